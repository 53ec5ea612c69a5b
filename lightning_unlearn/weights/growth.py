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

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from lightning_unlearn.weights.capture import Use

PROBES = 8

# How many standard deviations of rounding are let through. A sum of n terms, each rounded by chance, is off by some
# sqrt(n) units of its terms (Higham and Mary, SIAM J. Sci. Comput. 41, 2019): 8 of those are never seen, and a layer
# that is not what it seems is off by far more.
ROUNDINGS = 8.0


@dataclass(frozen=True)
class Grown:
    """What a parameter's gradient grew by in a backward pass, as numbers.

    Attributes:
        probes: ``(PROBES,)`` float64: what it gives between the random vectors.
        square: Its squared norm, a float64 scalar.
        floor: What underflow may hide of its norm.
        unit: The unit roundoff of its type.
    """

    probes: Tensor
    square: Tensor
    floor: float
    unit: float


class GradientGrowth:
    """Notes what the parameters of layers get in backward passes, as numbers.

    Args:
        layers: Layer name to Linear or Conv2d.

    Attributes:
        accumulated: Whether any ``.grad`` grew since the last :meth:`take`: a backward pass, and no
            ``torch.autograd.grad``.
    """

    def __init__(self, layers: Mapping[str, nn.Module]) -> None:
        self.layers = dict(layers)
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
            self._handles.append(parameter.register_post_accumulate_grad_hook(self._note_backward))

    def _note_backward(self, parameter: Tensor) -> None:
        self.accumulated |= self.enabled

    def _note(self, name: str, kind: str) -> Any:
        def hook(gradient: Tensor) -> None:
            if not self.enabled:
                return
            about = torch.finfo(gradient.dtype)
            # What is below the smallest number that float16 holds is 0 in its result.
            floor = about.smallest_normal * about.eps * gradient.numel() ** 0.5
            wide = gradient.detach().to(torch.promote_types(gradient.dtype, torch.float32))
            outputs = self._probes(wide.shape[0], wide, "outputs")  # (o, k)
            if kind == "bias":
                values = wide @ outputs
            else:
                matrix = wide.flatten(1)  # (o, i)
                values = ((matrix @ self._probes(matrix.shape[1], wide, "inputs")) * outputs).sum(0)
            probes, square = values.double(), wide.square().sum().double()
            before = self._seen.get((name, kind))
            if before is not None:  # checkpointing may bring a gradient in parts
                probes, square, floor = probes + before.probes, square + before.square, floor + before.floor
            self._seen[name, kind] = Grown(probes, square, floor, unit_of(gradient.dtype))

        return hook

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

    def differences(
        self, captured: Mapping[str, Sequence[Use]], grown: Mapping[tuple[str, str], Grown]
    ) -> tuple[Tensor, list[tuple[str, str]]]:
        """How far what was captured is from what gradients grew by, in units of what rounding may do.

        Args:
            captured: Layer name to its uses.
            grown: What :meth:`take` gave after the same backward pass.

        Returns:
            ``(P,)``, above 1 where they differ and NaN where a gradient is not finite; and whose they are.
        """
        names: list[tuple[str, str]] = []
        ratios: list[Tensor] = []
        for name, layer in self.layers.items():
            uses = captured.get(name, ())
            sums = self._sums(uses) if uses else {}
            unit = max([unit_of(use.dtype) for use in uses], default=0.0)
            for kind in ("weight", "bias"):
                if getattr(layer, kind) is not None and (uses or (name, kind) in grown):
                    names.append((name, kind))
                    ratios.append(_ratio(sums.get(kind), grown.get((name, kind)), unit))
        device = ratios[0].device if ratios else None
        return torch.stack([ratio.to(device) for ratio in ratios]) if ratios else torch.zeros(0), names

    def _sums(self, uses: Sequence[Use]) -> dict[str, Tensor]:
        """Name to ``(3, PROBES)``: sums of terms, sums of their squares, and the norm of all partial sums of terms."""
        terms: dict[str, list[Tensor]] = {"weight": [], "bias": []}
        for use in uses:
            inputs, gradients = use.layer.inputs.flatten(0, 1), use.layer.output_gradients.flatten(0, 1)
            left = gradients @ self._probes(gradients.shape[1], gradients, "outputs")  # (n, k)
            terms["bias"].append(left)
            terms["weight"].append(left * (inputs @ self._probes(inputs.shape[1], inputs, "inputs")))
        found = {}
        for kind, parts in terms.items():
            joined = torch.cat(parts).double()  # whose squares float32 may not hold
            found[kind] = torch.stack([joined.sum(0), joined.square().sum(0), joined.cumsum(0).square().sum(0).sqrt()])
        return found

    def detach(self) -> None:
        """Take the hooks off."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._hooked.clear()
        self._seen.clear()


def unit_of(dtype: torch.dtype) -> float:
    """The unit roundoff of what a matrix product in a type takes in, by the settings of this process.

    Args:
        dtype: A floating type.

    Returns:
        Half the distance from 1 to the next number: of the type, or of the narrower one that it may be rounded to.
    """
    unit = torch.finfo(dtype).eps / 2
    if dtype != torch.float32:
        return unit
    try:
        precision = torch.get_float32_matmul_precision()
        convolutions = torch.cuda.is_available() and torch.backends.cudnn.allow_tf32
    except RuntimeError:  # torch's older and newer settings were mixed
        return float(torch.finfo(torch.bfloat16).eps) / 2
    if precision == "medium":
        return float(torch.finfo(torch.bfloat16).eps) / 2
    return 2.0**-11 if precision == "high" or convolutions else unit


def _ratio(sums: Tensor | None, grown: Grown | None, unit: float) -> Tensor:
    """The difference over what rounding may make of it, for a parameter of which there is one of both at least.

    Args:
        sums: ``(3, PROBES)`` of what was captured.
        grown: What its gradient grew by.
        unit: The unit roundoff of the types that the layer worked in.

    Returns:
        A scalar.
    """
    if sums is None:
        assert grown is not None
        sums = grown.probes.new_zeros(3, PROBES)
    values, squares, partial = sums
    if grown is None:
        grown = Grown(torch.zeros_like(values), values.new_zeros(()), 0.0, 0.0)
    # The product's factors and result are rounded to the narrow type, each by chance: sqrt(Σ_n |g_n|² |a_n|²) bounds
    # the one and the result's norm the other. A sum is rounded at each of its partial sums S_k by u |S_k| by chance, in
    # float32 or float64: sqrt(Σ_k S_k²) u in all. With terms of random signs that is √n less than a bound by Σ |t|,
    # behind which an error of a per cent would hide where a batch has many positions.
    unit = max(unit, grown.unit)
    wide = torch.finfo(torch.float64 if unit < 2.0**-50 else torch.float32).eps / 2
    narrow = unit * (grown.square.to(values.device).sqrt() + squares.mean().sqrt())
    allowed = narrow + wide * partial.mean() + grown.floor
    difference = (values - grown.probes.to(values.device)).square().mean().sqrt()
    ratio: Tensor = difference / (ROUNDINGS * allowed).clamp(min=torch.finfo(torch.float64).tiny)
    return ratio


def norms(captured: Sequence[Use], grown: Grown | None, kind: str) -> tuple[float, float]:
    """The two norms of a parameter that differ, for a message.

    Args:
        captured: The uses of its layer.
        grown: What was noted of it.
        kind: ``weight`` or ``bias``.

    Returns:
        Of what was captured, summed over rows, and of what its gradient grew by.
    """
    total = torch.zeros(())
    for use in captured:
        gradients = use.layer.output_gradients.flatten(0, 1)
        part = gradients.mT @ use.layer.inputs.flatten(0, 1) if kind == "weight" else gradients.sum(0)
        total = total.to(part) + part
    return float(total.norm()), float(grown.square.sqrt()) if grown is not None else 0.0
