"""From finished models and score tables to results, against slow float64 versions, and what is said of them."""

from __future__ import annotations

import json
import math
import tempfile
from collections.abc import Sequence
from pathlib import Path
from statistics import NormalDist
from typing import Any

import numpy as np
import pytest
from evaluation_toys import KEYS, QUERIES, finish
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from lightning_unlearn.data.files import json_with_digest
from lightning_unlearn.errors import InputError
from lightning_unlearn.evaluation import Run, Study
from lightning_unlearn.evaluation.floors import Floors
from lightning_unlearn.evaluation.judging import judge, kept_samples, scores_of
from lightning_unlearn.evaluation.plan import Design, Plan, plan
from lightning_unlearn.evaluation.results import INSIDE, Judged, Removal, Results, Value
from lightning_unlearn.scores.table import ScoreTable

Table = NDArray[np.float64]
K = 2
DESIGN = Design(subsets=6, subsets_twice=3, seeds=3, k=[K], removal_queries=2, random_repeats=3)


def table_of(scores: Table) -> ScoreTable:
    """A score table ``(12, 3)`` in memory."""
    return ScoreTable(KEYS, ["all"] * len(KEYS), QUERIES, scores, np.ones(len(KEYS)), {})


def slow_ranks(values: Sequence[float]) -> list[float]:
    return [
        sum(other < value for other in values) + (sum(other == value for other in values) + 1) / 2 for value in values
    ]


def slow_rank_correlation(first: Sequence[float], second: Sequence[float]) -> float:
    ranks = [np.array(slow_ranks(values)) for values in (first, second)]
    a, b = (rank - rank.mean() for rank in ranks)
    scale = math.sqrt(float(a @ a) * float(b @ b))
    return float(a @ b) / scale if scale > 0 else 0.0


def slow_foretold(scores: Table, runs: Sequence[Run]) -> Table:
    """``(M, Q)`` sums of the scores of the samples that each model kept."""
    kept = [[row for row, key in enumerate(KEYS) if key not in run.removed] for run in runs]
    return np.array([[math.fsum(column[rows]) for column in scores.T] for rows in kept])


def slow_lds(scores: Table, runs: Sequence[Run], losses: Table) -> float:
    """Mean over queries of the correlation, over models, of summed scores with minus the loss."""
    columns = zip(slow_foretold(scores, runs).T, losses.T, strict=True)
    values = [slow_rank_correlation(list(foretold), list(-loss)) for foretold, loss in columns]
    return math.fsum(values) / len(values)


def slow_normal_scores(scores: Table) -> Table:
    columns = [
        [NormalDist().inv_cdf(rank / (len(scores) + 1)) for rank in slow_ranks(list(column))] for column in scores.T
    ]
    return np.array(columns).T


class Invented:
    """A study of invented outcomes: each run's row of each measure is a function of its place and the generator."""

    def __init__(self, folder: Path, plan: Plan, rng: np.random.Generator, digits: int = 6) -> None:
        self.plan = plan
        self.study = Study(folder, {})
        self.rows: dict[tuple[Run, str], Table] = {}
        for run in plan.runs():
            self.put(run, **{measure: rng.normal(1, 0.2, 3).round(digits) for measure in ("loss", "ssim")})

    def put(self, run: Run, **measures: Table) -> None:
        for name, values in measures.items():
            self.rows[run, name] = np.asarray(values, dtype=float)
        rest = {name: row.tolist() for (whose, name), row in self.rows.items() if whose == run and name != "loss"}
        finish(self.study, run, self.rows[run, "loss"].tolist(), **rest)

    def of(self, runs: Sequence[Run], measure: str = "loss", queries: int = 3) -> Table:
        return np.array([self.rows[run, measure][:queries] for run in runs])


