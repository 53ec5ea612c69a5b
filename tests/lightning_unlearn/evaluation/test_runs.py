"""Which models are trained: runs, their names, and the plan of an evaluation."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from evaluation_toys import KEYS, QUERIES
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_unlearn.errors import InputError
from lightning_unlearn.evaluation.plan import Design, plan
from lightning_unlearn.evaluation.runs import (
    Run,
    leave_k_out_runs,
    random_removal_runs,
    removal_size,
    seed_runs,
    subset_runs,
    without,
)
from lightning_unlearn.scores.table import ScoreTable

some_keys = st.lists(st.text("ab", max_size=2), max_size=4)


def table_of(scores: Any) -> ScoreTable:
    """A score table ``(12, 3)`` in memory."""
    values = np.asarray(scores, dtype=np.float32)
    return ScoreTable(KEYS, ["all"] * len(KEYS), QUERIES, values, np.ones(len(KEYS), np.float32), {})


@given(some_keys, some_keys, st.integers(0, 3), st.integers(0, 3), st.randoms())
def test_the_same_set_with_the_same_seed_is_the_same_run(
    first: list[str], second: list[str], seed: int, other: int, rng: Any
) -> None:
    shuffled = first + first[:2]
    rng.shuffle(shuffled)
    assert without(shuffled, seed) == without(first, seed)
    assert without(shuffled, seed).name == without(first, seed).name
    same = set(first) == set(second) and seed == other
    assert (without(first, seed).name == without(second, other).name) == same


def test_names_stay_as_they_are_since_finished_models_are_found_by_them() -> None:
    assert Run().name == "32e4a8be0692cf4f310c4ae96c168b04"
    assert without(["b", "a"], 3).name == "257cf8e15a018425da9422e5ff4e13da"


@settings(max_examples=50)
@given(st.integers(2, 20), st.integers(1, 6), st.integers(0, 6), st.floats(0.05, 0.95), st.integers(0, 3), st.randoms())
def test_more_subset_models_keep_the_first_ones(
    samples: int, models: int, more: int, share: float, seed: int, rng: Any
) -> None:
    keys = [f"key-{number}" for number in range(samples)]
    kept = round(samples * share)
    if not 0 < kept < samples:
        with pytest.raises(InputError, match=r"can't be made; .*\.$"):
            subset_runs(keys, models, share, seed)
        return
    runs = subset_runs(keys, models, share, seed)
    assert [run.seed for run in runs] == list(range(1, models + 1))
    assert all(len(run.removed) == samples - kept and set(run.removed) < set(keys) for run in runs)
    rng.shuffle(keys)
    second = min(more, models)
    longer = subset_runs(keys, models + more, share, seed, second)
    assert longer[:models] == runs
    assert longer[models + more :] == [Run(run.removed, 1_000_000 + run.seed) for run in runs[:second]]


def test_subsets_differ_and_leave_each_sample_out_of_about_half() -> None:
    runs = subset_runs(KEYS, 200)
    assert len({run.removed for run in runs}) > 150
    for key in KEYS:
        assert 70 < sum(key in run.removed for run in runs) < 130
    assert not {run.removed for run in runs} <= {run.removed for run in subset_runs(KEYS, 200, seed=1)}


@pytest.mark.parametrize("wrong", [{"share": 0.0}, {"share": 1.0}, {"share": -0.5}, {"share": 0.01}, {"share": 0.99}])
def test_subsets_that_keep_nothing_or_all_are_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(InputError, match=r"can't be made; choose one that keeps some\.$"):
        subset_runs(KEYS, 2, **wrong)


@pytest.mark.parametrize("second", [-1, 3])
def test_more_second_trainings_than_subsets_are_refused(second: int) -> None:
    with pytest.raises(InputError, match=r"can't be trained twice; .*\.$"):
        subset_runs(KEYS, 2, second=second)


def test_models_on_all_samples_differ_in_their_seeds_only() -> None:
    assert seed_runs(3) == [Run((), 1), Run((), 2), Run((), 3)]  # not 0, of which all removals are


@given(st.integers(1, 11), st.integers(1, 5), st.integers(0, 3), st.randoms())
def test_random_removals_are_k_samples_and_more_keep_the_first_ones(k: int, repeats: int, seed: int, rng: Any) -> None:
    runs = random_removal_runs(KEYS, k, repeats, seed)
    assert all(run.seed == 0 and len(run.removed) == k and set(run.removed) < set(KEYS) for run in runs)
    shuffled = list(KEYS)
    rng.shuffle(shuffled)
    assert random_removal_runs(shuffled, k, repeats + 2, seed)[:repeats] == runs


def test_random_removals_differ() -> None:
    runs = [run for k in (3, 4) for seed in (0, 1) for run in random_removal_runs(KEYS, k, 5, seed)]
    assert len(set(runs)) > 15


def test_queries_that_name_the_same_samples_share_a_run() -> None:
    runs = leave_k_out_runs([["b", "a", "c"], ["a", "b", "d"], ["c", "a", "b"]], 2)
    assert runs == [Run(("a", "b")), Run(("a", "b")), Run(("a", "c"))]


def test_fewer_named_samples_than_k_are_refused() -> None:
    with pytest.raises(InputError, match=r"Fewer than 3 .*\.$"):
        leave_k_out_runs([["a", "b", "c"], ["a", "b"]], 3)


@pytest.mark.parametrize(
    ("k", "samples", "size"), [(1, 2, 1), (5, 200, 5), (0.03, 200, 6), (0.5, 3, 2), (0.001, 200, 1), (7.0, 9, 7)]
)
def test_k_is_a_number_or_a_share(k: float, samples: int, size: int) -> None:
    assert removal_size(k, samples) == size


@pytest.mark.parametrize("k", [0, -1, -0.1, 12, 13, 2.5, 0.99, float("nan"), float("inf")])
def test_k_of_nothing_all_or_parts_of_samples_is_refused(k: float) -> None:
    with pytest.raises(InputError, match=r"can't be removed; .*\.$"):
        removal_size(k, 12)


@pytest.mark.parametrize(
    "wrong",
    [{"seeds": 1}, {"removal_queries": 0}, {"random_repeats": -1}, {"subsets": 1}, {"subsets_twice": 1}],
)
def test_a_design_with_too_few_of_a_kind_is_refused(wrong: dict[str, int]) -> None:
    with pytest.raises(InputError, match=rf"The design's {next(iter(wrong))} are .*\.$"):
        Design(**wrong)


def test_plan_removes_what_the_tables_name_for_the_first_queries() -> None:
    scores = np.zeros((12, 3))
    scores[[7, 3], 0] = 2, 1
    scores[[3, 7, 5], 1] = 3, 2, 1
    design = Design(subsets=3, subsets_twice=2, seeds=2, k=[2, 0.17, 3], removal_queries=2, random_repeats=2)
    found = plan(design, list(reversed(KEYS)), QUERIES, {"one": table_of(scores), "other": table_of(-scores)})
    assert list(found.keys) == KEYS
    assert list(found.removal_queries) == QUERIES[:2]
    assert list(found.removals["one"][2]) == [without([KEYS[3], KEYS[7]])] * 2
    assert list(found.removals["one"][3]) == [
        without([KEYS[7], KEYS[3], KEYS[0]]),  # a tie is broken by the key
        without([KEYS[3], KEYS[7], KEYS[5]]),
    ]
    assert {size: len(runs) for size, runs in found.random.items()} == {2: 2, 3: 2}  # 0.17 of 12 is 2 again
    assert [run.removed for run in found.second] == [run.removed for run in found.subsets[:2]]
    assert len(found.subsets) == 3


def test_plan_names_each_model_once_and_those_of_all_methods_first() -> None:
    scores = np.arange(36).reshape(12, 3)
    design = Design(subsets=3, subsets_twice=2, seeds=2, k=[2], removal_queries=2, random_repeats=2)
    found = plan(design, KEYS, QUERIES, {"one": table_of(scores), "same": table_of(scores)})
    runs = found.runs()
    assert len(set(runs)) == len(runs) == 2 + 3 + 2 + 2 + 1
    assert runs[:7] == [*found.seeds, *found.subsets, *found.second]
    assert set(runs) == {*runs[:7], *found.random[2], *found.removals["one"][2], *found.removals["same"][2]}


def test_plan_without_subsets_has_none() -> None:
    found = plan(Design(subsets=0, subsets_twice=0), KEYS, QUERIES, {})
    assert list(found.subsets) == list(found.second) == []
    assert len(found.runs()) == 5 + 5
