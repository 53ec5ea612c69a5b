"""Inputs of layers, kept as autograd keeps what it needs for the backward pass."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


class KeptInputs:
    """Keeps layers' inputs until their gradients come, and nothing that checkpointing or offloading has freed."""

    def __init__(self) -> None:
        self._cast: tuple[weakref.ref[Tensor], int, Tensor] | None = None  # the last input, its version, and its copy

    def clear(self) -> None:
        """Forget the last input."""
        self._cast = None

    def keep(self, inputs: Tensor, output: Tensor) -> Callable[[], Tensor]:
        """Keep an input.

        Args:
            inputs: What a layer was called with.
            output: What it gave.

        Returns:
            A function that gives the input, during backward, in the type that the layer worked in; it raises a
            ``RuntimeError`` if the input was changed in place meanwhile.
        """
        one = torch.zeros((), requires_grad=True)
        kept = _Saved.apply(one, self._as_used(inputs, output))  # type: ignore[no-untyped-call]

        def give() -> Tensor:
            (found,) = kept.grad_fn.saved_tensors
            assert isinstance(found, Tensor)
            return found

        return give

    def _as_used(self, inputs: Tensor, output: Tensor) -> Tensor:
        """The input in the type that the layer worked in.

        Under autocast that is a copy, so that the input may be changed in place afterwards: others may do so, since the
        layer keeps a copy, too.

        Returns:
            It, detached.
        """
        narrower = inputs.dtype != output.dtype == torch.promote_types(inputs.dtype, output.dtype)
        if inputs.dtype == output.dtype or narrower:
            return inputs.detach()
        # Many layers read the same text: one copy for those that come one after the other.
        if self._cast is not None:
            source, version, copy = self._cast
            if source() is inputs and version == inputs._version and copy.dtype == output.dtype:
                return copy
        copy = inputs.detach().to(output.dtype)
        self._cast = (weakref.ref(inputs), inputs._version, copy)
        return copy


class _Saved(torch.autograd.Function):
    """Saves a tensor by autograd's own means, whose hooks checkpointing and offloading use."""

    @staticmethod
    def forward(ctx: Any, anchor: Tensor, kept: Tensor) -> Tensor:
        ctx.save_for_backward(kept)
        return anchor.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[None, None]:
        return None, None  # nobody asks
