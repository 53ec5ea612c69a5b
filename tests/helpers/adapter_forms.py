"""One adapter in the forms that people's programs write it, written out by hand, and what it does to a network."""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from toys import tiny_unet


class Adapter(NamedTuple):
    """One layer's: ``A (r, i, …)``, ``B (o, r, …)``, alpha, and DoRA's magnitudes ``(o,)``."""

    down: Tensor
    up: Tensor
    alpha: float
    magnitude: Tensor | None


def stable_diffusion() -> nn.Module:
    return tiny_unet().double()


def stable_diffusion_xl() -> nn.Module:
    """SDXL's form: linear projections, blocks with and without attention, pooled text and sizes."""
    return tiny_unet(
        layers_per_block=2,
        block_out_channels=(8, 8, 8),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        transformer_layers_per_block=(1, 1, 2),
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=4,
        projection_class_embeddings_input_dim=6 * 4 + 5,
    ).double()


def flux() -> nn.Module:
    from diffusers import FluxTransformer2DModel

    torch.manual_seed(0)
    settings: dict[str, Any] = {
        "in_channels": 4,
        "num_layers": 1,
        "num_single_layers": 1,
        "attention_head_dim": 8,
        "num_attention_heads": 2,
        "joint_attention_dim": 6,
        "pooled_projection_dim": 5,
        "axes_dims_rope": (2, 2, 4),
        "guidance_embeds": True,
    }
    network: nn.Module = FluxTransformer2DModel(**settings)
    return network.eval().double()


def stable_diffusion_3() -> nn.Module:
    from diffusers import SD3Transformer2DModel

    torch.manual_seed(0)
    settings: dict[str, Any] = {
        "sample_size": 8,
        "patch_size": 2,
        "in_channels": 3,
        "out_channels": 3,
        "num_layers": 2,
        "attention_head_dim": 8,
        "num_attention_heads": 2,
        "joint_attention_dim": 6,
        "caption_projection_dim": 16,
        "pooled_projection_dim": 5,
        "pos_embed_max_size": 8,
        "dual_attention_layers": (0,),
        "qk_norm": "rms_norm",
    }
    network: nn.Module = SD3Transformer2DModel(**settings)
    return network.eval().double()


def outputs(network: nn.Module) -> Tensor:
    """The network's prediction on fixed inputs."""
    generator = torch.Generator().manual_seed(5)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    text, pooled = normal(2, 4, 6), normal(2, 5)
    timesteps = torch.tensor([3.0, 700.0], dtype=torch.float64)
    inputs: dict[str, Any] = {"encoder_hidden_states": text, "return_dict": False}
    kind = type(network).__name__
    if kind == "FluxTransformer2DModel":
        inputs |= {"pooled_projections": pooled, "timestep": timesteps / 1000, "guidance": torch.ones(2).double()}
        inputs |= {"hidden_states": normal(2, 9, 4), "img_ids": torch.zeros(9, 3), "txt_ids": torch.zeros(4, 3)}
    elif kind == "SD3Transformer2DModel":
        inputs |= {"pooled_projections": pooled, "timestep": timesteps, "hidden_states": normal(2, 3, 8, 8)}
    else:
        sizes = torch.tensor([[8.0, 8, 0, 0, 8, 8]] * 2)
        inputs |= {"sample": normal(2, 3, 8, 8), "timestep": timesteps}
        inputs |= {"added_cond_kwargs": {"text_embeds": pooled, "time_ids": sizes}}
    with torch.no_grad():
        out: Tensor = network(**inputs)[0]
    return out


def covered(network: nn.Module) -> dict[str, nn.Module]:
    return {name: layer for name, layer in network.named_modules() if isinstance(layer, nn.Linear | nn.Conv2d)}


