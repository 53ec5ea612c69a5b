"""Keys and names: held against diffusers' own converters, and against whatever hypothesis can think of."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import adapter_forms as forms
import pytest
import torch
from diffusers import FluxTransformer2DModel
from diffusers.loaders import lora_conversion_utils as diffusers_lora
from diffusers.loaders import single_file_utils as diffusers_files
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from lightning_unlearn.diffusion.adapters.adapter_file import AdapterFile
from lightning_unlearn.diffusion.adapters.flux_names import flux_names
from lightning_unlearn.diffusion.adapters.keys import is_text_encoder, parse_key
from lightning_unlearn.diffusion.adapters.layer_names import LayerNames, Part
from lightning_unlearn.diffusion.adapters.reading import read_layers
from lightning_unlearn.diffusion.adapters.stable_diffusion_3_names import stable_diffusion_3_names
from lightning_unlearn.diffusion.adapters.stable_diffusion_names import stable_diffusion_names


def full_width_flux() -> nn.Module:
    """FLUX.1's width, which diffusers' converters have written into them; without memory for its weights."""
    with torch.device("meta"):
        network: nn.Module = FluxTransformer2DModel(num_layers=1, num_single_layers=1, guidance_embeds=True)
    return network


def rows_of(name: str, layer: nn.Module) -> int:
    return layer.get_parameter("weight").shape[0]


def marked(network: nn.Module, names: dict[str, list[str]]) -> dict[str, Tensor]:
    """A checkpoint of the original code whose weights' rows all carry a number of their own."""
    layers, state, start = forms.covered(network), {}, 0
    for original, ours in names.items():
        rows = sum(rows_of(name, layers[name]) for name in ours)
        state[f"{original}.weight"] = torch.arange(start, start + rows).float()[:, None]
        state[f"{original}.bias"] = torch.zeros(rows)
        start += rows
    return state


NORMS = {
    "flux": [
        f"double_blocks.0.{side}_attn.norm.{kind}_norm.scale" for side in ("img", "txt") for kind in ("query", "key")
    ]
    + [f"single_blocks.0.norm.{kind}_norm.scale" for kind in ("query", "key")],
    "sd3": [
        f"joint_blocks.{n}.{side}.attn.ln_{k}.weight"
        for n in (0, 1)
        for side in ("x_block", "context_block")
        for k in "qk"
    ]
    + [f"joint_blocks.0.x_block.attn2.ln_{k}.weight" for k in "qk"]
    + ["pos_embed"],
}


@pytest.mark.parametrize(
    ("kind", "make", "names", "convert"),
    [
        ("flux", full_width_flux, flux_names, diffusers_files.convert_flux_transformer_checkpoint_to_diffusers),
        (
            "sd3",
            forms.stable_diffusion_3,
            stable_diffusion_3_names,
            diffusers_files.convert_sd3_transformer_checkpoint_to_diffusers,
        ),
    ],
)
def test_transformers_layers_and_rows_are_those_of_diffusers_converter(
    kind: str,
    make: Callable[[], nn.Module],
    names: Callable[[nn.Module], Any],
    convert: Callable[..., dict[str, Tensor]],
) -> None:
    network = make()
    layers = forms.covered(network)
    originals = {name: list(ours) for name, ours in names(network).items() if all(one in layers for one in ours)}
    assert {one for ours in originals.values() for one in ours} == set(layers)
    state = marked(network, originals)
    converted = convert({**state, **{name: torch.zeros(1) for name in NORMS[kind]}})
    found = LayerNames(network)
    for original, ours in originals.items():
        parts = found.find(f"diffusion_model.{original}")
        assert parts is not None
        assert [part.layer for part in parts] == ours
        # A layer that both call alike is looked up under one name.
        assert found.find(f"lora_unet_{original.replace('.', '_')}") == parts
        split = state[f"{original}.weight"].split([rows_of(name, layers[name]) for name in ours])
        for part, rows in zip(parts, split, strict=True):
            if part.swapped:
                rows = torch.cat(rows.chunk(2)[::-1])
            assert torch.equal(converted[f"{part.layer}.weight"], rows), (original, part)


def test_unet_layers_are_those_of_diffusers_converter() -> None:
    network = forms.stable_diffusion_xl()
    layers = forms.covered(network)
    names = {original: ours for original, ours in stable_diffusion_names(network).items() if ours[0] in layers}
    assert {ours for (ours,) in names.values()} == set(layers)
    found = LayerNames(network)
    for original, (ours,) in names.items():
        parts = found.find(f"lora_unet_{original.replace('.', '_')}")
        assert parts == (Part(ours),)
    # diffusers knows kohya's names of those layers that kohya trains.
    trained = [name for name in names if "blocks" in name or "block." in name]
    state: dict[str, Tensor] = {}
    for number, name in enumerate(trained):
        key = f"lora_unet_{name.replace('.', '_')}"
        state[f"{key}.lora_down.weight"] = torch.tensor([[float(number)]])
        state[f"{key}.lora_up.weight"] = torch.tensor([[1.0]])
        state[f"{key}.alpha"] = torch.tensor(1.0)
    converted = diffusers_lora._maybe_map_sgm_blocks_to_diffusers(dict(state), network.config)
    converted, _ = diffusers_lora._convert_non_diffusers_lora_to_diffusers(converted)
    theirs = {}
    for key, tensor in converted.items():
        parsed = parse_key(key)
        assert parsed is not None
        if parsed.role == "down":
            parts = found.find(parsed.layer)
            assert parts is not None, key
            theirs[int(tensor)] = parts[0].layer
    assert theirs == {number: names[name][0] for number, name in enumerate(trained)}


