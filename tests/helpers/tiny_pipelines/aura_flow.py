"""AuraFlow's pipeline."""

from __future__ import annotations

from pathlib import Path

from tiny_pipelines import parts

CHANNELS, PLACES = 4, 8


def make(folder: Path) -> Path:
    """Save one with random weights."""
    from diffusers import AuraFlowPipeline, AuraFlowTransformer2DModel, FlowMatchEulerDiscreteScheduler

    transformer = parts.seeded(
        lambda: AuraFlowTransformer2DModel(
            sample_size=PLACES,
            patch_size=2,
            in_channels=CHANNELS,
            num_mmdit_layers=1,
            num_single_dit_layers=1,
            attention_head_dim=8,
            num_attention_heads=2,
            joint_attention_dim=16,
            caption_projection_dim=16,
            out_channels=CHANNELS,
            pos_embed_max_size=PLACES * PLACES,
        )
    )
    pipeline = AuraFlowPipeline(
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=1.73),
        vae=parts.kl_autoencoder(CHANNELS, scaling_factor=0.13025),
        text_encoder=parts.umt5_encoder(16),
        tokenizer=parts.t5_tokenizer(),
    )
    return parts.saved(pipeline, folder)
