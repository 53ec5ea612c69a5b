"""What is seen along the targets' directions, and where on them a rise lies."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from lightning_unlearn.scores.step_reasons import LENGTH, LINEAR, LOSS
from lightning_unlearn.strategies.search import TOLERANCE, first_zeros

# How often a scale is halved where the loss is lower behind it than before.
MAX_HALVINGS = 20
# What a search found to be the boundary lies in the range, to its accuracy.
TOUCHING = 2 * TOLERANCE


class Way:
    """What is seen along the targets' directions; what is seen of one does not depend on the others.

    Args:
        rises: Relative rises ``(Q,)`` at given scales ``(Q,)``.
        start: ``(Q,)`` rise at scale 0.
        slopes: ``(Q,)`` first-order rise at scale 1.
        ends: ``(Q,)`` scales beyond which nobody goes.
        least_linear: Share of the first-order rise below which it is too far.

    Attributes:
        reasons: What ended each target's last search, if not its rise.
        evaluations: ``(Q,)``, how often each was measured.
    """

    def __init__(
        self, rises: Callable[[Tensor], Tensor], start: Tensor, slopes: Tensor, ends: Tensor, least_linear: float
    ) -> None:
        self.rises, self.start, self.slopes = rises, start, slopes
        self.ends, self.least_linear = ends, least_linear
        self.reasons: list[str] = [LOSS] * len(start)
        self.evaluations = torch.zeros_like(start)
        # All scales that were tried, and the rises there, NaN out of range and for targets that were not searched then.
        self._scales: list[Tensor] = []
        self._values: list[Tensor] = []

    def _measured(self, scale: Tensor) -> tuple[Tensor, Tensor]:
        """Rises at scales, and how far these are out of range: -1 far within it, 0 at its boundary; each ``(Q,)``."""
        asked = ~scale.isnan()
        value = self.rises(scale).double().where(asked, torch.nan)
        self.evaluations += asked
        behind = torch.full_like(value, -1.0)
        if self.least_linear:
            share = (value - self.start) / (self.slopes * scale)
            behind = (1 - share / self.least_linear).clamp(min=-1)
        too_long = scale / self.ends - 1
        out = torch.maximum(behind, too_long)
        for place in torch.nonzero(asked).flatten().tolist():
            far = float(out[place]) > -0.5 and bool(value[place].isfinite())
            self.reasons[place] = (LENGTH if too_long[place] > behind[place] else LINEAR) if far else LOSS
        within = value.where(out <= TOUCHING, torch.nan)
        self._scales.append(scale)
        self._values.append(within)
        return value, out

    def run(self, rise: Tensor, first: Tensor, active: Tensor) -> tuple[Tensor, Tensor]:
        """Search from a first guess, or from a scale that is known to be far enough.

        Args:
            rise: ``(Q,)`` the wanted rise.
            first: ``(Q,)`` where to begin.
            active: ``(Q,)`` bool, which targets are searched.

        Returns:
            ``(Q,)`` scales, and ``(Q,)`` bool whether the loss has risen as wanted there.
        """
        limited = torch.zeros_like(active)

        def excess(scale: Tensor) -> Tensor:
            value, out = self._measured(scale)
            short = (value - rise) / (rise - self.start)
            asked = ~scale.isnan()
            limited[asked] = (out > short)[asked]
            return torch.maximum(short, out)

        scale, found = first_zeros(excess, first, active)
        return scale, found & ~limited

    def look_nearer(self, scale: Tensor, active: Tensor) -> None:
        """Halve scales until the rise is lower for it.

        Args:
            scale: ``(Q,)`` where to begin.
            active: ``(Q,)`` bool, for which targets.
        """
        reasons = list(self.reasons)
        for _ in range(MAX_HALVINGS):
            highest = self.highest(torch.full_like(self.start, torch.inf))
            scale = scale / 2
            value, _ = self._measured(scale.where(active, torch.nan))
            active = active & ~(value < highest)
            if not bool(active.any()):
                break
        self.reasons = reasons

    def highest(self, most: Tensor) -> Tensor:
        """The highest rise seen in range that is not too high: where the loss jumps over what is wanted, others are.

        Args:
            most: ``(Q,)``.

        Returns:
            ``(Q,)``.
        """
        return torch.stack([value.where(value <= most, self.start) for value in self._values]).amax(0)

    def nearest(self, least: Tensor, most: Tensor) -> Tensor:
        """The nearest scale seen in range whose rise lies within bounds.

        Args:
            least: ``(Q,)``.
            most: ``(Q,)``.

        Returns:
            ``(Q,)``, infinite where none does.
        """
        scales, values = torch.stack(self._scales), torch.stack(self._values)
        return scales.where((values >= least) & (values <= most), torch.inf).amin(0)
