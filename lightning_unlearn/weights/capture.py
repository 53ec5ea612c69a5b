"""Per-sample gradients of chosen layers out of one ordinary backward pass, by hooks on inputs and output gradients.

A sample's gradient of a Linear weight is ``Σ_t g_t a_tᵀ`` over its positions ``t``, with the layer's input
``a (B, T, i)`` and the gradient ``g (B, T, o)`` at its output; a Conv2d is the same over its patches. The mean gradient
that a training step leaves in ``.grad`` can't give this: ``(mean g)² ≠ mean g²``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from lightning_unlearn.errors import InputError


@dataclass(frozen=True)
class CapturedLayer:
    """What one backward pass tells of one layer.

    Attributes:
        inputs: ``a``, ``(B, T, i)``; for Conv2d ``i`` runs over input channels and kernel positions.
        output_gradients: ``g``, ``(B, T, o)``.
    """

    inputs: Tensor
    output_gradients: Tensor

    def __len__(self) -> int:
        return len(self.inputs)

    def scaled(self, factors: Tensor | float) -> CapturedLayer:
        """The same with each sample's gradient multiplied.

        Args:
            factors: A number, or ``(B,)``.

        Returns:
            A layer whose gradients are scaled.
        """
        if isinstance(factors, Tensor):
            factors = factors.to(self.output_gradients)[:, None, None]
        return CapturedLayer(self.inputs, self.output_gradients * factors)

    def weight_gradients(self) -> Tensor:
        """Each sample's gradient of the weight, Conv2d kernels flattened.

        Returns:
            ``(B, o, i)``.
        """
        return torch.bmm(self.output_gradients.mT, self.inputs)

    def bias_gradients(self) -> Tensor:
        """Each sample's gradient of the bias.

        Returns:
            ``(B, o)``.
        """
        return self.output_gradients.sum(1)


class GradientCapture:
    """Watches layers during backward passes; use as a context manager, or call :meth:`attach` and :meth:`detach`.

    Nothing of the computation is changed. Forward passes without gradient are not seen. A layer that is used several
    times in one forward pass gives the sum of its uses (positions are put one after the other). When gradient
    checkpointing runs a layer again, only the run through which the gradient flows counts, since capture happens on
    gradients.

    Args:
        layers: Layer name to Linear or Conv2d; the batch is the first dimension of their inputs.

    Example:
        >>> layer = nn.Linear(3, 2)
        >>> with GradientCapture({"layer": layer}) as capture:
        ...     layer(torch.ones(4, 3)).sum().backward()
        >>> gradients = capture.take()["layer"].weight_gradients()
        >>> assert torch.equal(gradients.sum(0), layer.weight.grad) and gradients.shape == (4, 2, 3)
    """

    def __init__(self, layers: Mapping[str, nn.Module]) -> None:
        self.layers = dict(layers)
        self.enabled = True
        self._handles: list[RemovableHandle] = []
        self._captured: dict[str, list[tuple[Tensor, Tensor]]] = {}

    def attach(self) -> None:
        """Put the hooks on the layers."""
        for name, layer in self.layers.items():
            self._handles.append(layer.register_forward_hook(self._forward_hook(name), with_kwargs=True))

    @property
    def pending(self) -> bool:
        """Whether gradients were captured that nobody took."""
        return bool(self._captured)

    def clear(self) -> None:
        """Forget what was captured."""
        self._captured = {}

    def detach(self) -> None:
        """Take the hooks off and forget what was captured."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self.clear()

    def __enter__(self) -> GradientCapture:
        self.attach()
        return self

    def __exit__(self, *exception: object) -> None:
        # What was captured stays for take(); only the hooks go.
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def _forward_hook(self, name: str) -> Any:
        def hook(layer: nn.Module, arguments: tuple[Tensor, ...], keywords: dict[str, Tensor], output: Tensor) -> None:
            if not (self.enabled and output.requires_grad):
                return
            inputs = (arguments[0] if arguments else keywords["input"]).detach()

            def on_gradient(gradient: Tensor) -> None:
                self._captured.setdefault(name, []).append((inputs, gradient.detach()))

            output.register_hook(on_gradient)  # type: ignore[no-untyped-call]

        return hook

    def take(self) -> dict[str, CapturedLayer]:
        """What was captured since the last call, and start anew.

        Returns:
            Layer name to what was captured, float32 or wider; layers that no gradient reached are left out.

        Raises:
            InputError: If layers saw different numbers of rows, so that rows can't be samples.
        """
        captured, self._captured = self._captured, {}
        taken = {name: _join(name, self.layers[name], uses) for name, uses in captured.items()}
        rows = {len(layer) for layer in taken.values()}
        if len(rows) > 1:
            example = {len(layer): name for name, layer in taken.items()}
            raise InputError(
                "Layers see different numbers of rows in one batch ("
                + ", ".join(f"{name}: {count}" for count, name in sorted(example.items()))
                + "), so a row is not a sample; choose other layers by patterns."
            )
        return taken


def _join(name: str, layer: nn.Module, uses: list[tuple[Tensor, Tensor]]) -> CapturedLayer:
    pairs = [_positions(layer, inputs, gradients) for inputs, gradients in uses]
    if len(pairs) == 1:
        return CapturedLayer(*pairs[0])
    if len({len(inputs) for inputs, _ in pairs}) > 1:
        raise InputError(
            f"Layer {name} was used on different numbers of rows in one backward pass, so a row is not a sample; "
            "leave it out by patterns."
        )
    return CapturedLayer(torch.cat([pair[0] for pair in pairs], 1), torch.cat([pair[1] for pair in pairs], 1))


def _positions(layer: nn.Module, inputs: Tensor, gradients: Tensor) -> tuple[Tensor, Tensor]:
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
        # (B, i, T)
        patches = nn.functional.unfold(inputs, layer.kernel_size, layer.dilation, layer.padding, layer.stride)
        return patches.mT, gradients.flatten(2).mT
    return inputs.reshape(len(inputs), -1, inputs.shape[-1]), gradients.reshape(len(gradients), -1, gradients.shape[-1])
