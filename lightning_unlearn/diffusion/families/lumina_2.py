"""Lumina-Image 2.0: text and picture are one stream, whose time runs from noise to data."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from lightning_unlearn.data.conditions import Conditions
from lightning_unlearn.data.samples import ViewBatch
from lightning_unlearn.diffusion.families.base import Condition, Family, FlowTraining
from lightning_unlearn.diffusion.families.language import warn_of_cut
from lightning_unlearn.diffusion.families.patches import check_patches
from lightning_unlearn.diffusion.families.settings import setting


class Lumina2Family(Family):
    """``diffusers.Lumina2Transformer2DModel`` (Qin et al., arXiv 2503.21758).

    No weights are the text's alone but those of ``context_refiner``, which are no attention of the picture to it, so
    there is no ``text_kv``. diffusers' training script counts the scheduler's shift from the data's end, which this
    table does not, so the density of timesteps must be said.
    """

    title: ClassVar[str] = "Lumina-Image 2.0"
    class_names: ClassVar[Sequence[str]] = ("Lumina2Transformer2DModel",)
    selections: ClassVar[Mapping[str, Sequence[str]]] = {
        "attention": (r".*\.attn\.(to_[qkv]|to_out\.0)",),
        "feed_forward": (r".*\.feed_forward\.linear_[123]",),
    }
    conditions: ClassVar[Mapping[str, Condition]] = {
        "text": Condition(2, ("cap_feat_dim",)),
        "text_mask": Condition(1),
    }
    flow: ClassVar[FlowTraining | None] = FlowTraining(None)

    def call(self, network: nn.Module, noisy: Tensor, timesteps: Tensor, batch: ViewBatch) -> Tensor:
        """Call the transformer, whose time is 1 − σ and whose direction is x₀ − ε; see :meth:`Family.call`."""
        check_patches(network, noisy, setting(network, "patch_size"))
        prediction: Tensor = network(
            hidden_states=noisy,
            timestep=1 - timesteps / 1000,
            encoder_hidden_states=batch.text,
            encoder_attention_mask=batch.conditions["text_mask"].long(),
            return_dict=False,
        )[0]
        return -prediction

    @torch.no_grad()
    def encode(self, pipeline: Any, captions: Sequence[str]) -> Conditions:
        """Gemma's states behind the pipeline's own system prompt; see :meth:`Family.encode`."""
        text, mask, _, _ = pipeline.encode_prompt(list(captions), do_classifier_free_guidance=False)
        warn_of_cut(mask)
        return {"text": text.float(), "text_mask": mask.float()}
