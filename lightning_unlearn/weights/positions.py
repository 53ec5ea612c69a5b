"""A layer's input and output gradient in one form, whatever kind of layer it is."""

from __future__ import annotations

import torch
from torch import Tensor, nn


def positions_of(layer: nn.Module, inputs: Tensor, gradients: Tensor) -> tuple[Tensor, Tensor]:
    """Bring a layer's input and output gradient to one form, float32 or wider.

    Args:
        layer: Linear or Conv2d.
        inputs: What it was called with, the batch first.
        gradients: The gradient at its output.

    Returns:
        ``(B, T, i)`` and ``(B, T, o)``.
    """
    inputs = inputs.to(torch.promote_types(inputs.dtype, torch.float32))
    gradients = gradients.to(torch.promote_types(gradients.dtype, inputs.dtype))
    inputs = inputs.to(gradients.dtype)
    if isinstance(layer, nn.Conv2d):
        assert not isinstance(layer.padding, str)
        if inputs.ndim == 3:  # without a batch: one row
            inputs, gradients = inputs[None], gradients[None]
        # (B, i, T)
        patches = nn.functional.unfold(inputs, layer.kernel_size, layer.dilation, layer.padding, layer.stride)
        return patches.mT, gradients.flatten(2).mT
    if inputs.ndim == 1:
        inputs, gradients = inputs[None], gradients[None]
    return inputs.reshape(len(inputs), -1, inputs.shape[-1]), gradients.reshape(len(gradients), -1, gradients.shape[-1])
