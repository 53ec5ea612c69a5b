"""Who stays in a race, against an obvious version of the rule, and whether the promise is kept where it should be."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from lightning_unlearn.errors import InputError
from lightning_unlearn.scores.firmness import half_widths, student_quantile, upper_ends
from lightning_unlearn.scores.racing import Race, contenders, in_reach, leaders, thresholds

NUMBERS = st.floats(-4, 4).map(lambda value: round(value, 1))  # with ties
TABLES = st.integers(1, 25).flatmap(
    lambda samples: st.integers(1, 3).flatmap(
        lambda queries: st.tuples(*[arrays(np.float64, (samples, queries), elements=NUMBERS)] * 3)
    )
)
RACES = st.builds(Race, top=st.integers(1, 4), share=st.none() | st.sampled_from([0.1, 0.4, 0.8]))


def slow_leaders(scores: np.ndarray[Any, Any], count: int) -> set[int]:
    """The first so many rows of each query, the highest first."""
    found: set[int] = set()
    for column in scores.T.tolist():
        found |= set(sorted(range(len(column)), key=lambda row: -column[row])[:count])
    return found


@given(TABLES, RACES)
@settings(max_examples=60, deadline=None)
def test_rule_is_the_obvious_one(tables: Any, race: Race) -> None:
    scores, reach, whole = tables
    uppers = scores + abs(reach)
    leading = leaders(race, scores)
    assert set(np.flatnonzero(leading).tolist()) == slow_leaders(scores, 2 * race.top)

    least = thresholds(race, whole[leading])
    of_leaders = [sorted(column, reverse=True) for column in whole[leading].T.tolist()]
    assert least.tolist() == [c[race.top - 1] if len(c) >= race.top else -math.inf for c in of_leaders]

    chosen = set(np.flatnonzero(contenders(race, scores, uppers, leading, least)).tolist())
    queries = range(scores.shape[1])
    wanted = [
        row
        for row in range(len(scores))
        if not leading[row] and any(uppers[row, query] >= least[query] for query in queries)
    ]
    room = len(scores) if race.share is None else math.ceil(race.share * len(scores)) - int(leading.sum())
    if len(wanted) <= room:
        assert chosen == set(wanted)
    else:
        assert chosen <= set(wanted)
        assert len(chosen) == max(room, 0)


@given(TABLES, st.integers(1, 4))
@settings(max_examples=60, deadline=None)
def test_where_the_upper_ends_hold_all_of_the_best_are_finished(tables: Any, top: int) -> None:
    """Whatever the scores by the few views: it is the upper ends alone that the promise hangs on."""
    scores, reach, whole = tables
    race = Race(top=top)
    uppers = np.maximum(scores + abs(reach), whole)
    leading = leaders(race, scores)
    finished = leading | contenders(race, scores, uppers, leading, thresholds(race, whole[leading]))
    for query in range(whole.shape[1]):
        last = np.sort(whole[:, query])[::-1][min(top, len(whole)) - 1]
        assert finished[whole[:, query] > last].all()
        # Of those that tie for the last place, enough.
        assert (whole[finished, query] >= last).sum() >= min(top, len(whole))
    assert not in_reach(uppers[~finished], thresholds(race, whole[finished])).any()


def test_capped_race_finishes_whoever_is_nearest_in_units_of_its_own_reach() -> None:
    scores = np.array([[9.0], [8.0], [5.0], [4.0], [1.0], [0.0]])
    uppers = scores + np.array([[1.0], [1.0], [4.5], [40.0], [0.5], [9.0]])
    race = Race(top=1, share=0.5)
    leading = leaders(race, scores)
    chosen = contenders(race, scores, uppers, leading, np.array([8.0]))
    # 3 units of 4.5 away, 4 of 40, 8 of 9, and one that can't reach it: there is room for one.
    assert np.flatnonzero(leading).tolist() == [0, 1]
    assert np.flatnonzero(chosen).tolist() == [3]


@given(TABLES, RACES, st.integers(0, 1000))
@settings(max_examples=60, deadline=None)
def test_sample_whose_upper_end_is_not_known_contends_before_all_others(tables: Any, race: Race, seed: int) -> None:
    scores, reach, whole = tables
    uppers = scores + abs(reach)
    unknown = np.random.default_rng(seed).random(scores.shape) < 0.2
    uppers[unknown] = np.nan
    leading = leaders(race, scores)
    least = thresholds(race, whole[leading])
    assert in_reach(uppers, least)[unknown.any(1)].all()
    contend = contenders(race, scores, uppers, leading, least)
    left_out = unknown.any(1) & ~leading & ~contend
    if left_out.any():  # the cap, and then nobody else takes their room
        assert not contend[~unknown.any(1)].any()


def test_scores_beyond_float32_leave_an_upper_end_unknown() -> None:
    values = torch.tensor([[[1.0, 2.0, 1.0, 2.0]], [[1e39, -1e39, 1.0, 2.0]]], dtype=torch.float64).float()
    uppers = upper_ends(values, 1, "max", 0.01)[:, None].numpy()
    assert np.isnan(uppers).tolist() == [[False], [True]]
    assert in_reach(uppers, np.array([1e6])).tolist() == [False, True]


def test_race_with_too_few_views_to_judge_by_finishes_the_share_that_leads() -> None:
    scores = np.array([[1.0, 9.0], [2.0, 0.0], [3.0, 1.0], [4.0, 2.0], [0.0, 0.0]])
    race = Race(top=1, views=2, share=0.3)
    assert np.flatnonzero(leaders(race, scores)).tolist() == [0, 3]


@pytest.mark.parametrize("confidence", [0.5, 0.9])
@pytest.mark.parametrize("flips", ["max", "mean"])
def test_promise_is_kept_where_its_assumption_holds(confidence: float, flips: Any) -> None:
    """Many races of made-up samples, whose views scatter independently about their scores by all views."""
    generator = torch.Generator().manual_seed(0)
    race, kept, finished_share, races = Race(top=5, confidence=confidence), 0, 0.0, 150
    for _ in range(races):
        means = torch.randn(400, 2, 1, generator=generator, dtype=torch.float64)
        values = means + 0.4 * torch.randn(400, 2, 8, generator=generator, dtype=torch.float64)
        whole, few = (
            (sides.amax(1) if flips == "max" else sides.mean(1))[:, None].numpy()
            for sides in (means[..., 0], values.mean(-1))
        )
        uppers = upper_ends(values, 1, flips, race.tail)[:, None].numpy()
        leading = leaders(race, few)
        finished = leading | contenders(race, few, uppers, leading, thresholds(race, whole[leading]))
        kept += set(np.argsort(-whole[:, 0])[:5].tolist()) <= set(np.flatnonzero(finished).tolist())
        finished_share += float(finished.mean()) / races
    assert kept >= confidence * races
    assert finished_share < 0.5  # it is a race


def test_upper_end_is_the_95_percent_interval_s_own_where_the_tail_is() -> None:
    values = torch.randn(30, 1, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    expected = half_widths(values[None], 2, "mean")
    assert expected is not None
    torch.testing.assert_close(upper_ends(values, 2, "mean", 0.025), values.mean((1, 2)) + expected[:, 0])
    pair = torch.cat([values, values - 100], 1)
    torch.testing.assert_close(upper_ends(pair, 2, "max", 0.05), upper_ends(values, 2, "mean", 0.025))


@pytest.mark.parametrize("tail", [0.1, 1e-3, 1e-6])
def test_quantiles_of_small_tails_are_those_of_the_closed_forms(tail: float) -> None:
    found = student_quantile(torch.tensor([1.0, 2.0]), tail).tolist()
    exact = [1 / math.tan(math.pi * tail), (1 - 2 * tail) / math.sqrt(2 * tail * (1 - tail))]
    assert found == pytest.approx(exact, rel=1e-3)


@pytest.mark.parametrize(
    ("given_race", "part"),
    [
        ({"top": 0}, "at least one of top"),
        ({"views": 0}, "at least one of top"),
        ({"confidence": 1.0}, "below 1"),
        ({"share": 1.5}, "between 0 and 1"),
        ({"views": 3}, "too few to tell how a score scatters"),
    ],
)
def test_race_that_can_not_be_run_is_refused(given_race: dict[str, Any], part: str) -> None:
    with pytest.raises(InputError, match=part):
        Race(**given_race)
