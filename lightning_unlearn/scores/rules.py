"""Score rules: how a sample's losses before and after become its score.

A rule gives every view a value; what follows is the same for all of them. Values are averaged over captions, by their
shares in training where these differ, and over draws, and of the two flips the larger or the mean is taken.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from lightning_unlearn.scores.firmness import half_widths

Rule = Callable[[Tensor, Tensor], Tensor]
Flips = Literal["max", "mean"]
FLIPS: tuple[Flips, ...] = ("max", "mean")


def difference(base: Tensor, unlearned: Tensor) -> Tensor:
    """The rise of the loss: ``L_u - L_0``.

    Wang et al. (arXiv 2406.09408, Eq. 6 and Appendix B).

    Args:
        base: ``(B, flips, captions, draws)`` losses under θ₀, NaN where a sample has no such view.
        unlearned: ``(Q, B, flips, captions, draws)`` losses under θ₀ + δ.

    Returns:
        ``(Q, B, flips, captions, draws)``, NaN where a sample has no such view.
    """
    return unlearned - base


def ratio(base: Tensor, unlearned: Tensor) -> Tensor:
    """The rise relative to the loss: ``(L_u - L_0) / (L_u + L_0)``.

    As in mirrored unlearning for attribution (MUCS, arXiv 2605.17938), but without the 1e-3 that is added to the
    denominator there: it would count for more the smaller losses are, so that scores would depend on the loss's unit.
    What it guards against, a view whose loss is 0 before and after, did not rise: its value is 0.

    Args:
        base: ``(B, flips, captions, draws)``, NaN where a sample has no such view.
        unlearned: ``(Q, B, flips, captions, draws)``.

    Returns:
        ``(Q, B, flips, captions, draws)``, NaN where a sample has no such view.
    """
    # 0 / 0 would pass for a view that the sample lacks, which means over views leave out.
    nothing = (base == 0) & (unlearned == 0)
    return ((unlearned - base) / (unlearned + base)).masked_fill(nothing, 0.0)


RULES: dict[str, Rule] = {"difference": difference, "ratio": ratio}


def score(
    rule: str, base: Tensor, unlearned: Tensor, flips: Flips = "max", shares: Sequence[Sequence[float]] | None = None
) -> Tensor:
    """Scores of a batch: a rule's values, averaged over captions and draws, then the larger or the mean of both flips.

    Args:
        rule: Its name in ``RULES``.
        base: ``(B, flips, captions, draws)``.
        unlearned: ``(Q, B, flips, captions, draws)``.
        flips: Which of the flips is taken: ``max`` as in Wang et al. (Appendix B), or ``mean``.
        shares: Of each sample, those of its captions in training; ``None`` if all are alike.

    Returns:
        ``(B, Q)``.
    """
    return _over_views(RULES[rule](base, unlearned), flips, shares)


def _over_views(values: Tensor, flips: Flips, shares: Sequence[Sequence[float]] | None) -> Tensor:
    """``(Q, B, flips, captions, draws)`` to ``(B, Q)``."""
    # (Q, B, flips)
    sides = values.nanmean((-2, -1)) if shares is None else over_captions(values, shares).mean(-1)
    return (sides.amax(-1) if flips == "max" else sides.mean(-1)).mT


def over_captions(values: Tensor, shares: Sequence[Sequence[float]] | None) -> Tensor:
    """The mean of values over the captions that samples have.

    Args:
        values: ``(…, B, flips, captions, draws)``, NaN where a sample has no such caption.
        shares: Of each sample, those of all its captions, of which the first ones may be scored alone; ``None`` if all
            are alike.

    Returns:
        ``(…, B, flips, draws)``; NaN where the captions that are scored have no share.
    """
    if shares is None:
        return values.nanmean(-2)
    weights = values.new_zeros(len(shares), values.shape[-2])  # (B, captions)
    for row, given in enumerate(shares):
        weights[row, : len(given)] = values.new_tensor(given[: values.shape[-2]])
    shaped = weights[:, None, :, None]  # (B, 1, captions, 1)
    # A caption without a share counts nothing, not even where its loss is no number.
    counted = torch.where(shaped > 0, shaped * values, 0.0)
    return counted.sum(-2) / shaped.sum(-2)


@dataclass(frozen=True)
class Reduced:
    """What a score table keeps of a batch.

    Attributes:
        base_losses: ``(B,)`` mean losses under θ₀.
        scores: ``(B, Q)``.
        errors: ``(B, Q)`` half-widths of 95 % intervals, ``None`` where the views give none.
        deviations: ``(B, Q, flips, draws)`` float32, the rule's values averaged over captions; ``None`` if they are not
            kept.
        parts: Name of a method to its scores ``(B, Q)``, where several were asked together.
    """

    base_losses: Tensor
    scores: Tensor
    errors: Tensor | None = None
    deviations: Tensor | None = None
    parts: Mapping[str, Tensor] = field(default_factory=dict)

    def rows(self, good: Tensor) -> Reduced:
        """Some of the samples.

        Args:
            good: ``(B,)`` bool.

        Returns:
            Only those.
        """
        errors = None if self.errors is None else self.errors[good]
        deviations = None if self.deviations is None else self.deviations[good]
        return Reduced(self.base_losses[good], self.scores[good], errors, deviations)


def joined(parts: Sequence[Reduced]) -> Reduced:
    """Batches of one shard, one after the other.

    Args:
        parts: At least one; all of the same columns.

    Returns:
        All samples.
    """

    def column(values: Sequence[Tensor | None]) -> Tensor | None:
        known = [value for value in values if value is not None]
        return torch.cat(known) if known else None

    return Reduced(
        torch.cat([part.base_losses for part in parts]),
        torch.cat([part.scores for part in parts]),
        column([part.errors for part in parts]),
        column([part.deviations for part in parts]),
    )


def reduce_losses(
    base: Tensor,
    unlearned: Tensor,
    rule: str,
    flips: Flips = "max",
    noises: int = 1,
    shares: Sequence[Sequence[float]] | None = None,
    *,
    keep_deviations: bool = False,
) -> Reduced:
    """Scores of a batch with their errors.

    Args:
        base: ``(B, flips, captions, draws)``.
        unlearned: ``(Q, B, flips, captions, draws)``.
        rule: Name of the score rule.
        flips: Which of the flips is taken.
        noises: Draws in each stratum of the schedule.
        shares: Of each sample, those of its captions in training; ``None`` if all are alike.
        keep_deviations: Whether the values of the draws are kept.

    Returns:
        Scores, and what is kept beside them.
    """
    values = RULES[rule](base, unlearned)
    # Captions share a sample's timesteps, so that draws are independent of each other and captions are not.
    by_draw = over_captions(values, shares)  # (Q, B, flips, draws)
    return Reduced(
        base.nanmean((-3, -2, -1)) if shares is None else over_captions(base, shares).mean((-2, -1)),
        _over_views(values, flips, shares),
        half_widths(by_draw, noises, flips),
        by_draw.transpose(0, 1).float() if keep_deviations else None,
    )