@settings(max_examples=8)
@given(st.integers(0, 2**32 - 1), st.booleans())
def test_results_are_those_of_the_slow_versions(seed: int, tied: bool) -> None:
    rng = np.random.default_rng(seed)
    # Halves are tied, and so are their sums, in whatever order they are added.
    drawn = [rng.normal(0, 1, (12, 3)) for _ in range(2)]
    tables = {
        name: table_of((2 * scores).round() / 2 if tied else scores)
        for name, scores in zip(("one", "two"), drawn, strict=True)
    }
    needed = plan(DESIGN, KEYS, QUERIES, tables)
    with tempfile.TemporaryDirectory() as folder:
        invented = Invented(Path(folder), needed, rng, 1 if tied else 6)
        results = judge(invented.study, needed, tables, QUERIES)
    references = {measure: invented.of(needed.seeds, measure, 2).mean(0) for measure in ("loss", "ssim")}
    for name, table in tables.items():
        judged = results.methods[name]
        assert judged.datamodelling is not None
        assert judged.datamodelling_by_rank is not None
        losses = invented.of(needed.subsets)
        assert judged.datamodelling.mean == pytest.approx(slow_lds(table.scores, needed.subsets, losses), abs=1e-9)
        by_rank = slow_normal_scores(table.scores)
        if np.diff(np.sort(slow_foretold(by_rank, needed.subsets), 0), axis=0).min() > 1e-9:  # no tie but for rounding
            expected = slow_lds(by_rank, needed.subsets, losses)
            assert judged.datamodelling_by_rank.mean == pytest.approx(expected, abs=1e-9)
        assert set(judged.removals) == {K}
        changes = judged.removals[K].changes
        assert set(changes) == {"loss", "ssim"}
        for measure, change in changes.items():
            own = [invented.rows[run, measure][query] for query, run in enumerate(needed.removals[name][K])]
            expected = math.fsum(own - references[measure]) / 2
            assert change.mean == pytest.approx(expected, abs=1e-9)
            assert change.low <= change.mean <= change.high
    for measure, reference in references.items():
        random = invented.of(needed.random[K], measure, 2) - reference
        assert results.random[K][measure].mean == pytest.approx(math.fsum(random.flatten()) / random.size, abs=1e-9)
        assert results.seeds[measure].mean == pytest.approx(0, abs=1e-9)
    first, second = invented.of(needed.subsets[:3]), invented.of(needed.second)
    alike = [slow_rank_correlation(list(first[:, query]), list(second[:, query])) for query in range(3)]
    assert results.ceiling is not None
    assert results.ceiling.mean == pytest.approx(math.sqrt(max(0.0, math.fsum(alike) / 3)), abs=1e-9)
    assert results.counts == {
        "samples": 12,
        "queries": 3,
        "subset models": 6,
        "pairs of subset models": 3,
        "seed models": 3,
        "removal queries": 2,
    }


def test_floors_are_those_of_the_slow_version(tmp_path: Path) -> None:
    rng = np.random.default_rng(3)
    needed = plan(DESIGN, KEYS, QUERIES, {"one": table_of(rng.normal(0, 1, (12, 3)))})
    invented = Invented(tmp_path, needed, rng)
    floors = Floors(invented.study, needed)
    for measure in ("loss", "ssim"):
        rows = invented.of(needed.seeds, measure, 2)
        seeds = [[rows[m, q] - (rows[:, q].sum() - rows[m, q]) / 2 for q in range(2)] for m in range(3)]
        np.testing.assert_allclose(floors.seed_changes(measure).numpy(), seeds, rtol=0, atol=1e-12)
        random = invented.of(needed.random[K], measure, 2) - rows.mean(0)
        np.testing.assert_allclose(floors.random_changes(K, measure).numpy(), random, rtol=0, atol=1e-12)
        removed = needed.removals["one"][K]
        own = [invented.rows[removed[q], measure][q] - rows[:, q].mean() for q in range(2)]
        np.testing.assert_allclose(floors.changes(removed, measure).numpy(), own, rtol=0, atol=1e-12)


def test_measures_that_a_query_lacks_are_left_out(tmp_path: Path) -> None:
    needed = plan(DESIGN, KEYS, QUERIES, {})
    invented = Invented(tmp_path, needed, np.random.default_rng(0))
    floors = Floors(invented.study, needed)
    assert floors.measured() == ["loss", "ssim"]
    run = needed.seeds[1]
    invented.put(run, ssim=np.array([0.5, np.nan, 0.5]))
    path = invented.study.path(run)
    content = json.loads(path.read_text())
    del content["outcomes"][QUERIES[1]]["ssim"]
    path.write_bytes(json_with_digest(content))
    assert floors.measured() == ["loss"]


# ---------------------------------------------------------------------------------- planted truths


