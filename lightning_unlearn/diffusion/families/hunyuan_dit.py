"""HunyuanDiT: a transformer with cross-attention to the text of two encoders, side by side."""

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
from lightning_unlearn.errors import InputError

SIZES = ("original_size", "target_size", "crop_top_left")
"""In the order in which the network takes them, each in pixels, the vertical first."""

_TOKENS = {"text": "text_len", "text_2": "text_len_t5"}
_BASE_GRID = 64  # latents a side, for which the positions of the training were made


class HunyuanDiTFamily(Family):
    """``diffusers.HunyuanDiT2DModel`` (Li et al., arXiv 2405.08748): noise (as v) and variance."""

    title: ClassVar[str] = "HunyuanDiT"
    class_names: ClassVar[Sequence[str]] = ("HunyuanDiT2DModel",)
    conditions: ClassVar[Mapping[str, Condition]] = {
        "text": Condition(2, ("cross_attention_dim",)),
        "text_mask": Condition(1),
        "text_2": Condition(2, ("cross_attention_dim_t5",)),
        "text_2_mask": Condition(1),
    }
    selections: ClassVar[Mapping[str, Sequence[str]]] = BLOCK_SELECTIONS
    variance: ClassVar[bool] = True
    left_out: ClassVar[Mapping[str, str]] = {
        r"text_embedder\.linear_[12]": "All tokens of a batch enter as rows.",
        r"time_extra_emb\.pooler\.[qkvc]_proj": "Its weight is used without the layer.",
    }

    def needs(self, network: nn.Module) -> Mapping[str, Condition]:
        """See :meth:`Family.needs`; version 1.2 takes no sizes."""
        sized = setting(network, "use_style_cond_and_image_meta_size") is not False
        return {**self.conditions, **({name: Condition(1, length=2) for name in SIZES} if sized else {})}

    def check_batch(self, network: nn.Module, noisy: Tensor, batch: ViewBatch) -> None:
        """Also refuse text of another number of tokens, for which the network has a state of padding each."""
        super().check_batch(network, noisy, batch)
        for name, key in _TOKENS.items():
            found, wanted = batch.conditions[name].shape[1], setting(network, key)
            if found != wanted:
                raise InputError(
                    f"{name!r} has {found} tokens, but this {type(network).__name__} takes {wanted}; prepare the "
                    "samples with its own pipeline."
                )

    def call(self, network: nn.Module, noisy: Tensor, timesteps: Tensor, batch: ViewBatch) -> Tensor:
        """See :meth:`Family.call`; style 0 and the rotary positions as the pipeline makes them."""
        given = batch.conditions
        sizes = torch.cat([given[name] for name in SIZES], 1).to(noisy.dtype) if SIZES[0] in given else None  # (B, 6)
        prediction: Tensor = network(
            noisy,
            timesteps.to(noisy.dtype),
            encoder_hidden_states=given["text"],
            text_embedding_mask=given["text_mask"],
            encoder_hidden_states_t5=given["text_2"],
            text_embedding_mask_t5=given["text_2_mask"],
            image_meta_size=sizes,
            style=torch.zeros(len(noisy), dtype=torch.int64, device=noisy.device),
            image_rotary_emb=_positions(network, noisy),
            return_dict=False,
        )[0]
        return prediction

    @torch.no_grad()
    def encode(self, pipeline: Any, captions: Sequence[str]) -> Conditions:
        """``text`` of the CLIP, ``text_2`` of the T5, and both masks; see :meth:`Family.encode`."""
        made: Conditions = {}
        for number, (name, tokens) in enumerate(zip(_TOKENS, (77, 256), strict=True)):
            text, _, mask, _ = pipeline.encode_prompt(
                list(captions),
                device=pipeline.device,
                num_images_per_prompt=1,
                do_classifier_free_guidance=False,
                max_sequence_length=tokens,
                text_encoder_index=number,
            )
            made |= {name: text.float(), f"{name}_mask": mask.float()}
        return made

    def facts(self, height: int, width: int, original: tuple[int, int], crop: tuple[int, int]) -> dict[str, list[int]]:
        """See :meth:`Family.facts`."""
        return dict(zip(SIZES, (list(original), [height, width], list(crop)), strict=True))


def _positions(network: nn.Module, noisy: Tensor) -> tuple[Tensor, Tensor]:
    from diffusers.models.embeddings import get_2d_rotary_pos_embed
    from diffusers.pipelines.hunyuandit.pipeline_hunyuandit import get_resize_crop_region_for_grid

    patch = setting(network, "patch_size")
    grid = (noisy.shape[-2] // patch, noisy.shape[-1] // patch)
    made: tuple[Tensor, Tensor] = get_2d_rotary_pos_embed(
        setting(network, "attention_head_dim"),
        get_resize_crop_region_for_grid(grid, _BASE_GRID // patch),  # type: ignore[no-untyped-call]
        grid,
        device=noisy.device,
        output_type="pt",
    )
    return made
