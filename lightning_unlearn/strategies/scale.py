"""How far to go along a direction so that a target's loss rises as wanted."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from lightning_unlearn.errors import InputError, some_of
from lightning_unlearn.scores.step_reasons import LOSS, WORDS
from lightning_unlearn.strategies.base import Deltas
from lightning_unlearn.strategies.way import Way

# A loss that can't rise as wanted is raised to this share of the highest rise that was seen: where it levels off, the
# highest lies at scales that tell more of the search than of the loss. What lies just above the highest is raised to
# just below it, so that a little more of what is wanted changes little. Below the least share of the wanted rise there
# is nothing to be had.
SHARE, LEAST = 0.95, 0.01


@dataclass(frozen=True)
class Scales:
    """How far the steps go.

    Attributes:
        scales: ``(Q,)`` float64.
        limited: For each target what keeps its loss from rising as wanted, ``None`` if nothing does
            (:mod:`~lightning_unlearn.scores.step_reasons`).
        evaluations: ``(Q,)``, how often each target's loss was measured for it.
    """

    scales: Tensor
    limited: list[str | None]
    evaluations: Tensor


def find_scales(
    rises: Callable[[Tensor], Tensor],
    slopes: Tensor,
    wanted: float | Tensor,
    targets: Sequence[str],
    risen: Tensor | None = None,
    *,
    longest: Tensor | None = None,
    least_linear: float = 0.0,
    short: bool = False,
) -> Scales:
    """Scales at which all targets' losses have risen as wanted, or where the range of a step ends.

    All targets are searched at once, each in its own bracket; whoever is done is not measured again. The rise is the
    wanted one within a thousandth of it (:data:`~.search.TOLERANCE`), and mostly far nearer.

    Args:
        rises: Relative rises ``(Q,)`` of the losses at given scales ``(Q,)``, which are NaN where nobody asks.
        slopes: ``(Q,)`` first-order rise at scale 1, from which the first guess comes.
        wanted: The wanted rise, of all targets or ``(Q,)`` of each.
        targets: ``Q`` names, for messages.
        risen: ``(Q,)`` rise at scale 0, from earlier steps; none by default.
        longest: ``(Q,)`` scales beyond which no target goes.
        least_linear: Share of the first-order rise by which a loss must rise, for its step to go so far.
        short: Whether a target whose wanted rise is out of reach goes nearly as far as it can, with a warning that
            says how far, so that the others are not lost for it; an error by default.

    Returns:
        The scales, with what limits them.

    Raises:
        InputError: If a target's loss does not depend on the weights, or a rise can't be reached (with ``short``, not
            even a hundredth of it).

    Example:
        >>> found = find_scales(lambda c: c + c**2, torch.tensor([1.0]), 2.0, ["toy"])
        >>> torch.testing.assert_close(found.scales, torch.tensor([1.0], dtype=torch.float64), atol=1e-4, rtol=0)
    """
    slopes = slopes.double()
    rise = torch.as_tensor(wanted, dtype=torch.float64).expand_as(slopes)
    check_slopes(slopes, targets)
    start = torch.zeros_like(slopes) if risen is None else risen.double()
    beyond = [target for target, way in zip(targets, (rise - start).tolist(), strict=True) if way <= 0]
    if beyond:
        raise InputError(
            f"The loss of {beyond[0]!r} lies above what is wanted before the step; use fewer steps, or one."
        )
    ends = torch.full_like(slopes, torch.inf) if longest is None else longest.double()
    way = Way(rises, start, slopes, ends, least_linear)
    first = torch.minimum((rise - start) / slopes, ends)
    scale, done = way.run(rise, first, torch.ones_like(slopes, dtype=torch.bool))
    why: list[str | None] = [None] * len(targets)
    if not bool(done.all()):
        why = [None if reached else reason for reached, reason in zip(done.tolist(), way.reasons, strict=True)]
        # The first guess may lie beyond a loss that falls again.
        way.look_nearer(first, ~done)
        passed = way.nearest(rise, torch.full_like(rise, torch.inf))
        scale, done = _taken(way, rise, passed, ~done & passed.isfinite(), scale, done)
        why = [None if reached else reason for reached, reason in zip(done.tolist(), why, strict=True)]
    if not bool(done.all()):
        scale = _nearly(way, rise, scale, done, why, targets, short)
    return Scales(scale, why, way.evaluations)


def _nearly(
    way: Way, rise: Tensor, scale: Tensor, done: Tensor, why: Sequence[str | None], targets: Sequence[str], short: bool
) -> Tensor:
    """Nearly the highest rise within the range, for targets that can't have what is wanted."""
    missed = [place for place, found in enumerate(done.tolist()) if not found]
    fair = way.start + LEAST * (rise - way.start)
    highest = way.highest(rise)
    # Earlier steps brought these as far as they go: they stay, as their last step said already.
    stays = ~done & ~(highest > fair) & (way.start > LEAST * rise) if short else torch.zeros_like(done)
    hopeless = next((at for at in missed if not (short and (highest[at] > fair[at] or stays[at]))), None)
    if hopeless is not None:
        raise InputError(
            f"The loss of {targets[hopeless]!r} can't be raised by {float(rise[hopeless]):.3g} along its step; "
            "choose a smaller target_increase or toward_data, more draws or more weights."
        )
    top = highest - way.start
    within = way.start + torch.maximum(SHARE * top, 2 * top - (rise - way.start))
    said = [f"{targets[place]!r}: {float(within[place]):.3g} of {float(rise[place]):.3g}" for place in missed]
    reasons = " or ".join(dict.fromkeys(WORDS[why[place] or LOSS] for place in missed))
    rank_zero_warn(
        f"The loss of {len(missed)} target{'s' * (len(missed) > 1)} can't be raised as wanted along its step and is "
        f"raised as far as it goes ({some_of(said)}), since further away {reasons}; choose a smaller target_increase "
        "or toward_data, more draws or more weights."
    )
    near = way.nearest(within, rise)
    nearly, found = _taken(way, within, near, ~done & ~stays, scale, done)
    # Where the loss jumps over it, too, the nearest scale will do: there it rises by more, but not by the highest.
    return torch.where(stays, 0.0, torch.where(found, nearly, near))


