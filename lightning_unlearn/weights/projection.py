r"""Random projections that bring per-sample gradients to few numbers without ever making a gradient.

A layer's gradient of one sample is :math:`G = Σ_t g_t a_t^\top`. Projected from both sides it is

.. math:: P_o\, G\, P_i^\top = Σ_t (P_o g_t)(P_i a_t)^\top ,

``k × k`` numbers of a matrix ``o × i``, for the cost of two thin products a position. The rows of :math:`P` span a
random space, uniformly drawn, and are orthogonal and of squared length ``d / k`` where a side has ``d`` numbers: inner
products are then kept on average (Johnson and Lindenstrauss, 1984; from two sides, as in LoGra, arXiv 2405.13954), with
less scatter than of independent normal entries. A side that is no longer than ``k`` stays as it is.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from lightning_unlearn.errors import InputError
from lightning_unlearn.fingerprints import generator_for
from lightning_unlearn.weights.capture import CapturedLayer
from lightning_unlearn.weights.parameters import LayerSpec


@dataclass(frozen=True)
class Projection:
    """A two-sided projection of each layer.

    Args:
        layers: Layer name to its shape.
        side: k, how many numbers a side has at most.
        seed: Of the entries.
    """

    layers: Mapping[str, LayerSpec]
    side: int
    seed: int = 0
    _matrices: dict[tuple[str, str, torch.dtype, torch.device], Tensor] = field(
        default_factory=dict, init=False, repr=False, compare=False
    )

    @classmethod
    def within(cls, layers: Mapping[str, LayerSpec], numbers: int, side: int, seed: int = 0) -> Projection:
        """The widest projection that gives no more than so many numbers a sample.

        Args:
            layers: Layer name to its shape.
            numbers: At most.
            side: k, at most.
            seed: Of the entries.

        Returns:
            The projection.

        Raises:
            InputError: If even one number a side is too many.
        """
        for tried in range(side, 0, -1):
            found = cls(layers, tried, seed)
            if found.numbers <= numbers:
                return found
        raise InputError(
            f"{len(layers)} layers give {cls(layers, 1, seed).numbers} numbers a sample where each gives one for its "
            f"weight and one for its bias, but only {numbers} are wanted; choose fewer layers, or more numbers."
        )

    @property
    def sizes(self) -> dict[str, int]:
        """Parameter name to how many numbers are left of its gradient."""
        sizes: dict[str, int] = {}
        for name, spec in self.layers.items():
            outputs = min(self.side, spec.weight_shape[0])
            sizes[f"{name}.weight"] = outputs * min(self.side, _inputs(spec))
            if spec.has_bias:
                sizes[f"{name}.bias"] = outputs
        return sizes

    @property
    def numbers(self) -> int:
        """How many numbers are left of a sample's gradient."""
        return sum(self.sizes.values())

    def settings(self) -> dict[str, Any]:
        """What tells this projection from others of the same layers, as JSON.

        Returns:
            Its numbers.
        """
        return {"side": self.side, "seed": self.seed}

    def of(self, name: str, layer: CapturedLayer) -> dict[str, Tensor]:
        """What is left of each sample's gradient of one layer.

        Args:
            name: The layer's.
            layer: What was captured, of ``B`` samples.

        Returns:
            Parameter name to ``(B, numbers)``.
        """
        inputs = self._onto(name, "inputs", layer.inputs)  # (B, T, k)
        gradients = self._onto(name, "outputs", layer.output_gradients)  # (B, T, k)
        found = {f"{name}.weight": torch.bmm(gradients.mT, inputs).flatten(1)}
        if self.layers[name].has_bias:
            found[f"{name}.bias"] = gradients.sum(1)
        return found

    def _onto(self, name: str, which: str, values: Tensor) -> Tensor:
        if values.shape[-1] <= self.side:
            return values
        key = (name, which, values.dtype, values.device)
        if key not in self._matrices:
            drawn = _orthogonal(values.shape[-1], self.side, generator_for("projection", self.seed, name, which))
            self._matrices[key] = drawn.to(values)
        return values @ self._matrices[key]


def _inputs(spec: LayerSpec) -> int:
    """How many inputs a position has: those of a patch for a convolution."""
    return math.prod(spec.weight_shape[1:])


def _orthogonal(length: int, side: int, generator: torch.Generator) -> Tensor:
    """``(length, side)`` float64: columns that span a uniformly drawn space, of squared length ``length / side``."""
    drawn = torch.randn(length, side, generator=generator, dtype=torch.float64)
    found, upper = torch.linalg.qr(drawn)
    # With a positive diagonal the factors are unique, whichever library takes them.
    columns: Tensor = found * upper.diagonal().sign() * (length / side) ** 0.5
    return columns
