"""The Fisher that a person gives, as an object, a file or a word, and whether it is one of this network."""

from __future__ import annotations

from collections.abc import Mapping

from lightning.pytorch.utilities import rank_zero_warn
from torch import nn

from lightning_unlearn.errors import InputError
from lightning_unlearn.fisher import Fisher, IdentityFisher, load_fisher
from lightning_unlearn.weights.deltas import relative_distance
from lightning_unlearn.weights.parameters import layer_parameters, layer_specs

# Relative distance of the weights from where the Fisher was taken, above which a person is told.
FAR = 0.1


def find_fisher(source: Fisher | str | None, layers: Mapping[str, nn.Module]) -> Fisher:
    """A Fisher of which it is certain that it is of these layers.

    Args:
        source: A Fisher, its file, or ``identity`` for none.
        layers: The chosen layers, by name.

    Returns:
        The Fisher, with its sums.

    Raises:
        InputError: If there is none, or it is of another model.
    """
    if source is None:
        raise InputError(
            "A Fisher is needed: train with FisherAccumulator or run `lightning-unlearn fisher`, and pass its file "
            "as fisher."
        )
    if source == IdentityFisher.kind:
        return IdentityFisher(layer_specs(layers))
    fisher = load_fisher(source) if isinstance(source, str) else source
    where = source if isinstance(source, str) else "the given Fisher"
    for name, spec in layer_specs(layers).items():
        theirs = fisher.layers.get(name)
        if theirs != spec:
            what = f"has {theirs.weight_shape}" if theirs else "lacks it"
            raise InputError(
                f"The Fisher in {where} is of another model or selection: layer {name} is {spec.weight_shape} "
                f"here, but it {what}."
            )
    distance = relative_distance(layer_parameters(layers), fisher.weights)
    if distance > FAR:
        rank_zero_warn(
            f"The weights lie {distance:.0%} of their norm from those the Fisher in {where} was taken at; "
            "take it in the last part of training."
        )
    return fisher
