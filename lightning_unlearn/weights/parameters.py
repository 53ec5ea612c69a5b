"""Which weights are unlearned: a network found by name, and layers of it chosen by name."""

from __future__ import annotations

import math
import re
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from operator import attrgetter
from typing import Any

from torch import Tensor, nn

from lightning_unlearn.diffusion.adapters import has_adapter
from lightning_unlearn.diffusion.families import FAMILIES, family_of
from lightning_unlearn.diffusion.families.selections import BROAD, automatic, checked
from lightning_unlearn.errors import InputError
from lightning_unlearn.weights.coverage import OTHER_KINDS, seems_covered, uncovered

SELECTIONS = ("auto", "text_kv", "cross_attention", "attention", "feed_forward", "linear", "all", "adapter")
# What `auto` may take: weights, of which each query has a delta, and bytes of a Fisher's Kronecker factors in float32.
# It is the same on all machines, so that a Fisher from another one is of the same layers.
MOST_WEIGHTS, MOST_FACTORS = 10**8, 2**30
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
            ``"feed_forward"`` (the two layers of each transformer block's MLP), ``"linear"`` (every Linear), ``"all"``
            (every Linear and Conv2d; norms and embeddings are left out), ``"adapter"`` (A and B of a LoRA, nothing of
            its base), ``"auto"`` (see :func:`automatic_selection`), or regular expressions that whole layer names
            match.
            ``"linear"`` and ``"all"`` leave out, with a warning that names them, layers that have no per-sample
            gradient here; where one of these is named otherwise, it is refused.

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
    if selection == "auto":
        selection, _ = automatic_selection(network)
    if isinstance(selection, str) and selection != "adapter" and has_adapter(network):
        raise InputError(
            f"The network has an adapter, and {selection!r} is of networks without one; choose `adapter`, which takes "
            "A and B on a frozen base, or merge the adapter first."
        )
    if selection == "adapter" and not has_adapter(network):
        raise InputError("The network has no adapter whose weights could be chosen; name one, or other parameters.")
    covered = {name: module for name, module in network.named_modules() if seems_covered(module)}
    if isinstance(selection, str) and selection in BROAD:  # networks of no family have all their layers, too
        return _all_that_can_be(network, covered, selection, linear_only=selection == "linear")
    patterns: Sequence[str] = selection if not isinstance(selection, str) else _ADAPTER
    if isinstance(selection, str) and selection != "adapter":
        family = family_of(network)
        patterns = family.selections[checked(family, selection)]
    try:
        chosen: dict[str, nn.Module] = {
            name: module for name, module in covered.items() if any(re.fullmatch(pattern, name) for pattern in patterns)
        }
    except re.error as error:
        raise InputError(f"A pattern in {selection!r} is not a regular expression ({error}); correct it.") from None
    _refuse_none(network, covered, chosen, selection)
    refused = uncovered(chosen)
    if refused:
        raise InputError(next(iter(refused.values())))
    return chosen


def automatic_selection(network: nn.Module) -> tuple[str, str]:
    """What ``auto`` means: with an adapter the adapter's weights, else the most that is not too large.

    That is all layers, else all linear ones, else those of attention, else, where text has layers of its own, what the
    picture has of it: the first with at most ``MOST_WEIGHTS`` weights, and a Fisher whose Kronecker factors take at
    most ``MOST_FACTORS`` bytes; the last one, whatever its size. It depends on nothing but the network.

    Args:
        network: The denoiser, perhaps on the meta device.

    Returns:
        The selection's name, and why it is this one.

    Raises:
        InputError: If there is no layer to choose.

    Example:
        >>> automatic_selection(nn.Linear(2, 2))[0]
        'all'
    """
    if has_adapter(network):
        return "adapter", "the network has an adapter"
    family = next((family for family in FAMILIES if family.knows(network)), None)
    found: list[tuple[str, str]] = []
    larger: list[str] = []
    for name in automatic(family):
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                specs = layer_specs(select_layers(network, name)).values()
        except InputError:
            if not found:
                raise  # there is not one layer
            continue
        weights = sum(math.prod(shape) for spec in specs for shape in spec.parameter_shapes.values())
        factors = 4 * sum(spec.weight_shape[0] ** 2 + math.prod(spec.weight_shape[1:]) ** 2 for spec in specs)
        size = f"{len(specs)} layers, {weights:,} weights"
        found.append((name, f"{size}; {' and '.join(larger)} would be too large" if larger else size))
        if weights <= MOST_WEIGHTS and factors <= MOST_FACTORS:
            break
        larger.append(f"{name!r}")
    return found[-1]


def _refuse_none(
    network: nn.Module,
    covered: Mapping[str, nn.Module],
    chosen: Mapping[str, nn.Module],
    selection: str | Sequence[str],
) -> None:
    if not chosen:
        examples = ", ".join(list(covered)[:5]) or "none"
        raise InputError(
            f"No Linear or Conv2d layer of {type(network).__name__} matches {selection!r} (its layers: {examples}, …)."
        )


def _all_that_can_be(
    network: nn.Module, covered: Mapping[str, nn.Module], selection: str, linear_only: bool
) -> dict[str, nn.Module]:
    """Every layer with a per-sample gradient, and a warning that names the others and says why."""
    wanted = {name: module for name, module in covered.items() if not linear_only or not isinstance(module, nn.Conv2d)}
    _refuse_none(network, covered, wanted, selection)
    out = uncovered(wanted)
    for family in FAMILIES:
        if family.knows(network):
            for pattern, why in family.left_out.items():
                out |= {name: why for name in wanted if re.fullmatch(pattern, name)}
            break
    chosen = {name: module for name, module in wanted.items() if name not in out}
    if not chosen:
        raise InputError(next(iter(out.values())))
    others = (
        [] if linear_only else [name for name, module in network.named_modules() if isinstance(module, OTHER_KINDS)]
    )
    out |= dict.fromkeys(others, "of another kind than Linear and Conv2d")
    if out:
        shown = ", ".join(list(out)[:5])
        warnings.warn(
            f"{selection!r} leaves out {len(out)} layers of {type(network).__name__} that have no per-sample gradient "
            f"here: {shown}{', …' if len(out) > 5 else ''}. The first: {next(iter(out.values()))}"
        )
    return chosen


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
