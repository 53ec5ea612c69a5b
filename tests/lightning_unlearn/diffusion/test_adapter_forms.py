"""The same adapter in every form gives the same network: that of the papers' formula, in float64."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import adapter_forms as forms
import pytest
import torch
from torch import nn

from lightning_unlearn.diffusion.adapters import load_adapter, merge_adapter

NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "sd": forms.stable_diffusion,
    "sdxl": forms.stable_diffusion_xl,
    "flux": forms.flux,
    "sd3": forms.stable_diffusion_3,
}
# In the order of the original code's rows.
JOINED = {
    "flux": {
        "double_blocks.0.img_attn.qkv": [f"transformer_blocks.0.attn.to_{name}" for name in "qkv"],
        "double_blocks.0.txt_attn.qkv": [f"transformer_blocks.0.attn.add_{name}_proj" for name in "qkv"],
        "double_blocks.0.img_mlp.0": ["transformer_blocks.0.ff.net.0.proj"],
        "double_blocks.0.txt_mod.lin": ["transformer_blocks.0.norm1_context.linear"],
        "single_blocks.0.linear1": [
            *(f"single_transformer_blocks.0.attn.to_{name}" for name in "qkv"),
            "single_transformer_blocks.0.proj_mlp",
        ],
        "single_blocks.0.linear2": ["single_transformer_blocks.0.proj_out"],
        "final_layer.linear": ["proj_out"],
    },
    "sd3": {
        "joint_blocks.0.x_block.attn.qkv": [f"transformer_blocks.0.attn.to_{name}" for name in "qkv"],
        "joint_blocks.0.x_block.attn2.qkv": [f"transformer_blocks.0.attn2.to_{name}" for name in "qkv"],
        "joint_blocks.1.context_block.attn.qkv": [f"transformer_blocks.1.attn.add_{name}_proj" for name in "qkv"],
        "joint_blocks.0.context_block.attn.proj": ["transformer_blocks.0.attn.to_add_out"],
        "joint_blocks.1.x_block.mlp.fc2": ["transformer_blocks.1.ff.net.2"],
        "x_embedder.proj": ["pos_embed.proj"],
    },
}
# SDXL's, as sd-scripts writes them, counted by hand for the tiny network.
RENAMED = {
    "down_blocks.0.resnets.1.conv1": "input_blocks.2.0.in_layers.2",
    "down_blocks.0.downsamplers.0.conv": "input_blocks.3.0.op",
    "down_blocks.1.attentions.0.transformer_blocks.0.attn2.to_k": "input_blocks.4.1.transformer_blocks.0.attn2.to_k",
    "down_blocks.2.resnets.0.time_emb_proj": "input_blocks.7.0.emb_layers.1",
    "down_blocks.2.attentions.1.proj_in": "input_blocks.8.1.proj_in",
    "mid_block.attentions.0.transformer_blocks.1.ff.net.0.proj": "middle_block.1.transformer_blocks.1.ff.net.0.proj",
    "up_blocks.0.attentions.2.transformer_blocks.0.ff.net.2": "output_blocks.2.1.transformer_blocks.0.ff.net.2",
    "up_blocks.0.upsamplers.0.conv": "output_blocks.2.2.conv",
    "up_blocks.2.resnets.0.conv_shortcut": "output_blocks.6.0.skip_connection",
    "add_embedding.linear_2": "label_emb.0.2",
    "conv_in": "input_blocks.0.0",
}
PREFIX = {"sd": "unet.", "sdxl": "unet.", "flux": "transformer.", "sd3": "transformer."}


def layers_of(kind: str, network: nn.Module) -> list[str]:
    if kind in JOINED:
        return [name for names in JOINED[kind].values() for name in names]
    if kind == "sdxl":
        return list(RENAMED)
    # Everything: LoCon has the convolutions, too.
    return list(forms.covered(network))


Written = tuple[str, dict[str, forms.Adapter]]


def written(form: str, kind: str, network: nn.Module, folder: Path, *, dora: bool) -> Written:
    # ai-toolkit keeps no alpha: it is the rank.
    alpha = 3.0 if form == "ai-toolkit" else 2.0
    adapter = forms.random_adapter(network, layers_of(kind, network), alpha=alpha, dora=dora)
    path = folder / "lora.safetensors"
    if form == "peft":
        return forms.peft_folder(folder / "peft", adapter), adapter
    if form == "diffusers":
        settings = {f"{PREFIX[kind]}r": 3, f"{PREFIX[kind]}lora_alpha": 2.0}
        state = forms.dotted_state(adapter, PREFIX[kind], alpha=False)
        if kind in {"sd", "sdxl"}:
            state = {key.replace("lora_A", "lora.down").replace("lora_B", "lora.up"): it for key, it in state.items()}
        return forms.save(path, state, {"lora_adapter_metadata": json.dumps(settings)}), adapter
    if form == "kohya":
        named = forms.fused(adapter, JOINED[kind]) if kind in JOINED else adapter
        return forms.save(path, forms.kohya_state(named, RENAMED if kind == "sdxl" else None)), adapter
    if form == "lycoris":
        state = forms.kohya_state(adapter)
        return forms.save(path, {key.replace("lora_unet_", "lycoris_"): it for key, it in state.items()}), adapter
    named = forms.fused(adapter, JOINED[kind]) if kind in JOINED else adapter
    if kind in JOINED:
        # Joined, the ranks add up, and so does alpha: without one the scale stays 1.
        assert all(one.alpha == len(one.down) for one in named.values())
    return forms.save(path, forms.dotted_state(named, "diffusion_model.", alpha=False)), adapter


@pytest.mark.parametrize("dora", [False, True], ids=["lora", "dora"])
@pytest.mark.parametrize("form", ["diffusers", "peft", "kohya", "lycoris", "ai-toolkit"])
@pytest.mark.parametrize("kind", list(NETWORKS))
def test_every_form_gives_the_network_of_the_formula(kind: str, form: str, dora: bool, tmp_path: Path) -> None:
    network = NETWORKS[kind]()
    before = forms.outputs(network)
    path, adapter = written(form, kind, network, tmp_path, dora=dora)
    wanted = forms.outputs(forms.applied(network, adapter))
    load_adapter(network, path)
    found = forms.outputs(network)
    # What a mistake in the least of the layers would do is far above 1e-5.
    assert (wanted - before).abs().max() > 1e-2
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-5)
    merge_adapter(network)
    torch.testing.assert_close(forms.outputs(network), wanted, rtol=0, atol=1e-5)
    assert not any("lora" in name for name in network.state_dict())
