"""Z-Image: text and picture are one stream of as many tokens as each caption has."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from lightning_unlearn.data.conditions import Conditions
from lightning_unlearn.data.samples import ViewBatch
from lightning_unlearn.diffusion.families.base import Condition, Family, FlowTraining
from lightning_unlearn.diffusion.families.language import padded, states_of_each
from lightning_unlearn.diffusion.families.patches import check_patches

TOKENS = 512  # that the pipeline reads at most


class ZImageFamily(Family):
    """``diffusers.ZImageTransformer2DModel`` (arXiv 2511.22699): it takes lists, one entry a picture.

    No weights are the text's alone but those of ``context_refiner``, which are no attention of the picture to it, so
    there is no ``text_kv``.
    """

    title: ClassVar[str] = "Z-Image"
    class_names: ClassVar[Sequence[str]] = ("ZImageTransformer2DModel",)
    selections: ClassVar[Mapping[str, Sequence[str]]] = {
        "attention": (r".*\.attention\.(to_[qkv]|to_out\.0)",),
        "feed_forward": (r".*\.feed_forward\.w[123]",),
    }
    conditions: ClassVar[Mapping[str, Condition]] = {
        "text": Condition(2, ("cap_feat_dim",)),
        "text_mask": Condition(1),
    }
    left_out: ClassVar[Mapping[str, str]] = {
        r"all_x_embedder\..*|cap_embedder\.1": "Patches, or tokens, of all pictures of a batch enter as rows.",
    }
    flow: ClassVar[FlowTraining | None] = FlowTraining()
    plain: ClassVar[Mapping[str, tuple[tuple[Any, ...], str]]] = {
        "siglip_feat_dim": ((None,), "states of pictures beside those of the text")
    }

    def call(self, network: nn.Module, noisy: Tensor, timesteps: Tensor, batch: ViewBatch) -> Tensor:
        """Call the transformer, whose time is 1 − σ and whose direction is x₀ − ε; see :meth:`Family.call`."""
        check_patches(network, noisy, 2)
        predictions: list[Tensor] = network(
            list(noisy[:, :, None].unbind()),  # (C, 1, H, W) each
            (1000 - timesteps) / 1000,
            states_of_each(batch),
            return_dict=False,
        )[0]
        return -torch.stack(predictions)[:, :, 0]

    @torch.no_grad()
    def encode(self, pipeline: Any, captions: Sequence[str]) -> Conditions:
        """The language model's states of a chat with the caption; see :meth:`Family.encode`."""
        states, _ = pipeline.encode_prompt(list(captions), do_classifier_free_guidance=False)
        rows = [padded(text[None], None, tokens=TOKENS) for text in states]
        return {name: torch.cat([row[name] for row in rows]) for name in rows[0]}
