"""Questions to `serve` of a model that is a pipeline become what `prepare` makes of them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_pipelines import stable_diffusion_xl

from lightning_unlearn.command_line.serve_queries import Questions, query_maker
from lightning_unlearn.data.samples import Sample
from lightning_unlearn.datamodules.reading import read_samples
from lightning_unlearn.draws.views import Views
from lightning_unlearn.errors import InputError
from lightning_unlearn.preparation.prepare import prepare
from lightning_unlearn.unlearning.module import UnlearningModule

CPU = torch.device("cpu")


def test_a_pipelines_own_parts_answer_as_the_shards_were_prepared(tmp_path: Path) -> None:
    pipeline, pictures = stable_diffusion_xl.make(tmp_path / "sdxl"), tmp_path / "pictures"
    pictures.mkdir()
    pixels = np.random.default_rng(0).integers(0, 255, (24, 40, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(pictures / "one.png")
    (pictures / "one.txt").write_text("a cat")
    (shard,) = prepare(
        str(tmp_path / "shards"), images=str(pictures), pipeline=str(pipeline), size=16, device="cpu", resize="kohya"
    )
    (sample,) = read_samples(shard)
    module = UnlearningModule(str(pipeline), views=Views(timesteps=2))
    here = Path(shard.url).parent
    questions = Questions(str(pipeline), None, (), 2, None, [["a cat"]], lambda row: sample, here)
    maker = query_maker(module, questions, CPU)
    found = maker.from_picture("one", "a cat", (pictures / "one.png").read_bytes()).sample
    torch.testing.assert_close(found.latent, sample.latent, rtol=0, atol=0)
    for name, array in sample.conditions.items():
        torch.testing.assert_close(found.conditions[name], array, rtol=0, atol=0)
    made = maker.from_prompt("two", "a cat", 3).sample
    assert made.latent.shape == sample.latent.shape
    assert made.picture is not None
    assert (made.metadata["seed"], made.metadata["steps"]) == (3, 2)
    # The network that is asked is the one that generates.
    with torch.no_grad():
        for weight in module.network.parameters():
            weight.zero_()
    assert not torch.equal(maker.from_prompt("two", "a cat", 3).sample.latent, made.latent)


def test_shards_of_another_encoder_are_refused(tmp_path: Path) -> None:
    pipeline = stable_diffusion_xl.make(tmp_path / "sdxl")
    module = UnlearningModule(str(pipeline), views=Views(timesteps=2))
    sample = Sample("one", torch.zeros(4, 8, 8), {"text": torch.zeros(1, 12, 7)}, {"captions": ["a cat"]})
    questions = Questions(str(pipeline), None, (), None, None, [["a cat"]], lambda row: sample, tmp_path)
    with pytest.raises(InputError, match=r"but the training shards hold \(12, 7\)"):
        query_maker(module, questions, CPU)
