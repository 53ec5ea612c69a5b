"""What the optimizers of deltas share: Lightning's closure, the layers as groups, and an optimizer for each target."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Collection, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from lightning_unlearn.errors import InputError
from lightning_unlearn.fingerprints import public_name
from lightning_unlearn.fisher import Fisher
from lightning_unlearn.strategies.base import Deltas, Problem

OptimizerFactory = Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer]


def layer_groups(problem: Problem) -> list[dict[str, Any]]:
    """One parameter group a layer, since a Fisher may join a layer's weight and bias.

    Args:
        problem: With the deltas.

    Returns:
        For each layer ``{"params": [...], "names": [...]}``: its stacked deltas and their names.
    """
    return [{"params": [problem.deltas[name] for name in names], "names": names} for names in problem.layers.values()]


class DeltaOptimizer(torch.optim.Optimizer):
    """Moves stacked deltas by their gradients.

    Args:
        groups: As :func:`layer_groups` makes them.
        defaults: As torch's.
    """

    def __init__(self, groups: list[dict[str, Any]], defaults: dict[str, Any]) -> None:
        super().__init__(groups, defaults)

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

    def stacks(self) -> dict[str, nn.Parameter]:
        """The stacked deltas.

        Returns:
            Parameter name to ``(Q, *parameter)``.
        """
        return {
            name: stack
            for group in self.param_groups
            for name, stack in zip(group["names"], group["params"], strict=True)
        }


def preconditioned(
    optimizer: DeltaOptimizer, fisher: Fisher
) -> Iterator[tuple[dict[str, Any], dict[str, Tensor], Deltas]]:
    """The preconditioned gradients of an optimizer's deltas.

    Args:
        optimizer: After a backward pass.
        fisher: Finalized.

    Yields:
        Of each layer its group, its stacked deltas by name, and ``F⁻¹`` times their gradients.
    """
    for group in optimizer.param_groups:
        stacks = dict(zip(group["names"], group["params"], strict=True))
        gradients = {name: stack.grad for name, stack in stacks.items() if stack.grad is not None}
        yield group, stacks, fisher.precondition(gradients)


class TargetOptimizers(DeltaOptimizer):
    """An optimizer for each target, so that none depends on another, and one can stop while others go on.

    Args:
        groups: As :func:`layer_groups` makes them.
        targets: ``Q`` names, for messages.
        optimizer: Makes the optimizer of one target's deltas.
        moving: Names of the parameters whose deltas move; all by default.

    Attributes:
        finished: Targets that stay where they are.
    """

    def __init__(
        self,
        groups: list[dict[str, Any]],
        targets: list[str],
        optimizer: OptimizerFactory,
        moving: Collection[str] | None = None,
    ) -> None:
        super().__init__(groups, {})
        self.targets = targets
        stacks = {name: stack for name, stack in self.stacks().items() if moving is None or name in moving}
        # Rows of the stacks, in their memory.
        self.rows = [
            {name: nn.Parameter(stack.detach()[number]) for name, stack in stacks.items()}
            for number in range(len(targets))
        ]
        try:
            self.optimizers = [optimizer(list(rows.values())) for rows in self.rows]
        except (TypeError, ValueError) as error:
            raise InputError(f"The optimizer can't be used for these weights ({error}); choose another.") from error
        self.finished = [False] * len(targets)

    def move_by(self, gradients: Deltas) -> None:
        """Take one step of each target that is not finished.

        Args:
            gradients: Parameter name to ``(Q, *parameter)``.
        """
        for number, (rows, optimizer) in enumerate(zip(self.rows, self.optimizers, strict=True)):
            if not self.finished[number]:
                for name, row in rows.items():
                    row.grad = gradients[name][number]
                optimizer.step()
                optimizer.zero_grad()

    def state_dict(self) -> dict[str, Any]:
        """The state, with that of each target's optimizer.

        Returns:
            As torch's, and ``targets`` and ``finished``.
        """
        return {
            **super().state_dict(),
            "targets": [optimizer.state_dict() for optimizer in self.optimizers],
            "finished": list(self.finished),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take a state that :meth:`state_dict` gave.

        Args:
            state_dict: Of as many targets.
        """
        super().load_state_dict(state_dict)
        for optimizer, state in zip(self.optimizers, state_dict["targets"], strict=True):
            optimizer.load_state_dict(state)
        self.finished = list(state_dict["finished"])


def optimizer_settings(optimizer: OptimizerFactory) -> dict[str, Any]:
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
            f"{name}'s weight_decay of {decay:.3g} pulls deltas towards zero beside the objective; set it to 0."
        )
    # As JSON has it: a checkpoint holds these, and tuples would come back from run.json as lists.
    arguments = {name: list(value) if isinstance(value, tuple) else value for name, value in made.defaults.items()}
    plain = {
        name: value if isinstance(value, bool | int | float | str | list | None) else str(value)
        for name, value in arguments.items()
    }
    return {"class": public_name(f"{type(made).__module__}.{type(made).__qualname__}"), **plain}
