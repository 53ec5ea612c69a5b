"""A tiny pipeline without text and without a VAE, on pixels."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tiny_pipelines.parts import saved, seeded


def network(**overrides: Any) -> Any:
    from diffusers import UNet2DModel

    settings = {
        "sample_size": 16,
        "in_channels": 3,
        "out_channels": 3,
        "layers_per_block": 1,
        "block_out_channels": (8, 8),
        "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
        "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
        "attention_head_dim": 4,
        "norm_num_groups": 4,
    }
    return seeded(lambda: UNet2DModel(**settings | overrides))


def make(folder: Path, **overrides: Any) -> Path:
    from diffusers import DDPMPipeline, DDPMScheduler

    return saved(DDPMPipeline(network(**overrides), DDPMScheduler()), folder)
