"""Which weights are unlearned: a network found by name, and layers of it chosen by name."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor, nn

from lightning_unlearn.diffusion.adapters import has_adapter
from lightning_unlearn.diffusion.families import family_of
from lightning_unlearn.errors import InputError

SELECTIONS = ("text_kv", "cross_attention", "attention", "feed_forward", "all", "adapter")
# What PEFT makes of a layer; the base stays frozen.
_ADAPTER = (r".*\.lora_[AB]\.[^.]+",)


@dataclass(frozen=True)
class LayerSpec:
    """The shape of a chosen layer.

    Attributes:
        name: The layer's dotted name in the network.
        weight_shape: ``(o, i)`` for Linear, ``(o, i, kh, kw)`` for Conv2d.
        has_bias: Whether it has a bias ``(o,)``.
    """

    name: str
    weight_shape: tuple[int, ...]
    has_bias: bool

    @property
    def parameter_shapes(self) -> dict[str, tuple[int, ...]]:
        """Shapes of the layer's parameters by their dotted names in the network."""
        shapes = {f"{self.name}.weight": self.weight_shape}
        if self.has_bias:
            shapes[f"{self.name}.bias"] = self.weight_shape[:1]
        return shapes

    def to_json(self) -> dict[str, Any]:
        """The spec as JSON.

        Returns:
            Its fields.
        """
        return {"name": self.name, "weight_shape": list(self.weight_shape), "has_bias": self.has_bias}

    @classmethod
    def from_json(cls, fields: dict[str, Any]) -> LayerSpec:
        """Back from :meth:`to_json`.

        Args:
            fields: Its fields.

        Returns:
            The spec.
        """
        return cls(fields["name"], tuple(fields["weight_shape"]), bool(fields["has_bias"]))


def find_network(module: nn.Module, target: str) -> nn.Module:
    """A part of a user's LightningModule by its dotted name.

    Args:
        module: The user's.
        target: The name; empty for the module itself.

    Returns:
        The network.

    Raises:
        InputError: If there is none, or it is not a module.
    """
    try:
        network = attrgetter(target)(module) if target else module
    except AttributeError:
        names = ", ".join(name for name, _ in module.named_children())
        raise InputError(
            f"{type(module).__name__} has no {target!r}; set the target to one of its parts: {names}."
        ) from None
    if not isinstance(network, nn.Module):
        raise InputError(
            f"{target!r} of {type(module).__name__} is a {type(network).__name__}, not a module; name the network."
        )
    return network


def select_layers(network: nn.Module, selection: str | Sequence[str]) -> dict[str, nn.Module]:
    """The Linear and Conv2d layers that a selection names.

    Args:
        network: The denoiser.
        selection: ``"text_kv"`` (keys and values of attention to the text), ``"cross_attention"``, ``"attention"``,
            ``"feed_forward"`` (the two layers of each transformer block's MLP), ``"all"`` (every Linear and Conv2d;
            norms and embeddings are left out), ``"adapter"`` (A and B of a LoRA, nothing of its base), or regular
            expressions that whole layer names match.

    Returns:
        Dotted name to layer, in the network's order.

    Raises:
        InputError: If nothing matches, a layer is of a kind that is not covered, or two chosen layers share weights.

    Example:
        >>> list(select_layers(nn.Sequential(nn.Linear(1, 2), nn.ReLU(), nn.Linear(2, 1)), ["2"]))
        ['2']
    """
    # Other networks than diffusers' may have layers of these names that were never anything else.
    fused = any(name.endswith((".to_qkv", ".to_kv")) for name, _ in network.named_modules())
    if fused and any(hasattr(module, "unfuse_qkv_projections") for module in network.modules()):
        raise InputError("The network's attention projections are fused; call unfuse_qkv_projections() on it first.")
    if isinstance(selection, str) and selection not in SELECTIONS:
        known = ", ".join(SELECTIONS)
        raise InputError(f"Unknown selection {selection!r}; choose {known}, or give a list of patterns.")
    if isinstance(selection, str) and selection != "adapter" and has_adapter(network):
        raise InputError(
            f"The network has an adapter, and {selection!r} is of networks without one; choose `adapter`, which takes "
            "A and B on a frozen base, or merge the adapter first."
        )
    if selection == "adapter" and not has_adapter(network):
        raise InputError("The network has no adapter whose weights could be chosen; name one, or other parameters.")
    if selection == "all":
        patterns: Sequence[str] = (".*",)
    elif selection == "adapter":
        patterns = _ADAPTER
    elif isinstance(selection, str):
        family = family_of(network)
        if selection not in family.selections:
            others = ", ".join([*family.selections, "all"])
            raise InputError(f"{selection!r} means nothing in {family.title}; choose {others}, or give patterns.")
        patterns = family.selections[selection]
    else:
        patterns = selection
    covered = {name: module for name, module in network.named_modules() if _seems_covered(module)}
    try:
        chosen: dict[str, nn.Module] = {
            name: module for name, module in covered.items() if any(re.fullmatch(pattern, name) for pattern in patterns)
        }
    except re.error as error:
        raise InputError(f"A pattern in {selection!r} is not a regular expression ({error}); correct it.") from None
    if not chosen:
        examples = ", ".join(list(covered)[:5]) or "none"
        raise InputError(
            f"No Linear or Conv2d layer of {type(network).__name__} matches {selection!r} (its layers: {examples}, …)."
        )
    _refuse_uncovered(chosen)
    return chosen


