"""Ranks, the correlation of ranks, and scores of which only the ranks are left.

torchmetrics' Spearman correlation is not used: it goes through the columns one at a time, which the bootstrap can't
afford, ranks in float32, and adds 1e-6 to the denominator, which keeps even a perfect correlation below 1 where few
models are compared. The tests hold this one against it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_unlearn.metrics.inputs import table


def average_ranks(values: Tensor) -> Tensor:
    """Ranks from 1 along the last dimension; equal values share the mean of their ranks.

    Args:
        values: ``(..., M)``, without NaN.

    Returns:
        ``(..., M)`` float64.

    Example:
        >>> average_ranks(torch.tensor([30.0, 10.0, 30.0, 20.0])).tolist()
        [3.5, 1.0, 3.5, 2.0]
    """
    values = values.contiguous()
    ordered = values.sort(-1).values
    below = torch.searchsorted(ordered, values)
    at_most = torch.searchsorted(ordered, values, right=True)
    return (below + at_most + 1).to(torch.float64) / 2


def rank_correlation(first: Tensor, second: Tensor) -> Tensor:
    """Spearman's rank correlation along the last dimension: Pearson's correlation of the average ranks.

    Where one side is constant no order is predicted, or there is none to predict: the correlation counts as 0, not NaN.

    Args:
        first: ``(..., M)``, without NaN.
        second: ``(..., M)``, without NaN.

    Returns:
        ``(...)`` float64 in [-1, 1].

    Example:
        >>> rank_correlation(torch.tensor([1.0, 2.0, 9.0]), torch.tensor([[2.0, 3.0, 4.0], [5.0, 5.0, 5.0]])).tolist()
        [1.0, 0.0]
    """
    # With or without ties the mean rank is (M + 1) / 2, so that all but the root and the quotient is exact.
    middle = (first.shape[-1] + 1) / 2
    first, second = average_ranks(first) - middle, average_ranks(second) - middle
    scale = (first.square().sum(-1) * second.square().sum(-1)).sqrt()
    return torch.where(scale > 0, (first * second).sum(-1) / scale, 0.0)


def normal_scores(scores: Tensor) -> Tensor:
    """The scores of each query, replaced by the normal quantile of their rank (van der Waerden, 1952).

    ``Φ⁻¹(rank / (N + 1))``. The linear datamodelling score adds up scores, so that it also judges their distribution:
    clipping them at 0, or squaring what is above, can raise it although no sample passes another. After this transform
    every method has the same distribution for every query (but for ties) and only the order of the samples is compared.
    Any one increasing function of the rank would do that. This one is symmetric, so that it does not favour either
    end, and has no constant to choose.

    Args:
        scores: ``(N, Q)``; high means influential.

    Returns:
        ``(N, Q)`` float64.

    Raises:
        InputError: If it is no table of finite scores.

    Example:
        >>> scores = torch.tensor([[0.1], [2.0], [0.7]])
        >>> torch.equal(normal_scores(scores), normal_scores(scores**3))
        True
    """
    ranks = average_ranks(table("scores", scores, "samples", "queries").mT).mT
    quantiles: Tensor = torch.special.ndtri(ranks / (len(scores) + 1))
    return quantiles
