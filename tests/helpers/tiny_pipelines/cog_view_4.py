"""CogView4's pipeline."""

from __future__ import annotations

from pathlib import Path

from tiny_pipelines import language, parts

CHANNELS = 4
SHAPE = (CHANNELS, 8, 16)


def make(folder: Path) -> Path:
    """Save one with random weights."""
    from diffusers import CogView4Pipeline, CogView4Transformer2DModel, FlowMatchEulerDiscreteScheduler

    transformer = parts.seeded(
        lambda: CogView4Transformer2DModel(
            in_channels=CHANNELS,
            out_channels=CHANNELS,
            num_layers=2,
            attention_head_dim=8,
            num_attention_heads=2,
            text_embed_dim=8,
            time_embed_dim=8,
            condition_dim=4,
            pos_embed_max_size=8,
            sample_size=8,
            rope_axes_dim=(16, 16),
        )
    )
    scheduler = FlowMatchEulerDiscreteScheduler(
        use_dynamic_shifting=True, base_shift=0.25, max_shift=0.75, time_shift_type="linear"
    )
    pipeline = CogView4Pipeline(
        transformer=transformer,
        scheduler=scheduler,
        vae=parts.kl_autoencoder(CHANNELS, shift_factor=0.0, scaling_factor=1.0),
        text_encoder=language.glm(8),
        tokenizer=language.tokenizer("left"),
    )
    return parts.saved(pipeline, folder)
