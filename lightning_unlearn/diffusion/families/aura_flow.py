"""AuraFlow: a few blocks of two streams, then many in which text and picture are one."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from lightning_unlearn.data.conditions import Conditions
from lightning_unlearn.data.samples import ViewBatch
from lightning_unlearn.diffusion.families.base import Condition, Family, FlowTraining
from lightning_unlearn.diffusion.families.patches import check_patches
from lightning_unlearn.diffusion.families.settings import setting


class AuraFlowFamily(Family):
    """``diffusers.AuraFlowTransformer2DModel``. diffusers has no training script of it, so its density must be said.

    ``text_kv`` are the keys and values of the text's stream in the blocks that have two.
    """

    title: ClassVar[str] = "AuraFlow"
    class_names: ClassVar[Sequence[str]] = ("AuraFlowTransformer2DModel",)
    selections: ClassVar[Mapping[str, Sequence[str]]] = {
        "text_kv": (r"joint_.*\.attn\.add_[kv]_proj",),
        "attention": (r".*\.attn\.(to_[qkv]|to_out\.0|add_[qkv]_proj|to_add_out)",),
        "feed_forward": (r".*\.ff(_context)?\.(linear_[12]|out_projection)",),
    }
    conditions: ClassVar[Mapping[str, Condition]] = {"text": Condition(2, ("joint_attention_dim",))}
    flow: ClassVar[FlowTraining | None] = FlowTraining(None)

    def check_batch(self, network: nn.Module, noisy: Tensor, batch: ViewBatch) -> None:
        """Refuse latents of other sizes, too; see :meth:`Family.check_batch`.

        Args:
            network: The transformer.
            noisy: ``(B, C, H, W)``.
            batch: What it is conditioned on.
        """
        super().check_batch(network, noisy, batch)
        places = setting(network, "pos_embed_max_size")  # of the whole square
        check_patches(network, noisy, setting(network, "patch_size"), math.isqrt(places))

    def call(self, network: nn.Module, noisy: Tensor, timesteps: Tensor, batch: ViewBatch) -> Tensor:
        """Call the transformer; see :meth:`Family.call`.

        Args:
            network: The transformer.
            noisy: ``(B, C, H, W)``.
            timesteps: ``(B,)`` 1000 σ.
            batch: With ``text``, whose padding is zero.

        Returns:
            ``(B, C, H, W)``.
        """
        prediction: Tensor = network(
            noisy, encoder_hidden_states=batch.text, timestep=(timesteps / 1000).to(noisy), return_dict=False
        )[0]
        return prediction

    @torch.no_grad()
    def encode(self, pipeline: Any, captions: Sequence[str]) -> Conditions:
        """The states of Pile-T5, zero where there is padding; see :meth:`Family.encode`.

        Args:
            pipeline: An ``AuraFlowPipeline``.
            captions: ``n``.

        Returns:
            ``text``.
        """
        return {"text": pipeline.encode_prompt(list(captions), do_classifier_free_guidance=False)[0].float()}
