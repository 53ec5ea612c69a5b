"""U-Nets that are conditioned on a class, or on nothing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from torch import Tensor, nn

from lightning_unlearn.data.samples import ViewBatch
from lightning_unlearn.diffusion.families.base import TEXT, Condition, Family
from lightning_unlearn.diffusion.families.settings import OWN_OBJECTIVE, setting
from lightning_unlearn.diffusion.families.unet import PLAIN, UNetFamily
from lightning_unlearn.errors import InputError

CLASS = Condition(1, length=1)
"""The number of a class, from 0."""


def check_classes(network: nn.Module, batch: ViewBatch, count: int | None) -> None:
    """Refuse numbers of classes that a network does not have; an accelerator would die of them.

    Args:
        network: That takes them.
        batch: With ``class_label`` ``(B, 1)``.
        count: How many classes it has; ``None`` where any number will do.

    Raises:
        InputError: If one is outside.
    """
    labels = batch.conditions["class_label"]
    if labels.is_floating_point():
        raise InputError("The samples' class labels are no whole numbers; prepare them with a column of whole numbers.")
    if count is not None and bool(((labels < 0) | (labels >= count)).any()):
        raise InputError(
            f"Class labels go up to {int(labels.max())}, but this {type(network).__name__} has the classes 0 to "
            f"{count - 1}; use the numbers that the model was trained with."
        )


def _has_classes(network: nn.Module) -> bool:
    return setting(network, "class_embed_type") is not None or setting(network, "num_class_embeds") is not None


def _refuse_other_classes(network: nn.Module) -> None:
    kind = setting(network, "class_embed_type")
    if kind not in (None, "timestep"):
        raise InputError(
            f"This {type(network).__name__} takes class embeddings ready (its config has class_embed_type {kind!r}), "
            f"which samples don't hold; {OWN_OBJECTIVE}."
        )


def _count(network: nn.Module) -> int | None:
    count = setting(network, "num_class_embeds")
    return count if setting(network, "class_embed_type") is None and isinstance(count, int) else None


class ClassUNetFamily(Family):
    """``diffusers.UNet2DModel``: a class enters with the timestep, or nothing does."""

    title: ClassVar[str] = "U-Nets without text"
    class_names: ClassVar[Sequence[str]] = ("UNet2DModel",)
    conditions: ClassVar[Mapping[str, Condition]] = {}
    selections: ClassVar[Mapping[str, Sequence[str]]] = {
        "attention": (r".*\.attentions\.\d+\.(to_[qkv]|to_out\.0)",),
    }

    def needs(self, network: nn.Module) -> Mapping[str, Condition]:
        """See :meth:`Family.needs`."""
        return {"class_label": CLASS} if _has_classes(network) else {}

    def check(self, network: nn.Module) -> None:
        """See :meth:`Family.check`."""
        _refuse_other_classes(network)
        super().check(network)

    def check_batch(self, network: nn.Module, noisy: Tensor, batch: ViewBatch) -> None:
        """Also refuse classes that the network does not have."""
        super().check_batch(network, noisy, batch)
        if _has_classes(network):
            check_classes(network, batch, _count(network))

    def call(self, network: nn.Module, noisy: Tensor, timesteps: Tensor, batch: ViewBatch) -> Tensor:
        """See :meth:`Family.call`."""
        labels = batch.conditions["class_label"][:, 0] if _has_classes(network) else None
        prediction: Tensor = network(noisy, timesteps, class_labels=labels, return_dict=False)[0]
        return prediction


class ClassTextUNetFamily(UNetFamily):
    """``diffusers.UNet2DConditionModel`` with classes beside its text."""

    title: ClassVar[str] = "U-Nets with text and classes"
    conditions: ClassVar[Mapping[str, Condition]] = {"text": TEXT, "class_label": CLASS}
    plain: ClassVar[Mapping[str, tuple[tuple[Any, ...], str]]] = {
        key: value for key, value in PLAIN.items() if key not in ("class_embed_type", "num_class_embeds")
    }

    def knows(self, network: nn.Module) -> bool:
        """See :meth:`Family.knows`; by the config."""
        return super().knows(network) and _has_classes(network)

    def check(self, network: nn.Module) -> None:
        """See :meth:`Family.check`."""
        _refuse_other_classes(network)
        super().check(network)

    def check_batch(self, network: nn.Module, noisy: Tensor, batch: ViewBatch) -> None:
        """Also refuse classes that the network does not have."""
        super().check_batch(network, noisy, batch)
        check_classes(network, batch, _count(network))

    def call(self, network: nn.Module, noisy: Tensor, timesteps: Tensor, batch: ViewBatch) -> Tensor:
        """See :meth:`Family.call`."""
        labels = batch.conditions["class_label"][:, 0]
        prediction: Tensor = network(
            noisy, timesteps, encoder_hidden_states=batch.text, class_labels=labels, return_dict=False
        )[0]
        return prediction
