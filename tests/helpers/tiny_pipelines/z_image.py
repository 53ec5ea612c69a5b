"""Z-Image's pipeline."""

from __future__ import annotations

from pathlib import Path

from tiny_pipelines import language, parts

CHANNELS = 4
SHAPE = (CHANNELS, 8, 16)


def make(folder: Path) -> Path:
    """Save one with random weights."""
    from diffusers import FlowMatchEulerDiscreteScheduler, ZImagePipeline, ZImageTransformer2DModel

    transformer = parts.seeded(
        lambda: ZImageTransformer2DModel(
            in_channels=CHANNELS,
            dim=24,
            n_layers=1,
            n_refiner_layers=1,
            n_heads=3,
            n_kv_heads=3,
            cap_feat_dim=8,
            axes_dims=[2, 2, 4],
            axes_lens=[1024, 32, 32],
        )
    )
    pipeline = ZImagePipeline(
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=parts.kl_autoencoder(CHANNELS, shift_factor=0.1159, scaling_factor=0.3611, use_quant_conv=False),
        text_encoder=language.qwen_3(8),
        tokenizer=language.tokenizer(),
    )
    return parts.saved(pipeline, folder)
