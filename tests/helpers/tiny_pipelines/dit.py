"""A tiny DiT."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tiny_pipelines.parts import kl_autoencoder, saved, seeded


def network() -> Any:
    from diffusers import DiTTransformer2DModel

    return DiTTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=6,
        in_channels=4,
        out_channels=8,
        num_layers=2,
        sample_size=8,
        patch_size=2,
        num_embeds_ada_norm=1000,
    ).eval()


def make(folder: Path) -> Path:
    from diffusers import DDIMScheduler, DiTPipeline

    return saved(DiTPipeline(seeded(network), kl_autoencoder(4), DDIMScheduler()), folder)
