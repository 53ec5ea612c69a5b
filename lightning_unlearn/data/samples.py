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
    a list with an empty caption for networks that know no text.
``png`` / ``jpg`` / ``webp``
    Optional: a picture for people to look at. It is never decoded on the way to a score.
``mask.png``
    Optional, of a query: which part of it is unlearned (:mod:`lightning_unlearn.data.masks`). Samples that are
    scored, or trained on, are read without it.

Nothing else is decoded, and arrays are read with ``allow_pickle=False``: a shard is data and can't run code.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from lightning_unlearn.data.arrays import LARGEST_LATENT, decode_array
from lightning_unlearn.data.conditions import (
    NUMBERS,
    Conditions,
    cast_conditions,
    decode_conditions,
    shapes_of,
    stack_conditions,
)
from lightning_unlearn.data.masks import MASK_FIELD, decode_mask
from lightning_unlearn.errors import InputError

LATENT_FIELDS = ("latent.npy", "latent_flip.npy")
PICTURE_FIELDS = ("png", "jpg", "jpeg", "webp")


@dataclass(frozen=True)
class Sample:
    """One training image, or one query, with its captions.

    Attributes:
        key: Unique name.
        latent: ``(C, H, W)`` float32.
        conditions: Name to ``(captions or 1, …)``.
        metadata: The sample's json; ``metadata["captions"]`` is a list of strings.
        latent_flip: ``(C, H, W)`` float32, or ``None``.
        picture: The bytes of an encoded picture, or ``None``.
        mask: ``(H, W)`` float32, a query's region: 1 inside, 0 outside; ``None`` for the whole picture.
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
        return ViewBatch(self.latents[rows] if latents is None else latents, chosen)

    def to(self, device: torch.device) -> SampleBatch:
        """The batch with its tensors on ``device``; Lightning calls this for batches it does not know."""
        return replace(
            self,
            latents=self.latents.to(device, non_blocking=True),
            conditions=cast_conditions(self.conditions, device),
            latents_flip=None if self.latents_flip is None else self.latents_flip.to(device, non_blocking=True),
        )


def decode_sample(fields: Mapping[str, Any]) -> Sample:
    """Decode and check one sample.

    Args:
        fields: Field name to bytes, with ``__key__`` and ``__url__`` as WebDataset adds them; with ``mask.png`` only if
            the sample is a query. ``__dotted__`` is the field of a file whose key was meant to have dots.

    Returns:
        The sample, its arrays in float32.

    Raises:
        InputError: If a field is missing or malformed, or captions and text disagree.
    """
    where = f"Sample {fields['__key__']!r} in {fields.get('__url__', 'a shard')}"
    _check_fields(fields, where)
    try:
        metadata = json.loads(fields["json"])
    except (ValueError, RecursionError) as error:
        raise InputError(f"{where}: its json can't be read ({error}); make the shard again.") from None
    captions = metadata.get("captions") if isinstance(metadata, dict) else None
    if not isinstance(captions, list) or not captions or not all(isinstance(text, str) for text in captions):
        raise InputError(f"{where} has no captions; its json needs a list of strings named 'captions'.")
    if not _is_text(json.dumps(metadata, ensure_ascii=False)):
        raise InputError(f"{where}: its json holds half a surrogate pair, which is no text; write it anew.")
    latent = decode_array(fields["latent.npy"], "latent.npy", (3, 4), LARGEST_LATENT, where)
    if "text.npy" not in fields and any(captions) and NUMBERS not in metadata:
        _check_present(["text.npy"], where)
    conditions = decode_conditions(fields, metadata, len(captions), where)
    flip = None
    if "latent_flip.npy" in fields:
        flip = decode_array(fields["latent_flip.npy"], "latent_flip.npy", (3, 4), LARGEST_LATENT, where)
    if flip is not None and flip.shape != latent.shape:
        raise InputError(
            f"{where}: latent_flip.npy {tuple(flip.shape)} and latent.npy {tuple(latent.shape)} differ in shape."
        )
    picture = next((fields[name] for name in PICTURE_FIELDS if name in fields), None)
    mask = decode_mask(fields[MASK_FIELD], latent.shape[-2], latent.shape[-1], where) if MASK_FIELD in fields else None
    return Sample(fields["__key__"], latent, conditions, metadata, flip, picture, mask)


def _text(conditions: Conditions) -> Tensor:
    if "text" not in conditions:
        raise InputError("These samples hold no text.npy, which is asked for; prepare them with text.")
    return conditions["text"]


def _check_fields(fields: Mapping[str, Any], where: str) -> None:
    key = fields["__key__"]
    if not _is_text(key):
        raise InputError(f"{where} has a name that is not UTF-8; pack the shard again with names in UTF-8.")
    dotted = fields.get("__dotted__")
    if dotted is not None:
        raise InputError(
            f"{where}: its file {key + '.' + dotted!r} gives the key {key!r} and the field {dotted!r}, since a key "
            "ends at the first dot; pack the shard again with underscores for dots."
        )
    missing = [name for name in ("latent.npy", "json") if name not in fields]
    _check_present(missing, where)


def _check_present(missing: Sequence[str], where: str) -> None:
    if missing:
        raise InputError(
            f"{where} lacks {', '.join(missing)} among the files that lie side by side; a sample's files must follow "
            "each other in the shard, as `lightning-unlearn prepare` and `tar --sort=name` pack them."
        )


def _is_text(text: str) -> bool:
    # JSON can write half a surrogate pair, and tarfile gives names that are not UTF-8 so.
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


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


def collate_samples(shard: str, samples: Sequence[Sample], **markers: Any) -> SampleBatch:
    """Stack samples of one shard.

    Args:
        shard: The shard's identifier.
        samples: At least one sample; all latents of one shape, and all conditions.
        **markers: ``end_of_shard``, ``skipped`` or ``error`` of :class:`SampleBatch`.

    Returns:
        The batch.

    Raises:
        InputError: If shapes differ.
    """
    first = samples[0]
    for sample in samples:
        if sample.latent.shape != first.latent.shape or shapes_of(sample.conditions) != shapes_of(first.conditions):
            raise InputError(
                f"Sample {sample.key!r} has {shown_shapes(sample)}, but {first.key!r} has {shown_shapes(first)}; "
                "all samples of a run must have one shape."
            )
        if (sample.latent_flip is None) != (first.latent_flip is None):
            raise InputError(
                f"Only one of the samples {first.key!r} and {sample.key!r} has latent_flip.npy; prepare all with flips "
                "or none."
            )
    counts = [len(sample.captions) for sample in samples]
    flips = [sample.latent_flip for sample in samples if sample.latent_flip is not None]
    return SampleBatch(
        shard=shard,
        keys=[sample.key for sample in samples],
        latents=torch.stack([sample.latent for sample in samples]),
        conditions=stack_conditions([sample.conditions for sample in samples], counts),
        caption_counts=torch.tensor(counts),
        latents_flip=torch.stack(flips) if flips else None,
        **markers,
    )


def shown_shapes(sample: Sample) -> str:
    """The shapes of a sample's arrays, for a message.

    Args:
        sample: Any.

    Returns:
        E.g. ``"latent (4, 64, 64) and text (77, 768)"``.
    """
    named = {"latent": tuple(sample.latent.shape), **shapes_of(sample.conditions)}
    return " and ".join(f"{name} {shape}" for name, shape in named.items())
