from __future__ import annotations

import json
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import nn
from toys import DIM, ToyDenoiser, tiny_unet

from lightning_unlearn.errors import InputError
from lightning_unlearn.weights.parameters import LayerSpec, layer_parameters, layer_specs, select_layers


def test_text_kv_is_every_key_and_value_projection_of_the_text_and_nothing_else() -> None:
    network = tiny_unet()
    layers = select_layers(network, "text_kv")
    by_shape = [  # in this network only these projections read the text's DIM features
        name for name, layer in network.named_modules() if isinstance(layer, nn.Linear) and layer.in_features == DIM
    ]
    assert list(layers) == by_shape
    assert len(layers) > 2
    assert all(".attn2." in name for name in layers)


def test_selections_contain_one_another() -> None:
    network = tiny_unet()
    names = [list(select_layers(network, kind)) for kind in ("text_kv", "cross_attention", "attention", "all")]
    for smaller, larger in pairwise(names):
        assert set(smaller) < set(larger)
    everything = [name for name, layer in network.named_modules() if isinstance(layer, nn.Linear | nn.Conv2d)]
    assert names[-1] == everything


def test_feed_forward_is_the_two_layers_of_each_blocks_mlp() -> None:
    network = tiny_unet()
    blocks = [name for name, module in network.named_modules() if type(module).__name__ == "FeedForward"]
    layers = [
        name
        for name, layer in network.named_modules()
        if isinstance(layer, nn.Linear) and any(name.startswith(f"{block}.") for block in blocks)
    ]
    assert list(select_layers(network, "feed_forward")) == layers
    assert len(layers) == 2 * len(blocks) > 2


def test_patterns_match_whole_names_in_the_networks_order() -> None:
    assert list(select_layers(ToyDenoiser(), ["conv_out", "conv.*"])) == ["conv_in", "conv_out"]
    with pytest.raises(InputError):
        select_layers(ToyDenoiser(), ["conv"])


def test_specs_and_parameters_have_the_names_and_shapes_of_the_state_dict() -> None:
    network = nn.Sequential(nn.Linear(3, 2, bias=False), nn.Conv2d(2, 4, (3, 1)))
    layers = select_layers(network, "all")
    shapes = {name: tuple(tensor.shape) for name, tensor in network.state_dict().items()}
    specs = layer_specs(layers)
    assert {name: shape for spec in specs.values() for name, shape in spec.parameter_shapes.items()} == shapes
    parameters = layer_parameters(layers)
    assert all(parameters[name] is parameter for name, parameter in network.named_parameters())
    assert set(parameters) == set(shapes)


def test_spec_comes_back_from_json() -> None:
    for spec in (LayerSpec("a.b", (2, 3), False), LayerSpec("c", (2, 3, 1, 5), True)):
        assert LayerSpec.from_json(json.loads(json.dumps(spec.to_json()))) == spec


class Fused(nn.Module):
    """What diffusers leaves after ``fuse_qkv_projections``."""

    def __init__(self) -> None:
        super().__init__()
        self.attn = nn.Module()
        self.attn.to_qkv = nn.Linear(2, 6)

    def unfuse_qkv_projections(self) -> None: ...


def test_fused_unet_is_refused_until_it_is_unfused() -> None:
    network = tiny_unet()
    network.fuse_qkv_projections()
    with pytest.raises(InputError, match="unfuse_qkv_projections"):
        select_layers(network, "text_kv")
    with pytest.raises(InputError, match="unfuse_qkv_projections"):
        select_layers(nn.ModuleDict({"unet": Fused()}), "all")


def test_projection_that_was_never_anything_but_fused_is_a_layer_like_any_other() -> None:
    network = nn.ModuleDict({"attn": nn.ModuleDict({"to_qkv": nn.Linear(2, 6)})})
    assert list(select_layers(network, [r"attn\.to_qkv"])) == ["attn.to_qkv"]


def shared() -> nn.Module:
    network = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    network[1].weight = network[0].weight
    return network


@pytest.mark.parametrize(
    ("network", "selection", "says"),
    [
        (ToyDenoiser(), "text_kv", "No network family knows ToyDenoiser"),
        (ToyDenoiser(), "everything", "'everything'.*text_kv"),
        (ToyDenoiser(), ["nothing"], "nothing.*conv_in"),
        (ToyDenoiser(), [], "No Linear or Conv2d layer"),
        (ToyDenoiser(), ["conv("], r"'conv\('.*regular expression"),
        (nn.Sequential(nn.LayerNorm(2)), "all", "its layers: none"),
        (nn.Sequential(nn.Conv2d(2, 2, 3, groups=2)), "all", "Layer 0 is a grouped"),
        (nn.Sequential(nn.Conv2d(2, 2, 3, padding=1, padding_mode="reflect")), "all", "Layer 0 .*specially padded"),
        (nn.Sequential(nn.Conv2d(2, 2, 3, padding="same")), "all", "Layer 0 .*specially padded"),
        (shared(), "all", "Layers 0 and 1 share a weight"),
    ],
)
def test_selection_that_cannot_be_made_is_an_input_error_that_names_the_layer(
    network: nn.Module, selection: Any, says: str
) -> None:
    with pytest.raises(InputError, match=says):
        select_layers(network, selection)


def test_layer_registered_twice_is_chosen_once() -> None:
    layer = nn.Linear(2, 2)
    assert list(select_layers(nn.ModuleDict({"a": layer, "b": layer}), "all")) == ["a"]


def test_selecting_changes_no_weight_and_draws_no_random_number() -> None:
    network = tiny_unet()
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    state = torch.get_rng_state()
    select_layers(network, "all")
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(tensor, before[name]) for name, tensor in network.state_dict().items())
