"""A tiny PixArt-α with sizes, and a tiny PixArt-Σ without."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tiny_pipelines.parts import kl_autoencoder, saved, seeded, t5_encoder, t5_tokenizer

TEXT = 12


def network(sizes: bool = True) -> Any:
    from diffusers import PixArtTransformer2DModel

    return PixArtTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=6,
        in_channels=4,
        out_channels=8,
        num_layers=2,
        # With 128 the pipeline hands over sizes, and so its pictures are of 256 pixels here.
        sample_size=128 if sizes else 8,
        patch_size=2,
        cross_attention_dim=12,
        caption_channels=TEXT,
        use_additional_conditions=sizes,
    ).eval()


def make(folder: Path, sigma: bool = False) -> Path:
    from diffusers import DPMSolverMultistepScheduler, PixArtAlphaPipeline, PixArtSigmaPipeline

    kind = PixArtSigmaPipeline if sigma else PixArtAlphaPipeline
    pipeline = kind(
        tokenizer=t5_tokenizer(),
        text_encoder=t5_encoder(TEXT),
        vae=kl_autoencoder(4),
        transformer=seeded(lambda: network(not sigma)),
        scheduler=DPMSolverMultistepScheduler(),
    )
    return saved(pipeline, folder)
