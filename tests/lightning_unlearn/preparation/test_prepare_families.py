"""Pictures and captions to shards through pipelines of each family: what their own encoders and VAEs make of them."""

from __future__ import annotations

import json
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from flow_pipelines import opened
from PIL import Image
from tiny_pipelines import (
    aura_flow,
    chroma,
    flux,
    flux_2,
    hunyuan_dit,
    pixart,
    stable_diffusion_3,
    stable_diffusion_xl,
)

from lightning_unlearn.datamodules.reading import read_samples
from lightning_unlearn.errors import InputError
from lightning_unlearn.preparation import prepare

PIPELINES = {
    module.__name__.rpartition(".")[2]: module
    for module in (aura_flow, chroma, flux, flux_2, hunyuan_dit, pixart, stable_diffusion_3, stable_diffusion_xl)
}
CAPTIONS = {"a": ["a cat"], "b": ["dog", "a dog on a mat"], "c": ["x"]}


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pictures")
    noise = np.random.default_rng(0)
    rows = []
    for name, (width, height) in {"a": (40, 24), "b": (16, 16), "c": (20, 50)}.items():
        Image.fromarray(noise.integers(0, 255, (height, width, 3), dtype=np.uint8)).save(folder / f"{name}.png")
        rows.append(json.dumps({"file_name": f"{name}.png", "captions": CAPTIONS[name]}))
    (folder / "metadata.jsonl").write_text("\n".join(rows))
    return folder


@pytest.mark.parametrize("name", PIPELINES)
def test_shards_hold_what_the_pipeline_s_own_parts_make(name: str, pictures: Path, tmp_path: Path) -> None:
    module: ModuleType = PIPELINES[name]
    folder = module.make(tmp_path / "pipeline")
    (shard,) = prepare(
        output=str(tmp_path / "shards"),
        images=str(pictures),
        pipeline=str(folder),
        size=16,
        dtype="float32",
        batch_size=2,
    )
    model = opened(folder)
    samples = {sample.key: sample for sample in read_samples(shard)}
    assert sorted(samples) == ["a", "b", "c"]
    for key, captions in CAPTIONS.items():
        sample = samples[key]
        assert sample.captions == captions
        wanted = model.encoded(captions)
        assert set(wanted) <= set(sample.conditions)
        for condition, array in wanted.items():
            torch.testing.assert_close(sample.conditions[condition], array, rtol=1e-5, atol=1e-5)
    pixels = torch.from_numpy(np.asarray(Image.open(pictures / "b.png"), np.float32)).permute(2, 0, 1)[None] / 127.5 - 1
    with torch.no_grad():
        latent, _ = model.family.encode_pictures(model.pipeline.vae, pixels)
    torch.testing.assert_close(samples["b"].latent, latent[0], rtol=1e-5, atol=1e-5)
    manifest = json.loads((tmp_path / "shards" / "manifest.json").read_bytes())
    assert manifest["text"]["family"] == manifest["latent"]["family"] == model.family.title


def test_sizes_are_those_of_the_picture_and_of_what_was_cut(pictures: Path, tmp_path: Path) -> None:
    folder = stable_diffusion_xl.make(tmp_path / "pipeline")
    (shard,) = prepare(output=str(tmp_path / "shards"), images=str(pictures), pipeline=str(folder), size=16)
    told = {sample.key: sample.metadata["conditions"] for sample in read_samples(shard)}
    # 40 × 24 becomes 27 × 16, 16 in the middle of which are kept; 20 × 50 becomes 16 × 40.
    assert told["a"] == {"original_size": [24, 40], "crop_top_left": [0, 5], "target_size": [16, 16]}
    assert told["b"] == {"original_size": [16, 16], "crop_top_left": [0, 0], "target_size": [16, 16]}
    assert told["c"] == {"original_size": [50, 20], "crop_top_left": [12, 0], "target_size": [16, 16]}


def test_captions_that_are_cut_are_counted(pictures: Path, tmp_path: Path) -> None:
    folder = stable_diffusion_xl.make(tmp_path / "pipeline")
    with pytest.warns(UserWarning, match=r"longer than the 12 tokens that text_encoder reads"):
        prepare(
            output=str(tmp_path / "s"), images=str(pictures), pipeline=str(folder), size=16, caption="abcdefghijklmnop"
        )


def test_what_a_pipeline_lacks_is_named(pictures: Path, tmp_path: Path) -> None:
    folder = stable_diffusion_xl.make(tmp_path / "pipeline")
    arguments = {"images": str(pictures), "pipeline": str(folder), "size": 16}
    (folder / "text_encoder_2" / "model.safetensors").rename(folder / "kept")
    with pytest.raises(InputError, match=r"text_encoder_2 has no \.safetensors"):
        prepare(output=str(tmp_path / "a"), **arguments)
    (folder / "kept").rename(folder / "text_encoder_2" / "model.safetensors")
    (folder / "model_index.json").rename(folder / "kept")
    with pytest.raises(InputError, match=r"no model_index\.json"):
        prepare(output=str(tmp_path / "b"), **arguments)
    (folder / "kept").rename(folder / "model_index.json")
    (folder / "unet" / "config.json").write_text('{"_class_name": "PriorTransformer", "num_layers": 1}')
    with pytest.raises(InputError, match="family"):
        prepare(output=str(tmp_path / "c"), **arguments)


def test_tokens_are_those_that_the_encoders_read(pictures: Path, tmp_path: Path) -> None:
    arguments = {"images": str(pictures), "size": 16, "caption": "abcdefghijklmnop"}
    folder = pixart.make(tmp_path / "pipeline")
    prepare(output=str(tmp_path / "usual"), pipeline=str(folder), **arguments)
    manifest = json.loads((tmp_path / "usual" / "manifest.json").read_bytes())
    assert manifest["text"]["tokens"] == {"text_encoder": 120}  # its tokenizer says 12, of which the pipeline knows
    with pytest.warns(UserWarning, match=r"3 captions are longer than the 9 tokens that text_encoder reads"):
        (shard,) = prepare(output=str(tmp_path / "few"), pipeline=str(folder), tokens=9, **arguments)
    for sample in read_samples(shard):
        assert sample.text.shape == (1, 9, pixart.TEXT)
        assert sample.conditions["text_mask"].shape == (1, 9)
    for module in (stable_diffusion_xl, hunyuan_dit):
        fixed = module.make(tmp_path / module.__name__)
        with pytest.raises(InputError, match=r"`tokens` is for .* read just as many as they were trained with"):
            prepare(output=str(tmp_path / "refused"), pipeline=str(fixed), tokens=9, **arguments)
