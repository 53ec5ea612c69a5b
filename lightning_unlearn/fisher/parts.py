"""The sums of single layers, which may be added as soon as a layer's gradients are there."""

from __future__ import annotations

import torch

from lightning_unlearn.fisher.base import Fisher
from lightning_unlearn.fisher.sums import accumulate


def part_of(fisher: Fisher, layer: str) -> Fisher:
    """A Fisher of one of its layers in the same stage that has seen no sample.

    Args:
        fisher: Of all layers.
        layer: The name of one.

    Returns:
        A new one; what is no sum is shared.
    """
    spec = fisher.layers[layer]
    part = type(fisher)({layer: spec})
    part.targets = fisher.targets
    part.load_tensors(
        {
            name: torch.zeros_like(tensor) if fisher.is_sum(name) else tensor
            for name, tensor in fisher.tensors().items()
            # As kinds name their tensors: by the parameter, or with the layer between strokes.
            if name in spec.parameter_shapes or layer in name.split("/")[1:]
        }
    )
    return part


def add_part(fisher: Fisher, part: Fisher) -> None:
    """Add the sums of one layer in place; the samples, which all layers share, are to be counted once.

    Args:
        fisher: Of all layers; its sums are its own.
        part: As :func:`part_of` makes it.
    """
    sums = dict(fisher.tensors())
    for name, tensor in part.tensors().items():
        if fisher.is_sum(name):
            accumulate(sums, name, tensor)
    fisher.load_tensors(sums)
