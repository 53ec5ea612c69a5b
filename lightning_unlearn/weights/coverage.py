"""Which layers have a per-sample gradient here, and why others have none."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn

OTHER_KINDS = (
    nn.Conv1d,
    nn.Conv3d,
    nn.ConvTranspose1d,
    nn.ConvTranspose2d,
    nn.ConvTranspose3d,
    nn.Bilinear,
)
"""Layers with weights for which there is nothing here; norms and embeddings are nowhere expected."""


def seems_covered(module: nn.Module) -> bool:
    """Whether a module is a Linear or Conv2d, or was one before it was scripted.

    Args:
        module: Any.

    Returns:
        Whether it is; it may still have no per-sample gradient.
    """
    scripted = getattr(module, "original_name", None) if isinstance(module, torch.jit.ScriptModule) else None
    return isinstance(module, nn.Linear | nn.Conv2d) or scripted in ("Linear", "Conv2d")


def uncovered(layers: Mapping[str, nn.Module]) -> dict[str, str]:
    """The layers among some that have no per-sample gradient here.

    Args:
        layers: Name to Linear or Conv2d.

    Returns:
        Name to the sentence that says why, in the layers' order.
    """
    reasons = {name: _reason(name, layer) for name, layer in layers.items()}
    owners: dict[int, str] = {}
    for name, layer in layers.items():
        for parameter in layer.parameters(recurse=False):
            owner = owners.setdefault(id(parameter), name)
            if owner == name:
                continue
            for one in (owner, name):
                reasons[one] = reasons[one] or (
                    f"Layers {owner} and {name} share a weight, so neither has a gradient of its own; leave both out "
                    "by patterns, or give each a weight of its own."
                )
    return {name: reason for name, reason in reasons.items() if reason is not None}


def _reason(name: str, layer: nn.Module) -> str | None:
    if isinstance(layer, torch.jit.ScriptModule):
        return (
            f"Layer {name} is scripted by torch.jit, which hooks can't see into; use the network as it was before, "
            "or leave the layer out by patterns."
        )
    own = {kind for kind, _ in layer.named_parameters(recurse=False)}
    if "weight" not in own or nn.utils.parametrize.is_parametrized(layer):
        return (
            f"The weight of layer {name} is computed from other parameters (weight_norm, a parametrisation or "
            "sharding), which have no per-sample gradient here; make it a plain weight, as "
            "torch.nn.utils.parametrize.remove_parametrizations does, or leave the layer out by patterns."
        )
    if further := sorted(own - {"weight", "bias"}):
        return (
            f"Layer {name} is a {type(layer).__name__} with parameters of its own besides weight and "
            f"bias ({', '.join(further)}), which would not be seen, such as those of an adapter; use layers of "
            "their own for them, as PEFT does, or leave the layer out by patterns."
        )
    if isinstance(layer, nn.Conv2d) and (
        layer.groups != 1 or layer.padding_mode != "zeros" or isinstance(layer.padding, str)
    ):
        return (
            f"Layer {name} is a grouped or specially padded convolution, which has no per-sample gradient here; "
            "leave it out by patterns."
        )
    return None
