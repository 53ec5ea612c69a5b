"""Where targets stop in the middle of many steps: just where their loss has risen as wanted."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_unlearn.strategies.base import Deltas, Problem
from lightning_unlearn.strategies.scale import along, find_scales, positive


def stop_at(problem: Problem, before: Deltas, wanted: Tensor, finished: list[bool]) -> Tensor:
    """Shorten the last step of the targets whose loss has risen too far, so that it has risen as wanted, and stop them.

    Args:
        problem: With the deltas, which are changed in place.
        before: The deltas before the step.
        wanted: ``(Q,)`` wanted relative rises, above 0.
        finished: Of each target whether it has stopped already; changed in place.

    Returns:
        ``(Q,)`` float64: the rises after the step, before it was shortened.

    Raises:
        InputError: If a loss is not above 0, or there is no place on the step's way where the loss is as wanted.
    """
    wanted = wanted.double()
    base = positive(problem.losses(None, None), problem.targets)  # (Q,)
    rises = problem.losses(problem.deltas, None) / base - 1
    # A step after which the loss is NaN went too far.
    above = [
        place
        for place, (rise, enough) in enumerate(zip(rises.tolist(), wanted.tolist(), strict=True))
        if not (finished[place] or rise < enough)
    ]
    if not above:
        return rises
    directions = {name: delta.detach() - before[name] for name, delta in problem.deltas.items()}

    def every(scales: Tensor) -> Tensor:
        placed = torch.full_like(base, torch.nan)
        placed[above] = scales
        return placed

    def risen_at(scales: Tensor) -> Tensor:
        placed = every(scales)
        return (problem.losses(along(before, directions, placed), ~placed.isnan()) / base - 1)[above]

    risen = (problem.losses(before, None) / base - 1)[above]
    # The rise between the ends of the step is the first guess of its slope; beyond any bound, take the wanted one.
    slopes = (rises[above] - risen).where(rises[above].isfinite(), wanted[above] - risen)
    targets = [problem.targets[place] for place in above]
    found = find_scales(risen_at, slopes, wanted[above], targets, risen)
    for name, stack in along(before, directions, every(found.scales)).items():
        problem.deltas[name].detach()[above] = stack[above]
    for place in above:
        finished[place] = True
    return rises
