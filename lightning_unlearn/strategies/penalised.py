"""The objective of unlearning itself, minimised in many steps."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from lightning_unlearn.errors import InputError
from lightning_unlearn.strategies.base import Deltas, Problem, Strategy
from lightning_unlearn.strategies.descent import PenalisedDescent
from lightning_unlearn.strategies.optimizer import OptimizerFactory, layer_groups, optimizer_settings
from lightning_unlearn.strategies.stopping import stop_at


class Penalised(Strategy):
    r"""Minimises :math:`-L(\hat z, θ_0 + δ) + \frac{N}{2} δ^\top F δ` for each target by itself.

    Wang et al. (arXiv 2406.09408, Eq. 4), with the damped Fisher. By default
    :math:`δ \leftarrow δ + η\,(\frac{1}{N} F^{-1} ∇L(\hat z, θ_0 + δ) - δ)`, whose first step with η = 1 is the Newton
    step of α = 1. There is a minimum only where :math:`N F` exceeds the curvature of :math:`L`; where it does not,
    the loss gains more than the penalty, ever further away, and that is an error. All steps take the same draws, so
    that there is one function to minimise.

    Args:
        N: Strength of the penalty: the number of training images, over α where the paper's step has one.
        steps: Number of steps; with ``target_increase`` at most so many.
        optimizer: Makes another optimizer, from one target's deltas; such that it takes a step from the gradients that
            it is given, which LBFGS does not.
        lr: η, with no optimizer; 1 by default. Below 1 where the loss curves down by more than the penalty holds.
        target_increase: Relative rise of its own loss at which each target stops on its way: 0.1 is ten per cent.

    Raises:
        InputError: If a number is out of range, or the optimizer can't be used.
    """

    fresh_draws = False

    def __init__(
        self,
        N: float,
        steps: int = 20,
        optimizer: OptimizerFactory | None = None,
        lr: float | None = None,
        target_increase: float | None = None,
    ) -> None:
        sizes = {"N": N, "lr": lr, "target_increase": target_increase}
        given = {name: float(size) for name, size in sizes.items() if size is not None}
        if steps < 1 or not all(0 < size < math.inf for size in given.values()):
            raise InputError("Penalised needs at least one step, and finite N, lr and target_increase above 0.")
        if optimizer is not None and lr is not None:
            raise InputError("lr is of the descent without an optimizer; give the optimizer its own instead.")
        super().__init__()
        self.steps = steps
        self.N = N
        self.lr = 1.0 if lr is None else lr
        self.optimizer = optimizer
        self.target_increase = target_increase
        self._settings = (
            {**given, "optimizer": optimizer_settings(optimizer)} if optimizer else {**given, "lr": self.lr}
        )
        self._descent: PenalisedDescent | None = None

    def configure_optimizer(self, problem: Problem) -> PenalisedDescent:
        """An optimizer for each target, which gets the gradient of the objective.

        Args:
            problem: What it works on.

        Returns:
            The optimizer.

        Raises:
            InputError: If it does not take these weights.
        """
        make = self.optimizer or self._plain
        self._descent = PenalisedDescent(
            layer_groups(problem), problem.fisher, self.N, problem.targets, make, natural=self.optimizer is None
        )
        return self._descent

    def _plain(self, parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
        return torch.optim.SGD(parameters, lr=self.lr)

    def _ready(self) -> PenalisedDescent:
        assert self._descent is not None
        return self._descent

    @property
    def finished(self) -> bool:
        """Whether all targets have risen as wanted."""
        return all(self._ready().finished)

    def after_step(self, problem: Problem, before: Deltas, step: int) -> None:
        """Stop the targets whose loss has risen as wanted, or say after the last step how far they are.

        Args:
            problem: What it works on.
            before: The deltas before the step.
            step: Number of the step, from 1.

        Raises:
            InputError: If a target moved away from its minimum, or its loss has not risen as wanted in the end.
        """
        if self.target_increase is None:
            if step == self.steps:
                self._ready().conclude(step)
            return
        finished = self._ready().finished
        wanted = torch.full((len(finished),), self.target_increase, dtype=torch.float64)
        rises = stop_at(problem, before, wanted, finished)
        missed = [place for place, done in enumerate(finished) if not done]
        if missed and step == self.steps:
            raise InputError(
                f"The loss of {problem.targets[missed[0]]!r} has risen by {float(rises[missed[0]]):.3g} in {step} "
                f"steps, not by {self.target_increase:.3g}; take more steps, or choose a smaller N or target_increase."
            )

    def settings(self) -> dict[str, Any]:
        """The strategy as JSON.

        Returns:
            Its arguments, and those of its optimizer.
        """
        return {"strategy": "penalised", "steps": self.steps, **self._settings}
