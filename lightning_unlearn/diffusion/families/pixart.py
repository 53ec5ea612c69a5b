"""PixArt-α and PixArt-Σ: transformers with cross-attention to T5's text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from lightning_unlearn.data.conditions import Conditions
from lightning_unlearn.data.samples import ViewBatch
from lightning_unlearn.diffusion.families.base import Condition, Family
from lightning_unlearn.diffusion.families.selections import BLOCK_SELECTIONS
from lightning_unlearn.diffusion.families.settings import setting

SIZES: Mapping[str, Condition] = {"resolution": Condition(1, length=2), "aspect_ratio": Condition(1, length=1)}


class PixArtFamily(Family):
    """``diffusers.PixArtTransformer2DModel`` (Chen et al., arXiv 2310.00426, 2403.04692): noise and variance.

    α at 1024 pixels is given the resolution in pixels and the height over the width; its config says so.
    """

    title: ClassVar[str] = "PixArt-α and Σ"
    class_names: ClassVar[Sequence[str]] = ("PixArtTransformer2DModel",)
    conditions: ClassVar[Mapping[str, Condition]] = {
        "text": Condition(2, ("caption_channels", "cross_attention_dim")),
        "text_mask": Condition(1),
    }
    selections: ClassVar[Mapping[str, Sequence[str]]] = BLOCK_SELECTIONS
    variance: ClassVar[bool] = True
    left_out: ClassVar[Mapping[str, str]] = {
        r".*\.resolution_embedder\.linear_[12]": "Height and width enter as two rows of one sample.",
    }

    def needs(self, network: nn.Module) -> Mapping[str, Condition]:
        """See :meth:`Family.needs`."""
        return {**self.conditions, **SIZES} if _takes_sizes(network) else self.conditions

    def call(self, network: nn.Module, noisy: Tensor, timesteps: Tensor, batch: ViewBatch) -> Tensor:
        """See :meth:`Family.call`."""
        takes = _takes_sizes(network)
        added = {name: batch.conditions[name].to(noisy.dtype) if takes else None for name in SIZES}
        prediction: Tensor = network(
            noisy,
            encoder_hidden_states=batch.text,
            encoder_attention_mask=batch.conditions["text_mask"],
            timestep=timesteps,
            added_cond_kwargs=added,
            return_dict=False,
        )[0]
        return prediction

    @torch.no_grad()
    def encode(self, pipeline: Any, captions: Sequence[str]) -> Conditions:
        """See :meth:`Family.encode`; in lower case, as the pipeline does, and not otherwise cleaned.

        Args:
            pipeline: Of PixArt-α (120 tokens by default) or Σ (300).
            captions: ``n`` of them.

        Returns:
            ``text`` and ``text_mask``.
        """
        text, mask, _, _ = pipeline.encode_prompt(
            list(captions), do_classifier_free_guidance=False, device=pipeline.device
        )
        return {"text": text.float(), "text_mask": mask.float()}

    def facts(self, height: int, width: int, original: tuple[int, int], crop: tuple[int, int]) -> dict[str, list[Any]]:
        """See :meth:`Family.facts`; networks that don't take them leave them be."""
        return {"resolution": [height, width], "aspect_ratio": [height / width]}


def _takes_sizes(network: nn.Module) -> bool:
    said = setting(network, "use_additional_conditions")
    return bool(setting(network, "sample_size") == 128 if said is None else said)
