"""The form of a sample: its fields in a shard, the checks on them, and the batches they are put into.

A sample is a mapping of field name to bytes, as WebDataset reads it from a tar file:

``latent.npy``
    ``(C, H, W)`` float16 or float32: what the network is trained on; an image in [-1, 1] for a pixel-space model.
    ``(C, F, H, W)`` of a video.
``latent_flip.npy``
    Optional, the same shape: the latent of the mirrored picture (which is not the mirrored latent).
``text.npy``, ``pooled.npy``, …
    What the network is conditioned on (:mod:`lightning_unlearn.data.conditions`), float16 or float32; most networks
    need ``text.npy`` ``(captions, tokens, dim)`` and no more.
``json``
    ``{"captions": [...], ...}``: the captions in the order of ``text.npy``, and whatever else is known;
    a list with an empty caption for networks that know no text. ``weight`` and ``caption_weights`` say how often
    training saw the sample, and each of its captions (:mod:`lightning_unlearn.data.weights`).
``png`` / ``jpg`` / ``webp``
    Optional: a picture for people to look at. It is never decoded on the way to a score.
``loss_mask.png``
    Optional, of the same form: which part of the picture training looked at. Only training reads it.
``mask.png``
    Optional, of a query: which part of it is unlearned (:mod:`lightning_unlearn.data.masks`). Samples that are
    scored, or trained on, are read without it.

Nothing else is decoded, and arrays are read with ``allow_pickle=False``: a shard is data and can't run code.
"""

from __future__ import annotations

import json
from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from lightning_unlearn.data.arrays import LARGEST_LATENT, decode_array
from lightning_unlearn.data.conditions import NUMBERS, Conditions, cast_conditions, decode_conditions
from lightning_unlearn.data.field_checks import check_fields, check_present, is_text
from lightning_unlearn.data.masks import LOSS_MASK_FIELD, MASK_FIELD, decode_mask
from lightning_unlearn.data.shared import SHARED, names_fields
from lightning_unlearn.data.weights import caption_weights_of, weight_of
from lightning_unlearn.errors import InputError

LATENT_FIELDS = ("latent.npy", "latent_flip.npy")
PICTURE_FIELDS = ("png", "jpg", "jpeg", "webp")


@dataclass(frozen=True)
class Sample:
    """One training image, or one query, with its captions.

    Attributes:
        key: Unique name.
        latent: ``(C, H, W)`` float32, or ``(C, F, H, W)`` of a video, as wherever latents have three axes.
        conditions: Name to ``(captions or 1, …)``.
        metadata: The sample's json; ``metadata["captions"]`` is a list of strings.
        latent_flip: ``(C, H, W)`` float32, or ``None``.
        picture: The bytes of an encoded picture, or ``None``.
        mask: ``(H, W)`` float32, a query's region, or what training looked at: 1 inside, 0 outside; ``None`` for the
            whole picture.
    """

    key: str
    latent: Tensor
    conditions: Conditions
    metadata: dict[str, Any]
    latent_flip: Tensor | None = None
    picture: bytes | None = None
    mask: Tensor | None = None

    @property
    def captions(self) -> list[str]:
        """The sample's captions."""
        return list(self.metadata["captions"])

    @property
    def text(self) -> Tensor:
        """``(captions, tokens, dim)`` the text states."""
        return _text(self.conditions)

    @property
    def weight(self) -> float:
        """How often training saw it, beside others; an :class:`InputError` if its json says what is no weight."""
        return weight_of(self.metadata, f"Sample {self.key!r}")

    @property
    def caption_weights(self) -> list[float] | None:
        """Shares of its captions in training, which add up to 1; ``None`` if all are alike."""
        return caption_weights_of(self.metadata, len(self.captions), f"Sample {self.key!r}")


