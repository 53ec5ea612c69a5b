"""What the optimizers of deltas share: Lightning's closure, and the layers as groups."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from lightning_unlearn.fisher import Fisher
from lightning_unlearn.strategies.base import Deltas, Problem


def layer_groups(problem: Problem) -> list[dict[str, Any]]:
    """One parameter group a layer, since a Fisher may join a layer's weight and bias.

    Args:
        problem: With the deltas.

    Returns:
        For each layer ``{"params": [...], "names": [...]}``: its stacked deltas and their names.
    """
    return [{"params": [problem.deltas[name] for name in names], "names": names} for names in problem.layers.values()]


class DeltaOptimizer(torch.optim.Optimizer):
    """Moves stacked deltas by their preconditioned gradients.

    Args:
        groups: As :func:`layer_groups` makes them.
        fisher: Finalized; it is not part of the optimizer's state.
        defaults: As torch's.
    """

    def __init__(self, groups: list[dict[str, Any]], fisher: Fisher, defaults: dict[str, Any]) -> None:
        super().__init__(groups, defaults)
        self.fisher = fisher

    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Run the closure, in which Lightning's forward and backward live, then take one step.

        Args:
            closure: Computes gradients.

        Returns:
            What the closure returns.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        with torch.no_grad():
            self.move()
        return loss

    @abstractmethod
    def move(self) -> None:
        """Change the deltas by their gradients."""

    def directions(self) -> Iterator[tuple[dict[str, Any], dict[str, Tensor], Deltas]]:
        """The preconditioned gradients.

        Yields:
            Of each layer its group, its stacked deltas by name, and ``F⁻¹`` times their gradients.
        """
        for group in self.param_groups:
            stacks = dict(zip(group["names"], group["params"], strict=True))
            gradients = {name: stack.grad for name, stack in stacks.items() if stack.grad is not None}
            yield group, stacks, self.fisher.precondition(gradients)