def planted(folder: Path) -> tuple[Study, Plan, dict[str, ScoreTable]]:
    """Each query is made by two samples of its own; ``true`` knows which, ``wrong`` names others."""
    rng = np.random.default_rng(1)
    weights = rng.normal(0, 0.01, (12, 3))
    for query in range(3):
        weights[[2 * query, 2 * query + 1], query] = 1.0
    tables = {
        "true": table_of(weights),
        "wrong": table_of(np.roll(weights, 6, 0)),
        "random": table_of(rng.normal(size=(12, 3))),
    }
    design = Design(subsets=40, subsets_twice=10, seeds=5, k=[K], removal_queries=3, random_repeats=4)
    needed = plan(design, KEYS, QUERIES, tables)
    study = Study(folder, {})
    for run in needed.runs():
        kept = np.array([key not in run.removed for key in KEYS], dtype=float)
        loss = 5 - kept @ weights + rng.normal(0, 0.05, 3)
        finish(study, run, loss.tolist(), mse=loss.tolist(), ssim=(1 - loss / 10).tolist(), cosine=(-loss).tolist())
    return study, needed, tables


@pytest.fixture(scope="module")
def truth(tmp_path_factory: pytest.TempPathFactory) -> Results:
    study, needed, tables = planted(tmp_path_factory.mktemp("planted"))
    return judge(study, needed, tables, QUERIES)


def test_a_method_that_knows_the_truth_is_beyond_the_floors_and_one_that_does_not_is_inside(truth: Results) -> None:
    true, wrong = truth.methods["true"], truth.methods["wrong"]
    for score in (true.datamodelling, true.datamodelling_by_rank):
        assert score is not None
        assert score.low > 0
        assert score.mean > 0.6
    assert wrong.datamodelling is not None
    assert wrong.datamodelling.low <= 0
    assert truth.ceiling is not None
    assert truth.ceiling.mean > 0.9
    everything = {"loss", "mse", "ssim", "cosine"}
    assert true.removals[K].beyond_floor == dict.fromkeys(everything, True)
    assert wrong.removals[K].beyond_floor == dict.fromkeys(everything, False)
    # A loss rises and a similarity falls, by the two samples' weights.
    assert true.removals[K].changes["loss"].mean == pytest.approx(2, abs=0.15)
    assert true.removals[K].changes["ssim"].mean == pytest.approx(-0.2, abs=0.015)


def test_what_is_inside_the_floor_is_said_to_be(truth: Results) -> None:
    lines = truth.to_text().splitlines()
    said = {
        name: [line for line in lines if line.split()[0] == name] for name in ("true", "wrong", "random", "another")
    }
    assert [INSIDE in line for line in said["true"]] == [False, False]
    assert [INSIDE in line for line in said["wrong"]] == [True, True]
    assert all(line.endswith(INSIDE) for line in said["wrong"])
    assert str(truth.methods["true"].datamodelling) in said["true"][0]
    assert str(truth.methods["true"].removals[K].changes["mse"]) in said["true"][1]
    # The floors themselves stand below: of random removals, and of another seed.
    assert str(truth.random[K]["loss"]) in said["random"][-1]
    assert str(truth.seeds["loss"]) in said["another"][0]
    assert f"LDS that a perfect method would reach: {truth.ceiling}" in lines


def rewritten(study: Study, plan: Plan, runs: Sequence[Run], loss: float) -> Removal:
    """What is said of ``runs`` if all of them have this loss, and another measure that moved as wanted."""
    for run in runs:
        finish(study, run, [loss] * 3, mse=[2.0] * 3)
    removal = Floors(study, plan).removal(K, runs)
    assert removal.beyond_floor["mse"]
    return removal


@pytest.mark.parametrize("floor", ["random", "seeds"])
def test_a_change_must_lie_beyond_both_floors(floor: str, tmp_path: Path) -> None:
    scores = np.zeros((12, 3))
    scores[:K] = 1
    scores[:, 2] = np.arange(12)  # another run for the last query
    needed = plan(DESIGN, KEYS, QUERIES, {"one": table_of(scores)})
    study = Study(tmp_path, {})
    for number, run in enumerate(needed.runs()):
        finish(study, run, [1 + 1e-3 * (number % 2)] * 3, mse=[1 + 1e-3 * (number % 2)] * 3)
    removed = needed.removals["one"][K]
    assert rewritten(study, needed, removed, 2.0).beyond_floor["loss"]
    assert not rewritten(study, needed, removed, 0.5).beyond_floor["loss"]  # a loss that falls is none
    if floor == "random":  # any two samples do as much
        for run in needed.random[K]:
            finish(study, run, [2.0] * 3, mse=[1.0] * 3)
    else:  # another seed does more, now and then
        for number, run in enumerate(needed.seeds):
            finish(study, run, [[0.0, 0.0, 3.0][number]] * 3, mse=[1.0] * 3)
    assert not rewritten(study, needed, removed, 2.0).beyond_floor["loss"]


