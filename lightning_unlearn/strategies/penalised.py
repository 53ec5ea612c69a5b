"""The objective of unlearning itself, minimised in many steps."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from lightning_unlearn.errors import InputError
from lightning_unlearn.strategies.base import Deltas, Problem, Strategy
from lightning_unlearn.strategies.descent import OptimizerFactory, PenalisedDescent
from lightning_unlearn.strategies.optimizer import layer_groups
from lightning_unlearn.strategies.scale import along, find_scales


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
        self.steps = steps
        self.N = N
        self.lr = 1.0 if lr is None else lr
        self.optimizer = optimizer
        self.target_increase = target_increase
        self._settings = {**given, "optimizer": _settings_of(optimizer)} if optimizer else {**given, "lr": self.lr}
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
        try:
            self._descent = PenalisedDescent(
                layer_groups(problem), problem.fisher, self.N, problem.targets, make, natural=self.optimizer is None
            )
        except (TypeError, ValueError) as error:
            raise InputError(f"The optimizer can't be used for these weights ({error}); choose another.") from error
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
        base = problem.losses(None)  # (Q,)
        rises = problem.losses(problem.deltas) / base - 1
        finished = self._ready().finished
        # A step after which the loss is NaN went too far.
        above = [
            place for place, rise in enumerate(rises.tolist()) if not (finished[place] or rise < self.target_increase)
        ]
        if above:
            self._go_back(problem, before, above, rises, self.target_increase)
        missed = [place for place, done in enumerate(finished) if not done]
        if missed and step == self.steps:
            raise InputError(
                f"The loss of {problem.targets[missed[0]]!r} has risen by {float(rises[missed[0]]):.3g} in {step} "
                f"steps, not by {self.target_increase:.3g}; take more steps, or choose a smaller N or target_increase."
            )

    def _go_back(self, problem: Problem, before: Deltas, above: list[int], rises: Tensor, wanted: float) -> None:
        """Shorten the last step of some targets so that their loss has risen as wanted, and let them stay there.

        Args:
            problem: What it works on.
            before: The deltas before the step.
            above: Numbers of the targets.
            rises: ``(Q,)`` rises after the step.
            wanted: Wanted rise.
        """
        base = problem.losses(None)
        directions = {name: delta.detach() - before[name] for name, delta in problem.deltas.items()}

        def shortened(scales: Tensor) -> Deltas:
            every = torch.ones_like(base)
            every[above] = scales
            return along(before, directions, every)

        risen = (problem.losses(before) / base - 1)[above]
        # The rise between the ends of the step is the first guess of its slope; beyond any bound, take the wanted one.
        slopes = (rises[above] - risen).where(rises[above].isfinite(), wanted - risen)
        targets = [problem.targets[place] for place in above]
        scales = find_scales(lambda c: (problem.losses(shortened(c)) / base - 1)[above], slopes, wanted, targets, risen)
        for name, stack in shortened(scales).items():
            problem.deltas[name].detach()[above] = stack[above]
        for place in above:
            self._ready().finished[place] = True

    def settings(self) -> dict[str, Any]:
        """The strategy as JSON.

        Returns:
            Its arguments, and those of its optimizer.
        """
        return {"strategy": "penalised", "steps": self.steps, **self._settings}


def _settings_of(optimizer: OptimizerFactory) -> dict[str, Any]:
    """What an optimizer is, as JSON, after a trial on one weight.

    Args:
        optimizer: Makes it.

    Returns:
        Its class and arguments.

    Raises:
        InputError: If it can't be used.
    """
    weight = nn.Parameter(torch.zeros(1, 1))
    weight.grad = torch.zeros(1, 1)
    try:
        made = optimizer([weight])
        name = type(made).__name__
        made.step()
    except (TypeError, ValueError, RuntimeError, AssertionError) as error:
        raise InputError(
            f"This optimizer does not take a step from the gradients it is given ({error}); use one that does, such "
            "as torch.optim.SGD or torch.optim.Adam."
        ) from error
    decay = made.defaults.get("weight_decay")
    if decay:
        raise InputError(
            f"{name}'s weight_decay of {decay:.3g} pulls deltas towards zero beside the Fisher penalty; set it to 0."
        )
    # As JSON has it: a checkpoint holds these, and tuples would come back from run.json as lists.
    arguments = {name: list(value) if isinstance(value, tuple) else value for name, value in made.defaults.items()}
    plain = {
        name: value if isinstance(value, bool | int | float | str | list | None) else str(value)
        for name, value in arguments.items()
    }
    return {"class": f"{type(made).__module__}.{type(made).__qualname__}", **plain}