def _seems_covered(module: nn.Module) -> bool:
    """Whether it is a Linear or Conv2d, or was one before it was scripted."""
    scripted = getattr(module, "original_name", None) if isinstance(module, torch.jit.ScriptModule) else None
    return isinstance(module, nn.Linear | nn.Conv2d) or scripted in ("Linear", "Conv2d")


def _refuse_uncovered(layers: Mapping[str, nn.Module]) -> None:
    owners: dict[int, str] = {}
    for name, layer in layers.items():
        if isinstance(layer, torch.jit.ScriptModule):
            raise InputError(
                f"Layer {name} is scripted by torch.jit, which hooks can't see into; use the network as it was before, "
                "or leave the layer out by patterns."
            )
        own = {kind for kind, _ in layer.named_parameters(recurse=False)}
        if "weight" not in own or nn.utils.parametrize.is_parametrized(layer):
            raise InputError(
                f"The weight of layer {name} is computed from other parameters (weight_norm, a parametrisation or "
                "sharding), which have no per-sample gradient here; make it a plain weight, as "
                "torch.nn.utils.parametrize.remove_parametrizations does, or leave the layer out by patterns."
            )
        if further := sorted(own - {"weight", "bias"}):
            raise InputError(
                f"Layer {name} is a {type(layer).__name__} with parameters of its own besides weight and "
                f"bias ({', '.join(further)}), which would not be seen, such as those of an adapter; use layers of "
                "their own for them, as PEFT does, or leave the layer out by patterns."
            )
        if isinstance(layer, nn.Conv2d) and (
            layer.groups != 1 or layer.padding_mode != "zeros" or isinstance(layer.padding, str)
        ):
            raise InputError(
                f"Layer {name} is a grouped or specially padded convolution, which has no per-sample gradient here; "
                "leave it out by patterns."
            )
        for parameter in layer.parameters(recurse=False):
            owner = owners.setdefault(id(parameter), name)
            if owner != name:
                raise InputError(
                    f"Layers {owner} and {name} share a weight, so neither has a gradient of its own; leave both out "
                    "by patterns, or give each a weight of its own."
                )


def layer_specs(layers: Mapping[str, nn.Module]) -> dict[str, LayerSpec]:
    """The shapes of chosen layers.

    Args:
        layers: What :func:`select_layers` returns.

    Returns:
        Layer name to its spec.
    """
    specs = {}
    for name, layer in layers.items():
        weight = layer.weight
        assert isinstance(weight, Tensor)
        specs[name] = LayerSpec(name, tuple(weight.shape), layer.bias is not None)
    return specs


def layer_parameters(layers: Mapping[str, nn.Module]) -> dict[str, nn.Parameter]:
    """The parameters of chosen layers by their dotted names in the network.

    Args:
        layers: What :func:`select_layers` returns.

    Returns:
        Parameter name to parameter.
    """
    return {
        f"{name}.{kind}": parameter
        for name, layer in layers.items()
        for kind, parameter in layer.named_parameters(recurse=False)
    }
