"""Which weights are unlearned where nobody says it: those of the Fisher that is given, else the most that fits."""

from __future__ import annotations

import re
import warnings
from collections.abc import Mapping
from pathlib import Path

from torch import nn

from lightning_unlearn.errors import InputError
from lightning_unlearn.fisher import Fisher, IdentityFisher
from lightning_unlearn.fisher.files import read_about
from lightning_unlearn.weights.parameters import (
    SELECTIONS,
    LayerSpec,
    automatic_selection,
    layer_specs,
    select_layers,
)

AUTO = "auto"


def chosen_weights(
    network: nn.Module, parameters: str | list[str], fisher: Fisher | str | None
) -> tuple[str | list[str], str]:
    """The selection that is asked for; in place of ``auto`` what it means for this network and this Fisher.

    A Fisher that was taken of fewer weights than ``auto`` would choose chooses them: the others have none.

    Args:
        network: The denoiser, perhaps on the meta device.
        parameters: What is asked for.
        fisher: A Fisher or its file, which need not be there yet; its layers alone are looked at.

    Returns:
        The selection, and why it is this one; empty where it was asked for.

    Raises:
        InputError: If there is no layer to choose.
    """
    if parameters != AUTO:
        return parameters, ""
    name, why = automatic_selection(network)
    theirs = _layers_of(fisher)
    if theirs is None or _specs(network, name).items() <= theirs.items():
        return name, why
    where = f"in {fisher}" if isinstance(fisher, str) else "that is given"
    why = f"the Fisher {where} is of these alone; for more, take one with `parameters: {name}`"
    for narrower in SELECTIONS:
        if narrower != AUTO and _specs(network, narrower) == theirs:
            return narrower, why
    if theirs.items() <= layer_specs(_linear_or_conv(network)).items():
        return [re.escape(layer) for layer in theirs], why
    return name, ""  # of another model: what is done with it says so


def _layers_of(fisher: Fisher | str | None) -> dict[str, LayerSpec] | None:
    """``None`` where there is none, or nobody knows of which layers it is."""
    if fisher is None or fisher == IdentityFisher.kind:
        return None
    if isinstance(fisher, Fisher):
        return fisher.layers
    if not Path(fisher).is_file():
        return None
    try:
        return {spec["name"]: LayerSpec.from_json(spec) for spec in read_about(fisher)["layers"]}
    except (InputError, LookupError, TypeError, ValueError):
        return None  # a damaged file is refused where it is read


def _specs(network: nn.Module, selection: str) -> Mapping[str, LayerSpec]:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return layer_specs(select_layers(network, selection))
    except InputError:
        return {}


def _linear_or_conv(network: nn.Module) -> dict[str, nn.Module]:
    return {name: layer for name, layer in network.named_modules() if isinstance(layer, nn.Linear | nn.Conv2d)}
