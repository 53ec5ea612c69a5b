"""Latents of pictures by a pipeline's VAE; it runs in float32, without TF32."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import diffusers
import torch
from torch import Tensor

from lightning_unlearn.diffusion.families import Family, encode_kl, family_of, scaling_of
from lightning_unlearn.errors import InputError
from lightning_unlearn.fingerprints import generator_for, tensors_digest
from lightning_unlearn.preparation.inputs import Array, Item, stack_pixels
from lightning_unlearn.preparation.model_parts import as_numpy, config_of, load_model, network_beside, network_size
from lightning_unlearn.preparation.records import Record
from lightning_unlearn.weights.precision import ExactFloat32

VAES = ("vae", "movq", "vqvae")
"""What pipelines call it."""


class VaeLatents:
    """Latents of a pipeline's VAE as its network was trained on them: shifted and scaled.

    Args:
        folder: Of the pipeline.
        size: Side of the square pictures; by default the network's ``sample_size`` times the VAE's scale.
        kept: Whether the mean of the VAE's distribution is kept, or a draw from it.
        seed: Of the draws; each is a function of it, the sample's key and the flip alone.
        device: Where the VAE runs.

    Raises:
        InputError: If the folder has no usable VAE, or the size does not suit it.
    """

    def __init__(self, folder: Path, size: int | None, kept: str, seed: int, device: torch.device) -> None:
        network = network_beside(folder)
        self.family = family_of(network) if network is not None else None
        wanted = self.family.vae_class if self.family is not None else "AutoencoderKL"
        part = next((name for name in VAES if (folder / name).is_dir()), VAES[0])
        config = config_of(folder / part)
        if config.get("_class_name") != wanted or config.get("in_channels", 3) not in (1, 3):
            raise InputError(f"{folder / part} is no {wanted} for grey or RGB pictures; give ready `latents`.")
        kind = getattr(diffusers, wanted)
        self.vae = load_model(kind, folder / part, low_cpu_mem_usage=False).to(device)
        scale = _scale(self.vae)
        self.rows: int | None = None
        self.sides = (size, size) if size is not None else network_size(folder, scale)
        self.crop: tuple[int, int] | None = self.sides
        if any(side % scale for side in self.sides):
            raise InputError(f"{folder}'s VAE can't take pictures of {self.sides}; set size to a multiple of {scale}.")
        self.mode = "L" if config.get("in_channels") == 1 else "RGB"
        self.kept, self.seed, self.device = kept, seed, device
        latents, spread = self._encoded(self._blank())
        if kept == "sample" and spread is None:
            raise InputError(f"{folder / part} gives one code a picture and no distribution; leave `vae_sample` out.")
        self.shape: tuple[int, ...] = tuple(latents.shape[1:])
        self.about: dict[str, Any] = {
            "space": "latent",
            "vae": f"{folder.resolve().name}/{part}",
            "vae_fingerprint": tensors_digest(self.vae.state_dict()),
            "vae_sample": kept,
            **(scaling_of(self.vae) if self._scaled_by_config() else {}),
            **({"family": self.family.title} if self.family is not None else {}),
            **({"seed": seed} if kept == "sample" else {}),
        }

    def _scaled_by_config(self) -> bool:
        return self.family is None or type(self.family).encode_pictures is Family.encode_pictures

    def _blank(self) -> Tensor:
        channels = 1 if self.mode == "L" else 3
        return torch.zeros(1, channels, *self.sides, device=self.device)

    @torch.inference_mode()
    def _encoded(self, pixels: Tensor) -> tuple[Tensor, Tensor | None]:
        encode = self.family.encode_pictures if self.family is not None else encode_kl
        with ExactFloat32():
            return encode(self.vae, pixels)

    def facts(self, record: Record) -> dict[str, Any]:
        """See :class:`LatentSource`; it makes a latent of each picture."""
        return {}

    def latents(self, items: Sequence[Item], *, mirrored: bool) -> Array:
        """See :class:`LatentSource`."""
        pixels = torch.from_numpy(stack_pixels(items, mirrored=mirrored)).to(self.device)
        latents, spread = self._encoded(pixels)  # (B, C, H, W)
        if self.kept == "sample":
            assert spread is not None
            side = "mirrored" if mirrored else "picture"
            noise = [
                torch.randn(latents.shape[1:], generator=generator_for("prepare", self.seed, item.record.key, side))
                for item in items
            ]
            latents = latents + spread * torch.stack(noise).to(latents)
        return as_numpy(latents)

    def numbers(self, item: Item) -> dict[str, list[int]]:
        """See :class:`LatentSource`; what the family's networks are told of a picture's sizes."""
        if self.family is None or item.taken is None:
            return {}
        height, width = self.sides if item.pixels is None else item.pixels.shape[1:]
        return self.family.facts(height, width, item.taken.original, item.taken.corner)


def _scale(vae: Any) -> int:
    """Pixels a latent, along a side."""
    said = getattr(vae, "spatial_compression_ratio", None)
    if isinstance(said, int):
        return said
    widths = vae.config.get("block_out_channels") or vae.config.get("encoder_block_out_channels") or [64]
    return int(2 ** (len(widths) - 1))