def _taken(way: Way, rise: Tensor, first: Tensor, active: Tensor, scale: Tensor, done: Tensor) -> tuple[Tensor, Tensor]:
    # Once more for some targets, from scales that were seen to be far enough; the others keep what they have. Without
    # them, a search would step over a loss that falls again behind them.
    if not bool(active.any()):
        return scale, done
    again, found = way.run(rise, torch.where(active, first, scale), active)
    return torch.where(found, again, scale), done | found


def positive(losses: Tensor, targets: Sequence[str]) -> Tensor:
    """Refuse losses that a rise can't be relative to; those that are NaN are told of after the step.

    Args:
        losses: ``(Q,)`` under θ₀.
        targets: ``Q`` names, for the message.

    Returns:
        The losses.

    Raises:
        InputError: If one of them is zero or below.
    """
    for target, loss in zip(targets, losses.tolist(), strict=True):
        if loss <= 0:
            raise InputError(
                f"The loss of {target!r} is {loss:.3g}, and how far it rises is told relative to it; give Newton's "
                "alpha and N instead, or an objective whose loss is above 0."
            )
    return losses


def check_slopes(slopes: Tensor, targets: Sequence[str]) -> None:
    """Refuse targets whose loss does not rise along their natural gradient.

    Args:
        slopes: ``(Q,)`` a positive multiple of ``gᵀF⁻¹g``.
        targets: ``Q`` names, for the message.

    Raises:
        InputError: If one of them is zero or not finite.
    """
    flat = [target for target, slope in zip(targets, slopes.tolist(), strict=True) if not 0 < slope < float("inf")]
    if flat:
        raise InputError(
            f"The loss of {flat[0]!r} has no finite gradient in the chosen weights, so it can't be unlearned; "
            "choose other weights, or check the model."
        )


def along(before: Deltas, directions: Deltas, scales: Tensor) -> Deltas:
    """``before + scales · directions`` with one scale a target.

    Args:
        before: Parameter name to ``(Q, *parameter)``.
        directions: The same shapes.
        scales: ``(Q,)``.

    Returns:
        The same shapes.
    """
    return {
        name: before[name] + scales.to(direction).reshape(-1, *[1] * (direction.ndim - 1)) * direction
        for name, direction in directions.items()
    }
