"""How sure an answer is, against numbers by hand."""

from __future__ import annotations

import pytest
import torch

from lightning_unlearn.data.batches import collate_samples
from lightning_unlearn.data.samples import Sample
from lightning_unlearn.errors import InputError
from lightning_unlearn.scores.agreement import (
    AGREE,
    CAPTION,
    PIXEL,
    UNSURE,
    agreements,
    caption_digests,
    caption_shares,
)


def noise(samples: int, seed: int, queries: int = 1) -> torch.Tensor:
    return torch.randn(samples, queries, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_numbers_by_hand() -> None:
    one = torch.arange(20.0)[:, None]
    other = one.clone()
    other[:3, 0] = torch.tensor([30.0, 31.0, 32.0])  # three of its first five are the last three of the other
    (found,) = agreements({"one": one, "other": other}, one, [str(row) for row in range(20)])
    assert found.first_ten == pytest.approx(0.4)  # of 20 images, the first quarter
    assert found.caption_share is None
    ranks = torch.tensor([17.0, 18.0, 19.0, *range(17)])
    by_hand = float(torch.corrcoef(torch.stack([one[:, 0], ranks]))[0, 1])
    assert found.rank_correlation == pytest.approx(by_hand, rel=1e-6)
    assert found.correlation == pytest.approx(
        float(torch.corrcoef(torch.stack([one[:, 0], other[:, 0]]))[0, 1]), rel=1e-6
    )


def test_words() -> None:
    captions = [f"caption {row // 4}" for row in range(40)]
    same = noise(40, 0)
    words = {}
    for name, parts in {
        AGREE: {"one": same, "other": same + 0.1 * noise(40, 1)},
        UNSURE: {"one": same, "other": noise(40, 2), "third": noise(40, 3)},
    }.items():
        (found,) = agreements(parts, sum(parts.values(), torch.zeros(40, 1)), captions)
        words[name] = found.words
        assert found.record()["words"] == name
    by_caption = noise(10, 4).repeat_interleave(4, 0)
    (found,) = agreements({"one": by_caption, "other": by_caption}, by_caption, captions)
    assert found.caption_share == pytest.approx(1.0)
    assert [*words.values(), found.words] == [AGREE, UNSURE, CAPTION]


def test_an_answer_that_says_no_more_than_captions_or_pixels() -> None:
    parts = {"one": noise(40, 0, 2), "other": noise(40, 1, 2)}
    scores = parts["one"] + parts["other"]
    alike = {"captions": scores + 0.1 * noise(40, 2, 2), "pixels": -scores}
    alike["captions"][:, 1], alike["pixels"][:, 1] = -scores[:, 1], 3 * scores[:, 1] - 7
    found = agreements(parts, scores, list(range(40)), alike)
    assert [one.words for one in found] == [CAPTION, PIXEL]
    both = torch.stack([scores[:, 0], alike["captions"][:, 0]])
    assert found[0].alike["captions"] == pytest.approx(float(torch.corrcoef(both)[0, 1]))
    assert found[1].record()["alike"]["pixels"] == pytest.approx(1.0)
    assert [one.words for one in agreements(parts, scores, list(range(40)), {"pixels": noise(40, 3, 2)})] == [
        UNSURE
    ] * 2


def test_halves_of_the_views_have_first_ones_in_common() -> None:
    parts = {"one": noise(40, 0), "other": noise(40, 1)}
    first = torch.arange(40.0)[:, None]
    second = first.clone()
    second[:4] += 100  # of its first ten six are the other's
    (found,) = agreements(parts, parts["one"], list(range(40)), halves=torch.stack([first, second]))
    assert found.halves == pytest.approx(0.6)
    (without,) = agreements(parts, parts["one"], list(range(40)))
    assert without.halves is None
    assert "halves" not in without.record()


def test_scores_that_know_nothing_of_captions_have_no_share() -> None:
    """The mean over many queries is 0 but for chance, however many captions there are; clipping makes it no lower."""
    scores = noise(60, 5, queries=400)
    for each in (2, 3, 10):
        found = caption_shares(scores, [row // each for row in range(60)])
        assert found is not None
        assert float(found.median()) < 0.1
    assert caption_shares(scores, ["same"] * 60) is None
    flat = caption_shares(torch.ones(60, 1), [row // 2 for row in range(60)])
    assert flat is not None
    assert flat.item() == 0


def test_a_part_without_any_difference_agrees_with_nobody() -> None:
    one = noise(12, 6)
    (found,) = agreements({"one": one, "flat": torch.ones(12, 1)}, one, list(range(12)))
    assert (found.first_ten, found.correlation, found.rank_correlation) == (0.0, 0.0, 0.0)
    assert found.words == UNSURE


def test_one_method_can_not_agree() -> None:
    with pytest.raises(InputError, match="ask two or more"):
        agreements({"one": noise(3, 0)}, noise(3, 0), ["a", "b", "c"])


def test_a_caption_is_the_same_whatever_its_pictures_sizes_and_its_batch() -> None:
    def sample(key: str, caption: int, size: int, tokens: int) -> Sample:
        states = torch.full((1, 2, 3), float(caption))
        padded = torch.nn.functional.pad(states, (0, 0, 0, tokens - 2))
        mask = (torch.arange(tokens) < 2).float()[None]
        conditions = {"text": padded, "text_mask": mask, "original_size": torch.tensor([[size, size]])}
        return Sample(key, torch.zeros(1, 2, 2), conditions, {"captions": [""]})

    first = caption_digests(collate_samples("shard", [sample("a", 1, 64, 4), sample("b", 1, 32, 4)]))
    other = caption_digests(collate_samples("shard", [sample("c", 1, 16, 2), sample("d", 2, 64, 5)]))
    assert len({*first, other[0]}) == 1
    assert other[1] != other[0]
    # Classes have no captions of their own.
    classes = [
        Sample(str(row), torch.zeros(1, 2, 2), {"class_label": torch.tensor([[row]])}, {"captions": [""]})
        for row in (0, 0, 1)
    ]
    one, same, another = caption_digests(collate_samples("shard", classes))
    assert one == same != another
