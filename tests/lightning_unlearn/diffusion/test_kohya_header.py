"""What kohya's header says of a training, and what follows from it."""

from __future__ import annotations

import hashlib
import json
import re
import string
import warnings
from pathlib import Path
from typing import Any

import adapter_forms as forms
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lightning_unlearn.diffusion.adapters import (
    TrainingFolder,
    TrainingRecord,
    objective_of_training,
    read_training_record,
    warn_of_other_loss,
)
from lightning_unlearn.diffusion.objective import DenoisingObjective
from lightning_unlearn.errors import InputError
from lightning_unlearn.unlearning.module import UnlearningModule

# As sd-scripts' train_network.py writes it for one folder of pictures.
PLAIN = {
    "ss_sd_model_name": "v1-5.safetensors",
    "ss_new_sd_model_hash": "a" * 64,
    "ss_network_dim": "16",
    "ss_network_alpha": "8.0",
    "ss_noise_offset": "None",
    "ss_min_snr_gamma": "None",
    "ss_zero_terminal_snr": "False",
    "ss_caption_dropout_rate": "0.0",
    "ss_clip_skip": "None",
    "ss_enable_bucket": "False",
    "ss_resolution": "(512, 512)",
    "ss_flip_aug": "False",
    "ss_loss_type": "l2",
    "ss_debiased_estimation": "False",
    "ss_dataset_dirs": json.dumps({"10_sks dog": {"n_repeats": 10, "img_count": 5}}),
    "ss_reg_dataset_dirs": "{}",
}


def record(**said: str) -> TrainingRecord:
    found = read_training_record("a.safetensors", PLAIN | said)
    assert found is not None
    return found


def test_plain_training_has_nothing_that_is_not_followed_but_its_base_model() -> None:
    found = record()
    assert found.unfollowed() == (
        "it was trained on v1-5.safetensors (sha256 aaaaaaaaaaaa…); see that the network is that one, it is not "
        "compared.",
    )
    assert found.preparation() == {"size": 512}
    assert found.folders == (TrainingFolder("10_sks dog", 10, 5),)
    assert found.weights() == {"10_sks dog": 10.0}


def test_header_of_another_program_is_no_record() -> None:
    assert read_training_record("a", {"format": "pt", "lora_adapter_metadata": "{}"}) is None


def test_objective_is_the_trainings_or_says_where_it_is_not(recwarn: pytest.WarningsRecorder) -> None:
    found = record(**{"ss_min_snr_gamma": "5.0", "modelspec.prediction_type": "epsilon"})
    objective = objective_of_training(None, found)
    assert objective.prediction_type == "epsilon"
    assert objective.snr_gamma == 5
    warn_of_other_loss(objective, found)
    assert not recwarn
    with pytest.warns(UserWarning, match=r"trained with snr_gamma = 5.0, but the objective has None"):
        warn_of_other_loss(DenoisingObjective(), found)
    with pytest.warns(UserWarning, match=r"snr_gamma = None, but the objective has 5"):
        warn_of_other_loss(DenoisingObjective(snr_gamma=5), record())
    other = record(**{"modelspec.prediction_type": "v"})
    with pytest.raises(InputError, match=r"trained with v_prediction, but .* says epsilon; give the objective"):
        objective_of_training(None, other)
    with pytest.warns(UserWarning, match="prediction_type = v_prediction, but the objective has epsilon"):
        warn_of_other_loss(DenoisingObjective(), other)


@pytest.mark.parametrize(
    ("said", "sentence"),
    [
        ({"ss_noise_offset": "0.05"}, "noise offset of 0.05"),
        ({"ss_zero_terminal_snr": "True"}, "rescale_betas_zero_snr: true"),
        ({"ss_enable_bucket": "True"}, "buckets of aspect ratios"),
        ({"ss_resolution": "(512, 768)"}, "buckets of aspect ratios"),
        ({"ss_caption_dropout_rate": "0.1"}, "10% of captions left out"),
        ({"ss_clip_skip": "2"}, "clip skip 2"),
        ({"ss_debiased_estimation": "True"}, "debiased_estimation = True, which is not followed"),
        ({"ss_loss_type": "huber"}, "loss_type = huber, which is not followed"),
        ({"ss_multires_noise_iterations": "6"}, "multires_noise_iterations = 6"),
        ({"ss_ip_noise_gamma": "0.1"}, "ip_noise_gamma = 0.1"),
        ({"ss_apply_t5_attn_mask": "True"}, "apply_t5_attn_mask = True, which is not followed"),
        ({"ss_reg_dataset_dirs": json.dumps({"1_dog": {"n_repeats": 1, "img_count": 9}})}, "regularisation pictures"),
        (
            {
                "ss_dataset_dirs": json.dumps(
                    {name: {"n_repeats": n, "img_count": 2} for name, n in (("a", 2), ("b", 5))}
                )
            },
            "repeated folders differently .a: 2, b: 5",
        ),
    ],
)
def test_what_is_not_followed_is_said(said: dict[str, str], sentence: str) -> None:
    sentences = record(**said).unfollowed()
    assert len(sentences) == 2
    assert any(re.search(sentence, one) for one in sentences)


