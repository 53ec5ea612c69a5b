"""What is known of schedulers is what diffusers has; what is not known is refused, and the remedy named."""

from __future__ import annotations

import inspect
import json
from pathlib import Path
from typing import Any

import diffusers
import pytest
import safetensors.torch
import torch
from toys import DIM, LATENT, TOKENS, ToyDenoiser, tiny_unet

from lightning_unlearn.data.samples import ViewBatch
from lightning_unlearn.diffusion.loading import load_network
from lightning_unlearn.diffusion.noise_schedule import (
    FIXED_KEYS,
    SAMPLING_KEYS,
    SCHEDULERS,
    TRAINING_KEYS,
    load_scheduler,
)
from lightning_unlearn.diffusion.objective import DenoisingObjective
from lightning_unlearn.errors import InputError
from lightning_unlearn.unlearning.module import UnlearningModule


def defaults(name: str) -> dict[str, Any]:
    found = inspect.signature(getattr(diffusers, name).__init__).parameters
    return {key: parameter.default for key, parameter in found.items() if key not in ("self", "args", "kwargs")}


@pytest.mark.parametrize("name", SCHEDULERS)
def test_betas_and_keys_of_each_class_are_those_of_diffusers(name: str) -> None:
    known = defaults(name)
    if not known:
        pytest.skip(f"{name} needs a package that is not installed, so diffusers does not say")
    assert SCHEDULERS[name] == (known["beta_start"], known["beta_end"], known["beta_schedule"])
    # A new key of a new diffusers has to be looked at: it may change the loss.
    assert set(known) <= TRAINING_KEYS | SAMPLING_KEYS | FIXED_KEYS.keys()
    built = load_scheduler({"_class_name": name}, None)
    betas = (built.config.beta_start, built.config.beta_end, built.config.beta_schedule)
    assert betas == SCHEDULERS[name]
    # What is sampled again is clipped only where the class itself would.
    assert built.config.clip_sample == known.get("clip_sample", False)


@pytest.mark.parametrize(("key", "near"), [("beta_shedule", "beta_schedule"), ("num_timesteps", "num_train_timesteps")])
def test_the_nearest_key_is_suggested(key: str, near: str) -> None:
    with pytest.raises(InputError, match=rf"{key!r}.*\(is it {near}\?\)"):
        DenoisingObjective({key: "scaled_linear"})


def test_network_that_does_not_fit_is_refused_before_any_work() -> None:
    for change, what in (
        ({"out_channels": 2 * LATENT[0]}, "predicts a variance"),
        ({"class_embed_type": "projection", "projection_class_embeddings_input_dim": 4}, "class embeddings"),
        ({"time_cond_proj_dim": 8}, "guidance"),
    ):
        with pytest.raises(InputError, match=what):
            UnlearningModule(tiny_unet(**change), DenoisingObjective())


def test_a_loss_of_ones_own_takes_any_network() -> None:
    class Mine(DenoisingObjective):
        def __call__(self, network: Any, batch: Any, timesteps: Any, noise: Any) -> Any:
            return noise.flatten(1).mean(1)

    Mine().check_network(ToyDenoiser())
    with pytest.raises(InputError, match="ToyDenoiser"):
        DenoisingObjective().check_network(ToyDenoiser())


@pytest.mark.parametrize(
    ("latents", "text", "what"),
    [
        ((2, LATENT[0] + 1, 8, 8), (2, TOKENS, DIM), "takes 3 channels"),
        ((2, *LATENT), (2, TOKENS, DIM + 1), "takes \\(views, tokens, 6\\)"),
        ((2, *LATENT), (1, TOKENS, DIM), "for 2 latents"),
    ],
)
def test_conditions_of_another_form_are_named(latents: tuple[int, ...], text: tuple[int, ...], what: str) -> None:
    batch = ViewBatch(torch.zeros(latents), {"text": torch.zeros(text)})
    with pytest.raises(InputError, match=what):
        DenoisingObjective()(tiny_unet(), batch, torch.tensor([1, 2]), torch.zeros(latents))


def saved(folder: Path) -> Path:
    network: Any = tiny_unet()
    network.save_pretrained(folder)
    return folder / "diffusion_pytorch_model.safetensors"


def test_bin_files_are_never_read_and_the_conversion_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = saved(tmp_path)
    torch.save(safetensors.torch.load_file(path), path.with_suffix(".bin"))
    load_network(str(tmp_path))  # beside safetensors it is no harm
    path.unlink()

    def read(*_: Any, **__: Any) -> None:
        raise AssertionError("pickle was read")

    monkeypatch.setattr(torch, "load", read)
    with pytest.raises(InputError, match=r"model\.bin, which is pickle .*convert it with from_pretrained"):
        load_network(str(tmp_path))


def test_index_of_safetensors_that_names_a_bin_file_is_refused(tmp_path: Path) -> None:
    path = saved(tmp_path)
    state = safetensors.torch.load_file(path)
    torch.save(state, tmp_path / "part.bin")
    path.unlink()
    index = {"metadata": {"total_size": 1}, "weight_map": dict.fromkeys(state, "part.bin")}
    (tmp_path / f"{path.name}.index.json").write_text(json.dumps(index))
    with pytest.raises(InputError, match=r"part\.bin, which is pickle"):
        load_network(str(tmp_path))
