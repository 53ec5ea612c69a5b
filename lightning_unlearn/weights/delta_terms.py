"""Deltas as terms of their own beside what a layer gives, where adding them to its weights would lose them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from lightning_unlearn.weights.precision import without_autocast


class DeltaTerms:
    """While it holds something, each chosen layer gives ``W₀ a + δ a`` with the second term in float32.

    ``θ₀ + δ`` rounded to half precision would lose the delta. Base losses take the same way, without the second term,
    so that a delta of zero gives deviations of zero. What is held stays until something else is held or it is let go:
    with gradient checkpointing layers are computed once more in the backward pass, and must then be what they were.

    Args:
        layers: Layer name to Linear or Conv2d.
    """

    def __init__(self, layers: Mapping[str, nn.Module]) -> None:
        self._layers = dict(layers)
        self._handles: list[RemovableHandle] = []
        # Layer name to what is added to its weight and bias.
        self._terms: dict[str, tuple[Tensor | None, Tensor | None]] = {}

    def hold(self, deltas: Mapping[str, Tensor]) -> None:
        """Add deltas from here on.

        Args:
            deltas: Parameter name to delta, float32 or wider; layers without one give what they give, in float32.

        Raises:
            ValueError: If one is of another layer.
        """
        beside = deltas.keys() - {f"{name}.{kind}" for name in self._layers for kind in ("weight", "bias")}
        if beside:
            raise ValueError(f"{min(beside)} is no weight of the layers that were chosen.")
        self._terms = {name: (deltas.get(f"{name}.weight"), deltas.get(f"{name}.bias")) for name in self._layers}
        if not self._handles:
            self._handles = [
                layer.register_forward_hook(self._hook(name), with_kwargs=True) for name, layer in self._layers.items()
            ]

    def release(self) -> None:
        """Add nothing from here on, and leave layers as they were."""
        for handle in self._handles:
            handle.remove()
        self._handles, self._terms = [], {}

    def _hook(self, name: str) -> Any:
        def hook(layer: nn.Module, arguments: tuple[Tensor, ...], named: dict[str, Tensor], output: Tensor) -> Tensor:
            weight, bias = self._terms[name]
            wide = torch.promote_types(output.dtype, torch.float32)
            if weight is None:
                return output.to(wide)
            inputs = (arguments[0] if arguments else named["input"]).to(wide)
            with without_autocast(inputs.device):
                if isinstance(layer, nn.Conv2d):
                    assert not isinstance(layer.padding, str)
                    term = nn.functional.conv2d(
                        inputs, weight, bias, layer.stride, layer.padding, layer.dilation, layer.groups
                    )
                else:
                    term = nn.functional.linear(inputs, weight, bias)
            # The sum stays wide: what comes next casts it, and rounds once instead of twice.
            return output.to(wide) + term

        return hook
