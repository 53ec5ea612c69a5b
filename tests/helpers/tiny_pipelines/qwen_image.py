"""Qwen-Image's pipeline."""

from __future__ import annotations

from pathlib import Path

from tiny_pipelines import language, parts

CHANNELS = 4
SHAPE = (CHANNELS, 8, 16)


def make(folder: Path) -> Path:
    """Save one with random weights."""
    from diffusers import (
        AutoencoderKLQwenImage,
        FlowMatchEulerDiscreteScheduler,
        QwenImagePipeline,
        QwenImageTransformer2DModel,
    )

    transformer = parts.seeded(
        lambda: QwenImageTransformer2DModel(
            in_channels=4 * CHANNELS,
            out_channels=CHANNELS,
            num_layers=2,
            attention_head_dim=8,
            num_attention_heads=2,
            joint_attention_dim=8,
            axes_dims_rope=(2, 2, 4),
        )
    )
    vae = parts.seeded(
        lambda: AutoencoderKLQwenImage(
            base_dim=4,
            z_dim=CHANNELS,
            dim_mult=[1, 2],
            num_res_blocks=1,
            temperal_downsample=[False],
            latents_mean=[0.1, -0.2, 0.3, 0.4],
            latents_std=[1.1, 1.2, 0.9, 0.8],
        )
    )
    pipeline = QwenImagePipeline(
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, base_shift=0.5, max_shift=0.9),
        vae=vae,
        text_encoder=language.qwen_2_5_vision(8),
        tokenizer=language.tokenizer(),
    )
    return parts.saved(pipeline, folder)
