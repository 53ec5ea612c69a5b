"""Pictures to shards for networks that are given a class, the state of a picture, or nothing."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_pipelines import dit, kandinsky_2
from tiny_pipelines.parts import seeded

from lightning_unlearn.data.samples import Sample
from lightning_unlearn.datamodules.reading import read_samples
from lightning_unlearn.diffusion.families import family_of
from lightning_unlearn.errors import InputError
from lightning_unlearn.preparation import prepare

CLASSES = {"a": 3, "b": 0, "c": 1000}


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    folder = tmp_path / "pictures"
    folder.mkdir()
    noise = np.random.default_rng(0)
    for name in CLASSES:
        Image.fromarray(noise.integers(0, 255, (16, 16, 3), dtype=np.uint8)).save(folder / f"{name}.png")
    return folder


def write_table(folder: Path, column: str, values: dict[str, Any], **others: Any) -> None:
    rows = [{"file_name": f"{name}.png", column: value, **others} for name, value in values.items()]
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))


def prepared(output: Path, **settings: Any) -> dict[str, Sample]:
    settings = {name: str(value) if isinstance(value, Path) else value for name, value in settings.items()}
    (shard,) = prepare(output=str(output), dtype="float32", **settings)
    return {sample.key: sample for sample in read_samples(shard)}


@pytest.mark.parametrize("others", [{}, {"captions": ["a thing"]}])
def test_classes_of_a_column_go_to_the_network(pictures: Path, tmp_path: Path, others: dict[str, Any]) -> None:
    write_table(pictures, "kind", CLASSES, **others)
    pipeline = dit.make(tmp_path / "dit")
    samples = prepared(tmp_path / "out", images=pictures, pipeline=pipeline, class_labels="kind")
    for name, number in CLASSES.items():
        assert samples[name].conditions["class_label"].tolist() == [[number]]
        assert set(samples[name].conditions) == {"class_label"}
        assert samples[name].captions == others.get("captions", [""])
        assert samples[name].latent.shape == (4, 8, 8)


def test_classes_in_a_table_of_texts(pictures: Path, tmp_path: Path) -> None:
    rows = "".join(f"{name}.png,{number}\n" for name, number in CLASSES.items())
    (pictures / "metadata.csv").write_text("file_name,kind\n" + rows)
    samples = prepared(tmp_path / "out", images=pictures, size=8, class_labels="kind")
    assert {name: sample.metadata["conditions"] for name, sample in samples.items()} == {
        name: {"class_label": [number]} for name, number in CLASSES.items()
    }


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({"a": 3, "b": "cat", "c": 1}, "b.png.* class in 'kind' is 'cat', which is no whole number"),
        ({"a": 3, "b": -1, "c": 1}, "'-1', which is no whole number from 0 on"),
        ({"a": 3, "b": 0.5, "c": 1}, "'0.5', which is no whole number"),
        ({"a": 3, "b": True, "c": 1}, "'True', which is no whole number"),
        ({"a": 3, "b": None, "c": 1}, "has no 'kind' for its class"),
    ],
)
def test_a_class_that_is_none_is_named_before_any_work(
    pictures: Path, tmp_path: Path, values: dict[str, Any], says: str
) -> None:
    write_table(pictures, "kind", values)
    with pytest.raises(InputError, match=says):
        prepared(tmp_path / "out", images=pictures, size=8, class_labels="kind")
    with pytest.warns(UserWarning, match="1 of 3 samples were left out"):
        kept = prepared(tmp_path / "out", images=pictures, size=8, class_labels="kind", on_bad_sample="skip")
    assert sorted(kept) == ["a", "c"]


def test_classes_that_the_network_takes_must_be_named(pictures: Path, tmp_path: Path) -> None:
    pipeline = dit.make(tmp_path / "dit")
    with pytest.raises(InputError, match="takes classes; name their column with `class_labels`"):
        prepared(tmp_path / "out", images=pictures, pipeline=pipeline)


def test_an_unconditional_pipeline_in_pixels_needs_pictures_alone(pictures: Path, tmp_path: Path) -> None:
    from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel

    blocks = {"down_block_types": ("DownBlock2D",) * 2, "up_block_types": ("UpBlock2D",) * 2}
    settings = {"sample_size": 16, "block_out_channels": (4, 4), "norm_num_groups": 2, "layers_per_block": 1, **blocks}
    network = seeded(lambda: UNet2DModel(**settings))
    DDPMPipeline(network, DDPMScheduler()).save_pretrained(tmp_path / "ddpm")
    for captions in (None, "a thing"):
        out = tmp_path / f"out-{captions}"
        samples = prepared(out, images=pictures, pipeline=tmp_path / "ddpm", caption=captions)
        for name in CLASSES:
            picture = np.asarray(Image.open(pictures / f"{name}.png"), np.float32).transpose(2, 0, 1)
            torch.testing.assert_close(samples[name].latent, torch.from_numpy(picture / 127.5 - 1))
            assert samples[name].conditions == {}
            assert samples[name].captions == [captions or ""]


def test_states_of_pictures_are_given_ready(pictures: Path, tmp_path: Path) -> None:
    from diffusers import VQModel

    pipeline = kandinsky_2.make(tmp_path / "kandinsky")
    with pytest.raises(InputError, match="give them ready as `image_states`"):
        prepared(tmp_path / "out", images=pictures, pipeline=pipeline)
    states = np.random.default_rng(1).standard_normal((3, kandinsky_2.STATE)).astype(np.float32)
    np.save(tmp_path / "states.npy", states)
    samples = prepared(
        tmp_path / "out", images=pictures, pipeline=pipeline, image_states=tmp_path / "states.npy", caption="a thing"
    )
    movq = VQModel.from_pretrained(pipeline / "movq", local_files_only=True).eval()
    for row, name in enumerate("abc"):
        assert samples[name].conditions["image"].tolist() == states[row : row + 1].tolist()
        pixels = torch.from_numpy(np.asarray(Image.open(pictures / f"{name}.png"), np.float32)).permute(2, 0, 1)
        with torch.no_grad():
            latent = movq.encode(pixels[None] / 127.5 - 1).latents[0]
        torch.testing.assert_close(samples[name].latent, latent, rtol=1e-5, atol=1e-5)
    family = family_of(kandinsky_2.network())
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_bytes())
    assert manifest["latent"]["family"] == family.title
    assert "factor" not in manifest["latent"]  # its codes are not scaled
