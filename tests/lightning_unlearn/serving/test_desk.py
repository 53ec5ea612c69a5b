"""The desk and what it shows, without a server and a model."""

from __future__ import annotations

import io
import re
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from lightning_unlearn.data.samples import Sample
from lightning_unlearn.data.shards import ShardInfo, encode_sample, write_shards
from lightning_unlearn.datamodules.reading import read_samples
from lightning_unlearn.errors import InputError
from lightning_unlearn.preparation.asked import Made
from lightning_unlearn.serving import fragments
from lightning_unlearn.serving.captions import Captions
from lightning_unlearn.serving.contract import Answer, GroupRow
from lightning_unlearn.serving.desk import ANSWERS_KEPT, Desk, Provenance
from lightning_unlearn.serving.files import as_picture
from lightning_unlearn.serving.pictures import Pictures, picture_of

EVIL = "<script>alert(1)</script>\" onload='alert(2)'"


class _Model:
    """Makes queries and answers them; notices if it is asked twice at once."""

    def __init__(self, scores: Sequence[float]) -> None:
        self.scores, self.busy, self.overlaps = np.asarray(scores, np.float64), False, 0

    def from_prompt(self, key: str, prompt: str, seed: int) -> Made:
        self.overlaps += self.busy
        self.busy = True
        return Made(Sample(key, torch.zeros(3, 4, 4), {}, {"captions": [prompt], "seed": seed}), ["a note"])

    def from_picture(self, key: str, prompt: str, picture: bytes) -> Made:
        return self.from_prompt(key, prompt, 0)

    def answer(self, query: Sample) -> Answer:
        time.sleep(0.01)
        self.busy = False
        seed = int(query.metadata["seed"])
        return Answer(np.roll(self.scores, seed), {"das": self.scores}, {"words": "not sure", "first_ten": 0.2})

    def groups(self, field: str, answer: Answer) -> Sequence[GroupRow]:
        return [GroupRow(EVIL, 1, 0.5, -np.inf, np.inf), GroupRow("b", 2, -0.25, -0.5, 0.0)]


def _png(colour: str) -> bytes:
    stream = io.BytesIO()
    Image.new("RGB", (8, 8), colour).save(stream, "png")
    return stream.getvalue()


@pytest.fixture
def shard(tmp_path: Path) -> ShardInfo:
    def fields(row: int, picture: bytes | None) -> dict[str, Any]:
        latent = np.full((3, 4, 4), row / 10, np.float32)
        told = {"captions": [f"caption {row}", EVIL], "artist": EVIL, "n": row}
        return encode_sample(f"key-{row}", latent, np.zeros((2, 2, 3), np.float32), told, picture=picture)

    # The last has no stored picture, but its latent is one.
    samples = [fields(0, _png("red")), fields(1, b"damaged"), fields(2, None)]
    return write_shards(samples, tmp_path / "shards")[0]


def _desk(shard: ShardInfo, scores: Sequence[float] = (0.5, 2.0, -1.0), **fetched: Any) -> Desk:
    def fetch(info: ShardInfo, keys: frozenset[str]) -> dict[str, Sample]:
        fetched.setdefault("keys", []).extend(sorted(keys))
        return {sample.key: sample for sample in read_samples(info, pictures=True, keys=keys)}

    model = _Model(scores)
    pictures = Pictures([f"key-{row}" for row in range(3)], [shard] * 3, fetch)
    captions = Captions([[f"caption {row}", EVIL] for row in range(3)])
    return Desk(model, model, captions, pictures, ["artist"], Provenance("Toy", "It means nothing.", "line", {}))


def test_pictures_are_read_out_of_the_middle_of_a_shard(shard: ShardInfo) -> None:
    keys: list[str] = []
    desk = _desk(shard, keys=keys)
    shown = desk.pictures.shown([2, 0, 1])
    wanted = {sample.key: sample for sample in read_samples(shard, pictures=True)}
    for one in shown:
        assert one.picture == picture_of(wanted[one.key])
        assert list(one.captions) == wanted[one.key].captions
        assert one.facts["artist"] == EVIL
    assert [one.picture is None for one in shown] == [False, False, True]
    assert keys == ["key-2"]  # the others were read alone, without their arrays
    assert desk.pictures.shown([2]) == shown[:1]
    assert keys == ["key-2"]


