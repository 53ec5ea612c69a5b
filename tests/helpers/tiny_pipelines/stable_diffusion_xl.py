"""Stable Diffusion XL's pipeline."""

from __future__ import annotations

from pathlib import Path

from tiny_pipelines import parts

CHANNELS, PLACES = 4, 8


def make(folder: Path) -> Path:
    """Save one with random weights."""
    from diffusers import EulerDiscreteScheduler, StableDiffusionXLPipeline, UNet2DConditionModel

    unet = parts.seeded(
        lambda: UNet2DConditionModel(
            sample_size=PLACES,
            in_channels=CHANNELS,
            out_channels=CHANNELS,
            layers_per_block=1,
            block_out_channels=(8, 16),
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
            cross_attention_dim=20,
            attention_head_dim=2,
            transformer_layers_per_block=1,
            norm_num_groups=4,
            use_linear_projection=True,
            addition_embed_type="text_time",
            addition_time_embed_dim=4,
            projection_class_embeddings_input_dim=6 * 4 + 12,
        )
    )
    pipeline = StableDiffusionXLPipeline(
        vae=parts.kl_autoencoder(CHANNELS, scaling_factor=0.13025),
        text_encoder=parts.clip_encoder(8, projected=False),
        tokenizer=parts.clip_tokenizer(),
        text_encoder_2=parts.clip_encoder(12, projected=True),
        tokenizer_2=parts.clip_tokenizer(),
        unet=unet,
        scheduler=EulerDiscreteScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear"),
        add_watermarker=False,
    )
    return parts.saved(pipeline, folder)
