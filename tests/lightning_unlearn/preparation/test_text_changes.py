"""Text states of fine-tuned models: an adapter's part of the text encoder, learned tokens, a tuned text encoder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import adapter_forms as forms
import numpy as np
import pytest
import torch
from PIL import Image
from prepare_toys import TEXT_DIM, manifest, read, tiny_text_encoder, tiny_tokenizer
from tiny_pipelines import stable_diffusion_xl
from torch import Tensor, nn
from toys import tiny_unet

from lightning_unlearn.errors import InputError
from lightning_unlearn.preparation.prepare import prepare

CAPTION = "a photo of <new1> dog"


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from diffusers import AutoencoderKL, DDPMScheduler, StableDiffusionPipeline

    folder = tmp_path_factory.mktemp("models") / "base"
    with torch.random.fork_rng():
        torch.manual_seed(0)
        StableDiffusionPipeline(
            vae=AutoencoderKL(block_out_channels=(8,), norm_num_groups=4, sample_size=8),
            text_encoder=tiny_text_encoder(),
            tokenizer=tiny_tokenizer(),
            unet=tiny_unet(TEXT_DIM, in_channels=4, out_channels=4),  # type: ignore[arg-type]
            scheduler=DDPMScheduler(),
            safety_checker=None,
            feature_extractor=None,  # type: ignore[arg-type]
            requires_safety_checker=False,
        ).save_pretrained(folder)
    return folder


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    folder = tmp_path / "photos"
    folder.mkdir()
    Image.fromarray(np.zeros((16, 16, 3), np.uint8)).save(folder / "dog.png")
    (folder / "dog.txt").write_text(CAPTION)
    return folder


def opened(folder: Path) -> Any:
    from diffusers import StableDiffusionPipeline

    return StableDiffusionPipeline.from_pretrained(folder, local_files_only=True)


@torch.no_grad()
def conditioned_on(pipe: Any) -> Tensor:
    """What diffusers' own pipeline gives its network for the caption."""
    found: Tensor = pipe.encode_prompt(CAPTION, "cpu", 1, False)[0]
    return found


def adapter_file(pipe: Any, path: Path, header: dict[str, str] | None = None) -> str:
    encoder = pipe.text_encoder
    inside = "text_model." if "text_model" in dict(encoder.named_children()) else ""
    names = [f"{inside}encoder.layers.{i}.{n}" for i in range(2) for n in ("self_attn.q_proj", "mlp.fc1")]
    # With alpha as large as the rank, as diffusers takes it where a file does not say.
    text = forms.random_adapter(encoder, names, alpha=3.0)
    network = forms.random_adapter(pipe.unet, ["mid_block.attentions.0.proj_in"], alpha=3.0)
    state = forms.dotted_state(text, "text_encoder.", alpha=False)
    return forms.save(path, state | forms.dotted_state(network, "unet.", alpha=False), header)


def prepared(tmp_path: Path, photos: Path, pipeline: Path, **settings: Any) -> Tensor:
    out = tmp_path / "out"
    prepare(str(out), str(photos), str(pipeline), dtype="float32", overwrite=True, **settings)
    return read(out)["dog"].text


def test_text_states_are_those_of_the_pipeline_with_its_adapter(photos: Path, pipeline: Path, tmp_path: Path) -> None:
    pipe = opened(pipeline)
    path = adapter_file(pipe, tmp_path / "lora.safetensors")
    before = conditioned_on(pipe)
    pipe.load_lora_weights(path)  # diffusers' own
    wanted = conditioned_on(pipe)
    assert (wanted - before).abs().max() > 0.01
    torch.testing.assert_close(prepared(tmp_path, photos, pipeline, adapter=path), wanted, atol=1e-5, rtol=1e-5)
    assert manifest(tmp_path / "out")["text"]["adapter_layers"] == {"text_encoder": 4}
    with_adapter = manifest(tmp_path / "out")["text"]["fingerprint"]
    torch.testing.assert_close(prepared(tmp_path, photos, pipeline), before, atol=1e-6, rtol=1e-5)
    assert manifest(tmp_path / "out")["text"]["fingerprint"] != with_adapter


