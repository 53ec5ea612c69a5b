"""A tiny decoder of Kandinsky 2.2."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tiny_pipelines.parts import saved, seeded

STATE = 12


def network() -> Any:
    from diffusers import UNet2DConditionModel

    return UNet2DConditionModel(
        sample_size=8,
        in_channels=4,
        out_channels=8,
        layers_per_block=1,
        block_out_channels=(8, 16),
        down_block_types=("ResnetDownsampleBlock2D", "SimpleCrossAttnDownBlock2D"),
        mid_block_type="UNetMidBlock2DSimpleCrossAttn",
        up_block_types=("SimpleCrossAttnUpBlock2D", "ResnetUpsampleBlock2D"),
        addition_embed_type="image",
        encoder_hid_dim=STATE,
        encoder_hid_dim_type="image_proj",
        cross_attention_dim=STATE,
        attention_head_dim=4,
        norm_num_groups=4,
        resnet_time_scale_shift="scale_shift",
    ).eval()


def make(folder: Path) -> Path:
    from diffusers import DDPMScheduler, KandinskyV22Pipeline, VQModel

    def movq() -> Any:
        return VQModel(
            block_out_channels=(8, 8),
            down_block_types=("DownEncoderBlock2D",) * 2,
            up_block_types=("UpDecoderBlock2D",) * 2,
            latent_channels=4,
            norm_num_groups=4,
            vq_embed_dim=4,
            num_vq_embeddings=12,
        )

    scheduler = DDPMScheduler(beta_start=0.00085, beta_end=0.012, clip_sample=False, variance_type="learned_range")
    return saved(KandinskyV22Pipeline(seeded(network), scheduler, seeded(movq)), folder)