def test_flux_of_kohya_is_that_of_diffusers_converter() -> None:
    """At FLUX.1's own width; the scale is in their weights and beside ours."""
    network = full_width_flux()
    layers = forms.covered(network)
    generator = torch.Generator().manual_seed(3)
    state: dict[str, Tensor] = {}
    # diffusers' converter leaves the final layer's alpha out, and the outer layers have no prefix there.
    chosen = {name: ours for name, ours in flux_names(network).items() if "blocks" in name}
    for original, ours in chosen.items():
        key = f"lora_unet_{original.replace('.', '_')}"
        rows = sum(rows_of(name, layers[name]) for name in ours)
        inputs = layers[ours[0]].get_parameter("weight").shape[1]
        state[f"{key}.lora_down.weight"] = torch.randn(2, inputs, generator=generator)
        state[f"{key}.lora_up.weight"] = torch.randn(rows, 2, generator=generator)
        state[f"{key}.alpha"] = torch.tensor(0.5)
    ours_found, _ = read_layers(AdapterFile("a", state), LayerNames(network))
    theirs = diffusers_lora._convert_kohya_flux_lora_to_diffusers(dict(state))
    assert {f"transformer.{name}.lora_{kind}.weight" for name in ours_found for kind in "AB"} == theirs.keys()
    for name, found in ours_found.items():
        down, up = (theirs[f"transformer.{name}.lora_{kind}.weight"].double() for kind in "AB")
        vector = torch.randn(down.shape[1], generator=generator, dtype=torch.float64)
        wanted = up @ (down @ vector)
        product = found.alpha / found.rank * (found.up.double() @ (found.down.double() @ vector))
        # Their scale is taken into float32 weights: a rounding of each, then sums of 3072 to 15360 terms.
        torch.testing.assert_close(product, wanted, rtol=1e-4, atol=1e-4)


# ---------------------------------------------------------------------------------- whatever names there are

NETWORK = forms.stable_diffusion_xl()
NAMES = LayerNames(NETWORK)
FORMS = [
    "unet.{}.lora_A.weight",
    "{}.lora_B.default.weight",
    "unet.{}.lora.down.weight",
    "base_model.model.{}.lora_A.weight",
    "base_model.model.unet.{}.lora_B.weight",
    "diffusion_model.{}.alpha",
    "unet.{}.lora_magnitude_vector",
    "{}.lora_magnitude_vector.default.weight",
    "lora_unet_{_}.lora_down.weight",
    "lora_unet_{_}.lora_up.weight",
    "lora_unet_{_}.alpha",
    "lora_unet_{_}.dora_scale",
    "lycoris_{_}.lora_down.weight",
]


@settings(max_examples=300, deadline=None)
@given(st.sampled_from(list(NAMES.layers)), st.sampled_from(FORMS))
def test_every_form_of_a_layers_key_finds_that_layer_and_no_other(name: str, form: str) -> None:
    key = form.replace("{_}", name.replace(".", "_")).replace("{}", name)
    parsed = parse_key(key)
    assert parsed is not None
    assert NAMES.find(parsed.layer) == (Part(name),)
    assert not is_text_encoder(key)


def called(layer: str) -> list[str]:
    return [layer, *(original for original, ours in stable_diffusion_names(NETWORK).items() if ours == (layer,))]


@settings(max_examples=300, deadline=None)
@example("time_embed.2", "unet.{}.lora_A.weight")
@given(st.text(alphabet="abto_.kq12lradwnupeightxm", max_size=60), st.sampled_from(FORMS))
def test_any_other_text_is_no_layer_and_no_error(name: str, form: str) -> None:
    for key in (name, form.replace("{_}", name).replace("{}", name)):
        parsed = parse_key(key)
        found = None if parsed is None else NAMES.find(parsed.layer)
        # Found only where the text is a name of the layer, its own or its original one.
        assert found is None or any(one.replace(".", "_") in key.replace(".", "_") for one in called(found[0].layer))


def test_name_that_could_mean_two_layers_means_none() -> None:
    network = nn.ModuleDict({"a_b": nn.Linear(1, 1), "a": nn.ModuleDict({"b": nn.Linear(1, 1)})})
    names = LayerNames(network)
    assert names.find("lora_unet_a_b") is None
    assert names.find("a_b") == (Part("a_b"),)
    assert names.find("a.b") == (Part("a.b"),)
