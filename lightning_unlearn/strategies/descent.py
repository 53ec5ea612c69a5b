"""Steps down the penalised objective, each target by itself."""

from __future__ import annotations

import math
from typing import Any

import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from lightning_unlearn.errors import InputError
from lightning_unlearn.fisher import Fisher
from lightning_unlearn.strategies.base import Deltas
from lightning_unlearn.strategies.optimizer import OptimizerFactory, TargetOptimizers, preconditioned
from lightning_unlearn.strategies.scale import check_slopes

# So many times as far away as at the start is no detour: the steps lead away for good.
FAR = 1e3
# What may be left of the way at the end without a word.
NEAR = 1e-2


class PenalisedDescent(TargetOptimizers):
    r"""Gives each target's own optimizer the gradient of :math:`-L(\hat z, θ_0 + δ) + \frac{N}{2} δ^\top F δ`.

    The gradients that Lightning leaves are those of :math:`-L`, summed over micro-batches and ranks; the penalty's is
    added to them here, once, and the same on every rank. Where nothing may move (a layer whose Fisher is all zero),
    the gradient is zero.

    Args:
        groups: For each layer ``{"params": [...], "names": [...]}``: its stacked deltas and their names.
        fisher: Finalized; it is not part of the optimizer's state.
        N: Strength of the penalty.
        targets: ``Q`` names, for messages.
        optimizer: Makes the optimizer of one target's deltas.
        natural: Whether it gets :math:`(N F)^{-1}` times the gradient.

    Attributes:
        left: How far each target is from a minimum, as a share of how far it was at the start. The measure is
            ``√(rᵀFr)`` of ``r = (NF)⁻¹∇L − δ``, which is the way left to go if the loss is linear in the weights.
    """

    def __init__(
        self,
        groups: list[dict[str, Any]],
        fisher: Fisher,
        N: float,
        targets: list[str],
        optimizer: OptimizerFactory,
        natural: bool,
    ) -> None:
        super().__init__(groups, targets, optimizer)
        self.fisher = fisher
        self.N = N
        self.natural = natural
        self.start: list[float] = []
        self.left = [math.inf] * len(targets)

    def move(self) -> None:
        """Take one step of each target that is not finished."""
        gradients = self._natural_gradients()
        self._watch(self.fisher.quadratic(gradients))
        if not self.natural:
            gradients = _times_fisher(self.fisher, gradients, self.N)
        self.move_by(gradients)

    def _natural_gradients(self) -> Deltas:
        """``(NF)⁻¹`` times the gradients: ``δ − (NF)⁻¹∇L``; zero where nothing may move."""
        # Lightning's gradients are those of −L.
        return {
            name: stacks[name] + direction / self.N
            for _, stacks, directions in preconditioned(self, self.fisher)
            for name, direction in directions.items()
        }

    def _watch(self, squares: Tensor) -> None:
        """See how far each target is from a minimum.

        Args:
            squares: ``(Q,)`` squared distances.

        Raises:
            InputError: If a target can't be unlearned, or moves away for good.
        """
        if not self.start:
            check_slopes(squares, self.targets)
            self.start = squares.double().sqrt().tolist()
        distances: list[float] = squares.double().sqrt().tolist()
        self.left = [distance / start for distance, start in zip(distances, self.start, strict=True)]
        self._refuse_what_is_further_than(FAR)

    def _refuse_what_is_further_than(self, most: float) -> None:
        for target, left, finished in zip(self.targets, self.left, self.finished, strict=True):
            if not (finished or left <= most):
                raise InputError(
                    f"The unlearning of {target!r} diverges: it is {left:.3g} times as far from a minimum as at the "
                    "start, since N times the Fisher does not exceed the curvature of its loss, or steps are too "
                    "long; choose a larger N, more damping or a smaller learning rate, or stop at a target_increase."
                )

    def conclude(self, steps: int) -> None:
        """Say how far from the minimum targets were before the last step, if it is worth a word.

        Args:
            steps: How many were taken.

        Raises:
            InputError: If a target was further away than at the start.
        """
        self._refuse_what_is_further_than(1.0)
        far = [place for place, left in enumerate(self.left) if left > NEAR]
        if far:
            worst = max(far, key=lambda place: self.left[place])
            rank_zero_warn(
                f"{len(far)} of {len(self.targets)} targets have not converged: before the last of {steps} steps "
                f"{self.targets[worst]!r} was {self.left[worst]:.2g} times as far from the minimum as at the start; "
                "take more steps."
            )

    def state_dict(self) -> dict[str, Any]:
        """The state, with that of each target's optimizer.

        Returns:
            As torch's, and ``targets``, ``start``, ``left`` and ``finished``.
        """
        return {**super().state_dict(), "start": list(self.start), "left": list(self.left)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take a state that :meth:`state_dict` gave.

        Args:
            state_dict: Of as many targets.
        """
        super().load_state_dict(state_dict)
        self.start, self.left = list(state_dict["start"]), list(state_dict["left"])


def _times_fisher(fisher: Fisher, vectors: Deltas, factor: float) -> Deltas:
    """``factor · F v``, as the derivative of ``factor/2 · vᵀFv``."""
    leaves = {name: vector.detach().requires_grad_() for name, vector in vectors.items()}
    with torch.enable_grad():
        half = factor / 2 * fisher.quadratic(leaves).sum()
    return dict(zip(leaves, torch.autograd.grad(half, list(leaves.values())), strict=True))
