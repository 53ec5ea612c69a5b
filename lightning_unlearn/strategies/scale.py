"""How far to go along a direction so that a target's loss rises as wanted."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from lightning_unlearn.errors import InputError, some_of
from lightning_unlearn.strategies.base import Deltas

# The rise is found to this relative accuracy, near what float32 losses allow: the scale then depends on the losses
# alone, not on how the search happened to get there, and any number of processes finds the same one.
TOLERANCE = 1e-6
# Where rounding doesn't let the loss come that near, the search ends when its bracket is this narrow, if the rise is
# about right; if it isn't, the loss jumps over it, or turns NaN before it.
NARROW, ABOUT = 1e-9, 5e-3
MAX_EVALUATIONS = 60
# A loss that has not risen as wanted after so many doublings of the first guess won't: what it does at weights so large
# is rounding. And so often the first guess is halved where the loss is lower behind it than before.
MAX_DOUBLINGS, MAX_HALVINGS = 24, 20
# A loss that can't rise as wanted is raised to this share of the highest rise that was seen: where it levels off, the
# highest lies at scales that tell more of the search than of the loss. Below the least share of the wanted rise there
# is nothing to be had.
SHARE, LEAST = 0.95, 0.01


def find_scales(
    rises: Callable[[Tensor], Tensor],
    slopes: Tensor,
    wanted: float | Tensor,
    targets: Sequence[str],
    risen: Tensor | None = None,
    *,
    short: bool = False,
) -> Tensor:
    """Scales at which all targets' losses have risen as wanted, by bracketing and regula falsi (Illinois).

    All targets are searched at once, each in its own bracket; whoever is done stays where it is.

    Args:
        rises: Relative rises ``(Q,)`` of the losses at given scales ``(Q,)``.
        slopes: ``(Q,)`` first-order rise at scale 1, from which the first guess comes.
        wanted: The wanted rise, of all targets or ``(Q,)`` of each.
        targets: ``Q`` names, for messages.
        risen: ``(Q,)`` rise at scale 0, from earlier steps; none by default.
        short: Whether a target whose wanted rise is out of reach goes nearly as far as it can, with a warning that
            says how far, so that the others are not lost for it; an error by default.

    Returns:
        ``(Q,)`` float64.

    Raises:
        InputError: If a target's loss does not depend on the weights, or a rise can't be reached (with ``short``, not
            even a hundredth of it).

    Example:
        >>> scales = find_scales(lambda c: c + c**2, torch.tensor([1.0]), 2.0, ["toy"])
        >>> torch.testing.assert_close(scales, torch.tensor([1.0], dtype=torch.float64), atol=1e-6, rtol=0)
    """
    slopes = slopes.double()
    rise = torch.as_tensor(wanted, dtype=torch.float64).expand_as(slopes)
    check_slopes(slopes, targets)
    start = torch.zeros_like(slopes) if risen is None else risen.double()
    low_value = start - rise
    beyond = [target for target, value in zip(targets, low_value.tolist(), strict=True) if value >= 0]
    if beyond:
        raise InputError(
            f"The loss of {beyond[0]!r} lies above what is wanted before the step; use fewer steps, or one."
        )
    search = _Search(rises, start)
    scale, done = search.run(rise, -low_value / slopes, torch.ones_like(slopes, dtype=torch.bool))
    if bool(done.all()):
        return scale
    search.look_nearer(~done)
    passed = search.nearest(rise, torch.full_like(rise, torch.inf))
    scale, done = _taken(search, rise, passed, ~done & passed.isfinite(), scale, done)
    missed = [place for place, found in enumerate(done.tolist()) if not found]
    if not missed:
        return scale
    fair = start + LEAST * (rise - start)
    highest = search.highest(rise)
    hopeless = next((place for place in missed if not (short and highest[place] > fair[place])), None)
    if hopeless is not None:
        raise InputError(
            f"The loss of {targets[hopeless]!r} can't be raised by {float(rise[hopeless]):.3g} along its step; "
            "choose a smaller target_increase or toward_data, more draws or more weights."
        )
    within = start + SHARE * (highest - start)
    said = [f"{targets[place]!r}: {float(within[place]):.3g} of {float(rise[place]):.3g}" for place in missed]
    rank_zero_warn(
        f"The loss of {len(missed)} target{'s' * (len(missed) > 1)} can't be raised as wanted along its step and is "
        f"raised as far as it goes ({some_of(said)}); choose a smaller target_increase or toward_data, more draws or "
        "more weights."
    )
    near = search.nearest(within, rise)
    nearly, found = _taken(search, within, near, ~done, scale, done)
    # Where the loss jumps over it, too, the nearest scale will do: there it rises by more, but not by the highest.
    return torch.where(found, nearly, near)


def _taken(
    search: _Search, rise: Tensor, high: Tensor, active: Tensor, scale: Tensor, done: Tensor
) -> tuple[Tensor, Tensor]:
    # Once more for some targets, from scales that were seen to be far enough; the others keep what they have. Without
    # them, a search would step over a loss that falls again behind them.
    if not bool(active.any()):
        return scale, done
    again, found = search.run(rise, torch.where(active, high, scale), active)
    return torch.where(found, again, scale), done | found


class _Search:
    """Searches for scales of given rises, all targets at once; what is seen of one does not depend on the others.

    Args:
        rises: Relative rises ``(Q,)`` at given scales ``(Q,)``.
        start: ``(Q,)`` rise at scale 0.
    """

    def __init__(self, rises: Callable[[Tensor], Tensor], start: Tensor) -> None:
        self.rises, self.start = rises, start
        # All scales that were tried, and the rises there, NaN for targets that were not searched then.
        self._scales: list[Tensor] = []
        self._values: list[Tensor] = []

    def _measured(self, scale: Tensor, active: Tensor) -> Tensor:
        value = self.rises(scale).double().where(active, torch.nan)
        self._scales.append(scale)
        self._values.append(value)
        return value

    def run(self, rise: Tensor, scale: Tensor, active: Tensor) -> tuple[Tensor, Tensor]:
        """Search from a first guess, or from a scale that is known to be far enough.

        Args:
            rise: ``(Q,)`` the wanted rise.
            scale: ``(Q,)`` where to begin.
            active: ``(Q,)`` bool, which targets are searched.

        Returns:
            ``(Q,)`` scales, and ``(Q,)`` bool whether they are found.
        """
        low, low_value = torch.zeros_like(scale), self.start - rise
        high, high_value = torch.full_like(scale, torch.inf), torch.full_like(scale, torch.nan)
        side = torch.zeros_like(scale)  # which end moved last: +1 the upper, -1 the lower
        found, lost = torch.zeros_like(active), ~active
        for number in range(MAX_EVALUATIONS):
            value = self._measured(scale, ~(found | lost)) - rise
            narrow = high - low <= NARROW * scale
            found |= value.abs() <= torch.where(narrow, ABOUT, TOLERANCE) * rise
            if number == MAX_DOUBLINGS:
                lost |= ~found & high.isinf() & (value < 0)
            settled = found | lost
            if bool(settled.all()):
                break
            # A step so long that the loss is NaN went too far, however little we know of it; and a loss far above the
            # wanted one says hardly more: taken as it is, it would keep the next scales near the lower end.
            above = (value > 0) | value.isnan()
            value = torch.where(value.isnan(), rise, value).clamp(max=rise)
            # Illinois: when the same end moves twice, halve the value at the other, or it would never move.
            low_value = torch.where(above & (side == 1), low_value / 2, low_value)
            high_value = torch.where(~above & (side == -1), high_value / 2, high_value)
            high, high_value = torch.where(above, scale, high), torch.where(above, value, high_value)
            low, low_value = torch.where(above, low, scale), torch.where(above, low_value, value)
            side = torch.where(above, 1.0, -1.0)
            between = (low * high_value - high * low_value) / (high_value - low_value)
            # As long as there is no upper end, go on to twice the scale.
            scale = torch.where(settled, scale, torch.where(high.isinf(), 2 * scale, between))
        return scale, found

    def look_nearer(self, active: Tensor) -> None:
        """Halve the first guess until the rise is lower for it: it may lie beyond a loss that falls again.

        Args:
            active: ``(Q,)`` bool, for which targets.
        """
        scale = self._scales[0]
        for _ in range(MAX_HALVINGS):
            highest = self.highest(torch.full_like(self.start, torch.inf))
            scale = scale / 2
            active = active & ~(self._measured(scale, active) < highest)
            if not bool(active.any()):
                return

    def highest(self, most: Tensor) -> Tensor:
        """The highest rise seen that is not too high: where the loss jumps over what is wanted, others are.

        Args:
            most: ``(Q,)``.

        Returns:
            ``(Q,)``.
        """
        return torch.stack([value.where(value <= most, self.start) for value in self._values]).amax(0)

    def nearest(self, least: Tensor, most: Tensor) -> Tensor:
        """The nearest scale seen whose rise lies within bounds.

        Args:
            least: ``(Q,)``.
            most: ``(Q,)``.

        Returns:
            ``(Q,)``, infinite where none does.
        """
        scales, values = torch.stack(self._scales), torch.stack(self._values)
        return scales.where((values >= least) & (values <= most), torch.inf).amin(0)


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
