"""Stable Diffusion 3.5's pipeline, with a block of dual attention as 3.5 medium has them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tiny_pipelines import parts

CHANNELS, PLACES = 4, 8


def transformer() -> Any:
    """The network alone."""
    from diffusers import SD3Transformer2DModel

    return parts.seeded(
        lambda: SD3Transformer2DModel(
            sample_size=PLACES,
            patch_size=2,
            in_channels=CHANNELS,
            num_layers=2,
            attention_head_dim=8,
            num_attention_heads=2,
            joint_attention_dim=24,
            caption_projection_dim=16,
            pooled_projection_dim=20,
            out_channels=CHANNELS,
            pos_embed_max_size=PLACES,
            dual_attention_layers=(0,),
            qk_norm="rms_norm",
        )
    )


def make(folder: Path) -> Path:
    """Save one with random weights."""
    from diffusers import FlowMatchEulerDiscreteScheduler, StableDiffusion3Pipeline

    pipeline = StableDiffusion3Pipeline(
        transformer=transformer(),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=parts.kl_autoencoder(CHANNELS, shift_factor=0.0609, scaling_factor=1.5305, use_quant_conv=False),
        text_encoder=parts.clip_encoder(8, projected=True),
        tokenizer=parts.clip_tokenizer(),
        text_encoder_2=parts.clip_encoder(12, projected=True),
        tokenizer_2=parts.clip_tokenizer(),
        text_encoder_3=parts.t5_encoder(24),
        tokenizer_3=parts.t5_tokenizer(),
    )
    return parts.saved(pipeline, folder)
