"""FLUX.1's pipeline: dev, which is guidance-distilled, and schnell."""

from __future__ import annotations

from pathlib import Path

from tiny_pipelines import parts

CHANNELS, PLACES = 4, 8


def make(folder: Path, *, dev: bool = True) -> Path:
    """Save one with random weights."""
    from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel

    transformer = parts.seeded(
        lambda: FluxTransformer2DModel(
            patch_size=1,
            in_channels=4 * CHANNELS,
            num_layers=1,
            num_single_layers=1,
            attention_head_dim=8,
            num_attention_heads=2,
            joint_attention_dim=16,
            pooled_projection_dim=12,
            guidance_embeds=dev,
            axes_dims_rope=(2, 2, 4),
        )
    )
    pipeline = FluxPipeline(
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0 if dev else 1.0, use_dynamic_shifting=dev),
        vae=parts.kl_autoencoder(CHANNELS, shift_factor=0.1159, scaling_factor=0.3611, use_quant_conv=False),
        text_encoder=parts.clip_encoder(12, projected=False),
        tokenizer=parts.clip_tokenizer(),
        text_encoder_2=parts.t5_encoder(16),
        tokenizer_2=parts.t5_tokenizer(),
    )
    return parts.saved(pipeline, folder)
