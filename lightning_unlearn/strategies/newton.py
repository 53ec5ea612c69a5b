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
from lightning_unlearn.strategies.others import hold_others
from lightning_unlearn.strategies.scale import along, find_scales, positive
from lightning_unlearn.strategies.step_range import StepRange, longest_scales

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
    customised one its own. After step ``s`` of ``S`` the rise is ``s/S`` of it. A target whose loss can't rise so far,
    or whose step leaves the range in which it means something (:class:`~.step_range.StepRange`) before it does, goes
    nearly as far as it can, with a warning; the results say how far and why.

    Args:
        steps: Number of steps.
        target_increase: Wanted relative rise of each target's loss: 1 doubles it.
        alpha: α of the paper.
        N: Number of training images, with ``alpha``.
        toward_data: Wanted share of the way from each query's loss to the mean loss of the samples that are scored
            (over 64 draws; a set's loss is a sum, of as many as it has queries), but at least a rise of 0.5. By default
            0.5. A query's loss is that of its ``rise_draws``: of a few, it is a matter of chance.
        step_range: Where a step ends at the latest, because its numbers mean nothing further away; with ``alpha`` it
            goes as far as it is told, and the results say what is out of range. By default :class:`StepRange`'s.

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
        step_range: StepRange | None = None,
    ) -> None:
        super().__init__()
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
        self.step_range = step_range or StepRange()
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
        """Scale the step of each target so that its loss has risen as wanted; if α was given, only look at it.

        Args:
            problem: What it works on.
            before: The deltas before the step.
            step: Number of the step, from 1.
        """
        directions = {name: delta.detach() - before[name] for name, delta in problem.deltas.items()}
        base = problem.losses(None, None)  # (Q,)
        last = step == self.steps
        if self.alpha is not None and not last:
            return
        risen = problem.losses(before, None) / base - 1 if step > 1 else torch.zeros_like(base)
        # To first order the loss rises by gᵀd, and with d = c F⁻¹g that is dᵀFd / c.
        size = 1.0 if self.alpha is None or self.N is None else self.alpha / self.N
        slopes = problem.agreed(problem.fisher.quadratic(directions).to(base) / size / base)
        self.facts, scales = {}, torch.ones_like(base)
        if self.alpha is None:
            scales = self._scaled(problem, before, directions, slopes, risen, step)
            for name, scaled in along(before, directions, scales).items():
                problem.deltas[name].detach().copy_(scaled)
        self.facts |= {"first_order": risen + slopes * scales, "risen_before": risen}

    def _scaled(
        self, problem: Problem, before: Deltas, directions: Deltas, slopes: Tensor, risen: Tensor, step: int
    ) -> Tensor:
        """``(Q,)`` scales of the directions."""
        base = positive(problem.losses(None, None), problem.targets)

        def rises(scales: Tensor) -> Tensor:
            return problem.losses(along(before, directions, scales), ~scales.isnan()) / base - 1

        found = find_scales(
            rises,
            slopes,
            self._wanted(problem, base) * step / self.steps,
            problem.targets,
            risen,
            longest=self._longest(problem, before, directions),
            least_linear=self.step_range.least_linear,
            short=True,
        )
        limited, scales = list(found.limited), found.scales
        evaluations = found.evaluations
        if problem.others is not None and step == self.steps:
            held = hold_others(problem, before, directions, rises, scales, self.step_range.most_others)
            scales = held.scales
            self.facts |= {"others_after": held.losses, "rise": held.rises}
            evaluations = evaluations + held.evaluations
            limited = [late or early for late, early in zip(held.limited, limited, strict=True)]
        self.limited = dict(zip(problem.targets, limited, strict=True))
        self.facts["evaluations"] = evaluations
        return scales

    def _longest(self, problem: Problem, before: Deltas, directions: Deltas) -> Tensor | None:
        """``(Q,)`` scales at which deltas get too long."""
        longest = self.step_range.longest
        if longest == math.inf:
            return None
        if problem.weights_length == 0:
            raise InputError(
                "All chosen weights are zero, so no delta has a length in theirs; choose others, too, or set longest "
                "of Newton's step_range to .inf."
            )
        return problem.agreed(longest_scales(before, directions, longest * problem.weights_length))

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
        return {"strategy": "newton", "steps": self.steps, **self._size, "range": self.step_range.settings()}
