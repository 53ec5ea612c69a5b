"""Lumina-Image 2.0's pipeline."""

from __future__ import annotations

from pathlib import Path

from tiny_pipelines import language, parts

CHANNELS, HEIGHT, WIDTH = 4, 64, 128  # in pixels: the pipeline takes it that a VAE makes sides an eighth as long
SHAPE = (CHANNELS, 8, 16)


def make(folder: Path) -> Path:
    """Save one with random weights."""
    from diffusers import FlowMatchEulerDiscreteScheduler, Lumina2Pipeline, Lumina2Transformer2DModel

    transformer = parts.seeded(
        lambda: Lumina2Transformer2DModel(
            sample_size=8,
            in_channels=CHANNELS,
            hidden_size=16,
            num_layers=1,
            num_refiner_layers=1,
            num_attention_heads=2,
            num_kv_heads=1,
            multiple_of=8,
            axes_dim_rope=(2, 2, 4),
            axes_lens=(300, 32, 32),
            cap_feat_dim=8,
        )
    )
    pipeline = Lumina2Pipeline(
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=6.0),
        vae=parts.kl_autoencoder(CHANNELS, shift_factor=0.1159, scaling_factor=0.3611, use_quant_conv=False),
        text_encoder=language.gemma(8),
        tokenizer=language.tokenizer(),
    )
    return parts.saved(pipeline, folder)
