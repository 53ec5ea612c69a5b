"""No Fisher at all: plain gradient ascent, to show what the Fisher is for."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor

from lightning_unlearn.errors import InputError
from lightning_unlearn.fisher.base import Fisher
from lightning_unlearn.weights.capture import CapturedLayer


class IdentityFisher(Fisher):
    """The identity in the place of Fisher information, so that a step is one of plain gradient ascent.

    Wang et al. (arXiv 2406.09408, Table 2) find it no better than chance on their data: nothing holds everything else
    in place. It needs no pass over the data and no file: ``fisher: identity``.

    Args:
        layers: The layers it covers, by name.
    """

    kind: ClassVar[str] = "identity"

    def update(self, captured: Mapping[str, CapturedLayer]) -> None:
        """Count the samples.

        Args:
            captured: Layer name to per-sample gradients.
        """
        self.count += max(len(layer) for layer in captured.values())

    def tensors(self) -> dict[str, Tensor]:
        """There are none.

        Returns:
            Nothing.
        """
        return {}

    def load_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        """There are none.

        Args:
            tensors: Nothing.

        Raises:
            InputError: If there are some.
        """
        if tensors:
            raise InputError("An identity holds no sums; this is the file of another Fisher.")

    def finalize(self, damping: float) -> None:
        """Nothing to do: a multiple of the identity is as good.

        Args:
            damping: Of no effect.
        """

    def precondition(self, gradients: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The gradients as they are.

        Args:
            gradients: Parameter name to ``(*, *parameter)``.

        Returns:
            The same.
        """
        return dict(gradients)

    def quadratic(self, delta: Mapping[str, Tensor]) -> Tensor:
        """The squared length.

        Args:
            delta: Parameter name to ``(*, *parameter)``.

        Returns:
            ``(*,)``.
        """
        shapes = self.parameter_shapes
        terms = [
            change.square().sum(tuple(range(change.ndim - len(shapes[name]), change.ndim)))
            for name, change in delta.items()
        ]
        return torch.stack(terms).sum(0)
