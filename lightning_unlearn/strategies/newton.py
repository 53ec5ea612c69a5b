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
from lightning_unlearn.strategies.scale import along, find_scales, positive

# The default size of a step, by the benches (benchmarks/RESULTS.md), and the least rise where the way is short: a loss
# of ε-predictions hardly tells a picture that the model knows from another, and small steps foretell badly.
HALF, LEAST_RISE = 0.5, 0.5


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
    The size of the steps is given as in the paper (``alpha`` and ``N``), as the relative rise of the target's own loss
    after the last of them (``target_increase``), or, by default, as a share of the way from that loss to the model's
    mean loss of the training samples (``toward_data``): halfway, but up by at least a half. Unlike α, both rises carry
    over from one model to another, and the last one also to pictures that a model knows far better than others, as a
    customised one its own. After step ``s`` of ``S`` the rise is ``s/S`` of it. A target whose loss can't rise so far
    goes nearly as far as it can, with a warning; the results say how far.

    Args:
        steps: Number of steps.
        target_increase: Wanted relative rise of each target's loss: 1 doubles it.
        alpha: α of the paper.
        N: Number of training images, with ``alpha``.
        toward_data: Wanted share of the way from each query's loss to the mean loss of the samples that are scored
            (over 64 draws; a set's loss is a sum, of as many as it has queries), but at least a rise of 0.5. By default
            0.5. A query's loss is that of its ``rise_draws``: of a few, it is a matter of chance.

    Raises:
        InputError: If a number is out of range, only one of ``alpha`` and ``N`` is given, or sizes of two kinds.
    """

    def __init__(
        self,
        steps: int = 1,
        target_increase: float | None = None,
        alpha: float | None = None,
        N: int | None = None,
        toward_data: float | None = None,
    ) -> None:
        if (alpha is None) != (N is None):
            raise InputError("alpha and N belong together: the step is α/N; give both, or none and a rise.")
        sizes = {"target_increase": target_increase, "alpha": alpha, "toward_data": toward_data}
        given = {name: size for name, size in sizes.items() if size is not None} or {"toward_data": HALF}
        counted = {"N": N} if N is not None else {}
        for name, number in {"steps": steps, **given, **counted}.items():
            if not 0 < number < math.inf:
                raise InputError(
                    "Newton needs at least one step, and finite target_increase, toward_data, alpha and N above 0, but "
                    f"{name} is {number}."
                )
        if len(given) > 1:
            raise InputError(f"{' and '.join(given)} both say how large the step is; give only one of them.")
        self.steps = steps
        self.alpha = alpha
        self.N = N
        self.target_increase = target_increase
        self.toward_data = given.get("toward_data")
        self.searches = alpha is None
        self.needs_data_loss = self.toward_data is not None
        self._size = {**given, **counted}

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
        base = positive(problem.losses(None), problem.targets)  # (Q,)

        def rises(scales: Tensor) -> Tensor:
            return problem.losses(along(before, directions, scales)) / base - 1

        # To first order the loss rises by c gᵀF⁻¹g, and with the direction d = F⁻¹g that is c dᵀFd.
        slopes = problem.fisher.quadratic(directions).to(base) / base
        risen = problem.losses(before) / base - 1 if step > 1 else torch.zeros_like(base)
        wanted = self._wanted(problem, base) * step / self.steps
        scales = find_scales(rises, slopes, wanted, problem.targets, risen, short=True)
        for name, scaled in along(before, directions, scales).items():
            problem.deltas[name].detach().copy_(scaled)

    def _wanted(self, problem: Problem, base: Tensor) -> Tensor:
        """``(Q,)`` relative rises after the last step."""
        if self.toward_data is None:
            assert self.target_increase is not None
            return torch.full_like(base, self.target_increase)
        level = problem.data_loss()
        if not 0 < level < math.inf:
            raise InputError(
                f"The mean loss of the samples is {level:.3g}, and no query's loss can be brought toward_data; check "
                "the model and the shards, or give a target_increase."
            )
        queries = torch.tensor([len(keys) for keys in problem.members]).to(base)
        return (self.toward_data * (level * queries / base - 1)).clamp(min=LEAST_RISE)

    def settings(self) -> dict[str, Any]:
        """The strategy as JSON.

        Returns:
            Its arguments.
        """
        return {"strategy": "newton", "steps": self.steps, **self._size}
