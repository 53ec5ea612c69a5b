"""Deltas under autocast: added in float32, since ``θ₀ + δ`` cast to half precision would lose them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn


@contextmanager
def added_deltas(layers: Mapping[str, nn.Module], deltas: Mapping[str, Tensor], target: int) -> Iterator[None]:
    """While it lasts, each layer gives ``W₀ a + δ a`` with the second term in float32, outside of autocast.

    Args:
        layers: Layer name to Linear or Conv2d.
        deltas: Parameter name to ``(Q, *parameter)``.
        target: Number of the target.

    Yields:
        Nothing.
    """
    handles = []
    for name, layer in layers.items():
        bias = deltas.get(f"{name}.bias")
        hook = _adding(deltas[f"{name}.weight"][target], None if bias is None else bias[target])
        handles.append(layer.register_forward_hook(hook))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _adding(weight: Tensor, bias: Tensor | None) -> Any:
    def hook(layer: nn.Module, arguments: tuple[Tensor, ...], output: Tensor) -> Tensor:
        inputs = arguments[0].float()
        with torch.autocast(inputs.device.type, enabled=False):
            if isinstance(layer, nn.Conv2d):
                assert not isinstance(layer.padding, str)
                term = nn.functional.conv2d(inputs, weight, bias, layer.stride, layer.padding, layer.dilation)
            else:
                term = nn.functional.linear(inputs, weight, bias)
            # The sum stays in float32: what comes next casts it, and rounds once instead of twice.
            return output.float() + term

    return hook
