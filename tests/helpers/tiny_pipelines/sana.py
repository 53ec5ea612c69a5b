"""Sana's pipeline."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tiny_pipelines import language, parts

CHANNELS, HEIGHT, WIDTH = 4, 32, 64  # in pixels; Sana's own are multiples of 32
SHAPE = (CHANNELS, 8, 16)


def make(folder: Path) -> Path:
    """Save one with random weights."""
    from diffusers import FlowMatchEulerDiscreteScheduler, SanaPipeline, SanaTransformer2DModel

    transformer = parts.seeded(
        lambda: SanaTransformer2DModel(
            in_channels=CHANNELS,
            out_channels=CHANNELS,
            num_attention_heads=2,
            attention_head_dim=8,
            num_layers=1,
            num_cross_attention_heads=2,
            cross_attention_head_dim=8,
            cross_attention_dim=16,
            caption_channels=8,
            sample_size=8,
        )
    )
    pipeline = SanaPipeline(
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=_autoencoder(),
        text_encoder=language.gemma(8),
        tokenizer=language.tokenizer(),
    )
    return parts.saved(pipeline, folder)


def _autoencoder() -> Any:
    from diffusers import AutoencoderDC

    return parts.seeded(
        lambda: AutoencoderDC(
            latent_channels=CHANNELS,
            attention_head_dim=4,
            encoder_block_types=("ResBlock",) * 3,
            decoder_block_types=("ResBlock",) * 3,
            encoder_block_out_channels=(4, 4, 8),
            decoder_block_out_channels=(4, 4, 8),
            encoder_layers_per_block=(1, 1, 1),
            decoder_layers_per_block=(1, 1, 1),
            encoder_qkv_multiscales=((), (), ()),
            decoder_qkv_multiscales=((), (), ()),
            scaling_factor=0.41407,
        )
    )