def test_data_sets_of_a_config_file_are_read() -> None:
    subsets: list[dict[str, Any]] = [
        {"image_dir": "dog", "num_repeats": 3, "img_count": 7, "flip_aug": True, "is_reg": False},
        {"image_dir": "dogs", "num_repeats": 1, "img_count": 70, "is_reg": True},
    ]
    entry = {"resolution": [1024, 1024], "enable_bucket": True, "subsets": subsets}
    found = record(**{"ss_datasets": json.dumps([entry]), "ss_resolution": "None"})
    assert found.folders == (TrainingFolder("dog", 3, 7), TrainingFolder("dogs", 1, 70, True))
    assert found.resolution == (1024, 1024)
    assert found.buckets
    # Buckets keep the area of the square.
    assert found.preparation() == {"flips": True, "size": 1024}
    assert found.weights() == {"dog": 3.0}


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("ss_min_snr_gamma", "five"),
        ("ss_noise_offset", "nan"),
        ("ss_noise_offset", "-1"),
        ("ss_dataset_dirs", "{"),
        ("ss_dataset_dirs", "[]"),
        ("ss_dataset_dirs", '{"a": 3}'),
        ("ss_dataset_dirs", '{"a": {"n_repeats": "many"}}'),
        ("ss_datasets", '{"a": {}}'),
        ("ss_datasets", '[{"subsets": 5}]'),
        ("ss_datasets", '[{"resolution": 512}]'),
        ("ss_resolution", "large"),
    ],
)
def test_value_of_another_form_is_named(key: str, value: str) -> None:
    with pytest.raises(InputError, match=rf"a\.safetensors: {key} in its header is "):
        record(**{key: value})


@given(st.dictionaries(st.sampled_from([*PLAIN, "ss_datasets"]), st.text(string.printable, max_size=12)))
def test_any_header_is_read_or_refused_in_a_sentence(said: dict[str, str]) -> None:
    try:
        found = read_training_record("a.safetensors", PLAIN | said)
    except InputError:
        return
    assert found is None or all(isinstance(sentence, str) for sentence in found.unfollowed())


def bare(**said: str) -> TrainingRecord:
    found = read_training_record("a.safetensors", {"ss_sd_model_name": "a.safetensors", **said})
    assert found is not None
    return found


def base_file(folder: Path) -> Path:
    """A file as large as the web UI's hash wants it, whose parts differ."""
    path = folder / "base.safetensors"
    path.write_bytes(bytes(0x100000) + bytes(range(256)) * 0x101 + b"end")
    return path


def test_the_base_model_is_compared_where_both_are_known(tmp_path: Path) -> None:
    path = base_file(tmp_path)
    content = path.read_bytes()
    whole = hashlib.sha256(content).hexdigest()
    short = hashlib.sha256(content[0x100000:0x110000]).hexdigest()[:8]
    for same in ({"ss_new_sd_model_hash": whole}, {"ss_sd_model_hash": short}, {"ss_new_sd_model_hash": whole.upper()}):
        assert bare(**same).unfollowed(str(path)) == ()
    for other in ({"ss_new_sd_model_hash": "0" * 64, "ss_sd_model_hash": short}, {"ss_sd_model_hash": "0" * 8}):
        (sentence,) = bare(**other).unfollowed(str(path))
        assert sentence.startswith("it was trained on a.safetensors (hash 00000000")
        assert str(path) in sentence
        assert "another model" in sentence
    # A folder, a network that was given, or a name alone can't be compared.
    for base, known in (
        (str(tmp_path), {"ss_new_sd_model_hash": whole}),
        (None, {"ss_sd_model_hash": short}),
        (str(path), {}),
    ):
        (sentence,) = bare(**known).unfollowed(base)
        assert "it is not compared" in sentence


def test_a_module_compares_its_weights_file(tmp_path: Path) -> None:
    network = forms.stable_diffusion().float()
    adapter = forms.random_adapter(network, ["conv_in"])
    base = tmp_path / "base.pt"
    torch.save(network.state_dict(), base)
    for same in (True, False):
        digest = hashlib.sha256(base.read_bytes()).hexdigest() if same else "0" * 64
        header = {"ss_sd_model_name": "a.safetensors", "ss_new_sd_model_hash": digest}
        path = forms.save(tmp_path / "lora.safetensors", forms.kohya_state(adapter), header)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            UnlearningModule(forms.stable_diffusion(), weights=str(base), adapter=path, parameters="adapter")
        said = [str(warning.message) for warning in caught if "trained on" in str(warning.message)]
        assert len(said) == (0 if same else 1)
        assert all("another model" in sentence for sentence in said)
