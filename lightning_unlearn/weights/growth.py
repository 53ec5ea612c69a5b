r"""Whether what was captured of a layer is what its parameters' own gradients grew by.

Captured inputs and output gradients give a sample's gradient only if the layer is what it seems:
:math:`y = W a + b` with its own weight, used nowhere else. Then their sum over rows is the gradient :math:`G` that the
backward pass leaves at the weight,

.. math:: \sum_n g_n a_n^\top = G .

Both sides are compared by what they give between fixed random vectors, :math:`u_k^\top G v_k` and
:math:`\sum_n (g_n \cdot u_k)(a_n \cdot v_k)`: for independent standard normal vectors the mean square of their
difference is the squared Frobenius norm of the matrices' difference (the idea is Freivalds', 1979). That costs some
:math:`8 (i + o)` operations a row and never forms a matrix, so every backward pass that counts is checked.

A hook on a parameter sees its gradient before it is added to ``.grad``: before any reduction over ranks, before scaling
is undone and before clipping.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from lightning_unlearn.weights.capture import Use
from lightning_unlearn.weights.rounding import PROBES, Grown, Summed, beyond_rounding, unit_of


class GradientGrowth:
    """Notes what the parameters of layers get in backward passes, as numbers.

    Args:
        layers: Layer name to Linear or Conv2d.
        on_layer: Called during a backward pass with the name of a layer all of whose parameters have got a gradient;
            again, if checkpointing brings it in parts.

    Attributes:
        accumulated: Whether any ``.grad`` grew since the last :meth:`take`: a backward pass, and no
            ``torch.autograd.grad``.
    """

    def __init__(self, layers: Mapping[str, nn.Module], on_layer: Callable[[str], None] | None = None) -> None:
        self.layers = dict(layers)
        self._on_layer = on_layer
        self.enabled = True
        self.accumulated = False
        self._handles: list[RemovableHandle] = []
        self._hooked: dict[int, Tensor] = {}  # parameters by identity; sharding has several that take turns
        self._seen: dict[tuple[str, str], Grown] = {}
        self._vectors: dict[tuple[int, torch.device, torch.dtype, str], Tensor] = {}

    def attach(self) -> None:
        """Put hooks on the layers, so that parameters are found where sharding swaps them for a forward pass."""

        def look(name: str) -> Any:
            def hook(layer: nn.Module, arguments: Any) -> None:
                if self.enabled:
                    self._look_at(name)

            return hook

        for name, layer in self.layers.items():
            self._handles.append(
                layer.register_forward_pre_hook(torch.compiler.disable(look(name)))  # type: ignore[no-untyped-call]
            )
        self.look()

    def look(self) -> None:
        """Put hooks on parameters that have none, for layers that are never called, too."""
        for name in self.layers:
            self._look_at(name)

    def _look_at(self, name: str) -> None:
        for kind in ("weight", "bias"):
            parameter = getattr(self.layers[name], kind)
            if parameter is None or not parameter.requires_grad or id(parameter) in self._hooked:
                continue
            if not parameter.is_leaf:
                continue  # of a parametrisation: nothing will be seen, and that is refused
            self._hooked[id(parameter)] = parameter
            self._handles.append(parameter.register_hook(self._note(name, kind)))
            self._handles.append(parameter.register_post_accumulate_grad_hook(self._note_backward(name)))

    def _note_backward(self, name: str) -> Any:
        def hook(parameter: Tensor) -> None:
            self.accumulated |= self.enabled
            kinds = [kind for kind in ("weight", "bias") if getattr(self.layers[name], kind) is not None]
            if self.enabled and self._on_layer is not None and all((name, kind) in self._seen for kind in kinds):
                self._on_layer(name)

        return hook

    def _note(self, name: str, kind: str) -> Any:
        def hook(gradient: Tensor) -> None:
            if not self.enabled:
                return
            with torch.autocast(gradient.device.type, enabled=False):
                grown = self.grown(name, kind, gradient.detach())
            before = self._seen.get((name, kind))
            if before is not None:  # checkpointing may bring a gradient in parts
                probes, square = grown.probes + before.probes, grown.square + before.square
                grown = Grown(probes, square, grown.floor + before.floor, grown.unit)
            self._seen[name, kind] = grown

        return hook

    def grown(self, name: str, kind: str, gradient: Tensor) -> Grown:
        """The numbers of a gradient.

        Args:
            name: Of its layer.
            kind: ``weight`` or ``bias``.
            gradient: It.

        Returns:
            Its numbers.
        """
        about = torch.finfo(gradient.dtype)
        # What is below the smallest number that float16 holds is 0 in its result.
        floor = about.smallest_normal * about.eps * gradient.numel() ** 0.5
        wide = gradient.to(torch.promote_types(gradient.dtype, torch.float32))
        outputs = self._probes(wide.shape[0], wide, "outputs")  # (o, k)
        if kind == "bias":
            values = wide @ outputs
        else:
            matrix = wide.flatten(1)  # (o, i)
            values = ((matrix @ self._probes(matrix.shape[1], wide, "inputs")) * outputs).sum(0)
        unit = unit_of(gradient.dtype, gradient.device.type, self.layers[name])
        return Grown(values.double(), wide.square().sum().double(), floor, unit)

    def _probes(self, size: int, like: Tensor, side: str) -> Tensor:
        """Random vectors ``(size, PROBES)``, the same each time."""
        key = (size, like.device, like.dtype, side)
        if key not in self._vectors:
            generator = torch.Generator().manual_seed(2 * size + (side == "inputs"))
            drawn = torch.randn(size, PROBES, generator=generator, dtype=torch.float64)
            self._vectors[key] = drawn.to(like.device, like.dtype)
        return self._vectors[key]

    def take(self) -> dict[tuple[str, str], Grown]:
        """What was noted since the last call, and start anew.

        Returns:
            Layer name and ``weight`` or ``bias`` to what :meth:`differences` compares.
        """
        seen, self._seen, self.accumulated = self._seen, {}, False
        return seen

    def summed(self, name: str, uses: Sequence[Use]) -> Summed:
        """The numbers of what was captured of a layer.

        Args:
            name: The layer's.
            uses: Its uses in one backward pass, at least one.

        Returns:
            Their numbers.
        """
        terms: dict[str, list[Tensor]] = {"weight": [], "bias": []}
        for use in uses:
            inputs, gradients = use.layer.inputs.flatten(0, 1), use.layer.output_gradients.flatten(0, 1)
            left = gradients @ self._probes(gradients.shape[1], gradients, "outputs")  # (n, k)
            terms["bias"].append(left)
            terms["weight"].append(left * (inputs @ self._probes(inputs.shape[1], inputs, "inputs")))
        unit = max(unit_of(use.dtype, gradients.device.type, self.layers[name]) for use in uses)
        width = inputs.shape[1] + gradients.shape[1]
        return Summed({kind: _numbers(parts) for kind, parts in terms.items()}, unit, width)

    def differences(
        self, captured: Mapping[str, Summed], grown: Mapping[tuple[str, str], Grown]
    ) -> tuple[Tensor, list[tuple[str, str]]]:
        """How far what was captured is from what gradients grew by, in units of what rounding may do.

        Args:
            captured: Layer name to what :meth:`summed` gave.
            grown: What :meth:`take` gave after the same backward pass.

        Returns:
            ``(P,)``, above 1 where they differ and NaN where a gradient is not finite; and whose they are.
        """
        names: list[tuple[str, str]] = []
        ratios: list[Tensor] = []
        for name, layer in self.layers.items():
            for kind in ("weight", "bias"):
                if getattr(layer, kind) is not None and (name in captured or (name, kind) in grown):
                    names.append((name, kind))
                    ratios.append(beyond_rounding(captured.get(name), grown.get((name, kind)), kind))
        device = ratios[0].device if ratios else None
        return torch.stack([ratio.to(device) for ratio in ratios]) if ratios else torch.zeros(0), names

    def detach(self) -> None:
        """Take the hooks off."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._hooked.clear()
        self._seen.clear()


def _numbers(parts: Sequence[Tensor]) -> Tensor:
    """Of terms ``(n, PROBES)``, use by use, what :class:`Summed` holds."""
    joined = torch.cat([*parts]).double()  # whose squares float32 may not hold
    between = torch.zeros_like(joined[0])
    if len(parts) > 1:
        # A use's product is rounded, and so is the sum with those before it, the last use first.
        sums = torch.stack([part.double().sum(0) for part in reversed(parts)])
        between = sums.square().sum(0) + sums.cumsum(0)[1:].square().sum(0)
    partial = joined.cumsum(0)
    return torch.stack(
        [joined.sum(0), joined.square().sum(0), partial.square().sum(0).sqrt(), between, partial.abs().sum(0)]
    )
