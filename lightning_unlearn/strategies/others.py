"""Steps along which everything else's loss rises with the query's are shortened."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from lightning_unlearn.errors import some_of
from lightning_unlearn.scores.step_reasons import OTHERS, WORDS
from lightning_unlearn.strategies.base import Deltas, Problem
from lightning_unlearn.strategies.scale import along
from lightning_unlearn.strategies.search import first_zeros

# Where even a step of this share takes everything else along, it is its direction and not its size that does, and a
# shorter one says as little: from here down to half of it, steps are shortened by less and less, to not at all.
LEAST_SHARE = 0.01


@dataclass(frozen=True)
class Held:
    """How far the steps go when everything else has to stay.

    Attributes:
        scales: ``(Q,)`` float64.
        losses: ``(Q,)``, the samples' mean loss under each target's weights there.
        rises: ``(Q,)``, each target's own relative rise there.
        limited: For each target ``others`` if its step was shortened, ``None`` if not.
        evaluations: ``(Q,)``, how often each target's own loss was measured for it.
    """

    scales: Tensor
    losses: Tensor
    rises: Tensor
    limited: list[str | None]
    evaluations: Tensor


def hold_others(
    problem: Problem,
    before: Deltas,
    directions: Deltas,
    rises: Callable[[Tensor], Tensor],
    scales: Tensor,
    most: float,
) -> Held:
    """Shorten steps until the samples' mean loss rises by no more than a share of the target's rise, both relative.

    Args:
        problem: With the samples' losses.
        before: Deltas at scale 0, parameter name to ``(Q, *parameter)``.
        directions: The same shapes.
        rises: Relative rises ``(Q,)`` of the targets at scales ``(Q,)``, which are NaN where nobody asks.
        scales: ``(Q,)`` how far the steps go otherwise.
        most: The share.

    Returns:
        How far they go.
    """
    measure = problem.others
    assert measure is not None
    start = measure(None, None)  # (Q,)

    def at(places: Tensor) -> Tensor:
        return measure(along(before, directions, places), ~places.isnan())

    losses, rise = at(scales), rises(scales)
    evaluations = torch.ones_like(scales)
    # What falls is no harm; and a bound of infinity asks for nothing.
    strays = losses / start - 1 > most * rise.clamp(min=0)

    def excess(places: Tensor) -> Tensor:
        nonlocal evaluations
        evaluations = evaluations + ~places.isnan()
        return ((at(places) / start - 1) / (most * rises(places)) - 1).clamp(min=-1)

    if not bool(strays.any()):
        return Held(scales, losses, rise, [None] * len(scales), evaluations)
    nearer, found = first_zeros(excess, scales, strays)
    shares = _kept(nearer / scales)
    held = strays & found & (shares < 1)
    scales = torch.where(held, shares * scales, scales)
    again = scales.where(held, torch.nan)
    losses, rise = torch.where(held, at(again), losses), torch.where(held, rises(again), rise)
    evaluations = evaluations + held
    limited = [OTHERS if stays else None for stays in held.tolist()]
    shortened = [repr(target) for target, why in zip(problem.targets, limited, strict=True) if why]
    if shortened:
        what = "The step of 1 target is" if len(shortened) == 1 else f"The steps of {len(shortened)} targets are"
        rank_zero_warn(f"{what} shortened, since {WORDS[OTHERS]} ({some_of(shortened)}).")
    return Held(scales, losses, rise, limited, evaluations)


def _kept(shares: Tensor) -> Tensor:
    """What is kept of steps that would have to be shortened to some shares of them: continuous, 1 where that is 0."""
    turned_back = LEAST_SHARE ** (2 * shares / LEAST_SHARE - 1)
    return torch.where(shares < LEAST_SHARE, turned_back, shares).clamp(max=1.0)