def test_pictures_that_are_gone_are_shown_as_absent(shard: ShardInfo) -> None:
    Path(shard.url).unlink()
    (shown,) = _desk(shard).pictures.shown([1])
    assert (shown.key, list(shown.captions), shown.picture) == ("key-1", [], None)
    assert "It is not found in its shard any more." in fragments.picture(1, shown, [], 3)


def test_questions_are_answered_one_at_a_time_and_kept_for_a_while(shard: ShardInfo) -> None:
    desk = _desk(shard)
    found: list[Any] = []
    threads = [threading.Thread(target=lambda n=n: found.append(desk.ask("a prompt", n))) for n in range(20)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len({asked.token for asked in found}) == 20
    assert desk.maker.overlaps == 0  # type: ignore[attr-defined]
    for asked in found:
        scores = np.roll([0.5, 2.0, -1.0], asked.query.metadata["seed"])
        np.testing.assert_array_equal(asked.answer.scores, scores)
        assert asked.order.tolist() == np.argsort(-scores).tolist()
    for asked in found[: ANSWERS_KEPT - 1]:
        assert desk.asked(asked.token) is asked
    first = found[0]
    desk.answerer.answer = lambda query: Answer(np.zeros(3))  # type: ignore[method-assign]
    for _ in range(ANSWERS_KEPT):
        desk.ask("another")
    assert desk.asked(first.token) is None
    assert desk.helped(0, [first.token]) == []


def test_a_training_picture_is_told_what_it_helped(shard: ShardInfo) -> None:
    desk = _desk(shard)
    one, other = desk.ask("one", 0), desk.ask("other", 1)
    helped = desk.helped(1, [one.token, "unknown", other.token])
    assert [(one.asked.prompt, one.rank, one.score) for one in helped] == [("one", 1, 2.0), ("other", 2, 0.5)]
    assert [one.asked.prompt for one in desk.helped(2, [one.token, other.token])] == ["other", "one"]
    # Somebody else's questions are nobody's business.
    assert [one.asked.prompt for one in desk.helped(1, [other.token])] == ["other"]


def test_scores_that_are_not_finite_are_refused(shard: ShardInfo) -> None:
    with pytest.raises(InputError, match="not finite"):
        _desk(shard, (1.0, np.nan, 0.0)).ask("a prompt")


def test_captions_are_found_by_all_their_words() -> None:
    captions = Captions([["A category"], ["Cat and dog", "two animals"], ["CAT"], ["dog"]])
    assert captions.search("cat", 9) == ([2, 1, 0], 3)  # whole words and short captions first
    assert captions.search("  dog   ANIMALS", 9) == ([1], 1)
    assert captions.search("cat", 1) == ([2], 3)
    assert captions.search("c.t", 9) == ([], 0)
    assert captions.search("  ", 9) == ([], 0)


def test_nothing_that_people_or_shards_say_becomes_markup(shard: ShardInfo) -> None:
    desk = _desk(shard)
    asked = desk.ask(EVIL)
    (shown,) = desk.pictures.shown([0])
    pages = [
        fragments.answer(desk, asked),
        fragments.groups(asked, "artist", desk.groups(asked, "artist")),
        fragments.found(EVIL, [0], [shown], 1),
        fragments.picture(0, shown, desk.helped(0, [asked.token]), 3),
        fragments.notice(EVIL),
    ]
    for page in pages:
        assert "<script" not in page
        assert "onload='" not in page
    # A single picture has no interval, and its bar goes from end to end.
    assert "left: 0.0%; right: 0.0%" in pages[1]
    assert not re.search(r"\b(nan|inf)\b", pages[1])


def test_the_picture_to_share_takes_any_text_and_pictures_that_are_none(shard: ShardInfo) -> None:
    desk = _desk(shard)
    asked = desk.ask("a prompt of many words, " * 40 + "x" * 400)
    with Image.open(io.BytesIO(as_picture(desk, asked))) as card:
        pixels = np.asarray(card.convert("RGB")).astype(int)
    assert card.width == 1600
    # The second of the sources is the red one; the margins stay white.
    assert (np.abs(pixels - (255, 0, 0)).max(-1) < 30).sum() > 20_000
    assert (pixels[:, -40:] == 255).all()
    assert (pixels[-20:] == 255).all()
