"""Stable Diffusion 1's pipeline."""

from __future__ import annotations

from pathlib import Path

from tiny_pipelines import parts

CHANNELS, PLACES = 4, 8


def make(folder: Path) -> Path:
    """Save one with random weights."""
    from diffusers import DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel

    unet = parts.seeded(
        lambda: UNet2DConditionModel(
            sample_size=PLACES,
            in_channels=CHANNELS,
            out_channels=CHANNELS,
            layers_per_block=1,
            block_out_channels=(8, 8),
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
            cross_attention_dim=12,
            attention_head_dim=2,
            norm_num_groups=4,
        )
    )
    pipeline = StableDiffusionPipeline(
        vae=parts.kl_autoencoder(CHANNELS),
        text_encoder=parts.clip_encoder(12, projected=False),
        tokenizer=parts.clip_tokenizer(),
        unet=unet,
        scheduler=DDIMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear"),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    return parts.saved(pipeline, folder)
