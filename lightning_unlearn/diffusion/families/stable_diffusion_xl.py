"""Stable Diffusion XL: a U-Net that is given two encoders' states, one of them pooled, and sizes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from lightning_unlearn.data.conditions import Conditions
from lightning_unlearn.data.samples import ViewBatch
from lightning_unlearn.diffusion.families.base import TEXT, Condition
from lightning_unlearn.diffusion.families.settings import setting
from lightning_unlearn.diffusion.families.unet import PLAIN, UNetFamily

SIZES = ("original_size", "crop_top_left", "target_size")


class StableDiffusionXLFamily(UNetFamily):
    """``diffusers.UNet2DConditionModel`` with ``addition_embed_type: text_time`` (Podell et al., arXiv 2307.01952).

    The pooled state and the sizes (Section 2.2; height before width) enter with the timestep, so that ``text_kv`` are
    not all weights that the text passes through.
    """

    title: ClassVar[str] = "Stable Diffusion XL"
    conditions: ClassVar[Mapping[str, Condition]] = {
        "text": TEXT,
        "pooled": Condition(1),
        **{name: Condition(1) for name in SIZES},
    }
    plain: ClassVar[Mapping[str, tuple[tuple[Any, ...], str]]] = {
        name: said for name, said in PLAIN.items() if name != "addition_embed_type"
    }

    def knows(self, network: nn.Module) -> bool:
        """By the class and the config; see :meth:`Family.knows`."""
        return super().knows(network) and setting(network, "addition_embed_type") == "text_time"

    def call(self, network: nn.Module, noisy: Tensor, timesteps: Tensor, batch: ViewBatch) -> Tensor:
        """Call the U-Net; see :meth:`Family.call`.

        Args:
            network: The U-Net.
            noisy: ``(B, C, H, W)``.
            timesteps: ``(B,)``.
            batch: With ``text``, ``pooled`` and the three sizes.

        Returns:
            ``(B, C, H, W)``.
        """
        given = batch.conditions
        sizes = torch.cat([given[name] for name in SIZES], dim=1).to(noisy)  # (B, 6)
        added = {"text_embeds": given["pooled"], "time_ids": sizes}
        states = {"encoder_hidden_states": batch.text, "added_cond_kwargs": added}
        prediction: Tensor = network(noisy, timesteps, **states, return_dict=False)[0]
        return prediction

    @torch.no_grad()
    def encode(self, pipeline: Any, captions: Sequence[str]) -> Conditions:
        """Both CLIPs' states side by side, and the second's pooled one; see :meth:`Family.encode`.

        Args:
            pipeline: A ``StableDiffusionXLPipeline``.
            captions: ``n``.

        Returns:
            ``text`` and ``pooled``.
        """
        text, _, pooled, _ = pipeline.encode_prompt(list(captions), do_classifier_free_guidance=False)
        return {"text": text.float(), "pooled": pooled.float()}

    def facts(self, height: int, width: int, original: tuple[int, int], crop: tuple[int, int]) -> dict[str, list[int]]:
        """The sizes; see :meth:`Family.facts`."""
        return {"original_size": list(original), "crop_top_left": list(crop), "target_size": [height, width]}
