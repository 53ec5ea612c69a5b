"""Queries in memory are what `prepare` makes of the same pictures and prompts."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_pipelines import stable_diffusion_xl

from lightning_unlearn.data.samples import Sample
from lightning_unlearn.datamodules.reading import read_samples
from lightning_unlearn.diffusion.loading import load_network
from lightning_unlearn.diffusion.objective import DenoisingObjective
from lightning_unlearn.errors import InputError
from lightning_unlearn.preparation.asked import MOST_PIXELS, NetworkQueries, PipelineQueries, check_picture
from lightning_unlearn.preparation.asked_prompts import KnownPrompts
from lightning_unlearn.preparation.choices import Choices
from lightning_unlearn.preparation.encoding import Encoding
from lightning_unlearn.preparation.generating import PictureMaker
from lightning_unlearn.preparation.inputs import PixelLatents
from lightning_unlearn.preparation.other_conditions import NoText
from lightning_unlearn.preparation.prepare import prepare
from lightning_unlearn.preparation.sources import latent_source, text_source
from lightning_unlearn.preparation.tally import Tally
from lightning_unlearn.preparation.text_changes import TextChanges

CPU = torch.device("cpu")
SHORT = "a cat"
PROMPT = "a photo of a cat"  # longer than the 12 tokens that tiny encoders read


def _png(width: int, height: int) -> bytes:
    pixels = np.random.default_rng(0).integers(0, 255, (height, width, 3), dtype=np.uint8)
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, "png")
    return stream.getvalue()


def _encoding(pipeline: Path, choices: Choices) -> Encoding:
    latents = latent_source(None, None, str(pipeline), 16, False, "mean", 0, CPU, Tally())
    text = text_source(None, None, None, None, str(pipeline), CPU, 1, TextChanges())
    return Encoding(latents, text, choices, True, "float16", 64, needs_text=True)


@pytest.fixture(scope="module")
def sdxl(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return stable_diffusion_xl.make(tmp_path_factory.mktemp("asked") / "sdxl")


def test_a_picture_becomes_what_prepare_makes_of_it(sdxl: Path, tmp_path: Path) -> None:
    (tmp_path / "pictures").mkdir()
    (tmp_path / "pictures" / "query.png").write_bytes(_png(40, 24))
    (tmp_path / "pictures" / "query.txt").write_text(PROMPT)
    bucketed: dict[str, Any] = {"crop": "bucket", "bucket_step": 2, "bucket_shortest": 8, "bucket_longest": 32}
    (shard,) = prepare(
        str(tmp_path / "shards"),
        images=str(tmp_path / "pictures"),
        pipeline=str(sdxl),
        size=16,
        flips=True,
        device="cpu",
        picture_size=64,
        **bucketed,
    )
    (wanted,) = read_samples(shard, pictures=True)
    # Masks of the training's loss are nothing for a query.
    queries = PipelineQueries(_encoding(sdxl, Choices(masks="alpha", **bucketed)), None)
    found = queries.from_picture("query", PROMPT, _png(40, 24)).sample
    assert found.latent.shape == wanted.latent.shape != (4, 8, 8)
    torch.testing.assert_close(found.latent, wanted.latent, rtol=0, atol=0)
    assert found.latent_flip is not None
    assert wanted.latent_flip is not None
    torch.testing.assert_close(found.latent_flip, wanted.latent_flip, rtol=0, atol=0)
    assert found.conditions.keys() == wanted.conditions.keys() > {"text", "pooled"}
    for name, array in wanted.conditions.items():
        torch.testing.assert_close(found.conditions[name], array, rtol=0, atol=0)
    assert found.picture == wanted.picture
    assert found.captions == [PROMPT]
    with pytest.raises(InputError, match="Nothing here generates pictures"):
        queries.from_prompt("query", PROMPT, 0)


def test_a_prompt_becomes_the_picture_that_its_pipeline_makes(sdxl: Path) -> None:
    maker = PictureMaker(sdxl, load_network(str(sdxl / "unet")), None, (), 16, 2, None, CPU)
    queries = PipelineQueries(_encoding(sdxl, Choices()), lambda prompt, seed: (maker.make(prompt, seed), maker.facts))
    made = queries.from_prompt("query", SHORT, 7)
    stream = io.BytesIO()
    maker.make(SHORT, 7).save(stream, "png")
    wanted = queries.from_picture("query", SHORT, stream.getvalue()).sample
    torch.testing.assert_close(made.sample.latent, wanted.latent, rtol=0, atol=0)
    assert made.sample.metadata["seed"] == 7
    assert made.sample.metadata["steps"] == 2
    assert made.notes == []
    long = queries.from_picture("query", PROMPT, stream.getvalue())
    assert long.notes == ["The prompt is longer than what the model's text encoder reads; only its beginning was read."]


# ---------------------------------------------------------------------- without a pipeline


def _known(*captions: list[str]) -> KnownPrompts:
    def fetch(row: int) -> Sample:
        text = torch.arange(len(captions[row]) * 6).reshape(-1, 2, 3).float() + 100 * row
        return Sample(
            str(row), torch.zeros(3, 4, 4), {"text": text, "pooled": text[:1, 0]}, {"captions": captions[row]}
        )

    return KnownPrompts(captions, fetch)


def test_a_prompt_is_the_caption_that_says_the_same() -> None:
    known = _known(["A tiger"], ["snake", "Green snake."])
    conditions, notes = known.conditions("a photo of a  green snake")
    assert conditions["text"].tolist() == [[[106, 107, 108], [109, 110, 111]]]
    assert conditions["pooled"].tolist() == [[100, 101, 102]]
    assert notes == ["It is read as the training caption 'Green snake.'."]
    assert known.conditions("A tiger")[1] == []
    with pytest.raises(InputError, match=r"'a yellow snake' is none of them; try 'snake', 'A tiger', 'Green snake\."):
        known.conditions("a yellow snake")
    with pytest.raises(InputError, match="try 'A tiger', 'snake'"):
        known.conditions("xyz")


class _Network(torch.nn.Module):
    """Nobody asks it here."""


def _pixels(grey: bool = False) -> NetworkQueries:
    encoding = Encoding(PixelLatents(4, grey), NoText(), Choices(), False, "float16", 64, needs_text=False)
    return NetworkQueries(_Network(), DenoisingObjective(), (1 if grey else 3, 4, 4), _known(["cat"]), encoding, True)


def test_a_picture_is_brought_to_the_networks_pixels() -> None:
    stream = io.BytesIO()
    Image.new("RGB", (12, 8), (255, 0, 128)).save(stream, "png")
    found = _pixels().from_picture("query", "cat", stream.getvalue()).sample
    assert found.latent.shape == (3, 4, 4)
    np.testing.assert_allclose(found.latent[:, 1, 2].numpy(), [1, -1, 128 / 127.5 - 1], atol=1e-3)
    assert found.latent_flip is not None
    torch.testing.assert_close(found.latent_flip, found.latent.flip(-1), rtol=0, atol=0)
    assert found.picture is not None
    latents = NetworkQueries(_Network(), None, (4, 4, 4), _known(["cat"]), None, False)
    with pytest.raises(InputError, match="start serve with the --pipeline that has its VAE"):
        latents.from_picture("query", "cat", stream.getvalue())
    with pytest.raises(InputError, match="Nothing here generates pictures"):
        latents.from_prompt("query", "cat", 0)


def test_what_is_no_picture_gets_a_sentence() -> None:
    whole = _png(30, 30)
    check_picture(whole)
    for broken in (b"", b"\x89PNG\r\n\x1a\nno", whole[: len(whole) // 2], b"<svg/>", b"GIF89a"):
        with pytest.raises(
            InputError, match=r"^This file can't be read as a picture; give a whole one \(PNG, JPEG, WEBP\)\.$"
        ):
            check_picture(broken)
    # A few hundred bytes that claim more than a memory holds.
    stream, side = io.BytesIO(), int(MOST_PIXELS**0.5) + 8
    Image.new("1", (side, side)).save(stream, "png")
    with pytest.raises(InputError, match="67 million pixels, and no more than 67 are taken"):
        check_picture(stream.getvalue())
