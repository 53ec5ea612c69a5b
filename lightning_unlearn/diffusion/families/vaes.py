"""Latents of VAEs, scaled and shifted as networks are trained on them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def encode_kl(vae: Any, pixels: Tensor) -> tuple[Tensor, Tensor | None]:
    """Latents of a VAE that gives a distribution; see :meth:`Family.encode_pictures`.

    Args:
        vae: The VAE.
        pixels: ``(B, channels, H, W)`` in [-1, 1]; ``(B, channels, F, H, W)`` of videos.

    Returns:
        Mean and standard deviation ``(B, C, H, W)`` or ``(B, C, F, H, W)``, scaled and shifted as its config says.
    """
    distribution = vae.encode(pixels).latent_dist
    said = scaling_of(vae)
    shift, factor = (
        torch.tensor(said[name]).to(pixels).reshape(-1, *[1] * (pixels.ndim - 2)) for name in ("shift", "factor")
    )
    return (distribution.mean - shift) * factor, distribution.std * factor


def scaling_of(vae: Any) -> dict[str, list[float]]:
    """How the latents of a VAE are shifted and scaled, by its config.

    Args:
        vae: Of diffusers.

    Returns:
        ``shift`` and ``factor``, one number for all channels or one for each.
    """
    config = vae.config
    # Some VAEs normalise each channel (diffusers' latents_mean, latents_std), others have one shift for all.
    shift = config.get("latents_mean") or [config.get("shift_factor") or 0.0]
    spread = config.get("latents_std") or [1.0]
    # Those of videos have no factor beside the spread; an AutoencoderKL of old has this one.
    usual = 1.0 if config.get("latents_std") else 0.18215
    factor = config.get("scaling_factor", usual) / torch.tensor(spread)
    return {"shift": torch.tensor(shift).flatten().tolist(), "factor": factor.flatten().tolist()}
