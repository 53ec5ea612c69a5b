"""What can be said of every method on a bench now, by the models that are trained.

A method's setting is chosen on one half of the queries and on subset models of its own, and reported on the others.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from benches import Bench
from method_settings import CONSENSUS_DEFAULT, CONSENSUS_FIXED, DEFAULT_OF, DEFAULT_SETTINGS, METHODS
from packed import open_study
from score_files import is_scored, read, read_costs
from together import by_default
from torch import Tensor

from lightning_unlearn.evaluation.floors import Floors
from lightning_unlearn.evaluation.judging import ceiling, datamodelling, kept_samples, scores_of
from lightning_unlearn.evaluation.plan import Plan
from lightning_unlearn.evaluation.results import Removal, Value, value_of
from lightning_unlearn.evaluation.runs import Run
from lightning_unlearn.evaluation.study import Study
from lightning_unlearn.metrics import (
    Comparison,
    linear_datamodelling_comparison,
    linear_datamodelling_interval,
    linear_datamodelling_score,
    subset_predictions,
)
from lightning_unlearn.scores.table import ScoreTable

OURS = CONSENSUS_FIXED
# What papers report of two methods, the better one first: Zheng et al. (arXiv 2311.00500), Park et al. (arXiv
# 2303.14186), Lin et al. (ICLR 2025); the last two by leave-K-out, Wang et al. (arXiv 2406.09408 and 2511.10721).
REPORTED = (
    ("d_trak", "trak"),
    ("d_trak", "journey_trak"),
    ("d_trak", "gradient_similarity"),
    ("trak", "gradient_similarity"),
    ("trak", "influence"),
    ("das", "d_trak"),
    ("unlearning", "gradient_ascent"),
    ("unlearning_ekfac", "unlearning"),
)


@dataclass(frozen=True)
class Row:
    """A method on a bench.

    Attributes:
        method: Its name.
        setting: The one that was chosen.
        settings: All that were tried.
        raw: Its linear datamodelling score.
        by_rank: The same with only the order of scores.
        behind: Our default's score less this one's.
        costs: What it took.
        removals: Number of removed samples to what their removal changed, or to what is missing.
        removals_behind: The same to the change of a query's loss by our default's removals less that by these.
    """

    method: str
    setting: str
    settings: list[str]
    raw: Value
    by_rank: Value
    behind: Value | None
    costs: Mapping[str, float] | None
    removals: Mapping[int, Removal | str]
    removals_behind: Mapping[int, Value]


@dataclass(frozen=True)
class Page:
    """A bench's part of the page."""

    bench: Bench
    rows: list[Row]
    ceiling: Value | None
    random: Mapping[int, Mapping[str, Value]]
    seeds: Mapping[str, Value]
    reported: list[tuple[str, str, Value]]
    facts: Mapping[str, Any]


@dataclass(frozen=True)
class Half:
    """One half of the evidence: queries, and the models that they are judged by.

    Attributes:
        order: The queries that are columns of scores.
        queries: Those of this half.
        kept: ``(M, N)``, which model was trained on which sample.
        outcomes: ``(M, queries)`` losses.
    """

    order: list[str]
    queries: list[str]
    kept: Tensor
    outcomes: Tensor

    def predictions(self, scores: Tensor) -> Tensor:
        """What scores ``(N, all queries)`` foretell of each model, ``(M, queries)``."""
        return subset_predictions(self._of(scores), self.kept)

    def mean(self, scores: Tensor) -> float:
        """The linear datamodelling score, mean over queries."""
        return float(linear_datamodelling_score(self._of(scores), self.kept, self.outcomes).mean())

    def mean_of(self, scores: Tensor, query: str) -> float:
        """The linear datamodelling score of one query."""
        column, place = self.order.index(query), self.queries.index(query)
        outcomes = self.outcomes[:, [place]]
        return float(linear_datamodelling_score(scores[:, [column]], self.kept, outcomes).mean())

    def value(self, scores: Tensor) -> Value:
        """The same with its interval."""
        return Value(self.mean(scores), *linear_datamodelling_interval(self.predictions(scores), self.outcomes))

    def compared(self, first: Tensor, second: Tensor, times: float = 1.0) -> Comparison:
        """The first scores' less the second's, so many times."""
        predictions = [self.predictions(scores) for scores in (first, second)]
        return linear_datamodelling_comparison(*predictions, self.outcomes, times=times)

    def _of(self, scores: Tensor) -> Tensor:
        return scores[:, [self.order.index(query) for query in self.queries]]


def evidence(bench: Bench) -> tuple[Half, Half]:
    """The half that chooses settings, and the half that reports."""
    study, plan = open_study(bench), bench.plan()
    (report_queries, choose_queries), (report_runs, choose_runs) = bench.queries, bench.subsets(plan)
    order = [query.key for query in bench.samples("queries")]
    return (
        half_of(study, plan, order, choose_queries, choose_runs),
        half_of(study, plan, order, report_queries, report_runs),
    )


def half_of(study: Study, plan: Plan, order: list[str], queries: list[str], runs: Sequence[Run]) -> Half:
    """Some queries, and the models that judge them: those that are trained by now."""
    runs = [run for run in runs if study.is_finished(run)]
    return Half(order, queries, kept_samples(plan.keys, runs), torch.from_numpy(study.losses(runs, queries)))


