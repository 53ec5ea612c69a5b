"""FLUX.2: latents that the VAE's pipeline has already cut into patches and normalised."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from lightning_unlearn.data.conditions import Conditions
from lightning_unlearn.data.samples import ViewBatch
from lightning_unlearn.diffusion.families.base import Condition, Family, FlowTraining
from lightning_unlearn.diffusion.families.patches import check_patches, distilled_guidance


class Flux2Family(Family):
    """``diffusers.Flux2Transformer2DModel``, dev and klein.

    The blocks of one stream have one layer for queries, keys, values and the MLP's input, which is in no named
    selection but ``linear`` and ``all``.
    """

    title: ClassVar[str] = "FLUX.2"
    class_names: ClassVar[Sequence[str]] = ("Flux2Transformer2DModel",)
    selections: ClassVar[Mapping[str, Sequence[str]]] = {
        "text_kv": (r"transformer_blocks\..*\.attn\.add_[kv]_proj",),
        "attention": (r"transformer_blocks\..*\.attn\.(to_[qkv]|to_out\.0|add_[qkv]_proj|to_add_out)",),
        "feed_forward": (r"transformer_blocks\..*\.ff(_context)?\.linear_(in|out)",),
    }
    conditions: ClassVar[Mapping[str, Condition]] = {
        "text": Condition(2, ("joint_attention_dim",)),
        "guidance": Condition(1, optional=True),
    }
    vae_class: ClassVar[str] = "AutoencoderKLFlux2"
    flow: ClassVar[FlowTraining | None] = FlowTraining()

    def call(self, network: nn.Module, noisy: Tensor, timesteps: Tensor, batch: ViewBatch) -> Tensor:
        """Call the transformer; see :meth:`Family.call`.

        Args:
            network: The transformer.
            noisy: ``(B, C, H, W)``, one token a place.
            timesteps: ``(B,)`` 1000 σ.
            batch: With ``text`` and, for dev, ``guidance``.

        Returns:
            ``(B, C, H, W)``.
        """
        prediction: Tensor = network(
            hidden_states=noisy.flatten(2).transpose(1, 2),  # (B, H · W, C)
            timestep=timesteps / 1000,
            guidance=distilled_guidance(network, batch),
            encoder_hidden_states=batch.text,
            txt_ids=_places(noisy, 1, 1, batch.text.shape[1]),
            img_ids=_places(noisy, noisy.shape[-2], noisy.shape[-1], 1),
            return_dict=False,
        )[0]
        return prediction.transpose(1, 2).reshape(noisy.shape)

    def size_shift(self, network: nn.Module, config: Any, latents: Tensor, steps: int) -> float:
        """By the pipeline's fit, to the number of steps, too; see :meth:`Family.size_shift`."""
        from diffusers.pipelines.flux2.pipeline_flux2 import compute_empirical_mu

        return float(compute_empirical_mu(latents.shape[-2] * latents.shape[-1], steps))

    @torch.no_grad()
    def encode(self, pipeline: Any, captions: Sequence[str]) -> Conditions:
        """States of three layers of the language model side by side; see :meth:`Family.encode`.

        Args:
            pipeline: A ``Flux2Pipeline`` or ``Flux2KleinPipeline``.
            captions: ``n``.

        Returns:
            ``text``.
        """
        return {"text": pipeline.encode_prompt(list(captions))[0].float()}

    def encode_pictures(self, vae: Any, pixels: Tensor) -> tuple[Tensor, Tensor | None]:
        """Patches of 2 × 2 latents as channels, normalised by the VAE's batch norm; see :meth:`Family.encode_pictures`.

        Args:
            vae: An ``AutoencoderKLFlux2``.
            pixels: ``(B, 3, H, W)`` in [-1, 1].

        Returns:
            Mean and standard deviation, ``(B, 4C, h/2, w/2)``.
        """
        distribution = vae.encode(pixels).latent_dist
        check_patches(vae, distribution.mean, 2)
        mean, deviation = (
            torch.nn.functional.pixel_unshuffle(part, 2) for part in (distribution.mean, distribution.std)
        )
        normal = (vae.bn.running_var + vae.config.batch_norm_eps).sqrt()[:, None, None].to(mean)
        return (mean - vae.bn.running_mean[:, None, None].to(mean)) / normal, deviation / normal


def _places(noisy: Tensor, height: int, width: int, length: int) -> Tensor:
    """Time, row, column and place in the text of each token, ``(B, height · width · length, 4)``."""
    axes = (torch.arange(1), torch.arange(height), torch.arange(width), torch.arange(length))
    return torch.cartesian_prod(*axes).to(noisy.device).expand(len(noisy), -1, -1)
