"""U-Nets with cross-attention to text: Stable Diffusion 1 and 2, MSCOCO latent diffusion, small pixel-space models."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from torch import Tensor, nn

from lightning_unlearn.data.samples import ViewBatch
from lightning_unlearn.diffusion.families.base import Family
from lightning_unlearn.diffusion.families.selections import BLOCK_SELECTIONS

# Settings by which a U-Net takes more than latents, timesteps and text states, the values with which it does not, and
# what it would take.
PLAIN: dict[str, tuple[tuple[Any, ...], str]] = {
    "class_embed_type": ((None,), "class labels"),
    "num_class_embeds": ((None,), "class labels"),
    "addition_embed_type": ((None, "text"), "more conditions"),
    "encoder_hid_dim_type": ((None, "text_proj"), "states of a picture beside those of the text"),
    "time_cond_proj_dim": ((None,), "a guidance scale, as a guidance-distilled network does"),
}


class UNetFamily(Family):
    """``diffusers.UNet2DConditionModel``: text enters through ``attn2.to_k`` and ``attn2.to_v`` and nowhere else.

    Wang et al. (arXiv 2406.09408, Section 4 and Table 2) unlearn just these weights.

    Attributes:
        plain: Settings by which a U-Net takes more than this family gives it, the values with which it does not, and
            what it would take.
    """

    title: ClassVar[str] = "Stable Diffusion 1 and 2"
    class_names: ClassVar[Sequence[str]] = ("UNet2DConditionModel",)
    selections: ClassVar[Mapping[str, Sequence[str]]] = BLOCK_SELECTIONS
    plain: ClassVar[Mapping[str, tuple[tuple[Any, ...], str]]] = PLAIN

    def call(self, network: nn.Module, noisy: Tensor, timesteps: Tensor, batch: ViewBatch) -> Tensor:
        """Call the U-Net with its text states; see :meth:`Family.call`.

        Args:
            network: The U-Net.
            noisy: ``(B, C, H, W)``.
            timesteps: ``(B,)``.
            batch: Its ``text`` is the ``encoder_hidden_states``.

        Returns:
            ``(B, C, H, W)``.
        """
        prediction: Tensor = network(noisy, timesteps, encoder_hidden_states=batch.text, return_dict=False)[0]
        return prediction
