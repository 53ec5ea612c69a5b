"""FLUX.1, dev and schnell: blocks of two streams, then blocks in which text and picture are one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from lightning_unlearn.data.conditions import Conditions
from lightning_unlearn.data.samples import ViewBatch
from lightning_unlearn.diffusion.families.base import Condition, Family, FlowTraining
from lightning_unlearn.diffusion.families.patches import (
    check_patches,
    distilled_guidance,
    grid_places,
    packed,
    unpacked,
)
from lightning_unlearn.diffusion.families.settings import setting


class FluxFamily(Family):
    """``diffusers.FluxTransformer2DModel``: latents come as patches of 2 × 2, and dev is guidance-distilled.

    ``text_kv`` are the keys and values of the text's stream in the blocks that have two.
    """

    title: ClassVar[str] = "FLUX.1"
    class_names: ClassVar[Sequence[str]] = ("FluxTransformer2DModel",)
    selections: ClassVar[Mapping[str, Sequence[str]]] = {
        "text_kv": (r"transformer_blocks\..*\.attn\.add_[kv]_proj",),
        "attention": (r".*\.attn\.(to_[qkv]|to_out\.0|add_[qkv]_proj|to_add_out)",),
        "feed_forward": (r".*\.ff(_context)?\.net\.(0\.proj|2)", r"single_.*\.proj_mlp"),
    }
    conditions: ClassVar[Mapping[str, Condition]] = {
        "text": Condition(2, ("joint_attention_dim",)),
        "pooled": Condition(1, ("pooled_projection_dim",)),
        "guidance": Condition(1, optional=True),
    }
    flow: ClassVar[FlowTraining | None] = FlowTraining()

    def latent_channels(self, network: nn.Module) -> int | None:
        """Before packing; see :meth:`Family.latent_channels`.

        Args:
            network: The transformer.

        Returns:
            A quarter of its ``in_channels``.
        """
        channels = setting(network, "in_channels")
        return channels // 4 if isinstance(channels, int) else None

    def call(self, network: nn.Module, noisy: Tensor, timesteps: Tensor, batch: ViewBatch) -> Tensor:
        """Call the transformer; see :meth:`Family.call`.

        Args:
            network: The transformer.
            noisy: ``(B, C, H, W)``.
            timesteps: ``(B,)`` 1000 σ.
            batch: With ``text``, ``pooled`` and, for dev, ``guidance``.

        Returns:
            ``(B, C, H, W)``.
        """
        check_patches(network, noisy, 2)
        height, width = noisy.shape[-2:]
        prediction: Tensor = network(
            hidden_states=packed(noisy),
            timestep=timesteps / 1000,
            encoder_hidden_states=batch.text,
            txt_ids=noisy.new_zeros(batch.text.shape[1], 3),
            img_ids=grid_places(height // 2, width // 2, noisy),
            return_dict=False,
            **self.further(network, noisy, batch),
        )[0]
        return unpacked(prediction, height, width)

    def further(self, network: nn.Module, noisy: Tensor, batch: ViewBatch) -> dict[str, Any]:
        """What the network is given besides text and places.

        Args:
            network: The transformer.
            noisy: ``(B, C, H, W)``.
            batch: What it is conditioned on.

        Returns:
            Keywords of its call.
        """
        return {
            "pooled_projections": batch.conditions["pooled"],
            "guidance": distilled_guidance(network, batch),
        }

    @torch.no_grad()
    def encode(self, pipeline: Any, captions: Sequence[str]) -> Conditions:
        """T5's states and CLIP's pooled one; see :meth:`Family.encode`.

        Args:
            pipeline: A ``FluxPipeline``.
            captions: ``n``.

        Returns:
            ``text`` and ``pooled``.
        """
        text, pooled, _ = pipeline.encode_prompt(list(captions))
        return {"text": text.float(), "pooled": pooled.float()}
