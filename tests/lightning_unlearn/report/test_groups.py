"""Groups' shares of the ranked evidence, held against a slow version that is written out image by image."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_unlearn.errors import InputError
from lightning_unlearn.report.groups import (
    NOT_SAID,
    Membership,
    counted,
    draw,
    evidence,
    pool_of,
    redrawn,
    shares,
)


def _membership(groups: Sequence[object], field: str = "artist") -> Membership:
    keys = [f"image-{row:04d}" for row in range(len(groups))]
    membership = Membership(field, keys)
    for key, group in zip(keys, groups, strict=True):
        membership.add(key, {"captions": ["one"]} | ({} if group is None else {field: group}))
    return membership


def _slow_shares(order: Sequence[int], counts: Sequence[int], groups: Sequence[str], first: int) -> dict[str, float]:
    """Each image as often as it was drawn, one after the other, until as many as count have come."""
    standing = [row for row, count in zip(order, counts, strict=True) for _ in range(count)][:first]
    weights = [1 / math.log2(1 + rank) for rank in range(1, len(standing) + 1)]
    found: dict[str, float] = {}
    for row, weight in zip(standing, weights, strict=True):
        found[groups[row]] = found.get(groups[row], 0.0) + weight / math.fsum(weights)
    return found


@settings(max_examples=40, deadline=None)
@given(counts=st.lists(st.integers(0, 4), min_size=1, max_size=40), first=st.integers(1, 12), seed=st.integers(0, 99))
def test_evidence_is_that_of_the_slow_version(counts: list[int], first: int, seed: int) -> None:
    generator = np.random.default_rng(seed)
    order = generator.permutation(len(counts)).tolist()
    groups = [str(generator.integers(3)) for _ in counts]
    fast = evidence(np.array([counts]), first)[0]
    slow = _slow_shares(order, counts, groups, first)
    for name in set(groups):
        found = sum(weight for row, weight in zip(order, fast, strict=True) if groups[row] == name)
        assert found == pytest.approx(slow.get(name, 0.0), abs=1e-12)


@pytest.mark.parametrize("known", [False, True])
def test_shares_and_intervals_are_those_of_the_slow_version(known: bool) -> None:
    generator = np.random.default_rng(0)
    samples, first = 120, counted(120)
    groups = [f"artist {generator.integers(4)}" for _ in range(samples)]
    scores = generator.standard_normal(samples) + np.array([name == "artist 2" for name in groups])
    errors = generator.uniform(0.2, 0.8, samples) if known else None
    order = np.argsort(-scores, kind="stable")
    listed = shares(_membership(groups), order[: pool_of(samples, known)], scores, errors, draw(samples, known))
    slow = _slow_shares(order.tolist(), [1] * samples, groups, first)
    assert {one.group: one.share for one in listed} == pytest.approx(slow)
    assert [one.share for one in listed] == pytest.approx(sorted(slow.values(), reverse=True))
    assert sum(one.images for one in listed) == first == 30
    for one in listed:
        assert one.of_training == groups.count(one.group) / samples
    drawn = []
    for _ in range(1500):
        rows = generator.integers(samples, size=samples)  # a training set drawn again
        moved = scores[rows] + (0 if errors is None else generator.standard_normal(samples) * errors[rows] / 1.96)
        ranked = rows[np.argsort(-moved, kind="stable")].tolist()
        drawn.append(_slow_shares(ranked, [1] * samples, groups, first))
    for one in listed:
        low, high = np.quantile([found.get(one.group, 0.0) for found in drawn], (0.025, 0.975))
        assert (one.low, one.high) == pytest.approx((low, high), abs=0.04)


def test_a_group_of_the_first_half_has_more_evidence_than_the_other_and_every_share_adds_up() -> None:
    scores = np.arange(40.0)[::-1]
    listed = shares(_membership(["a"] * 5 + ["b"] * 35), np.arange(40), scores, None, draw(len(scores), False))
    assert [one.group for one in listed] == ["a", "b"]
    assert sum(one.share for one in listed) == pytest.approx(1)
    assert listed[0].share > 0.5
    assert listed[0].low < listed[0].share < listed[0].high


def test_only_ranks_count_and_not_how_large_scores_are() -> None:
    scores = np.linspace(3, 1, 60)
    membership = _membership([str(row % 3) for row in range(60)])
    once = shares(membership, np.arange(60), scores, None, draw(len(scores), False))
    assert shares(membership, np.arange(60), np.exp(5 * scores), None, draw(60, False)) == once


def test_the_pool_holds_whatever_can_get_among_the_first() -> None:
    samples = 5000
    counts = redrawn(np.random.default_rng(0), pool_of(samples, False), samples, 300)
    assert counts.shape == (300, 400)
    assert counts.mean() == pytest.approx(1, abs=0.02)
    assert (counts.sum(1) >= counted(samples)).all()
    few = redrawn(np.random.default_rng(0), 7, 7, 50)
    assert (few.sum(1) == 7).all()


def test_lists_put_an_image_into_each_group_and_a_missing_field_is_said() -> None:
    membership = _membership([["Klee", "Marc"], "Klee", None, [], 7, "", {"name": "x"}])
    assert [membership.of(row) for row in range(7)] == [
        ("Klee", "Marc"),
        ("Klee",),
        (NOT_SAID,),
        (NOT_SAID,),
        ("7",),
        (NOT_SAID,),
        (NOT_SAID,),
    ]
    assert membership.share_of_training("Klee") == pytest.approx(2 / 7)
    membership.check()


def test_the_domain_is_that_of_the_address_where_nothing_else_says_it() -> None:
    membership = Membership("domain", ["a", "b", "c"])
    membership.add("a", {"captions": [""], "url": "https://images.example.org/one.jpg?x=1"})
    membership.add("b", {"captions": [""], "url": "https://x.example/", "domain": "said.example"})
    membership.add("c", {"captions": [""], "url": "http://[broken"})
    membership.add("not in the table", {"captions": [""], "domain": "other"})
    assert [membership.of(row)[0] for row in range(3)] == ["images.example.org", "said.example", NOT_SAID]


def test_a_field_that_no_image_has_is_refused_with_those_that_they_have() -> None:
    membership = Membership("artst", ["a"])
    membership.add("a", {"captions": [""], "artist": "Klee", "licence": "CC0"})
    with pytest.raises(
        InputError, match=r"'artst' in its json.*fields that they have: artist, licence\); name another"
    ):
        membership.check()


def test_after_a_race_those_that_it_finished_stay_first_in_every_draw() -> None:
    scores = np.arange(40.0)[::-1].copy()
    finished = np.arange(40) >= 30  # which score lowest
    order = np.concatenate([np.arange(30, 40), np.arange(30)])
    membership = _membership(["b"] * 30 + ["a"] * 10)
    listed = shares(membership, order, scores, np.full(40, 0.1), draw(40, True), finished, 10)
    assert (listed[0].group, listed[0].share) == ("a", 1.0)
    assert listed[0].low > 0.6
