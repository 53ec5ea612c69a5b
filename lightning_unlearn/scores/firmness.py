"""How firm a score is: its 95 % interval from the scatter of its own draws, and the ranks that this leaves open.

A score is a mean over draws, one or more in each stratum of the schedule, so its variance comes from the scatter within
strata alone (Cochran, Sampling Techniques, 3rd edition, Sections 5.3 and 5.4).
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

COVERAGE = 0.95
# What lies beyond either end of such an interval.
TAIL = (1 - COVERAGE) / 2
# Beyond so many degrees of freedom, Student's t is normal to three digits.
MOST_DEGREES = 2000.0


def groups_of_draws(draws: int, noises: int) -> list[int]:
    """Sizes of the groups of consecutive draws within which scatter is measured.

    With several noises these are the strata. With one, neighbouring strata are taken together, two by two and the last
    three where their number is odd: *collapsed strata* (Cochran, Section 5A.12). The difference of the neighbours'
    means then counts as scatter, so that intervals are too wide rather than too narrow.

    Args:
        draws: Of each caption and flip.
        noises: Draws in each stratum.

    Returns:
        The sizes, which add up to ``draws``; none where a single draw shows no scatter.
    """
    if noises > 1:
        return [noises] * (draws // noises)
    if draws < 2:
        return []
    return [2] * (draws // 2 - draws % 2) + [3] * (draws % 2)


def variance_of_mean(values: Tensor, sizes: Sequence[int]) -> tuple[Tensor, Tensor]:
    r"""The variance of a stratified mean, and how well it is known.

    With :math:`s_g^2` the variance within group :math:`g` of :math:`n_g` among :math:`n` draws,

    .. math::
        \operatorname{Var}(\bar x) = \sum_g \frac{n_g s_g^2}{n^2} = \sum_g v_g, \qquad
        ν = \frac{(\sum_g v_g)^2}{\sum_g v_g^2 / (n_g + 1)} - 2.

    ν is Satterthwaite's (Biometrics Bulletin 2(6), 1946) with Welch's correction for few draws in a group (Biometrika
    34, 1947): with two of them in each, the plain formula gives a third of the degrees that there are.

    Args:
        values: ``(…, draws)`` float64.
        sizes: Of the groups, which are consecutive; each at least 2.

    Returns:
        The variance and its degrees of freedom, both ``(…)``.
    """
    draws = values.shape[-1]
    within = [group - group.mean(-1, keepdim=True) for group in torch.split(values, list(sizes), -1)]
    parts = torch.stack(
        [group.square().sum(-1) * size / (size - 1) for group, size in zip(within, sizes, strict=True)], -1
    )
    variance = parts.sum(-1)  # of the sum of all draws
    shares = torch.where(variance[..., None] > 0, parts / variance[..., None], 1 / len(sizes))
    degrees = 1 / (shares.square() / (torch.tensor(sizes) + 1)).sum(-1) - 2
    # As few as the smallest group's, as many as all groups' together.
    return variance / draws**2, degrees.clamp(min(sizes) - 1, draws - len(sizes))


def half_widths(values: Tensor, noises: int, flips: Literal["max", "mean"]) -> Tensor | None:
    """Half the width of each score's 95 % interval: Student's t times the root of its variance.

    Both flips of a draw have the same timestep, so for their mean a draw's flips are averaged first. For the larger of
    them, the interval is that of the flip that was taken. Where the flips lie apart, any draws would have taken the
    same one; where they are level, the larger of two means scatters less than either.

    Args:
        values: ``(Q, B, flips, draws)``, averaged over captions; draw ``d`` lies in stratum ``d // noises``.
        noises: Draws in each stratum.
        flips: Which of the flips the scores took.

    Returns:
        ``(B, Q)`` float64, or ``None`` where a single draw shows no scatter.
    """
    sizes = groups_of_draws(values.shape[-1], noises)
    if not sizes:
        return None
    values = values.double()
    if flips == "mean":
        taken = values.mean(-2)
    else:
        side = values.mean(-1).argmax(-1)[..., None, None]  # (Q, B, 1, 1)
        taken = values.take_along_dim(side, -2).squeeze(-2)
    variance, degrees = variance_of_mean(taken, sizes)
    return (student_quantile(degrees) * variance.sqrt()).mT


def upper_ends(values: Tensor, noises: int, flips: Literal["max", "mean"], tail: float) -> Tensor:
    """How high scores could be: the upper end of an interval that is open below.

    For the larger of both flips, each flip has an interval of its own with half of the tail, and the higher end counts.

    Args:
        values: ``(N, flips, draws)``, a rule's values averaged over captions.
        noises: Draws in each stratum.
        flips: Which of the flips is taken.
        tail: The probability that what is estimated lies beyond the end, below a half.

    Returns:
        ``(N,)`` float64.
    """
    values = values.double()
    sides = values.mean(-2, keepdim=True) if flips == "mean" else values  # (N, sides, draws)
    variance, degrees = variance_of_mean(sides, groups_of_draws(values.shape[-1], noises))
    reach = student_quantile(degrees, tail / sides.shape[-2]) * variance.sqrt()
    return (sides.mean(-1) + reach).amax(-1)


def student_quantile(degrees: Tensor, tail: float = TAIL) -> Tensor:
    """How many standard errors an interval reaches to a side, by default the 95 % interval to either.

    Args:
        degrees: Of freedom, at least 1; of any shape.
        tail: The probability beyond it, from 1e-9 to below a half.

    Returns:
        The quantile of Student's t, the same shape, float64, good to three digits.
    """
    inverses, logarithms = _quantiles(tail)
    found = np.exp(np.interp(1 / degrees.double().numpy(), inverses, logarithms))
    return torch.from_numpy(np.asarray(found))


@functools.cache
def _quantiles(tail: float) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """A grid of ``1 / degrees``, in which the logarithms of quantiles are nearly straight, and these."""
    # With t = √ν tan φ the density of Student's t is cos(φ)^(ν−1), which one can sum up.
    inverses = np.linspace(1 / MOST_DEGREES, 1, 200)
    quantiles = []
    for degrees in 1 / inverses:
        end = min(np.pi / 2, 12 / np.sqrt(degrees))  # beyond it there is nothing left
        # Denser towards the end, where small tails are.
        angles = end * (1 - np.linspace(1, 0, 2001) ** 2)
        # At the middles: for hardly more than one degree the density falls to zero in the last step.
        parts = np.cos((angles[1:] + angles[:-1]) / 2) ** (degrees - 1) * np.diff(angles)
        beyond = np.append(np.cumsum(parts[::-1])[::-1], 0)  # of an angle
        at = np.interp(-2 * tail, -beyond / beyond[0], angles)
        quantiles.append(np.sqrt(degrees) * np.tan(at))
    return inverses, np.log(quantiles)


def rank_ranges(scores: NDArray[Any], errors: NDArray[Any]) -> NDArray[np.intp]:
    """The ranks that samples may have, as far as their intervals say.

    Args:
        scores: ``(N,)``.
        errors: ``(N,)`` half-widths.

    Returns:
        ``(N, 2)``: how many samples' intervals lie wholly above a sample's, and how many others' do not lie wholly
        below it. 0 is the most influential.
    """
    low, high = scores.astype(np.float64) - errors, scores.astype(np.float64) + errors
    above = len(low) - np.searchsorted(np.sort(low), high, side="right")
    below = np.searchsorted(np.sort(high), low, side="left")
    return np.stack([above, len(low) - 1 - below], 1)
