"""The layers of Stable Diffusion's U-Net (1, 2 and XL) by the names that Stability's code gives them.

kohya trains SDXL on a U-Net with these names; for 1 and 2 it uses those of diffusers.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from torch import nn

_ENDS = {
    "input_blocks.0.0": "conv_in",
    "out.2": "conv_out",
    "time_embed.0": "time_embedding.linear_1",
    "time_embed.2": "time_embedding.linear_2",
    "label_emb.0.0": "add_embedding.linear_1",
    "label_emb.0.2": "add_embedding.linear_2",
}
_RESNET = {
    "conv1": "in_layers.2",
    "conv2": "out_layers.3",
    "time_emb_proj": "emb_layers.1",
    "conv_shortcut": "skip_connection",
}


def stable_diffusion_names(network: nn.Module) -> Mapping[str, Sequence[str]]:
    """Original names to ours.

    Args:
        network: A ``UNet2DConditionModel``.

    Returns:
        Original layer name to the one layer that it is.
    """
    places = dict(_places(network))
    names = {original: (ours,) for original, ours in _ENDS.items()}
    for name, _ in network.named_modules():
        for ours, original in places.items():
            if name.startswith(f"{ours}."):
                inner = name.removeprefix(f"{ours}.")
                names[f"{original}.{_RESNET.get(inner, inner)}"] = (name,)
            elif name == ours:
                names[original] = (name,)
    return names


def _places(network: nn.Module) -> Iterator[tuple[str, str]]:
    """Our blocks and theirs, counted as Stability's code appends them."""
    number = 1  # input_blocks.0 is conv_in
    for i, block in enumerate(_children(network, "down_blocks")):
        for j in range(_count(block, "resnets")):
            yield f"down_blocks.{i}.resnets.{j}", f"input_blocks.{number}.0"
            yield f"down_blocks.{i}.attentions.{j}", f"input_blocks.{number}.1"
            number += 1
        if _count(block, "downsamplers"):
            yield f"down_blocks.{i}.downsamplers.0.conv", f"input_blocks.{number}.0.op"
            number += 1
    for ours, original in (("resnets.0", "0"), ("attentions.0", "1"), ("resnets.1", "2")):
        yield f"mid_block.{ours}", f"middle_block.{original}"
    number = 0
    for i, block in enumerate(_children(network, "up_blocks")):
        for j in range(_count(block, "resnets")):
            yield f"up_blocks.{i}.resnets.{j}", f"output_blocks.{number}.0"
            yield f"up_blocks.{i}.attentions.{j}", f"output_blocks.{number}.1"
            number += 1
        if _count(block, "upsamplers"):
            # It stands in the last of the block's, after the attention where there is one.
            after = 2 if _count(block, "attentions") else 1
            yield f"up_blocks.{i}.upsamplers.0.conv", f"output_blocks.{number - 1}.{after}.conv"


def _children(module: nn.Module, name: str) -> list[nn.Module]:
    found = getattr(module, name, None)
    return list(found.children()) if isinstance(found, nn.Module) else []


def _count(module: nn.Module, name: str) -> int:
    return len(_children(module, name))
