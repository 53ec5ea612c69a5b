"""CogView4: text and picture share all weights; sizes enter with a time that does not know of the schedule's shift."""

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

SIZES = ("original_size", "target_size", "crop_top_left")
TOKENS = 256


class CogView4Family(Family):
    """``diffusers.CogView4Transformer2DModel``.

    Its pipeline pads captions on the left and masks nothing, so that what becomes of one depends on the longest beside
    it; here all are padded to 256 tokens. The network's time t belongs to :math:`σ = μ t / (1 + (μ - 1) t)`, where μ
    depends on the number of patches.
    """

    title: ClassVar[str] = "CogView4"
    class_names: ClassVar[Sequence[str]] = ("CogView4Transformer2DModel",)
    selections: ClassVar[Mapping[str, Sequence[str]]] = {
        "attention": (r".*\.attn1\.(to_[qkv]|to_out\.0)",),
        "feed_forward": (r".*\.ff\.net\.(0\.proj|2)",),
    }
    conditions: ClassVar[Mapping[str, Condition]] = {
        "text": Condition(2, ("text_embed_dim",)),
        **{name: Condition(1) for name in SIZES},
    }
    # diffusers trains only networks with a control picture, which are others.
    flow: ClassVar[FlowTraining | None] = FlowTraining(None)

    def call(self, network: nn.Module, noisy: Tensor, timesteps: Tensor, batch: ViewBatch) -> Tensor:
        """Call the transformer; see :meth:`Family.call`."""
        side = setting(network, "patch_size")
        check_patches(network, noisy, side)
        shift = _shift(noisy, side)
        sigmas = timesteps / 1000
        original, target, crop = (batch.conditions[name].to(noisy) for name in SIZES)  # (B, 2) each
        prediction: Tensor = network(
            hidden_states=noisy,
            encoder_hidden_states=batch.text,
            timestep=1000 * sigmas / (shift + (1 - shift) * sigmas),
            original_size=original,
            target_size=target,
            crop_coords=crop,
            return_dict=False,
        )[0]
        return prediction

    def size_shift(self, network: nn.Module, config: Any, latents: Tensor, steps: int) -> float:
        """The μ that :meth:`call` undoes; see :meth:`Family.size_shift`."""
        return _shift(latents, setting(network, "patch_size"))

    @torch.no_grad()
    def encode(self, pipeline: Any, captions: Sequence[str]) -> Conditions:
        """The language model's states, padded as beside a caption of 256 tokens; see :meth:`Family.encode`."""
        tokenizer = pipeline.tokenizer
        longest = tokenizer.pad_token * (TOKENS - len(tokenizer("").input_ids))
        text, _ = pipeline.encode_prompt(
            [*captions, longest], do_classifier_free_guidance=False, max_sequence_length=TOKENS
        )
        return {"text": text[:-1].float()}

    def facts(self, height: int, width: int, original: tuple[int, int], crop: tuple[int, int]) -> dict[str, list[int]]:
        """The sizes, height before width; see :meth:`Family.facts`."""
        return {"original_size": list(original), "target_size": [height, width], "crop_top_left": list(crop)}


def _shift(latents: Tensor, side: int) -> float:
    return 0.25 + 0.75 * math.sqrt(latents.shape[-2] * latents.shape[-1] / side**2 / 256)