@dataclass(frozen=True)
class ViewBatch:
    """What the network sees of ``B`` views, but for their timesteps and noise.

    Attributes:
        latents: ``(B, C, H, W)``.
        conditions: What else the network is given, name to ``(B, …)``.
        mask: ``(B, H, W)``, which part of each latent the loss is of; ``None`` for all of it.
    """

    latents: Tensor
    conditions: Conditions
    mask: Tensor | None = None

    @property
    def text(self) -> Tensor:
        """``(B, tokens, dim)`` the text states."""
        return _text(self.conditions)

    def to(self, device: torch.device, dtype: torch.dtype) -> ViewBatch:
        """The views where a network is, in its type.

        Args:
            device: The network's.
            dtype: The network's.

        Returns:
            A new batch.
        """
        mask = None if self.mask is None else self.mask.to(device, dtype)
        return ViewBatch(self.latents.to(device, dtype), cast_conditions(self.conditions, device, dtype), mask)


# Not frozen: a Trainer's precision plugin may only convert the tensors of a dataclass that isn't.
@dataclass
class SampleBatch:
    """Samples of one shard, stacked.

    Attributes:
        shard: Identifier of the shard (see :func:`lightning_unlearn.data.shards.shard_id`).
        keys: ``B`` keys.
        latents: ``(B, C, H, W)``.
        conditions: Name to ``(B, captions or 1, …)``; rows past a sample's last caption are zero.
        caption_counts: ``(B,)`` int64.
        latents_flip: ``(B, C, H, W)`` or ``None``.
        end_of_shard: How many samples the whole shard had, on its last batch; otherwise ``None``.
        skipped: How many bad samples were left out of the shard, on its last batch.
        error: Why the shard can't be finished, instead of samples.
        places: ``B`` places in the shard, by which rows of a table are ordered; empty where nobody asks for them.
        caption_weights: Of each sample, the shares of its captions in training; ``None`` if all are alike.
        masks: ``(B, H, W)``, which part of each latent training looked at; ``None`` for all of it.
        metadata: ``B`` samples' json; empty where nobody put it there.
    """

    shard: str
    keys: list[str] = field(default_factory=list)
    latents: Tensor = field(default_factory=lambda: torch.empty(0))
    conditions: Conditions = field(default_factory=dict)
    caption_counts: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.int64))
    latents_flip: Tensor | None = None
    end_of_shard: int | None = None
    skipped: int = 0
    error: str | None = None
    places: list[int] = field(default_factory=list)
    caption_weights: list[list[float]] | None = None  # no tensor, which a Trainer's precision would round
    masks: Tensor | None = None
    metadata: list[dict[str, Any]] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.keys)

    @property
    def text(self) -> Tensor:
        """``(B, captions, tokens, dim)`` the text states."""
        return _text(self.conditions)

    def views(self, rows: Tensor, captions: Tensor, latents: Tensor | None = None) -> ViewBatch:
        """What the network sees of some samples, one caption of each.

        Args:
            rows: ``(b,)`` which samples.
            captions: ``(b,)`` which caption of each.
            latents: ``(b, C, H, W)`` what stands in their latents' place, e.g. those of mirrored pictures.

        Returns:
            ``b`` views.
        """
        rows = rows.to(self.latents.device)
        captions = captions.to(self.latents.device)
        chosen = {name: array[rows, captions if array.shape[1] > 1 else 0] for name, array in self.conditions.items()}
        mask = None if self.masks is None else self.masks[rows]
        return ViewBatch(self.latents[rows] if latents is None else latents, chosen, mask)

    def only(self, wanted: Container[str]) -> SampleBatch:
        """The batch with some of its samples; what it says of its shard stays.

        Args:
            wanted: Their keys.

        Returns:
            A new batch, or the same if all are wanted.
        """
        rows = [row for row, key in enumerate(self.keys) if key in wanted]
        if len(rows) == len(self.keys):
            return self
        return replace(
            self,
            keys=[self.keys[row] for row in rows],
            latents=self.latents[rows],
            conditions={name: array[rows] for name, array in self.conditions.items()},
            caption_counts=self.caption_counts[rows],
            latents_flip=None if self.latents_flip is None else self.latents_flip[rows],
            places=[self.places[row] for row in rows] if self.places else [],
            caption_weights=None if self.caption_weights is None else [self.caption_weights[row] for row in rows],
            masks=None if self.masks is None else self.masks[rows],
            metadata=[self.metadata[row] for row in rows] if self.metadata else [],
        )

    def to(self, device: torch.device) -> SampleBatch:
        """The batch with its tensors on ``device``; Lightning calls this for batches it does not know."""
        return replace(
            self,
            latents=self.latents.to(device, non_blocking=True),
            conditions=cast_conditions(self.conditions, device),
            latents_flip=None if self.latents_flip is None else self.latents_flip.to(device, non_blocking=True),
            masks=None if self.masks is None else self.masks.to(device, non_blocking=True),
        )


