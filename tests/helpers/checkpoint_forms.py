"""Small networks in the forms of checkpoints that people have."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn
from toys import ToyDenoiser, tiny_unet

from lightning_unlearn.diffusion.adapters.stable_diffusion_names import stable_diffusion_names
from lightning_unlearn.diffusion.checkpoints import AveragedChoice, WeightsOrigin
from lightning_unlearn.diffusion.loading import load_weights

# Normalisations, which no adapter changes, beside the layers that adapters have names for.
_NORMS = {"norm1": "in_layers.0", "norm2": "out_layers.0"}


def moved(by: float) -> dict[str, Tensor]:
    """A tiny U-Net's weights, all of them moved by a number, so that two sets are told apart."""
    return {name: value + by for name, value in tiny_unet().state_dict().items()}


def toy_moved(by: float) -> dict[str, Tensor]:
    """The same of a network that is made in no time."""
    return {name: value + by for name, value in ToyDenoiser().state_dict().items()}


def load_toy(path: Path | str, prefix: str = "") -> dict[str, Tensor]:
    """What that network has after it was loaded from a file."""
    return load_into(path, prefix, network=ToyDenoiser())[0]


def load_into(
    path: Path | str, prefix: str = "", averaged: AveragedChoice = None, network: nn.Module | None = None
) -> tuple[dict[str, Tensor], WeightsOrigin]:
    """What a network has after it was loaded from a file, and where it was found."""
    network = network if network is not None else tiny_unet()
    origin = load_weights(network, str(path), prefix, averaged)
    return network.state_dict(), origin


def assert_weights(got: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> None:
    """The very same names and numbers."""
    assert got.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert torch.equal(got[name], tensor), name


def original_state(network: nn.Module, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A U-Net's weights by the names that Stability's code gives them."""
    theirs = {ours[0]: original for original, ours in stable_diffusion_names(network).items()}
    theirs["conv_norm_out"] = "out.0"
    for name, _ in network.named_modules():
        parent, _, last = name.rpartition(".")
        if last in _NORMS and ".resnets." in name:
            theirs[name] = theirs[f"{parent}.conv1"].removesuffix("in_layers.2") + _NORMS[last]
    found = {}
    for name, tensor in state.items():
        layer, _, kind = name.rpartition(".")
        found[f"{theirs[layer]}.{kind}"] = tensor
    assert len(found) == len(state)
    return found
