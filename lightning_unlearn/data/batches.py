"""Samples put into batches, each of one form."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

from lightning_unlearn.data.conditions import forms_of, shapes_of, stack_conditions, widths_of
from lightning_unlearn.data.samples import Sample, SampleBatch
from lightning_unlearn.errors import InputError

Item = TypeVar("Item")


def form_name(latent: Sequence[int], conditions: Mapping[str, Sequence[int]]) -> str:
    """What must be alike in samples of one batch.

    Args:
        latent: The latent's shape.
        conditions: Name to the shape of one caption's entry.

    Returns:
        E.g. ``"latent 4x64x48, text ?x768, text_mask ?"``; a question mark stands for any number of tokens.
    """
    named = {"latent": tuple(latent), **forms_of(conditions)}
    return ", ".join(
        f"{name} {'x'.join('?' if length is None else str(length) for length in shape)}".strip()
        for name, shape in named.items()
    )


def form_of(sample: Sample) -> str:
    """The form of a sample, see :func:`form_name`.

    Args:
        sample: Any.

    Returns:
        Its form.
    """
    return form_name(sample.latent.shape, shapes_of(sample.conditions))


def check_shapes(sample: Sample, other: Sample, url: str) -> None:
    """Refuse a sample that the network of another one can't take.

    Height, width and the number of tokens may differ: many networks take any.

    Args:
        sample: Of a training shard.
        other: A query, or a sample.
        url: The sample's shard.

    Raises:
        InputError: If latents differ in their channels, or conditions in their names or widths.
    """
    axes = (sample.latent.ndim, sample.latent.shape[0]), (other.latent.ndim, other.latent.shape[0])
    if axes[0] != axes[1] or widths_of(sample.conditions) != widths_of(other.conditions):
        raise InputError(
            f"Sample {sample.key!r} in {url} has {shown_shapes(sample)}, but {other.key!r} has {shown_shapes(other)}; "
            "channels and the widths of text must be alike: prepare both in the same way."
        )


class Forms(Generic[Item]):
    """What waits for others of its form, so that each batch has one.

    Args:
        size: Items a batch.
        held: How many batches' worth of items may wait; beyond, the form with most of them goes first.
    """

    def __init__(self, size: int, held: int = 8) -> None:
        self.most = held * size
        self.size = size
        self._waiting: dict[str, list[Item]] = {}

    def add(self, form: str, item: Item) -> list[Item] | None:
        """Take one more.

        Args:
            form: Its form.
            item: The next one.

        Returns:
            A batch that had to make room for it, if there is one; so there is always something left for a last batch.
        """
        leaves: str | None = None
        if len(self._waiting.get(form, ())) == self.size:
            leaves = form
        elif sum(map(len, self._waiting.values())) == self.most:
            leaves = max(self._waiting, key=lambda name: len(self._waiting[name]))
        out = None if leaves is None else self._waiting.pop(leaves)
        self._waiting.setdefault(form, []).append(item)
        return out

    def rest(self) -> Iterator[list[Item]]:
        """What still waits, in the order in which the forms came first.

        Yields:
            Batches.
        """
        while self._waiting:
            yield self._waiting.pop(next(iter(self._waiting)))


def collate_samples(shard: str, samples: Sequence[Sample], **markers: Any) -> SampleBatch:
    """Stack samples of one shard.

    Args:
        shard: The shard's identifier.
        samples: At least one sample; all of one form.
        **markers: ``end_of_shard``, ``skipped``, ``places`` or ``error`` of :class:`SampleBatch`.

    Returns:
        The batch.

    Raises:
        InputError: If forms differ.
    """
    first = samples[0]
    for sample in samples:
        if form_of(sample) != form_of(first):
            raise InputError(
                f"Sample {sample.key!r} has {shown_shapes(sample)}, but {first.key!r} has {shown_shapes(first)}; "
                "all samples of a batch must have one shape, and text states of different length a mask."
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
        caption_weights=_caption_weights(samples),
        masks=_masks(samples),
        metadata=[sample.metadata for sample in samples],
        **markers,
    )


def _caption_weights(samples: Sequence[Sample]) -> list[list[float]] | None:
    given = [sample.caption_weights for sample in samples]
    if all(weights is None for weights in given):
        return None
    counts = [len(sample.captions) for sample in samples]
    return [[1 / count] * count if weights is None else weights for weights, count in zip(given, counts, strict=True)]


def _masks(samples: Sequence[Sample]) -> Tensor | None:
    if all(sample.mask is None for sample in samples):
        return None
    whole = torch.ones(samples[0].latent.shape[-2:])
    return torch.stack([whole if sample.mask is None else sample.mask for sample in samples])


def shown_shapes(sample: Sample) -> str:
    """The shapes of a sample's arrays, for a message.

    Args:
        sample: Any.

    Returns:
        E.g. ``"latent (4, 64, 64) and text (77, 768)"``.
    """
    named = {"latent": tuple(sample.latent.shape), **shapes_of(sample.conditions)}
    return " and ".join(f"{name} {shape}" for name, shape in named.items())
