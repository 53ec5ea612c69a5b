r"""One layer's adapter: :math:`W + \frac{α}{r} B A`, and with a magnitude (DoRA) its rows brought to that length.

LoRA: Hu et al. (arXiv 2106.09685, Section 4.1). DoRA: Liu et al. (arXiv 2402.09353, Eq. 5),
:math:`m \, (W + \frac{α}{r} B A) / \|W + \frac{α}{r} B A\|` with the norm of each row.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lightning_unlearn.diffusion.adapters.layer_names import Part
from lightning_unlearn.errors import InputError


@dataclass(frozen=True)
class LowRank:
    """The adapter of one layer.

    Attributes:
        down: ``A``, ``(r, i)`` for Linear, ``(r, i, kh, kw)`` for Conv2d.
        up: ``B``, ``(o, r)`` or ``(o, r, 1, 1)``.
        alpha: Its scale is ``alpha / r``.
        magnitude: DoRA's, ``(o,)``.
    """

    down: Tensor
    up: Tensor
    alpha: float
    magnitude: Tensor | None = None

    @property
    def rank(self) -> int:
        """``r``."""
        return len(self.down)


def part_of_layers(
    where: str, whole: LowRank, parts: Sequence[Part], layers: Sequence[nn.Linear | nn.Conv2d]
) -> dict[str, LowRank]:
    """Bring what a file has for a layer into the form of the network's layers.

    Where the original code has one layer for queries, keys and values, each of ours takes its rows of ``B``, and of
    ``A`` what these use: a fused adapter that was put together from three has no weights that do nothing.

    Args:
        where: The file and the layer's name in it, for messages.
        whole: What the file has.
        parts: The layers of the network that it is, in the order of its rows.
        layers: These layers.

    Returns:
        Layer name in the network to its adapter.

    Raises:
        InputError: If shapes don't fit.
    """
    outputs = [_shape(layer)[0] for layer in layers]
    rows = len(whole.up)
    if sum(outputs) != rows:
        raise InputError(
            f"{where} gives {rows} outputs, but the network's {' + '.join(part.layer for part in parts)} has "
            f"{sum(outputs)}; the adapter is of another model."
        )
    found = {}
    magnitudes = [None] * len(parts) if whole.magnitude is None else torch.split(whole.magnitude, outputs)
    for part, layer, up, magnitude in zip(parts, layers, torch.split(whole.up, outputs), magnitudes, strict=True):
        if part.swapped:
            up = _swap_halves(up)
            magnitude = None if magnitude is None else _swap_halves(magnitude)
        down, alpha = whole.down, whole.alpha
        used = up.transpose(0, 1).flatten(1).any(1)  # (r,)
        if len(parts) > 1 and used.any():
            down, up, alpha = down[used], up[:, used], alpha * int(used.sum()) / whole.rank
        found[part.layer] = LowRank(*_as_layer(where, down, up, layer), alpha, magnitude)
    return found


def _as_layer(where: str, down: Tensor, up: Tensor, layer: nn.Linear | nn.Conv2d) -> tuple[Tensor, Tensor]:
    """``A`` and ``B`` in the layer's form: a Linear may have been trained as a 1×1 convolution, and the other way."""
    outputs, inputs = _shape(layer)[:2]
    kernel = _shape(layer)[2:]
    rank = len(down)
    if down[0].numel() != inputs * kernel.numel() or up[0].numel() != rank:
        raise InputError(
            f"{where} is of a layer with weights {tuple(down.shape)} and {tuple(up.shape)}, but the network's is "
            f"{tuple(_shape(layer))}; the adapter is of another model."
        )
    if down.ndim > 2 and down.shape[2:] != kernel and down.shape[2:].numel() != 1:
        raise InputError(f"{where} has a kernel {tuple(down.shape[2:])}, but the network's layer has {tuple(kernel)}.")
    ones = (1,) * len(kernel)
    return down.reshape(rank, inputs, *kernel).contiguous(), up.reshape(outputs, rank, *ones).contiguous()


def _shape(layer: nn.Linear | nn.Conv2d) -> torch.Size:
    # Not the weight's: a quantised layer has packed ones.
    if isinstance(layer, nn.Linear):
        return torch.Size((layer.out_features, layer.in_features))
    return torch.Size((layer.out_channels, layer.in_channels // layer.groups, *layer.kernel_size))


def _swap_halves(rows: Tensor) -> Tensor:
    first, second = rows.chunk(2)
    return torch.cat((second, first))
