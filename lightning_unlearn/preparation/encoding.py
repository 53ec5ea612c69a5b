"""One sample encoded: its picture, its latents and its conditions as the fields of a shard."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from lightning_unlearn.data.arrays import LARGEST_LATENT, LARGEST_TEXT
from lightning_unlearn.data.conditions import NUMBERS
from lightning_unlearn.data.shards import encode_sample
from lightning_unlearn.errors import InputError
from lightning_unlearn.preparation.choices import Choices
from lightning_unlearn.preparation.inputs import Array, Item, LatentSource, Taken, TextSource
from lightning_unlearn.preparation.loss_masks import loss_mask
from lightning_unlearn.preparation.pictures import crop_middle, open_picture, to_preview
from lightning_unlearn.preparation.records import Record
from lightning_unlearn.preparation.resizing import resized, to_pixels


@dataclass(frozen=True)
class Encoding:
    """How samples are encoded.

    Attributes:
        latents: Where latents come from.
        text: Where text states come from.
        choices: How pictures are read.
        mirrored: Whether latents of mirrored pictures are made.
        dtype: ``"float16"`` or ``"float32"``.
        picture_size: Longer side of the picture for people; 0 makes none.
        needs_text: Whether the network is given text.
    """

    latents: LatentSource
    text: TextSource
    choices: Choices
    mirrored: bool
    dtype: str
    picture_size: int
    needs_text: bool

    def item(self, index: int, record: Record) -> Item:
        """Read a sample's picture, if anybody looks at it.

        Args:
            index: Its row in the source.
            record: What is known of it.

        Returns:
            The sample with its pixels.
        """
        if record.picture is None or (self.latents.crop is None and not self.picture_size):
            return Item(index, record)
        place = str(record.picture) if isinstance(record.picture, Path) else record.place
        picture = open_picture(record.picture, place, self.latents.mode, self.choices)
        pixels, taken, mask = None, None, None
        if self.latents.crop is not None:
            shape = self.choices.bucket(self.latents.crop, picture.height, picture.width)
            taken = _taken(picture.height, picture.width, *shape)
            pixels = to_pixels(resized(picture, *shape, self.choices.resize))
            if self.choices.masks in ("loss", "alpha"):
                mask = loss_mask(record, self.choices, *shape)
            picture = crop_middle(picture, *shape)
        preview = to_preview(picture, self.picture_size) if self.picture_size else None
        return Item(index, record, pixels, preview, taken, mask)

    def arrays(self, batch: Sequence[Item]) -> tuple[list[Array], list[Array] | None, list[dict[str, Array]]]:
        """What models make of samples.

        Args:
            batch: ``B`` samples.

        Returns:
            ``B`` latents, those of the mirrored pictures, and ``B`` times text states by name.
        """
        latents = self._latents(batch, mirrored=False)
        flips = self._latents(batch, mirrored=True) if self.mirrored else None
        return latents, flips, self.text.states(batch)

    def fields(
        self,
        item: Item,
        latent: Array,
        flip: Array | None,
        states: Mapping[str, Array],
        classes: Callable[[Record], dict[str, list[int]]] = lambda record: {},
    ) -> dict[str, Any]:
        """A sample as a shard holds it.

        Args:
            item: The sample.
            latent: ``(C, H, W)``.
            flip: Of the mirrored picture.
            states: Its text states by name.
            classes: Its class by name, where the network takes one.

        Returns:
            Field name to bytes, and ``__key__``.

        Raises:
            InputError: If a number is too large, or none.
        """
        record = item.record
        facts, captions = self.latents.facts(record), {"captions": record.captions}
        numbers = self.latents.numbers(item) | classes(record)
        # An empty object says that there is no text because the network takes none.
        told = {NUMBERS: numbers} if numbers or not self.needs_text else {}
        return encode_sample(
            record.key,
            self._stored(latent, "latent", item),
            {name: self._stored(array, name, item) for name, array in states.items()},
            {**record.metadata, **facts, **told, **captions},
            latent_flip=None if flip is None else self._stored(flip, "mirrored latent", item),
            picture=item.preview,
            picture_format="webp",
            loss_mask=item.mask,
        )

    def _latents(self, batch: Sequence[Item], *, mirrored: bool) -> list[Array]:
        """The latents of samples; pictures of one shape are encoded together."""
        alike: dict[Any, list[int]] = {}
        for row, item in enumerate(batch):
            alike.setdefault(row if item.pixels is None else item.pixels.shape, []).append(row)
        found: dict[int, Array] = {}
        for rows in alike.values():
            latents = self.latents.latents([batch[row] for row in rows], mirrored=mirrored)
            found |= dict(zip(rows, latents, strict=True))
        return [found[row] for row in range(len(batch))]

    def _stored(self, array: Array, what: str, item: Item) -> Array:
        with np.errstate(over="ignore"):
            stored = np.ascontiguousarray(array, dtype=self.dtype)
        place = item.record.place
        largest = LARGEST_LATENT if "latent" in what else LARGEST_TEXT
        if np.isfinite(array).all() and float(np.abs(array).max()) > largest:  # of float16, NumPy would cast the bound
            raise InputError(
                f"The {what} of {place} holds numbers larger than {largest:.0e}, which no shard is read with; scale "
                "it, or leave the sample out."
            )
        if not np.isfinite(stored).all():
            raise InputError(
                f"The {what} of {place} holds NaN or numbers too large for {self.dtype}; try dtype=float32."
            )
        return stored


def _taken(height: int, width: int, to_height: int, to_width: int) -> Taken:
    # As trainers tell it: resized so that it covers what is wanted, then the middle cut out.
    scale = max(to_height / height, to_width / width)
    corner = (round((height * scale - to_height) / 2), round((width * scale - to_width) / 2))
    return Taken((height, width), (max(0, corner[0]), max(0, corner[1])))
