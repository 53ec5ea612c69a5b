"""What every strategy can do."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lightning_unlearn.fisher import Fisher
from lightning_unlearn.strategies.step_range import StepRange

Deltas = dict[str, Tensor]


@dataclass(frozen=True)
class Problem:
    """What a strategy works on.

    Attributes:
        deltas: Parameter name to stacked deltas ``(Q, *parameter)``, the parameters that are trained.
        layers: Layer name to the names of its parameters in ``deltas``.
        given_fisher: Finalized; ``None`` if there is none and the strategy needs none.
        targets: ``Q`` names, for messages.
        members: The keys of the queries in each of them.
        losses: The targets' mean losses ``(Q,)`` float64 over the fixed draws of the stream "rise", summed over
            ranks, under given deltas (``None``: under θ₀); of targets that a mask ``(Q,)`` chooses, NaN for the others
            (``None``: of all). Every rank must call it.
        others: The same of the samples to score, under the weights of each target, over fixed draws of the stream
            "others"; ``None`` where there are none.
        data_loss: The mean loss of the samples to score under θ₀, over fixed draws of the stream "others", summed over
            ranks; for strategies that need it. Every rank must call it.
        weights_length: Length of all chosen weights together, under θ₀.
        agreed: Numbers as the first rank has them; every rank must call it. What a strategy computes by itself may
            differ by rounding between ranks on different devices, and what it decides by that must not.
        untrained: Each query's mean loss over the same draws, by its key, under a newly initialised network of the same
            kind. Every rank must call it.
    """

    deltas: Deltas
    layers: dict[str, list[str]]
    given_fisher: Fisher | None
    targets: list[str]
    members: list[list[str]]
    losses: Callable[[Deltas | None, Tensor | None], Tensor]
    others: Callable[[Deltas | None, Tensor | None], Tensor] | None
    data_loss: Callable[[], float]
    weights_length: float
    untrained: Callable[[], dict[str, float]]
    agreed: Callable[[Tensor], Tensor]

    @property
    def fisher(self) -> Fisher:
        """The Fisher, for strategies that need one: without it there is no fit."""
        assert self.given_fisher is not None
        return self.given_fisher


class Strategy(ABC):
    """How deltas are found in Lightning's ``fit``.

    Attributes:
        steps: Optimizer steps, at most; each takes all draws of all targets.
        fresh_draws: Whether each step has draws of its own; in a strategy that minimises one function, all steps have
            the same.
        needs_fisher: Whether it can't do without a Fisher.
        searches: Whether it measures losses many times over after its first step, to find how far that should go.
        needs_data_loss: Whether it asks for the mean loss of the samples to score.
        real_draws: Draws of training samples that each step of each target takes too; none by default.
        step_range: Beyond what a target's delta is told of; strategies that search how far to go stop there.
        facts: What the last step was like, ``(Q,)`` each, for the results: the rise before it (``risen_before``), what
            it would be after it to first order (``first_order``), what it is (``rise``), the samples' mean losses
            (``others_after``) and how often losses were measured (``evaluations``), whatever is known of these.
        limited: Target to what kept its last step from going as far as wanted
            (:mod:`~lightning_unlearn.scores.step_reasons`).
    """

    steps: int
    fresh_draws: bool = True
    needs_fisher: bool = True
    searches: bool = False
    needs_data_loss: bool = False
    real_draws: int = 0
    step_range: StepRange = StepRange()

    def __init__(self) -> None:
        self.facts: dict[str, Tensor] = {}
        self.limited: dict[str, str | None] = {}

    @property
    def needs_samples(self) -> bool:
        """Whether it needs samples besides the queries."""
        return self.needs_data_loss or self.real_draws > 0

    @abstractmethod
    def configure_optimizer(self, problem: Problem) -> torch.optim.Optimizer:
        """The optimizer of the deltas.

        Their gradients are those of the mean loss of the real draws, if there are any, *minus* the mean over the
        targets' draws of what :meth:`ascended` makes of their losses.

        Args:
            problem: What it works on.

        Returns:
            The optimizer.
        """

    def ascended(self, losses: Tensor, key: str) -> Tensor:
        """What is to rise, as a function of a query's losses; by default these themselves.

        Args:
            losses: ``(b,)``, of some of its draws.
            key: The query's.

        Returns:
            ``(b,)``.
        """
        return losses

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
