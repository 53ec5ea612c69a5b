"""Chroma: FLUX.1 without guidance and without CLIP, whose attention adds a mask of the text, as diffusers has it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from lightning_unlearn.data.conditions import Conditions
from lightning_unlearn.data.samples import ViewBatch
from lightning_unlearn.diffusion.families.base import Condition, FlowTraining
from lightning_unlearn.diffusion.families.flux import FluxFamily


class ChromaFamily(FluxFamily):
    """``diffusers.ChromaTransformer2DModel``. diffusers has no training script of it, so its density must be said."""

    title: ClassVar[str] = "Chroma"
    class_names: ClassVar[Sequence[str]] = ("ChromaTransformer2DModel",)
    conditions: ClassVar[Mapping[str, Condition]] = {
        "text": Condition(2, ("joint_attention_dim",)),
        "text_mask": Condition(1),
    }
    flow: ClassVar[FlowTraining | None] = FlowTraining(None)

    def further(self, network: nn.Module, noisy: Tensor, batch: ViewBatch) -> dict[str, Any]:
        """The mask over text and picture; see :meth:`FluxFamily.further`.

        Args:
            network: The transformer.
            noisy: ``(B, C, H, W)``.
            batch: With ``text_mask``.

        Returns:
            Keywords of its call.
        """
        mask = batch.conditions["text_mask"].to(noisy)
        tokens = noisy.shape[-2] * noisy.shape[-1] // 4
        return {"attention_mask": torch.cat([mask, mask.new_ones(len(mask), tokens)], 1)}

    @torch.no_grad()
    def encode(self, pipeline: Any, captions: Sequence[str]) -> Conditions:
        """T5's states, and which of them count: all of the caption and one of padding; see :meth:`Family.encode`.

        Args:
            pipeline: A ``ChromaPipeline``.
            captions: ``n``.

        Returns:
            ``text`` and ``text_mask``.
        """
        text, _, mask, *_ = pipeline.encode_prompt(list(captions), do_classifier_free_guidance=False)
        return {"text": text.float(), "text_mask": mask.float()}
