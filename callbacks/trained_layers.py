"""The chosen layers of a network that a training moves: a frozen weight has no gradient to be seen."""

from __future__ import annotations

from lightning.pytorch.utilities import rank_zero_warn
from torch import nn

from lightning_unlearn.errors import InputError
from lightning_unlearn.weights.parameters import select_layers


def trained_layers(network: nn.Module, parameters: str | list[str]) -> dict[str, nn.Module]:
    """The layers that a selection names, of which all are trained.

    Args:
        network: The denoiser, in training.
        parameters: The selection; of ``auto`` those that are trained are taken, with a warning.

    Returns:
        Dotted name to layer.

    Raises:
        InputError: If some that were asked for are frozen, or all are.
    """
    layers = select_layers(network, parameters)
    frozen = [name for name, layer in layers.items() if not all(p.requires_grad for p in layer.parameters())]
    if parameters == "auto" and 0 < len(frozen) < len(layers):
        rank_zero_warn(
            f"The Fisher is of {len(layers) - len(frozen)} layers alone, since this training leaves {len(frozen)} "
            f"others as they are (e.g. {frozen[0]})."
        )
        return {name: layer for name, layer in layers.items() if name not in frozen}
    if frozen:
        raise InputError(
            f"{len(frozen)} of the chosen layers are frozen (e.g. {frozen[0]}), so no gradient reaches them; "
            "choose layers that are trained, or run `lightning-unlearn fisher` afterwards."
        )
    return layers
