"""Wan's pipeline of text to video."""

from __future__ import annotations

from pathlib import Path

from tiny_pipelines import parts

CHANNELS, FRAMES = 4, 5
SHAPE = (CHANNELS, 3, 8, 16)


def make(folder: Path) -> Path:
    """Save one with random weights."""
    from diffusers import AutoencoderKLWan, UniPCMultistepScheduler, WanPipeline, WanTransformer3DModel

    transformer = parts.seeded(
        lambda: WanTransformer3DModel(
            num_attention_heads=2,
            attention_head_dim=12,
            in_channels=CHANNELS,
            out_channels=CHANNELS,
            text_dim=16,
            freq_dim=8,
            ffn_dim=16,
            num_layers=1,
            rope_max_seq_len=32,
        )
    )
    vae = parts.seeded(
        lambda: AutoencoderKLWan(
            base_dim=4,
            z_dim=CHANNELS,
            dim_mult=[1, 2],
            num_res_blocks=1,
            temperal_downsample=[True],
            latents_mean=[0.1, -0.2, 0.3, 0.4],
            latents_std=[1.1, 1.2, 0.9, 0.8],
            scale_factor_temporal=2,
            scale_factor_spatial=2,
        )
    )
    pipeline = WanPipeline(
        transformer=transformer,
        scheduler=UniPCMultistepScheduler(
            prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0, num_train_timesteps=1000
        ),
        vae=vae,
        text_encoder=parts.umt5_encoder(16),
        tokenizer=parts.t5_tokenizer(),
    )
    return parts.saved(pipeline, folder)
