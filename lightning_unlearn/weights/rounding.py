r"""What rounding may make of the difference between what was captured of a layer and what its gradient grew by.

Rounding to nearest is off by a relative :math:`u / \sqrt 3` at most in the root mean square, and by chance, so
:math:`n` roundings of like size make :math:`\sqrt n` of one (Higham and Mary, SIAM J. Sci. Comput. 41, 2019).

Two kinds are told apart. Rows are summed in float32 or float64, each partial sum :math:`S_k` being rounded once; that
is small. What may be coarse is the type that a layer works in: in bfloat16 or float16 its gradient
:math:`G = \sum_n g_n a_n^\top` is rounded when it is done (off by :math:`u ‖G‖`), or in parts where the product is
cut along its rows (:math:`u \sqrt{\sum_n |g_n|^2 |a_n|^2}` for parts of random signs); in TF32 the factors are, with
as much; and where a layer is used several times, so is each use's gradient and each sum of them. All that adds up in
squares.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from operator import attrgetter

import torch
from torch import Tensor, nn

PROBES = 8

# How many standard deviations are let through. The root mean square over the probes of an error that has a normal
# distribution is above 2.5 of them once in 10⁷; with u/√3 for one of them, 3 units are above 5.
NARROW = 3.0
# For the sums in float32 or float64, in units; what is not what it seems is off by far more. TF32 cuts off, on some
# devices, instead of rounding to nearest, which is within 3 units too: 2 u · 0.72 in the mean.
WIDE = 8.0
# Of a bias the terms may be equal numbers, as those of a mean over a prediction are, and some kernels add them one by
# one: their roundings are not by chance, and add up. Measured: n/20 units of the sum of n of them; this lets n/8 through.
DRIFT = 0.25


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


@dataclass(frozen=True)
class Summed:
    """What was captured of a layer, summed over rows, as numbers.

    Attributes:
        kinds: ``weight`` and ``bias`` to ``(5, PROBES)`` float64: between the random vectors the sums of terms, the
            sums of their squares, the norms of all partial sums of terms, the sums of squares of what is rounded
            between several uses, and the sums of the partial sums' sizes.
        unit: The largest unit roundoff of the products that it took part in.
        width: How many numbers a term is a sum of.
    """

    kinds: Mapping[str, Tensor]
    unit: float
    width: int


def unit_of(dtype: torch.dtype, device: str, layer: nn.Module) -> float:
    """The unit roundoff of what a layer's products take in, by the settings of this process.

    Args:
        dtype: The floating type that it works in.
        device: The kind of device, such as ``cuda``.
        layer: Linear or Conv2d.

    Returns:
        Half the distance from 1 to the next number: of the type, or of the narrower one that it may be rounded to.
    """
    unit = torch.finfo(dtype).eps / 2
    if dtype != torch.float32:
        return unit
    # What the check itself multiplies are matrices, whatever the layer.
    products = ["cuda.matmul" if device == "cuda" else "mkldnn.matmul"]
    if isinstance(layer, nn.Conv2d) and torch.backends.cudnn.enabled:
        products.append("cudnn.conv" if device == "cuda" else "mkldnn.conv")
    narrower = {"tf32": 2.0**-11, "bf16": 2.0**-8}
    set_to = [attrgetter(product)(torch.backends).fp32_precision for product in products]
    return max([unit, *(narrower.get(precision, unit) for precision in set_to)])


def beyond_rounding(captured: Summed | None, grown: Grown | None, kind: str) -> Tensor:
    """The difference over what rounding may make of it, for a parameter of which there is one of both at least.

    Args:
        captured: Of its layer.
        grown: What its gradient grew by.
        kind: ``weight`` or ``bias``.

    Returns:
        A scalar, above 1 where they differ and NaN where one is not finite.
    """
    if captured is None:
        assert grown is not None
        captured = Summed({kind: grown.probes.new_zeros(5, PROBES)}, 0.0, 0)
    values, squares, partial, between, sizes = captured.kinds[kind]
    if grown is None:
        grown = Grown(torch.zeros_like(values), values.new_zeros(()), 0.0, 0.0)
    square = grown.square.to(values.device)
    unit = max(captured.unit, grown.unit)
    wide = torch.finfo(torch.float64 if unit < 2.0**-50 else torch.float32).eps / 2
    narrow = unit * (square + squares.mean() + between.mean()).sqrt()
    # A term is a dot product of as many numbers as the layer is wide: their partial sums are rounded, too.
    terms = (1 + captured.width**0.5 / 4) * (square.sqrt() + squares.mean().sqrt())
    allowed = NARROW * narrow + WIDE * (wide * (partial.mean() + terms) + grown.floor)
    if kind == "bias":
        allowed = allowed + DRIFT * wide * sizes.mean()
    difference = (values - grown.probes.to(values.device)).square().mean().sqrt()
    ratio: Tensor = difference / allowed.clamp(min=torch.finfo(torch.float64).tiny)
    return ratio
