"""Wan: videos, with cross-attention to the states of a multilingual T5."""

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
from lightning_unlearn.diffusion.families.vaes import encode_kl

TOKENS = 512  # as the pipeline has it where it generates


class WanFamily(Family):
    """``diffusers.WanTransformer3DModel`` (Wan team, arXiv 2503.20314): text to video, of Wan 2.1.

    Text enters through ``attn2`` and nowhere else, behind ``condition_embedder``; its padding is zeros, which the
    attention sees.
    """

    title: ClassVar[str] = "Wan"
    class_names: ClassVar[Sequence[str]] = ("WanTransformer3DModel",)
    selections: ClassVar[Mapping[str, Sequence[str]]] = {
        "text_kv": (r".*\.attn2\.to_[kv]",),
        "cross_attention": (r".*\.attn2\.(to_[qkv]|to_out\.0)",),
        "attention": (r".*\.attn[12]\.(to_[qkv]|to_out\.0)",),
        "feed_forward": (r".*\.ffn\.net\.(0\.proj|2)",),
    }
    conditions: ClassVar[Mapping[str, Condition]] = {"text": Condition(2, ("text_dim",))}
    latent_dimensions: ClassVar[int] = 4
    vae_class: ClassVar[str] = "AutoencoderKLWan"
    flow: ClassVar[FlowTraining | None] = FlowTraining(None)  # diffusers has no training script of it
    plain: ClassVar[Mapping[str, tuple[tuple[Any, ...], str]]] = {
        "image_dim": ((None,), "a picture from which the video starts"),
        "added_kv_proj_dim": ((None,), "a picture from which the video starts"),
    }

    def call(self, network: nn.Module, noisy: Tensor, timesteps: Tensor, batch: ViewBatch) -> Tensor:
        """Call the transformer with ``(B, C, F, H, W)``; see :meth:`Family.call`."""
        check_patches(network, noisy, setting(network, "patch_size")[-1])
        prediction: Tensor = network(
            hidden_states=noisy, timestep=timesteps, encoder_hidden_states=batch.text, return_dict=False
        )[0]
        return prediction

    @torch.no_grad()
    def encode(self, pipeline: Any, captions: Sequence[str]) -> Conditions:
        """T5's states, zero where padding is; see :meth:`Family.encode`."""
        text, _ = pipeline.encode_prompt(list(captions), do_classifier_free_guidance=False, max_sequence_length=TOKENS)
        return {"text": text.float()}

    def encode_pictures(self, vae: Any, pixels: Tensor) -> tuple[Tensor, Tensor | None]:
        """Latents of videos ``(B, 3, F, H, W)``, or of pictures as videos of one frame.

        Args:
            vae: An ``AutoencoderKLWan``.
            pixels: In [-1, 1].

        Returns:
            Mean and standard deviation, ``(B, C, f, h, w)``.
        """
        return encode_kl(vae, pixels if pixels.ndim == 5 else pixels[:, :, None])