def test_of_one_query_nothing_is_beyond_the_floor_and_the_table_says_why(tmp_path: Path) -> None:
    design = Design(subsets=0, subsets_twice=0, seeds=2, k=[K], removal_queries=1, random_repeats=1)
    tables = {"one": table_of(np.arange(36.0).reshape(12, 3))}
    needed = plan(design, KEYS, QUERIES, tables)
    study = Study(tmp_path, {})
    for number, run in enumerate(needed.runs()):
        finish(study, run, [1 + 1e-3 * number] * 3, mse=[1 + 1e-3 * number] * 3)
    for run in needed.removals["one"][K]:
        finish(study, run, [9.0] * 3, mse=[9.0] * 3)
    results = judge(study, needed, tables, QUERIES)
    assert results.methods["one"].removals[K].beyond_floor == {"loss": False, "mse": False}
    (line,) = (line for line in results.to_text().splitlines() if line.startswith("one"))
    assert line.endswith("one query shows no scatter; give removal_queries 2 or more")
    assert INSIDE not in line  # nor is that known
    assert "removal_queries" in json.dumps(results.to_json()["methods"]["one"]["removals"])


def test_only_what_is_inside_is_named_where_the_rest_is_not() -> None:
    value, low = Value(1.0, 0.5, 1.5), Value(0.1, -0.5, 0.5)
    removal = Removal({"loss": value, "mse": value}, {"loss": True, "mse": False})
    results = Results(
        {"one": Judged(value, low, {K: removal})}, None, {K: {"loss": low, "mse": low}}, {"loss": low, "mse": low}, {}
    )
    first, second = (line for line in results.to_text().splitlines() if line.startswith("one"))
    assert first.endswith(f"{INSIDE}: LDS by rank")
    assert second.endswith(f"{INSIDE}: mse")
    again = json.loads(json.dumps(results.to_json()))
    assert again["methods"]["one"]["removals"]["2"]["beyond_floor"] == {"loss": True, "mse": False}
    assert again["methods"]["one"]["datamodelling"] == {"mean": 1.0, "low": 0.5, "high": 1.5}
    assert again["ceiling"] is None


# ---------------------------------------------------------------------------------- parts


def test_without_subset_models_there_is_no_datamodelling_score(tmp_path: Path) -> None:
    design = Design(subsets=0, subsets_twice=0, seeds=2, k=[K], removal_queries=1, random_repeats=1)
    tables = {"one": table_of(np.zeros((12, 3)))}
    needed = plan(design, KEYS, QUERIES, tables)
    results = judge(Invented(tmp_path, needed, np.random.default_rng(0)).study, needed, tables, QUERIES)
    assert results.ceiling is None
    assert results.methods["one"].datamodelling is results.methods["one"].datamodelling_by_rank is None
    assert "LDS" not in results.to_text()
    assert results.counts["subset models"] == 0


def test_datamodelling_may_be_judged_by_some_of_the_models_and_queries(tmp_path: Path) -> None:
    rng = np.random.default_rng(5)
    tables = {"one": table_of(rng.normal(size=(12, 3)))}
    needed = plan(DESIGN, KEYS, QUERIES, tables)
    invented = Invented(tmp_path, needed, rng)
    results = judge(invented.study, needed, tables, [QUERIES[2], QUERIES[0]], needed.subsets[3:])
    found = results.methods["one"].datamodelling
    assert found is not None
    losses = invented.of(needed.subsets[3:])[:, [2, 0]]
    expected = slow_lds(tables["one"].scores[:, [2, 0]], needed.subsets[3:], losses)
    assert found.mean == pytest.approx(expected, abs=1e-9)
    assert results.counts["subset models"] == 3


def test_scores_are_taken_by_name_whatever_their_order() -> None:
    scores = np.arange(36.0).reshape(12, 3)
    found = scores_of(table_of(scores), [KEYS[5], KEYS[1]], [QUERIES[2], QUERIES[0]])
    assert found.tolist() == [[17.0, 15.0], [5.0, 3.0]]
    wrong: Any
    for wrong in ((["nobody"], QUERIES), (KEYS, ["nobody"])):
        with pytest.raises(InputError, match=r"lacks 'nobody'; .*\.$"):
            scores_of(table_of(scores), *wrong)


def test_kept_samples_are_those_not_removed() -> None:
    runs = [Run(("b",)), Run(), Run(("a", "c"), 3)]
    expected = [[True, False, True], [True, True, True], [False, True, False]]
    assert kept_samples(["a", "b", "c"], runs).tolist() == expected
