"""DiT: a transformer on latents that is conditioned on a class."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import ClassVar

from torch import Tensor, nn

from lightning_unlearn.data.samples import ViewBatch
from lightning_unlearn.diffusion.families.base import Condition, Family
from lightning_unlearn.diffusion.families.class_unet import CLASS, check_classes
from lightning_unlearn.diffusion.families.selections import BLOCK_SELECTIONS
from lightning_unlearn.diffusion.families.settings import setting
from lightning_unlearn.errors import InputError


class DiTFamily(Family):
    """``diffusers.DiTTransformer2DModel`` (Peebles and Xie, arXiv 2212.09748): noise and variance, side by side."""

    title: ClassVar[str] = "DiT"
    class_names: ClassVar[Sequence[str]] = ("DiTTransformer2DModel",)
    conditions: ClassVar[Mapping[str, Condition]] = {"class_label": CLASS}
    selections: ClassVar[Mapping[str, Sequence[str]]] = {
        name: BLOCK_SELECTIONS[name] for name in ("attention", "feed_forward")
    }
    variance: ClassVar[bool] = True

    def check_batch(self, network: nn.Module, noisy: Tensor, batch: ViewBatch) -> None:
        """Also refuse classes that the network does not have, and latents that it would put together wrongly."""
        super().check_batch(network, noisy, batch)
        # The class after the last stands for none, as guidance needs it.
        check_classes(network, batch, (setting(network, "num_embeds_ada_norm") or 0) + 1)
        side = setting(network, "sample_size")
        if noisy.shape[-2:] != (side, side):
            raise InputError(
                f"Latents are {noisy.shape[-2]}x{noisy.shape[-1]}, but this {type(network).__name__} takes {side}x"
                f"{side} alone; prepare the pictures in the size that it was trained on."
            )

    def call(self, network: nn.Module, noisy: Tensor, timesteps: Tensor, batch: ViewBatch) -> Tensor:
        """See :meth:`Family.call`."""
        labels = batch.conditions["class_label"][:, 0]
        prediction: Tensor = network(noisy, timestep=timesteps, class_labels=labels, return_dict=False)[0]
        return prediction
