"""Kandinsky 2.2's decoder: a U-Net that is given the state of a picture, and no text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from torch import Tensor, nn

from lightning_unlearn.data.samples import ViewBatch
from lightning_unlearn.diffusion.families.base import Condition, Family
from lightning_unlearn.diffusion.families.settings import setting


class Kandinsky2Family(Family):
    """``diffusers.UNet2DConditionModel`` with ``addition_embed_type`` ``image``.

    The state (an image embedding of CLIP: of the picture itself in training, made by the prior from the text in
    generation) enters with the timestep and as keys and values beside those of the picture. Noise and variance.
    """

    title: ClassVar[str] = "Kandinsky 2.2"
    class_names: ClassVar[Sequence[str]] = ("UNet2DConditionModel",)
    conditions: ClassVar[Mapping[str, Condition]] = {"image": Condition(1, ("encoder_hid_dim",))}
    selections: ClassVar[Mapping[str, Sequence[str]]] = {
        "cross_attention": (r".*\.attentions\.\d+\.add_[kv]_proj",),
        "attention": (r".*\.attentions\.\d+\.(to_[qkv]|add_[kv]_proj|to_out\.0)",),
    }
    vae_class: ClassVar[str] = "VQModel"
    variance: ClassVar[bool] = True

    def knows(self, network: nn.Module) -> bool:
        """See :meth:`Family.knows`; by the config."""
        ways = (setting(network, "addition_embed_type"), setting(network, "encoder_hid_dim_type"))
        return super().knows(network) and ways == ("image", "image_proj")

    def call(self, network: nn.Module, noisy: Tensor, timesteps: Tensor, batch: ViewBatch) -> Tensor:
        """See :meth:`Family.call`."""
        added = {"image_embeds": batch.conditions["image"]}
        prediction: Tensor = network(
            noisy, timesteps, encoder_hidden_states=None, added_cond_kwargs=added, return_dict=False
        )[0]
        return prediction

    def encode_pictures(self, vae: Any, pixels: Tensor) -> tuple[Tensor, Tensor | None]:
        """The codes of its MoVQ before they are quantised, unscaled; see :meth:`Family.encode_pictures`."""
        return vae.encode(pixels).latents, None