def test_an_adapter_without_text_weights_says_so(photos: Path, pipeline: Path, tmp_path: Path) -> None:
    network = forms.random_adapter(opened(pipeline).unet, ["mid_block.attentions.0.proj_in"])
    path = forms.save(tmp_path / "lora.safetensors", forms.kohya_state(network))
    with pytest.warns(UserWarning, match="holds nothing for text encoders"):
        found = prepared(tmp_path, photos, pipeline, adapter=path)
    torch.testing.assert_close(found, conditioned_on(opened(pipeline)), atol=1e-6, rtol=1e-5)


def test_what_the_header_says_of_pictures_is_followed(
    photos: Path, pipeline: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    header = {"ss_resolution": "(16, 16)", "ss_flip_aug": "True"}
    path = adapter_file(opened(pipeline), tmp_path / "lora.safetensors", header)
    prepared(tmp_path, photos, pipeline, adapter=path)
    assert "size 16, flips" in capsys.readouterr().err
    sample = read(tmp_path / "out")["dog"]
    assert sample.latent.shape == (4, 16, 16)
    assert sample.latent_flip is not None
    prepared(tmp_path, photos, pipeline, adapter=path, size=8)
    assert read(tmp_path / "out")["dog"].latent.shape == (4, 8, 8)


@pytest.mark.parametrize("vectors", [1, 3])
def test_text_states_of_a_learned_token_are_the_pipelines(
    photos: Path, pipeline: Path, tmp_path: Path, vectors: int
) -> None:
    table = torch.arange(float(vectors * TEXT_DIM)).reshape(vectors, TEXT_DIM) / 20
    torch.save({"<new1>": table if vectors > 1 else table[0]}, tmp_path / "<new1>.bin")
    pipe = opened(pipeline)
    before = conditioned_on(pipe)
    pipe.load_textual_inversion({"<new1>": table if vectors > 1 else table[0]}, token="<new1>")
    wanted = conditioned_on(pipe)
    assert (wanted - before).abs().max() > 0.01
    found = prepared(tmp_path, photos, pipeline, token=str(tmp_path / "<new1>.bin"))
    torch.testing.assert_close(found, wanted, atol=1e-6, rtol=1e-5)
    assert manifest(tmp_path / "out")["text"]["learned_tokens"] == ["<new1>"]


def test_a_tuned_encoder_takes_the_place_of_the_pipelines(photos: Path, pipeline: Path, tmp_path: Path) -> None:
    # As a DreamBooth training with --train_text_encoder saves it: without a tokenizer.
    pipe = opened(pipeline)
    encoder: nn.Module = pipe.text_encoder
    with torch.no_grad():
        for parameter in encoder.parameters():
            parameter.add_(0.1)
    pipe.text_encoder.save_pretrained(tmp_path / "checkpoint-5" / "text_encoder")
    found = prepared(tmp_path, photos, pipeline, text_encoder=str(tmp_path / "checkpoint-5" / "text_encoder"))
    torch.testing.assert_close(found, conditioned_on(pipe), atol=1e-6, rtol=1e-5)
    assert manifest(tmp_path / "out")["text"]["encoder"] == "checkpoint-5/text_encoder"


def test_a_pipeline_in_half_precision_alone_is_encoded_with(photos: Path, pipeline: Path, tmp_path: Path) -> None:
    pipe = opened(pipeline).to(torch.float16)
    pipe.save_pretrained(tmp_path / "half", variant="fp16")
    assert not list((tmp_path / "half").rglob("*model.safetensors"))
    found = prepared(tmp_path, photos, tmp_path / "half")
    torch.testing.assert_close(found, conditioned_on(opened(pipeline)), atol=5e-3, rtol=5e-3)


def test_ready_text_states_can_not_be_changed(photos: Path, pipeline: Path, tmp_path: Path) -> None:
    np.save(tmp_path / "text.npy", np.zeros((1, 77, TEXT_DIM), np.float32))
    with pytest.raises(InputError, match="`text` is ready"):
        prepared(tmp_path, photos, pipeline, text=str(tmp_path / "text.npy"), token="a.bin")


# --- a family with two encoders


@pytest.fixture(scope="module")
def two_encoders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return stable_diffusion_xl.make(tmp_path_factory.mktemp("models") / "xl")


def opened_xl(folder: Path) -> Any:
    from diffusers import StableDiffusionXLPipeline

    return StableDiffusionXLPipeline.from_pretrained(folder, local_files_only=True)


@torch.no_grad()
def conditions_of_xl(pipe: Any) -> dict[str, Tensor]:
    text, _, pooled, _ = pipe.encode_prompt(CAPTION, device="cpu", do_classifier_free_guidance=False)
    return {"text": text, "pooled": pooled}


def assert_prepared_xl(tmp_path: Path, photos: Path, folder: Path, wanted: dict[str, Tensor], **settings: Any) -> None:
    prepare(str(tmp_path / "out"), str(photos), str(folder), dtype="float32", overwrite=True, size=16, **settings)
    sample = read(tmp_path / "out")["dog"]
    for name, value in wanted.items():
        torch.testing.assert_close(sample.conditions[name], value, atol=1e-5, rtol=1e-5)


def test_both_encoders_of_a_family_take_their_part_of_an_adapter(
    photos: Path, two_encoders: Path, tmp_path: Path
) -> None:
    pipe = opened_xl(two_encoders)
    before = conditions_of_xl(pipe)
    state: dict[str, Tensor] = {}
    for part in ("text_encoder", "text_encoder_2"):
        encoder = getattr(pipe, part)
        names = [name for name in forms.covered(encoder) if name.endswith(("q_proj", "fc1"))]
        state |= forms.dotted_state(forms.random_adapter(encoder, names, alpha=3.0), f"{part}.", alpha=False)
    path = forms.save(tmp_path / "lora.safetensors", state)
    pipe.load_lora_weights(path)
    wanted = conditions_of_xl(pipe)
    assert all((wanted[name] - before[name]).abs().max() > 0.01 for name in before)
    assert_prepared_xl(tmp_path, photos, two_encoders, wanted, adapter=path)
    assert set(manifest(tmp_path / "out")["text"]["adapter_layers"]) == {"text_encoder", "text_encoder_2"}


def test_both_encoders_of_a_family_learn_a_word(photos: Path, two_encoders: Path, tmp_path: Path) -> None:
    pipe = opened_xl(two_encoders)
    vectors = {"clip_l": torch.linspace(-1, 1, 16).reshape(2, 8), "clip_g": torch.linspace(-1, 1, 24).reshape(2, 12)}
    path = forms.save(tmp_path / "<new1>.safetensors", vectors)
    for key, end in (("clip_l", ""), ("clip_g", "_2")):
        parts = {"text_encoder": getattr(pipe, f"text_encoder{end}"), "tokenizer": getattr(pipe, f"tokenizer{end}")}
        pipe.load_textual_inversion({"<new1>": vectors[key]}, token="<new1>", **parts)
    assert_prepared_xl(tmp_path, photos, two_encoders, conditions_of_xl(pipe), token=path)


def test_a_tuned_second_encoder_is_known_by_its_folders_name(photos: Path, two_encoders: Path, tmp_path: Path) -> None:
    pipe = opened_xl(two_encoders)
    with torch.no_grad():
        for parameter in pipe.text_encoder_2.parameters():
            parameter.add_(0.05)
    folder = tmp_path / "checkpoint-5" / "text_encoder_2"
    pipe.text_encoder_2.save_pretrained(folder)
    assert_prepared_xl(tmp_path, photos, two_encoders, conditions_of_xl(pipe), text_encoder=str(folder))
    assert manifest(tmp_path / "out")["text"]["tuned"] == "checkpoint-5/text_encoder_2"
