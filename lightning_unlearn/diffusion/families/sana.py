"""Sana: linear attention within the picture, cross-attention to the states of a language model."""

from __future__ import annotations

import inspect
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


class SanaFamily(Family):
    """``diffusers.SanaTransformer2DModel`` (Xie et al., arXiv 2410.10629).

    Text enters through ``attn2`` and nowhere else, behind ``caption_projection``. The middle layer of a block's MLP is
    a depthwise convolution, which has no per-sample gradient here.
    """

    title: ClassVar[str] = "Sana"
    class_names: ClassVar[Sequence[str]] = ("SanaTransformer2DModel",)
    selections: ClassVar[Mapping[str, Sequence[str]]] = {
        "text_kv": (r".*\.attn2\.to_[kv]",),
        "cross_attention": (r".*\.attn2\.(to_[qkv]|to_out\.0)",),
        "attention": (r".*\.attn[12]\.(to_[qkv]|to_out\.0)",),
        "feed_forward": (r".*\.ff\.conv_(inverted|point)",),
    }
    conditions: ClassVar[Mapping[str, Condition]] = {
        "text": Condition(2, ("caption_channels",)),
        "text_mask": Condition(1),
    }
    vae_class: ClassVar[str] = "AutoencoderDC"
    flow: ClassVar[FlowTraining | None] = FlowTraining()
    plain: ClassVar[Mapping[str, tuple[tuple[Any, ...], str]]] = {
        "guidance_embeds": ((False, None), "a guidance scale, as Sana-Sprint does")
    }

    def call(self, network: nn.Module, noisy: Tensor, timesteps: Tensor, batch: ViewBatch) -> Tensor:
        """Call the transformer, padding masked; see :meth:`Family.call`."""
        check_patches(network, noisy, setting(network, "patch_size"))
        scale = setting(network, "timestep_scale")
        prediction: Tensor = network(
            noisy,
            encoder_hidden_states=batch.text,
            encoder_attention_mask=batch.conditions["text_mask"],
            timestep=timesteps * (1.0 if scale is None else scale),
            return_dict=False,
        )[0]
        return prediction

    @torch.no_grad()
    def encode(self, pipeline: Any, captions: Sequence[str]) -> Conditions:
        """Gemma's states behind the pipeline's own instruction, which they leave out; see :meth:`Family.encode`."""
        instruction = inspect.signature(pipeline.__call__).parameters["complex_human_instruction"].default
        text, mask, _, _ = pipeline.encode_prompt(
            list(captions), do_classifier_free_guidance=False, complex_human_instruction=instruction
        )
        warn_of_cut(mask)
        return {"text": text.float(), "text_mask": mask.float()}

    def encode_pictures(self, vae: Any, pixels: Tensor) -> tuple[Tensor, Tensor | None]:
        """The code of an autoencoder without a distribution; see :meth:`Family.encode_pictures`."""
        return vae.encode(pixels).latent * vae.config.scaling_factor, None
