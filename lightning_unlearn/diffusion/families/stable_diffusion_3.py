"""Stable Diffusion 3 and 3.5: text and picture go through one attention, with weights of their own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from lightning_unlearn.data.conditions import Conditions
from lightning_unlearn.data.samples import ViewBatch
from lightning_unlearn.diffusion.families.base import Condition, Family, FlowTraining
from lightning_unlearn.diffusion.families.patches import check_patches
from lightning_unlearn.diffusion.families.settings import setting


class StableDiffusion3Family(Family):
    """``diffusers.SD3Transformer2DModel`` (Esser et al., arXiv 2403.03206).

    ``text_kv`` are the keys and values of the stream that the text enters by; from the second block on what passes
    through them has seen the picture, too. ``attn2`` of 3.5 is attention of the picture to itself.
    """

    title: ClassVar[str] = "Stable Diffusion 3"
    class_names: ClassVar[Sequence[str]] = ("SD3Transformer2DModel",)
    selections: ClassVar[Mapping[str, Sequence[str]]] = {
        "text_kv": (r".*\.attn\.add_[kv]_proj",),
        "attention": (r".*\.attn2?\.(to_[qkv]|to_out\.0|add_[qkv]_proj|to_add_out)",),
        "feed_forward": (r".*\.ff(_context)?\.net\.(0\.proj|2)",),
    }
    conditions: ClassVar[Mapping[str, Condition]] = {
        "text": Condition(2, ("joint_attention_dim",)),
        "pooled": Condition(1, ("pooled_projection_dim",)),
    }
    flow: ClassVar[FlowTraining | None] = FlowTraining("logit_normal", preconditioned=True)

    def check_batch(self, network: nn.Module, noisy: Tensor, batch: ViewBatch) -> None:
        """Refuse latents of other sizes, too; see :meth:`Family.check_batch`.

        Args:
            network: The transformer.
            noisy: ``(B, C, H, W)``.
            batch: What it is conditioned on.
        """
        super().check_batch(network, noisy, batch)
        check_patches(network, noisy, setting(network, "patch_size"), setting(network, "pos_embed_max_size"))

    def call(self, network: nn.Module, noisy: Tensor, timesteps: Tensor, batch: ViewBatch) -> Tensor:
        """Call the transformer; see :meth:`Family.call`.

        Args:
            network: The transformer.
            noisy: ``(B, C, H, W)``.
            timesteps: ``(B,)`` 1000 σ.
            batch: With ``text`` and ``pooled``.

        Returns:
            ``(B, C, H, W)``.
        """
        prediction: Tensor = network(
            hidden_states=noisy,
            timestep=timesteps,
            encoder_hidden_states=batch.text,
            pooled_projections=batch.conditions["pooled"],
            return_dict=False,
        )[0]
        return prediction

    @torch.no_grad()
    def encode(self, pipeline: Any, captions: Sequence[str]) -> Conditions:
        """Both CLIPs' states side by side, before T5's, and both pooled ones; see :meth:`Family.encode`.

        Args:
            pipeline: A ``StableDiffusion3Pipeline``.
            captions: ``n``.

        Returns:
            ``text`` and ``pooled``.
        """
        text, _, pooled, _ = pipeline.encode_prompt(list(captions), None, None, do_classifier_free_guidance=False)
        return {"text": text.float(), "pooled": pooled.float()}
