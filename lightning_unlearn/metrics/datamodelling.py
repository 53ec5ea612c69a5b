"""Do the scores foretell what a model trained on part of the samples would do? The linear datamodelling score."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.utilities import dim_zero_cat

from lightning_unlearn.errors import InputError
from lightning_unlearn.metrics.inputs import same_shape, table
from lightning_unlearn.metrics.ranks import rank_correlation

# Sums that differ by less than this share of the sum of all scores' sizes, about 1e-12, are equal but for rounding.
RESOLUTION = 2.0**-40
# The smallest and the largest sum of sizes that units are made for.
SIZES = (2.0**-970, torch.finfo(torch.float64).max)


def subset_predictions(scores: Tensor, kept: Tensor) -> Tensor:
    """What the scores foretell for models trained on subsets: the sum of the scores of the samples kept.

    An additive datamodel, Park et al. (arXiv 2303.14186, Sec. 2). Predictions are only ranked, so sums that are equal
    must be equal to the last bit, in whatever order a library adds them up: they are summed as whole numbers, and
    rounded to about 1e-12 of the sum of the sizes of all scores.

    Args:
        scores: ``(N, Q)``; high means influential.
        kept: ``(M, N)`` bool, which samples each model was trained on.

    Returns:
        ``(M, Q)`` float64; high where a low loss of the query is expected.

    Raises:
        InputError: If the shapes don't fit, ``kept`` is not bool, or a score is not finite.
    """
    scores = table("scores", scores, "samples", "queries")
    if kept.dtype != torch.bool or kept.ndim != 2 or kept.shape[1] != len(scores):
        raise InputError(
            f"The kept samples are {kept.dtype} of shape {tuple(kept.shape)}; give a bool for each model and each of "
            f"the {len(scores)} samples that have scores."
        )
    total = scores.abs().sum(0).clamp(*SIZES)  # (Q,)
    # A power of two. In this unit all scores together are less than 2^52, which float64 counts without rounding.
    unit = total / torch.frexp(total).mantissa * 2.0**-52
    sums = kept.to(torch.float64) @ (scores / unit).round()
    coarse = RESOLUTION * 2.0**52
    return (sums / coarse).round() * coarse * unit


def linear_datamodelling_score(scores: Tensor, kept: Tensor, outcomes: Tensor) -> Tensor:
    """Rank correlation, over models trained on subsets, of what the scores foretell and what came.

    ``LDS(τ, z) = ρ({Σ_{i ∈ S_j} τ_i}_j, {f(z; θ(S_j))}_j)``: Park et al. (arXiv 2303.14186, Definition 2.3), for
    diffusion models Zheng et al. (arXiv 2311.00500). Here ``f`` is minus the query's loss, since an influential sample
    is one whose presence lowers it. Ties get their average rank; if all predictions or all losses are equal, the score
    is 0, not NaN.

    Args:
        scores: ``(N, Q)``; high means influential.
        kept: ``(M, N)`` bool, which samples each model was trained on.
        outcomes: ``(M, Q)`` loss of each query under each of these models.

    Returns:
        ``(Q,)`` float64 in [-1, 1].

    Raises:
        InputError: If the shapes don't fit, there are fewer than two models, or a value is not finite.

    Example:
        >>> scores = torch.tensor([[3.0], [1.0], [0.0]])  # the first sample helps most
        >>> kept = torch.tensor([[True, True, False], [True, False, True], [False, True, True]])
        >>> linear_datamodelling_score(scores, kept, torch.tensor([[0.1], [0.2], [0.3]])).tolist()
        [1.0]
    """
    return _score(subset_predictions(scores, kept), table("outcomes", outcomes, "models", "queries"))


def _score(predictions: Tensor, outcomes: Tensor) -> Tensor:
    """``(Q,)`` scores of ``(M, Q)`` predictions and losses."""
    same_shape("predictions", predictions, "outcomes", outcomes)
    return _over_models(predictions, -outcomes)


def _over_models(first: Tensor, second: Tensor) -> Tensor:
    if len(first) < 2:
        raise InputError(f"A correlation over models has {len(first)} of them; give two or more.")
    return rank_correlation(first.mT, second.mT)


def noise_ceiling(first: Tensor, second: Tensor) -> Tensor:
    """The linear datamodelling score that a perfect method can be expected to reach, for losses of one model a subset.

    Two models trained on the same subset differ by their seeds. If a loss is what the subset makes of it plus
    independent noise of the same variance, then the correlation ``r`` of two trainings is the share of the variance
    that the subset explains, and what the subset makes of it correlates with one noisy loss by ``√r`` (attenuation;
    Spearman, 1904, "The proof and measurement of association between two things"). That is exact for Pearson's
    correlation, and close to it for ranks; noise that grows with the loss, or a seed shared by the trainings, breaks
    it. ``r`` is averaged over queries before the root is taken: the roots of single ones, which vary a lot, would
    average to less. Where it is negative the ceiling is 0. It is an estimate itself: a score may lie above it by
    chance. For the mean loss of both trainings put ``2r / (1 + r)`` (Spearman-Brown) in the place of ``r``.

    Args:
        first: ``(M, Q)`` losses of models trained on ``M`` subsets.
        second: ``(M, Q)`` losses of models trained on the same subsets with other seeds.

    Returns:
        A float64 scalar in [0, 1].

    Raises:
        InputError: If the shapes differ, there are fewer than two subsets, or a value is not finite.

    Example:
        >>> losses = torch.tensor([[0.1], [0.2], [0.3]])
        >>> noise_ceiling(losses, losses).item(), noise_ceiling(losses, -losses).item()
        (1.0, 0.0)
    """
    first, second = (table("outcomes", outcomes, "models", "queries") for outcomes in (first, second))
    same_shape("first outcomes", first, "second", second)
    return _over_models(first, second).mean().clamp(min=0).sqrt()


class LinearDatamodellingScore(Metric):
    """The linear datamodelling score of models that come one by one, in batches, or on several processes.

    See :func:`linear_datamodelling_score`; what the scores foretell is :func:`subset_predictions`. The losses of all
    models are kept, since ranks can't be summed. A process that has no model takes part with none.

    Args:
        queries: How many there are.
        reduction: ``mean`` over queries, or ``none`` for ``(Q,)`` values.

    Example:
        >>> metric = LinearDatamodellingScore(queries=1)
        >>> metric.update(torch.tensor([[3.0], [2.0]]), torch.tensor([[0.1], [0.2]]))
        >>> metric.update(torch.tensor([[1.0]]), torch.tensor([[0.3]]))
        >>> float(metric.compute())
        1.0
    """

    is_differentiable = False
    higher_is_better = True
    full_state_update = False

    predictions: list[Tensor]
    outcomes: list[Tensor]

    def __init__(self, queries: int, reduction: Literal["mean", "none"] = "mean") -> None:
        # With a cache, a process that has had no update since it last computed would not take part in the next sync.
        super().__init__(compute_with_cache=False)
        if reduction not in {"mean", "none"}:
            raise InputError(f"The reduction {reduction!r} is not known; give 'mean' or 'none'.")
        self.queries = queries
        self.reduction = reduction
        self.add_state("predictions", [], dist_reduce_fx="cat")
        self.add_state("outcomes", [], dist_reduce_fx="cat")
        self.reset()

    def reset(self) -> None:
        """Forget all models."""
        super().reset()
        # In the place of an empty list torchmetrics gathers a float32 vector, which waits for ever, or fails, among
        # the float64 tables of the other processes.
        for state in (self.predictions, self.outcomes):
            state.append(torch.zeros(0, self.queries, dtype=torch.float64, device=self.device))

    def update(self, predictions: Tensor, outcomes: Tensor) -> None:
        """Add models; each must be given once, on one process.

        Args:
            predictions: ``(m, Q)`` from :func:`subset_predictions`.
            outcomes: ``(m, Q)`` losses.

        Raises:
            InputError: If the shapes don't fit or a value is not finite.
        """
        predictions = table("predictions", predictions, "models", "queries")
        outcomes = table("outcomes", outcomes, "models", "queries")
        same_shape("predictions", predictions, "outcomes", outcomes)
        if predictions.shape[1] != self.queries:
            raise InputError(f"The predictions are for {predictions.shape[1]} queries; give all {self.queries}.")
        self.predictions.append(predictions)
        self.outcomes.append(outcomes)

    def compute(self) -> Tensor:
        """The score over all models.

        Returns:
            Its mean over queries, or ``(Q,)`` values without reduction; float64.

        Raises:
            InputError: If there are fewer than two models.
        """
        values = _score(dim_zero_cat(self.predictions), dim_zero_cat(self.outcomes))
        return values.mean() if self.reduction == "mean" else values
