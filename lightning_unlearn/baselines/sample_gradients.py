"""What is known of the gradients of some samples, and their products with others."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

# Columns of gradients that are widened to float64 at a time.
COLUMNS = 2**15


@dataclass(frozen=True)
class Gradients:
    """What is known of ``B`` samples.

    Attributes:
        parameters: Parameter name (or ``"projection"``) to gradients ``(B, numel)``, float32 or wider, on the CPU.
            Where the subject projects gradients, the numbers that are left of each; of a sketch there is one, named
            ``"sketch"``.
        errors: ``(B,)`` float64: each sample's root mean squared error of the prediction (the root of the loss), mean
            over its views.
        losses: ``(B,)`` float64: each sample's loss, mean over its views.
    """

    parameters: Mapping[str, Tensor]
    errors: Tensor
    losses: Tensor

    def __len__(self) -> int:
        return len(self.errors)

    def rows(self, numbers: Sequence[int]) -> Gradients:
        """Some of the samples.

        Args:
            numbers: Which, in the wanted order.

        Returns:
            Their gradients.
        """
        rows = torch.tensor(numbers)
        chosen = {name: gradient[rows] for name, gradient in self.parameters.items()}
        return Gradients(chosen, self.errors[rows], self.losses[rows])

    def wide(self) -> Tensor:
        """All parameters' gradients side by side.

        Returns:
            ``(B, P)`` float64.
        """
        return torch.cat([gradient.double() for gradient in self.parameters.values()], 1)

    def squared_norms(self) -> Tensor:
        """The squared length of each sample's gradient.

        Returns:
            ``(B,)`` float64.
        """
        rows = [gradient.double().square().sum(1) for gradient in self.parameters.values()]
        return torch.stack(rows).sum(0)

    def products(self, others: Mapping[str, Tensor]) -> Tensor:
        """Dot products with other gradients.

        Args:
            others: Parameter name to ``(M, numel)``.

        Returns:
            ``(B, M)`` float64.
        """
        total = torch.zeros(len(self), len(next(iter(others.values()))), dtype=torch.float64)
        for name, other in others.items():
            for ours, theirs in zip(
                *(torch.split(rows, COLUMNS, 1) for rows in (self.parameters[name], other)), strict=True
            ):
                total += ours.double() @ theirs.double().mT
        return total


def join(parts: Sequence[Gradients]) -> Gradients:
    """The gradients of several batches, one after the other.

    Args:
        parts: At least one.

    Returns:
        Of all their samples.
    """
    names = parts[0].parameters
    return Gradients(
        {name: torch.cat([part.parameters[name] for part in parts]) for name in names},
        torch.cat([part.errors for part in parts]),
        torch.cat([part.losses for part in parts]),
    )
