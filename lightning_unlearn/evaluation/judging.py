"""From finished models and score tables to what can be said of each method, with intervals and noise floors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from lightning_unlearn.errors import InputError
from lightning_unlearn.evaluation.floors import Floors
from lightning_unlearn.evaluation.plan import Plan
from lightning_unlearn.evaluation.results import Judged, Results, Value, value_of
from lightning_unlearn.evaluation.runs import Run
from lightning_unlearn.evaluation.study import Study
from lightning_unlearn.metrics import (
    linear_datamodelling_interval,
    linear_datamodelling_score,
    noise_ceiling,
    noise_ceiling_interval,
    normal_scores,
    subset_predictions,
)
from lightning_unlearn.scores.table import ScoreTable


def judge(
    study: Study,
    plan: Plan,
    tables: Mapping[str, ScoreTable],
    queries: Sequence[str],
    subsets: Sequence[Run] | None = None,
) -> Results:
    """Judge methods by finished models.

    Args:
        study: Where the models' numbers are.
        plan: Which models.
        tables: Method to scores.
        queries: On which queries the linear datamodelling score is taken.
        subsets: By which subset models; by all of the plan's if not given.

    Returns:
        The results.
    """
    runs = list(plan.subsets if subsets is None else subsets)
    floors = Floors(study, plan)
    measured = floors.measured()
    methods = {}
    for name, table in tables.items():
        raw = by_rank = None
        if runs:
            raw, by_rank = datamodelling(study, plan, table, queries, runs)
        removals = {size: floors.removal(size, removed) for size, removed in plan.removals.get(name, {}).items()}
        methods[name] = Judged(raw, by_rank, removals)
    return Results(
        methods=methods,
        ceiling=ceiling(study, plan, queries) if plan.second else None,
        random={
            size: {measure: value_of(floors.random_changes(size, measure)) for measure in measured}
            for size in plan.random
        },
        seeds={measure: value_of(floors.seed_changes(measure)) for measure in measured},
        counts={
            "samples": len(plan.keys),
            "queries": len(queries),
            "subset models": len(runs),
            "pairs of subset models": len(plan.second),
            "seed models": len(plan.seeds),
            "removal queries": len(plan.removal_queries),
        },
    )


def kept_samples(keys: Sequence[str], runs: Sequence[Run]) -> Tensor:
    """Which samples models were trained on.

    Args:
        keys: ``N`` sample keys.
        runs: ``M`` runs.

    Returns:
        ``(M, N)`` bool.
    """
    removed = [set(run.removed) for run in runs]
    return torch.tensor([[key not in left_out for key in keys] for left_out in removed])


def scores_of(table: ScoreTable, keys: Sequence[str], queries: Sequence[str]) -> Tensor:
    """A table's scores in a given order.

    Args:
        table: The scores.
        keys: ``N`` sample keys.
        queries: ``Q`` query keys.

    Returns:
        ``(N, Q)`` float64.

    Raises:
        InputError: If the table lacks some.
    """
    rows = {key: row for row, key in enumerate(table.keys)}
    columns = {key: column for column, key in enumerate(table.queries)}
    lacking = [key for key in keys if key not in rows] or [key for key in queries if key not in columns]
    if lacking:
        raise InputError(f"A score table lacks {lacking[0]!r}; score the samples and queries that are evaluated.")
    chosen = table.scores[np.ix_([rows[key] for key in keys], [columns[key] for key in queries])]
    return torch.from_numpy(np.ascontiguousarray(chosen)).double()


def datamodelling(
    study: Study, plan: Plan, table: ScoreTable, queries: Sequence[str], runs: Sequence[Run]
) -> tuple[Value, Value]:
    """Linear datamodelling score of a method: as it is, and by ranks only.

    Args:
        study: Where the models' numbers are.
        plan: Which samples there are.
        table: The method's scores.
        queries: On which queries.
        runs: By which subset models.

    Returns:
        Both, with intervals over queries and models.
    """
    outcomes = torch.from_numpy(study.losses(runs, queries))
    kept = kept_samples(plan.keys, runs)
    scores = scores_of(table, plan.keys, queries)
    values = []
    for variant in (scores, normal_scores(scores)):
        predictions = subset_predictions(variant, kept)
        mean = float(linear_datamodelling_score(variant, kept, outcomes).mean())
        values.append(Value(mean, *linear_datamodelling_interval(predictions, outcomes)))
    return values[0], values[1]


def ceiling(study: Study, plan: Plan, queries: Sequence[str]) -> Value:
    """The linear datamodelling score that a perfect method would reach, given the noise of training.

    Args:
        study: Where the models' numbers are.
        plan: With subsets that were trained twice.
        queries: On which queries.

    Returns:
        It, with an interval over queries and subsets.
    """
    first = torch.from_numpy(study.losses(plan.subsets[: len(plan.second)], queries))
    second = torch.from_numpy(study.losses(plan.second, queries))
    return Value(float(noise_ceiling(first, second)), *noise_ceiling_interval(first, second))
