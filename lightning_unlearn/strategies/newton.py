"""Natural-gradient steps."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from lightning_unlearn.errors import InputError
from lightning_unlearn.fisher import Fisher
from lightning_unlearn.strategies.base import Deltas, Problem, Strategy
from lightning_unlearn.strategies.optimizer import DeltaOptimizer, layer_groups, preconditioned
from lightning_unlearn.strategies.scale import along, find_scales


class NaturalGradient(DeltaOptimizer):
    r"""Steps along :math:`-F^{-1} g`, one parameter group a layer.

    Args:
        groups: For each layer ``{"params": [...], "names": [...]}``: its stacked deltas and their names.
        fisher: Finalized; it is not part of the optimizer's state.
        step_size: What :math:`F^{-1} g` is multiplied with.
    """

    def __init__(self, groups: list[dict[str, Any]], fisher: Fisher, step_size: float) -> None:
        super().__init__(groups, {"step_size": step_size})
        self.fisher = fisher

    def move(self) -> None:
        """Take one step along the natural gradient."""
        for group, stacks, directions in preconditioned(self, self.fisher):
            for name, direction in directions.items():
                stacks[name].sub_(direction, alpha=group["step_size"])


class Newton(Strategy):
    r"""One or many steps of :math:`θ \leftarrow θ + \frac{α}{N} F^{-1} ∇L(\hat z, θ)`.

    Wang et al. (arXiv 2406.09408, Eq. 5 and Appendix A). As there, the term :math:`N F (θ - θ_0)` is left out of later
    steps.
    The size of the steps is given either as in the paper (``alpha`` and ``N``), or as the relative rise of the target's
    own loss after the last of them (``target_increase``), which, unlike α, carries over from one model to another:
    after step ``s`` of ``S`` the rise is ``s/S`` of it. A target whose loss can't rise so far goes nearly as far as it
    can, with a warning; the results say how far.

    Args:
        steps: Number of steps.
        target_increase: Wanted relative rise of each target's loss: 1 doubles it. Ignored if ``alpha`` is given.
        alpha: α of the paper.
        N: Number of training images, with ``alpha``.

    Raises:
        InputError: If a number is out of range, or only one of ``alpha`` and ``N`` is given.
    """

    def __init__(
        self, steps: int = 1, target_increase: float = 1.0, alpha: float | None = None, N: int | None = None
    ) -> None:
        if (alpha is None) != (N is None):
            raise InputError("alpha and N belong together: the step is α/N; give both, or neither and target_increase.")
        size_is_fine = 0 < target_increase < math.inf and (alpha is None or 0 < alpha < math.inf)
        if steps < 1 or not size_is_fine or (N is not None and N < 1):
            raise InputError("Newton needs at least one step, and finite target_increase, alpha and N above 0.")
        self.steps = steps
        self.target_increase = target_increase
        self.alpha = alpha
        self.N = N

    def configure_optimizer(self, problem: Problem) -> NaturalGradient:
        """The natural gradient with the step size α/N, or 1 where the scale is found after the step.

        Args:
            problem: What it works on.

        Returns:
            The optimizer.
        """
        step_size = 1.0 if self.alpha is None or self.N is None else self.alpha / self.N
        return NaturalGradient(layer_groups(problem), problem.fisher, step_size)

    def after_step(self, problem: Problem, before: Deltas, step: int) -> None:
        """Scale the step of each target so that its loss has risen as wanted; nothing if α was given.

        Args:
            problem: What it works on.
            before: The deltas before the step.
            step: Number of the step, from 1.
        """
        if self.alpha is not None:
            return
        directions = {name: delta.detach() - before[name] for name, delta in problem.deltas.items()}
        base = problem.losses(None)  # (Q,)

        def rises(scales: Tensor) -> Tensor:
            return problem.losses(along(before, directions, scales)) / base - 1

        # To first order the loss rises by c gᵀF⁻¹g, and with the direction d = F⁻¹g that is c dᵀFd.
        slopes = problem.fisher.quadratic(directions).to(base) / base
        risen = problem.losses(before) / base - 1 if step > 1 else torch.zeros_like(base)
        wanted = self.target_increase * step / self.steps
        scales = find_scales(rises, slopes, wanted, problem.targets, risen, short=True)
        for name, scaled in along(before, directions, scales).items():
            problem.deltas[name].detach().copy_(scaled)

    def settings(self) -> dict[str, Any]:
        """The strategy as JSON.

        Returns:
            Its arguments.
        """
        size = {"target_increase": self.target_increase} if self.alpha is None else {"alpha": self.alpha, "N": self.N}
        return {"strategy": "newton", "steps": self.steps, **size}