def chosen_tables(
    bench: Bench, study: Study, plan: Plan, selection: str | None = None
) -> dict[str, tuple[str, dict[str, ScoreTable]]]:
    """Each method that has scores: its setting and the tables of all, or of those with a selection of weights.

    The setting is that with the highest linear datamodelling score on the half of the evidence that chooses.
    """
    queries, runs = bench.queries[1], bench.subsets(plan)[1]
    choosing = half_of(study, plan, queries, queries, runs)
    found = {}
    for method in METHODS:
        if is_scored(bench, method):
            tables = read(bench, method, selection)
            values = {
                setting: choosing.mean(scores_of(table, plan.keys, choosing.order)) for setting, table in tables.items()
            }
            found[method] = (max(values, key=values.__getitem__), tables)
    for method, setting in DEFAULT_SETTINGS.items():
        if DEFAULT_OF in found and setting in found[DEFAULT_OF][1]:
            found[method] = (setting, {setting: found[DEFAULT_OF][1][setting]})
    table = by_default(bench)
    if table is not None and selection in (None, "all"):
        found[CONSENSUS_FIXED] = (CONSENSUS_DEFAULT, {CONSENSUS_DEFAULT: table})
    return found


def chosen_settings(bench: Bench, selection: str) -> dict[str, str]:
    """Each method that has scores, with its setting among those with a selection of weights."""
    found = chosen_tables(bench, open_study(bench), bench.plan(), selection)
    return {method: setting for method, (setting, _) in found.items()}


def removal_runs(bench: Bench, methods: Sequence[str] | None = None) -> list[Run]:
    """Models without what methods name, by default those of the bench's settings; the first method's first."""
    chosen = chosen_tables(bench, open_study(bench), bench.plan())
    tables = {method: tables[setting] for method, (setting, tables) in chosen.items()}
    return removals_of(bench, bench.plan(tables), methods)


def removals_of(bench: Bench, plan: Plan, methods: Sequence[str] | None = None) -> list[Run]:
    """A plan's removals, each once, in the order of the methods."""
    ordered = [method for method in methods or bench.settings["removal_methods"] if method in plan.removals]
    return list(dict.fromkeys(run for method in ordered for runs in plan.removals[method].values() for run in runs))


def judge(bench: Bench) -> Page:
    """Everything that can be said of a bench now."""
    study, plain = open_study(bench), bench.plan()
    report_queries, reporting = bench.queries[0], bench.subsets(plain)[0]
    report_runs = [run for run in reporting if study.is_finished(run)]
    chosen = chosen_tables(bench, study, plain)
    tables = {method: tables[setting] for method, (setting, tables) in chosen.items()}
    plan = bench.plan(tables)
    asked = list(dict.fromkeys([*plain.runs(), *removals_of(bench, plan)]))
    half = half_of(study, plan, report_queries, report_queries, report_runs)

    def compared(first: str, second: str) -> Value:
        """The first method's score less the second's, on the same queries and models."""
        scores = [scores_of(tables[method], plan.keys, report_queries) for method in (first, second)]
        interval = half.compared(*scores)
        return Value(half.mean(scores[0]) - half.mean(scores[1]), interval.low, interval.high)

    floors = Floors(study, plan)
    ours = {
        size: floors.changes(removed, "loss")
        for size, removed in plan.removals.get(OURS, {}).items()
        if not study.missing([*removed, *plan.seeds])
    }
    rows = []
    for method, (setting, settings) in chosen.items():
        raw, by_rank = datamodelling(study, plan, tables[method], report_queries, report_runs)
        behind = compared(OURS, method) if method != OURS and OURS in tables else None
        removals: dict[int, Removal | str] = {}
        removals_behind: dict[int, Value] = {}
        for size, removed in plan.removals[method].items():
            missing = len(study.missing([*removed, *plan.random[size], *plan.seeds]))
            listed = method in bench.settings["removal_methods"]
            waiting = f"{missing} model{'s' * (missing > 1)} missing" if listed else "–"
            removals[size] = waiting if missing else floors.removal(size, removed)
            if not missing and size in ours and method != OURS:
                removals_behind[size] = value_of(ours[size] - floors.changes(removed, "loss"))
        costs = read_costs(bench, DEFAULT_OF if method in DEFAULT_SETTINGS else method, setting)
        rows.append(Row(method, setting, list(settings), raw, by_rank, behind, costs, removals, removals_behind))
    rows.sort(key=lambda row: -row.raw.mean)
    # The first subsets are those that are trained twice.
    pairs_done = bool(plan.second) and not study.missing([*plan.subsets[: len(plan.second)], *plan.second])
    seeds_done = not study.missing(plan.seeds)
    measured = floors.measured() if seeds_done else []
    return Page(
        bench=bench,
        rows=rows,
        ceiling=ceiling(study, plan, report_queries) if pairs_done else None,
        random={
            size: {measure: value_of(floors.random_changes(size, measure)) for measure in measured}
            for size, runs in plan.random.items()
            if not study.missing([*runs, *plan.seeds])
        },
        seeds={measure: value_of(floors.seed_changes(measure)) for measure in measured},
        reported=[(*pair, compared(*pair)) for pair in REPORTED if set(pair) <= set(tables)],
        facts={
            "samples": len(plan.keys),
            "report_models": len(report_runs),
            "report_queries": len(report_queries),
            "subset_models": len(plan.subsets) - len(study.missing(plan.subsets)),
            "asked_subset_models": len(plan.subsets),
            "pairs": len(plan.second),
            "removal_queries": len(plan.removal_queries),
            "random_repeats": bench.design.random_repeats,
            "seed_models": len(plan.seeds) - len(study.missing(plan.seeds)),
            "missing": len(study.missing(asked)),
            "all": len(asked),
        },
    )
