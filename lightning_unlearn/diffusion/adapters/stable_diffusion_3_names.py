"""The layers of Stable Diffusion 3 and 3.5 by the names that Stability's code gives them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import nn

_ENDS = {
    "x_embedder.proj": ["pos_embed.proj"],
    "context_embedder": ["context_embedder"],
    "t_embedder.mlp.0": ["time_text_embed.timestep_embedder.linear_1"],
    "t_embedder.mlp.2": ["time_text_embed.timestep_embedder.linear_2"],
    "y_embedder.mlp.0": ["time_text_embed.text_embedder.linear_1"],
    "y_embedder.mlp.2": ["time_text_embed.text_embedder.linear_2"],
    "final_layer.linear": ["proj_out"],
    "final_layer.adaLN_modulation.1": ["norm_out.linear"],
}
_BLOCK = {
    "x_block.attn.qkv": ["attn.to_q", "attn.to_k", "attn.to_v"],
    "x_block.attn.proj": ["attn.to_out.0"],
    "x_block.attn2.qkv": ["attn2.to_q", "attn2.to_k", "attn2.to_v"],
    "x_block.attn2.proj": ["attn2.to_out.0"],
    "x_block.mlp.fc1": ["ff.net.0.proj"],
    "x_block.mlp.fc2": ["ff.net.2"],
    "x_block.adaLN_modulation.1": ["norm1.linear"],
    "context_block.attn.qkv": ["attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"],
    "context_block.attn.proj": ["attn.to_add_out"],
    "context_block.mlp.fc1": ["ff_context.net.0.proj"],
    "context_block.mlp.fc2": ["ff_context.net.2"],
    "context_block.adaLN_modulation.1": ["norm1_context.linear"],
}


def stable_diffusion_3_names(network: nn.Module) -> Mapping[str, Sequence[str]]:
    """Original names to ours.

    Args:
        network: An ``SD3Transformer2DModel``.

    Returns:
        Original layer name to the layers that it is, in the order of its rows.
    """
    names = dict(_ENDS)
    for number, _ in network.get_submodule("transformer_blocks").named_children():
        for original, parts in _BLOCK.items():
            names[f"joint_blocks.{number}.{original}"] = [f"transformer_blocks.{number}.{part}" for part in parts]
    return names
