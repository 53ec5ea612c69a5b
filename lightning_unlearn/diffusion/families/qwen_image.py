"""Qwen-Image: text and picture go through one attention, with weights of their own; padding is left out of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from lightning_unlearn.data.conditions import Conditions
from lightning_unlearn.data.samples import ViewBatch
from lightning_unlearn.diffusion.families.base import Condition, Family, FlowTraining
from lightning_unlearn.diffusion.families.language import padded, without_padding
from lightning_unlearn.diffusion.families.patches import check_patches, packed, unpacked
from lightning_unlearn.diffusion.families.settings import refuse_settings, setting
from lightning_unlearn.diffusion.families.vaes import encode_kl

TOKENS = 512  # as diffusers' training script has it; the pipeline reads up to 1024


class QwenImageFamily(Family):
    """``diffusers.QwenImageTransformer2DModel`` (Wu et al., arXiv 2508.02324): latents come as patches of 2 × 2.

    ``text_kv`` are the keys and values of the text's stream, which from the second block on has seen the picture.
    """

    title: ClassVar[str] = "Qwen-Image"
    class_names: ClassVar[Sequence[str]] = ("QwenImageTransformer2DModel",)
    selections: ClassVar[Mapping[str, Sequence[str]]] = {
        "text_kv": (r".*\.attn\.add_[kv]_proj",),
        "attention": (r".*\.attn\.(to_[qkv]|to_out\.0|add_[qkv]_proj|to_add_out)",),
        "feed_forward": (r".*\.(img|txt)_mlp\.net\.(0\.proj|2)",),
    }
    conditions: ClassVar[Mapping[str, Condition]] = {
        "text": Condition(2, ("joint_attention_dim",)),
        "text_mask": Condition(1),
    }
    vae_class: ClassVar[str] = "AutoencoderKLQwenImage"
    flow: ClassVar[FlowTraining | None] = FlowTraining()
    plain: ClassVar[Mapping[str, tuple[tuple[Any, ...], str]]] = {
        "guidance_embeds": ((False, None), "a guidance scale"),
        "zero_cond_t": ((False, None), "pictures to edit"),
        "use_additional_t_cond": ((False, None), "a further condition, as Qwen-Image-Layered does"),
        "use_layer3d_rope": ((False, None), "layers of pictures"),
    }

    def check(self, network: nn.Module) -> None:
        """Its ``in_channels`` are those of a patch, its ``out_channels`` are not; see :meth:`Family.check`."""
        refuse_settings(network, self.plain)

    def latent_channels(self, network: nn.Module) -> int | None:
        """Before packing; see :meth:`Family.latent_channels`."""
        return None if (channels := setting(network, "in_channels")) is None else int(channels) // 4

    def call(self, network: nn.Module, noisy: Tensor, timesteps: Tensor, batch: ViewBatch) -> Tensor:
        """Call the transformer; see :meth:`Family.call`."""
        check_patches(network, noisy, 2)
        height, width = noisy.shape[-2:]
        text, mask = without_padding(batch)
        prediction: Tensor = network(
            hidden_states=packed(noisy),
            timestep=timesteps / 1000,
            encoder_hidden_states=text,
            encoder_hidden_states_mask=mask,
            img_shapes=[[(1, height // 2, width // 2)]] * len(noisy),
            return_dict=False,
        )[0]
        return unpacked(prediction, height, width)

    @torch.no_grad()
    def encode(self, pipeline: Any, captions: Sequence[str]) -> Conditions:
        """The language model's states behind the pipeline's own instruction; see :meth:`Family.encode`."""
        text, mask = pipeline.encode_prompt(list(captions), max_sequence_length=TOKENS)
        return padded(text, mask, TOKENS)

    def encode_pictures(self, vae: Any, pixels: Tensor) -> tuple[Tensor, Tensor | None]:
        """Latents of a VAE of videos, for which a picture is one of one frame; see :meth:`Family.encode_pictures`."""
        mean, deviation = encode_kl(vae, pixels[:, :, None])
        return mean[:, :, 0], None if deviation is None else deviation[:, :, 0]
