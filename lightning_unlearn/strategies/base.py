"""What every strategy can do."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lightning_unlearn.fisher import Fisher

Deltas = dict[str, Tensor]


@dataclass(frozen=True)
class Problem:
    """What a strategy works on.

    Attributes:
        deltas: Parameter name to stacked deltas ``(Q, *parameter)``, the parameters that are trained.
        layers: Layer name to the names of its parameters in ``deltas``.
        fisher: Finalized.
        targets: ``Q`` names, for messages.
        losses: The targets' mean losses ``(Q,)`` float64 over the fixed draws of the stream "rise", summed over
            ranks, under given deltas (``None``: under θ₀). Every rank must call it.
    """

    deltas: Deltas
    layers: dict[str, list[str]]
    fisher: Fisher
    targets: list[str]
    losses: Callable[[Deltas | None], Tensor]


class Strategy(ABC):
    """How deltas are found in Lightning's ``fit``.

    Attributes:
        steps: Optimizer steps, at most; each takes all draws of all targets.
        fresh_draws: Whether each step has draws of its own; in a strategy that minimises one function, all steps have
            the same.
    """

    steps: int
    fresh_draws: bool = True

    @abstractmethod
    def configure_optimizer(self, problem: Problem) -> torch.optim.Optimizer:
        """The optimizer of the deltas; their gradients are those of *minus* the targets' mean losses.

        Args:
            problem: What it works on.

        Returns:
            The optimizer.
        """

    @abstractmethod
    def after_step(self, problem: Problem, before: Deltas, step: int) -> None:
        """What is done after each optimizer step, e.g. finding its scale; changes the deltas in place.

        Args:
            problem: What it works on.
            before: The deltas before the step.
            step: Number of the step, from 1.
        """

    @abstractmethod
    def settings(self) -> dict[str, Any]:
        """What tells this strategy from another, as JSON.

        Returns:
            JSON-like settings.
        """

    @property
    def finished(self) -> bool:
        """Whether no further step would change a delta, so that the rest of them can be left out."""
        return False
