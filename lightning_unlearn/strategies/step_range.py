"""The range in which a step means something, and what leaves it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from lightning_unlearn.errors import InputError
from lightning_unlearn.scores.step_reasons import LENGTH, LINEAR, OTHERS


@dataclass(frozen=True)
class StepRange:
    """How far a step may go before its numbers mean nothing; each bound lies beyond what the benches' good steps need.

    On the benches (benchmarks/step_range.py) default steps have deltas up to 27 times as long as the weights, rises
    from 0.46 to 4.1 of the first-order ones, and a rise of everything else of at most 0.02 of the query's. A step that
    had lost its way there, of a query whose loss was to rise by 300 %, had 1074, 0.009 and 0.78.

    Args:
        longest: Length of a delta, in lengths of the weights that it is added to.
        least_linear: Share of the first-order rise by which the loss really rises.
        most_others: Relative rise of the samples' mean loss, as a share of the query's relative rise.

    Raises:
        InputError: If a bound is out of range.
    """

    longest: float = 100.0
    least_linear: float = 0.1
    most_others: float = 0.25

    def __post_init__(self) -> None:
        """Refuse bounds that hold nothing."""
        if not (self.longest > 0 and 0 <= self.least_linear < 1 and self.most_others > 0):
            raise InputError(
                "A step's range needs longest and most_others above 0 and least_linear from 0 to below 1, but they are "
                f"{self.longest}, {self.most_others} and {self.least_linear}; correct them."
            )

    def left_by(self, found: Mapping[str, float]) -> list[str]:
        """What of a target's step is out of range.

        Args:
            found: Its ``rise``, and ``length``, ``linear``, ``others_before`` and ``others_after`` where known.

        Returns:
            Short names of what is (:mod:`~lightning_unlearn.scores.step_reasons`).
        """
        # What was limited lies on the boundary, to the accuracy of the search.
        near = 1.01
        left = []
        if not found.get("linear", math.inf) * near >= self.least_linear:
            left.append(LINEAR)
        if not found.get("length", 0.0) <= self.longest * near:
            left.append(LENGTH)
        if "others_after" in found:
            others = found["others_after"] / found["others_before"] - 1
            if others > 0 and not others <= self.most_others * near * max(found["rise"], 0.0):
                left.append(OTHERS)
        return left

    def settings(self) -> dict[str, Any]:
        """The bounds as JSON, without those that are off.

        Returns:
            Name to number.
        """
        return {name: value for name, value in asdict(self).items() if 0 < value < math.inf}


def squared_lengths(stacks: Mapping[str, Tensor]) -> Tensor:
    """Squared lengths of deltas over all their parameters.

    Args:
        stacks: Parameter name to ``(Q, *parameter)``.

    Returns:
        ``(Q,)`` float64.
    """
    return inner_products(stacks, stacks)


def inner_products(first: Mapping[str, Tensor], second: Mapping[str, Tensor]) -> Tensor:
    """Inner products of deltas over all their parameters.

    Args:
        first: Parameter name to ``(Q, *parameter)``.
        second: The same shapes.

    Returns:
        ``(Q,)`` float64.
    """
    products = [(stack.detach().double() * second[name].detach()).flatten(1).sum(1) for name, stack in first.items()]
    return torch.stack(products).sum(0).cpu()


def longest_scales(before: Mapping[str, Tensor], directions: Mapping[str, Tensor], longest: float) -> Tensor:
    """The scales at which deltas get too long: :math:`c > 0` with :math:`‖b + c d‖ = r`.

    Args:
        before: b, parameter name to ``(Q, *parameter)``.
        directions: d, the same shapes.
        longest: r, in the weights' own units.

    Returns:
        ``(Q,)`` float64.

    Example:
        >>> longest_scales({"a": torch.tensor([[0.0, 3.0]])}, {"a": torch.tensor([[2.0, 0.0]])}, 5.0)
        tensor([2.], dtype=torch.float64)
    """
    square, mixed = squared_lengths(directions), inner_products(before, directions)
    room = (longest**2 - squared_lengths(before)).clamp(min=0.0)
    return ((mixed.square() + square * room).sqrt() - mixed) / square