def random_adapter(
    network: nn.Module, names: Sequence[str], rank: int = 3, alpha: float = 2.0, dora: bool = False
) -> dict[str, Adapter]:
    """An adapter that changes the network's outputs by about as much as they are."""
    layers = covered(network)
    generator = torch.Generator().manual_seed(7)
    found = {}
    for name in names:
        weight = layers[name].get_parameter("weight")
        outputs, inputs, *kernel = weight.shape
        down = torch.randn(rank, inputs, *kernel, generator=generator) / 2
        up = torch.randn(outputs, rank, *[1] * len(kernel), generator=generator) / 2
        magnitude = torch.rand(outputs, generator=generator) + 0.5 if dora else None
        found[name] = Adapter(down, up, alpha, magnitude)
    return found


def applied(network: nn.Module, adapter: Mapping[str, Adapter]) -> nn.Module:
    """Slow and obvious: the weights that the papers' formulas give."""
    network = copy.deepcopy(network)
    layers = covered(network)
    for name, one in adapter.items():
        weight = layers[name].get_parameter("weight")
        product = one.up.double().flatten(1) @ one.down.double().flatten(1)
        changed = weight.detach() + one.alpha / len(one.down) * product.reshape(weight.shape)
        if one.magnitude is not None:
            rows = changed.flatten(1)
            scaled = one.magnitude.double()[:, None] * rows / rows.norm(dim=1, keepdim=True)
            changed = scaled.reshape(weight.shape)
        weight.data.copy_(changed)
    return network


def save(path: Path, state: Mapping[str, Tensor], header: Mapping[str, str] | None = None) -> str:
    save_file({key: value.contiguous().clone() for key, value in state.items()}, path, dict(header or {}))
    return str(path)


def kohya_state(adapter: Mapping[str, Adapter], names: Mapping[str, str] | None = None) -> dict[str, Tensor]:
    """sd-scripts' ``networks/lora.py``: the layer's name with underscores, and alpha; LyCORIS has ``dora_scale``."""
    state = {}
    for layer, one in adapter.items():
        name = f"lora_unet_{(names or {}).get(layer, layer).replace('.', '_')}"
        state[f"{name}.lora_down.weight"], state[f"{name}.lora_up.weight"] = one.down, one.up
        state[f"{name}.alpha"] = torch.tensor(one.alpha)
        if one.magnitude is not None:
            state[f"{name}.dora_scale"] = one.magnitude.reshape(-1, *[1] * (one.down.ndim - 1))
    return state


def dotted_state(adapter: Mapping[str, Adapter], prefix: str, alpha: bool) -> dict[str, Tensor]:
    """ai-toolkit's, PEFT's and diffusers' newer form."""
    state = {}
    for layer, one in adapter.items():
        state[f"{prefix}{layer}.lora_A.weight"], state[f"{prefix}{layer}.lora_B.weight"] = one.down, one.up
        if alpha:
            state[f"{prefix}{layer}.alpha"] = torch.tensor(one.alpha)
        if one.magnitude is not None:
            state[f"{prefix}{layer}.lora_magnitude_vector"] = one.magnitude
    return state


def fused(adapter: Mapping[str, Adapter], joined: Mapping[str, Sequence[str]]) -> dict[str, Adapter]:
    """Layers under the names of the original code; several that are one there are joined as sd-scripts does."""
    found = {}
    for original, layers in joined.items():
        parts = [adapter[layer] for layer in layers]
        ranks = sum(len(part.down) for part in parts)
        down = torch.cat([part.down for part in parts])
        up = torch.block_diag(*[part.up for part in parts]) if len(parts) > 1 else parts[0].up
        magnitude = None if parts[0].magnitude is None else torch.cat([part.magnitude for part in parts])  # type: ignore[misc]
        found[original] = Adapter(down, up, parts[0].alpha * ranks / len(parts[0].down), magnitude)
    return found


def peft_folder(folder: Path, adapter: Mapping[str, Adapter], **settings: Any) -> str:
    """What PEFT's ``save_pretrained`` leaves."""
    folder.mkdir(parents=True)
    some = next(iter(adapter.values()))
    config = {
        "peft_type": "LORA",
        "r": len(some.down),
        "lora_alpha": some.alpha,
        "use_dora": some.magnitude is not None,
    }
    (folder / "adapter_config.json").write_text(json.dumps(config | settings))
    save(folder / "adapter_model.safetensors", dotted_state(adapter, "base_model.model.", alpha=False))
    return str(folder)