def decode_sample(fields: Mapping[str, Any]) -> Sample:
    """Decode and check one sample.

    Args:
        fields: Field name to bytes, with ``__key__`` and ``__url__`` as WebDataset adds them; with ``mask.png`` only if
            the sample is a query, with ``loss_mask.png`` only if it is trained on. ``__dotted__`` is the field of a
            file whose key was meant to have dots.

    Returns:
        The sample, its arrays in float32.

    Raises:
        InputError: If a field is missing or malformed, or captions and text disagree.
    """
    where = f"Sample {fields['__key__']!r} in {fields.get('__url__', 'a shard')}"
    check_fields(fields, where)
    try:
        metadata = json.loads(fields["json"])
    except (ValueError, RecursionError) as error:
        raise InputError(f"{where}: its json can't be read ({error}); make the shard again.") from None
    if isinstance(metadata, dict) and names_fields(metadata.get(SHARED)):
        del metadata[SHARED]  # where they lay is nobody's concern once they are read
    captions = metadata.get("captions") if isinstance(metadata, dict) else None
    if not isinstance(captions, list) or not captions or not all(isinstance(text, str) for text in captions):
        raise InputError(f"{where} has no captions; its json needs a list of strings named 'captions'.")
    if not is_text(json.dumps(metadata, ensure_ascii=False)):
        raise InputError(f"{where}: its json holds half a surrogate pair, which is no text; write it anew.")
    latent = decode_array(fields["latent.npy"], "latent.npy", (3, 4), LARGEST_LATENT, where)
    if "text.npy" not in fields and any(captions) and NUMBERS not in metadata:
        check_present(["text.npy"], where)
    conditions = decode_conditions(fields, metadata, len(captions), where)
    flip = None
    if "latent_flip.npy" in fields:
        flip = decode_array(fields["latent_flip.npy"], "latent_flip.npy", (3, 4), LARGEST_LATENT, where)
    if flip is not None and flip.shape != latent.shape:
        raise InputError(
            f"{where}: latent_flip.npy {tuple(flip.shape)} and latent.npy {tuple(latent.shape)} differ in shape."
        )
    picture = next((fields[name] for name in PICTURE_FIELDS if name in fields), None)
    caption_weights_of(metadata, len(captions), where)
    mask_field = next((name for name in (MASK_FIELD, LOSS_MASK_FIELD) if name in fields), None)
    mask = None
    if mask_field is not None:
        mask = decode_mask(fields[mask_field], latent.shape[-2], latent.shape[-1], where, mask_field)
    return Sample(fields["__key__"], latent, conditions, metadata, flip, picture, mask)


def _text(conditions: Conditions) -> Tensor:
    if "text" not in conditions:
        raise InputError("These samples hold no text.npy, which is asked for; prepare them with text.")
    return conditions["text"]


def named_arrays(samples: Sequence[Sample]) -> dict[str, Tensor]:
    """What a network sees of samples, by names of which a digest can be taken.

    Args:
        samples: With unique keys.

    Returns:
        ``{key}/latent`` and ``{key}/text`` (or another condition) to tensor, and ``{key}/mask`` of those that have one.
    """
    arrays: dict[str, Tensor] = {}
    for sample in samples:
        seen = {"latent": sample.latent, **sample.conditions, "mask": sample.mask}
        arrays |= {f"{sample.key}/{name}": array for name, array in seen.items() if array is not None}
    return arrays
