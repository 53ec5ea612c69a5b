"""How far a measure would move with other queries, other models or other seeds: percentile bootstrap intervals.

Whatever was drawn by chance is drawn again with replacement (Efron, 1979). Where a value depends on two things that
were drawn, each is drawn again on its own, as in the pigeonhole bootstrap (Owen, Annals of Applied Statistics 1(2),
2007), which errs on the wide side. The draws are a function of the seed and of the numbers of things drawn: two methods
that are judged on the same queries and models are compared on the same draws.

An interval of few values is too short, as every percentile interval: at 0.95, a mean of 10 normal values is inside
in about 0.90 of all cases, of 30 in about 0.93.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from lightning_unlearn.errors import InputError
from lightning_unlearn.fingerprints import generator_for
from lightning_unlearn.metrics.inputs import same_shape, table
from lightning_unlearn.metrics.ranks import rank_correlation

# Values in memory at a time: 32 MB in float64.
VALUES_AT_A_TIME = 2**22


class Interval(NamedTuple):
    """Where a mean lies.

    Attributes:
        low: Lower end.
        high: Upper end.
    """

    low: float
    high: float


class Comparison(NamedTuple):
    """Where the difference of two methods lies, first minus second.

    Attributes:
        low: Lower end of the interval.
        high: Upper end.
        share_above_zero: Of the resamples, how many favour the first method; 0 to 1.
    """

    low: float
    high: float
    share_above_zero: float


def bootstrap_interval(values: Tensor, *, level: float = 0.95, resamples: int = 10_000, seed: int = 0) -> Interval:
    """Interval of a mean over queries.

    Args:
        values: ``(Q,)``; or ``(repeats, Q)`` where each query was measured in several repeats that are a sample too,
            e.g. a floor of random scores: then repeats and queries are drawn again.
        level: Share of cases that the interval is to cover, between 0 and 1.
        resamples: How many.
        seed: Of the resampling.

    Returns:
        The interval, in the unit of the values.

    Raises:
        InputError: If a value is not finite, or a setting out of range.

    Example:
        >>> values = torch.arange(20.0)
        >>> low, high = bootstrap_interval(values)
        >>> low < float(values.mean()) < high
        True
    """
    return _interval(_resampled_means(values, resamples, seed), level)


def paired_bootstrap(differences: Tensor, *, level: float = 0.95, resamples: int = 10_000, seed: int = 0) -> Comparison:
    """Interval of the mean difference of two methods on the same queries.

    Args:
        differences: ``(Q,)``, or ``(repeats, Q)`` as in :func:`bootstrap_interval`; first method minus second.
        level: Share of cases that the interval is to cover, between 0 and 1.
        resamples: How many.
        seed: Of the resampling.

    Returns:
        The interval and the share of resamples above 0.

    Raises:
        InputError: If a value is not finite, or a setting out of range.
    """
    return _comparison(_resampled_means(differences, resamples, seed), level)


def linear_datamodelling_interval(
    predictions: Tensor, outcomes: Tensor, *, level: float = 0.95, resamples: int = 1_000, seed: int = 0
) -> Interval:
    """Interval of the mean linear datamodelling score, with both queries and models drawn again.

    Models are a sample as well as queries, and all queries share them: to draw only queries again makes the interval
    too short. A model that is drawn twice is tied with itself.

    Args:
        predictions: ``(M, Q)`` from :func:`~lightning_unlearn.metrics.datamodelling.subset_predictions`.
        outcomes: ``(M, Q)`` losses.
        level: Share of cases that the interval is to cover, between 0 and 1.
        resamples: How many.
        seed: Of the resampling.

    Returns:
        The interval.

    Raises:
        InputError: If the shapes differ, a value is not finite, or a setting is out of range.
    """
    return _interval(_resampled_scores(predictions, outcomes, resamples, seed), level)


def noise_ceiling_interval(
    first: Tensor, second: Tensor, *, level: float = 0.95, resamples: int = 1_000, seed: int = 0
) -> Interval:
    """Interval of the noise ceiling, with both queries and subsets drawn again.

    Args:
        first: ``(M, Q)`` losses of models trained on ``M`` subsets.
        second: ``(M, Q)`` losses of models trained on the same subsets with other seeds.
        level: Share of cases that the interval is to cover, between 0 and 1.
        resamples: How many.
        seed: Of the resampling.

    Returns:
        The interval.

    Raises:
        InputError: If the shapes differ, a value is not finite, or a setting is out of range.
    """
    # A loss that falls is a score that rises: correlated with what is minus the other loss, the sign is put right.
    return _interval(_resampled_scores(first, -second, resamples, seed).clamp(min=0).sqrt(), level)


def linear_datamodelling_comparison(
    first: Tensor,
    second: Tensor,
    outcomes: Tensor,
    *,
    times: float = 1.0,
    level: float = 0.95,
    resamples: int = 1_000,
    seed: int = 0,
) -> Comparison:
    """Interval of the difference of two methods' mean linear datamodelling scores, on the same queries and models.

    Args:
        first: ``(M, Q)`` predictions of the first method.
        second: ``(M, Q)`` predictions of the second.
        outcomes: ``(M, Q)`` losses.
        times: The second method's score counts so many times: at 1.5 an interval above 0 says that the first is more
            than half as good again.
        level: Share of cases that the interval is to cover, between 0 and 1.
        resamples: How many.
        seed: Of the resampling.

    Returns:
        The interval, first minus ``times`` the second, and the share of resamples above 0.

    Raises:
        InputError: If the shapes differ, a value is not finite, or a setting is out of range.
    """
    draws = [_resampled_scores(predictions, outcomes, resamples, seed) for predictions in (first, second)]
    return _comparison(draws[0] - times * draws[1], level)


def _draws(what: str, count: int, resamples: int, seed: int) -> Tensor:
    """``(resamples, count)`` numbers of what is drawn, with replacement."""
    if resamples < 1:
        raise InputError(f"A bootstrap of {resamples} resamples was asked for; give 1 or more.")
    return torch.randint(count, (resamples, count), generator=generator_for("bootstrap", what, seed))


def _weights(draws: Tensor) -> Tensor:
    """``(resamples, count)`` float64: which share of a resample each thing has."""
    ones = torch.ones(draws.shape, dtype=torch.float64)
    return torch.zeros_like(ones).scatter_add_(1, draws, ones) / draws.shape[1]


def _resampled_means(values: Tensor, resamples: int, seed: int) -> Tensor:
    """``(resamples,)`` means of ``(Q,)`` or ``(repeats, Q)`` values."""
    values = table("values", values[None] if values.ndim == 1 else values, "repeats", "queries").cpu()
    repeats, queries = values.shape
    by_query = _weights(_draws("repeats", repeats, resamples, seed)) @ values  # (resamples, Q)
    return (by_query * _weights(_draws("queries", queries, resamples, seed))).sum(1)


def _resampled_scores(predictions: Tensor, outcomes: Tensor, resamples: int, seed: int) -> Tensor:
    """``(resamples,)`` mean linear datamodelling scores."""
    predictions = table("predictions", predictions, "models", "queries").mT.cpu()  # (Q, M)
    outcomes = table("outcomes", outcomes, "models", "queries").mT.cpu()
    same_shape("predictions", predictions.mT, "outcomes", outcomes.mT)
    queries, models = outcomes.shape
    parts = torch.split(_draws("models", models, resamples, seed), max(1, VALUES_AT_A_TIME // outcomes.numel()))
    # Each part's tables are (Q, some resamples, M).
    by_query = torch.cat([rank_correlation(predictions[:, part], -outcomes[:, part]) for part in parts], dim=1)
    return (by_query.mT * _weights(_draws("queries", queries, resamples, seed))).sum(1)


def _interval(draws: Tensor, level: float) -> Interval:
    if not 0 < level < 1:
        raise InputError(f"The level of an interval is between 0 and 1, not {level}; give for instance 0.95.")
    ends = torch.tensor([(1 - level) / 2, (1 + level) / 2], dtype=torch.float64)
    low, high = draws.quantile(ends).tolist()
    return Interval(low, high)


def _comparison(draws: Tensor, level: float) -> Comparison:
    return Comparison(*_interval(draws, level), float((draws > 0).double().mean()))
