"""Fine-tuning that forgets the query and keeps everything else by training on it."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn

from lightning_unlearn.errors import InputError, some_of
from lightning_unlearn.strategies.base import Deltas, Problem, Strategy
from lightning_unlearn.strategies.optimizer import (
    OptimizerFactory,
    TargetOptimizers,
    layer_groups,
    optimizer_settings,
)
from lightning_unlearn.strategies.stopping import stop_at


class MirroredDescent(TargetOptimizers):
    """Gives each target's own optimizer the gradients as Lightning leaves them: they are those of the objective."""

    def move(self) -> None:
        """Take one step of each target that is not finished."""
        self.move_by({name: stack.grad for name, stack in self.stacks().items() if stack.grad is not None})


class Mirrored(Strategy):
    r"""Steps down :math:`\frac{1}{R} \sum_z L(z, θ_0 + δ) - λ\, \frac{1}{n} \sum \min(L(\hat z, θ_0 + δ), L_{null})`.

    "Mirrored unlearning" of MUCS (arXiv 2605.17938): real samples :math:`z` hold everything else in place instead of a
    Fisher, and :math:`L_{null}`, the loss of the untrained network on the query, is as far as any draw of the query is
    pushed. Each step takes fresh draws of both. A target stops, by itself and just there, where its loss has reached a
    share of :math:`L_{null}`, or a wanted rise; who has not after the last step gets a warning and keeps its delta.

    The loss of a set is the sum of its queries', as everywhere, so that a set of ``k`` takes a ``strength`` of λ / k
    for the paper's mean. The clip is on each draw, at the query's mean over the schedule.

    In the paper it is the feed-forward layers that move (``parameters="feed_forward"``), of any chosen layers only the
    weights and not the biases, and scores are means of the rule ``ratio`` over 100 noises that all images share, in the
    noisiest 70 % of the schedule (``Views(100, (0.3, 1.0))``).

    Args:
        steps: Number of steps, at most.
        lr: Learning rate of Adam, with no ``optimizer``: a tenth of the training's in the paper; by default 1e-5.
        optimizer: Makes another optimizer, from one target's deltas; such that it takes a step from the gradients that
            it is given, which LBFGS does not.
        strength: λ, the weight of the query beside the real samples.
        real_draws: R, draws of real samples a step, the same for all targets.
        null_loss: :math:`L_{null}` of every query; by default it is measured, for each query, on a newly initialised
            network of the same class and config.
        stop_share: Share of :math:`L_{null}` at which a target stops; 0.95 by default.
        target_increase: Relative rise of its own loss at which each target stops instead: 0.1 is ten per cent.

    Raises:
        InputError: If a number is out of range, two are given for one thing, or the optimizer can't be used.
    """

    needs_fisher = False

    def __init__(
        self,
        steps: int = 100,
        lr: float | None = None,
        optimizer: OptimizerFactory | None = None,
        strength: float = 0.2,
        real_draws: int = 64,
        null_loss: float | None = None,
        stop_share: float | None = None,
        target_increase: float | None = None,
    ) -> None:
        sizes = {"lr": lr, "strength": strength, "null_loss": null_loss, "target_increase": target_increase}
        given = {name: float(size) for name, size in sizes.items() if size is not None}
        if min(steps, real_draws) < 1 or not all(0 < size < math.inf for size in given.values()):
            raise InputError(
                "Mirrored needs at least one step and one of real_draws, and finite lr, strength, null_loss and "
                "target_increase above 0."
            )
        if stop_share is not None and not 0 < stop_share <= 1:
            raise InputError(f"stop_share is a share of the untrained network's loss within 0 and 1, not {stop_share}.")
        if optimizer is not None and lr is not None:
            raise InputError("lr is of the descent without an optimizer; give the optimizer its own instead.")
        if stop_share is not None and target_increase is not None:
            raise InputError("A target stops at a stop_share or at a target_increase; give only one of them.")
        super().__init__()
        self.steps = steps
        self.lr = 1e-5 if lr is None else lr
        self.optimizer = optimizer
        self.strength = strength
        self.real_draws = real_draws
        self.null_loss = null_loss
        self.target_increase = target_increase
        self.stop_share = 0.95 if stop_share is None else stop_share
        stop = {} if target_increase is not None else {"stop_share": self.stop_share}
        rate = {"lr": self.lr} if optimizer is None else {"optimizer": optimizer_settings(optimizer)}
        self._settings = {**given, **stop, **rate}
        self._descent: MirroredDescent | None = None
        # Query to its L_null, and of each target the rise at which it stops, (Q,).
        self._null: dict[str, float] = {}
        self._wanted = torch.empty(0)

    def configure_optimizer(self, problem: Problem) -> MirroredDescent:
        """An optimizer for each target; measures the untrained network first.

        Args:
            problem: What it works on.

        Returns:
            The optimizer.

        Raises:
            InputError: If it does not take these weights, the untrained network's loss can't be measured, or a target's
                loss is as high already as it should get.
        """
        given = self.null_loss
        keys = [key for members in problem.members for key in members]
        self._null = problem.untrained() if given is None else dict.fromkeys(keys, given)
        self._wanted = self._wanted_rises(problem)
        weights = [name for name in problem.deltas if name.endswith(".weight")]
        self._descent = MirroredDescent(
            layer_groups(problem), problem.targets, self.optimizer or self._adam, moving=weights
        )
        return self._descent

    def _adam(self, parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
        return torch.optim.Adam(parameters, lr=self.lr)

    def _wanted_rises(self, problem: Problem) -> Tensor:
        """``(Q,)`` float64."""
        base = problem.losses(None, None)
        if self.target_increase is not None:
            return torch.full_like(base, self.target_increase)
        nulls = [math.fsum(self._null[key] for key in keys) for keys in problem.members]  # a set's loss is a sum
        for target, loss, most in zip(problem.targets, base.tolist(), nulls, strict=True):
            # A loss that is NaN lies nowhere; what is said of it comes after the first step.
            if loss >= self.stop_share * most:
                raise InputError(
                    f"The loss of {target!r} is {loss:.3g} before any step, {loss / most:.0%} of the untrained "
                    f"network's {most:.3g}, so there is nothing to unlearn up to {self.stop_share:.0%}; check the "
                    "query and the weights, or give a null_loss or a target_increase."
                )
        return self.stop_share * torch.tensor(nulls, dtype=torch.float64) / base - 1

    def ascended(self, losses: Tensor, key: str) -> Tensor:
        """``λ min(L, L_null)``: what a draw of a query is pushed to.

        Args:
            losses: ``(b,)``, of some of its draws.
            key: The query's.

        Returns:
            ``(b,)``.
        """
        return self.strength * losses.clamp(max=self._null[key])

    def _ready(self) -> MirroredDescent:
        assert self._descent is not None
        return self._descent

    @property
    def finished(self) -> bool:
        """Whether all targets have stopped."""
        return all(self._ready().finished)

    def after_step(self, problem: Problem, before: Deltas, step: int) -> None:
        """Stop the targets whose loss is high enough, and say after the last step which are not.

        Args:
            problem: What it works on.
            before: The deltas before the step.
            step: Number of the step, from 1.
        """
        finished = self._ready().finished
        rises = stop_at(problem, before, self._wanted, finished)
        if step < self.steps or all(finished):
            return
        if self.target_increase is None:
            # Back from a rise to a share of L_null.
            reached = self.stop_share * (1 + rises) / (1 + self._wanted)
            what = f"{self.stop_share:.3g} of the untrained network's loss"
        else:
            reached, what = rises, f"a rise of {self.target_increase:.3g}"
        short = [place for place, done in enumerate(finished) if not done]
        said = some_of([f"{problem.targets[place]!r}: {float(reached[place]):.3g}" for place in short])
        rank_zero_warn(
            f"{len(short)} of {len(finished)} targets have not reached {what} in {step} steps ({said}) and "
            "are kept as they are; take more steps or a larger learning rate."
        )

    def settings(self) -> dict[str, Any]:
        """The strategy as JSON.

        Returns:
            Its arguments, and those of its optimizer.
        """
        return {"strategy": "mirrored", "steps": self.steps, "real_draws": self.real_draws, **self._settings}
