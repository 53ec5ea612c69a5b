"""Chroma's pipeline."""

from __future__ import annotations

from pathlib import Path

from tiny_pipelines import parts

CHANNELS, PLACES = 4, 8


def make(folder: Path) -> Path:
    """Save one with random weights."""
    from diffusers import ChromaPipeline, ChromaTransformer2DModel, FlowMatchEulerDiscreteScheduler

    transformer = parts.seeded(
        lambda: ChromaTransformer2DModel(
            patch_size=1,
            in_channels=4 * CHANNELS,
            num_layers=1,
            num_single_layers=1,
            attention_head_dim=8,
            num_attention_heads=2,
            joint_attention_dim=16,
            axes_dims_rope=(2, 2, 4),
            approximator_num_channels=8,
            approximator_hidden_dim=16,
            approximator_layers=1,
        )
    )
    pipeline = ChromaPipeline(
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(),
        vae=parts.kl_autoencoder(CHANNELS, shift_factor=0.1159, scaling_factor=0.3611, use_quant_conv=False),
        text_encoder=parts.t5_encoder(16),
        tokenizer=parts.t5_tokenizer(),
    )
    return parts.saved(pipeline, folder)
