"""Records, their latents and their text put together and written to shards, all of them or none."""

from __future__ import annotations

import itertools
import shutil
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm.auto import tqdm

from lightning_unlearn.data.shards import MANIFEST, ShardInfo, encode_sample, write_shards
from lightning_unlearn.errors import InputError
from lightning_unlearn.preparation.inputs import Array, Item, LatentSource, TextSource
from lightning_unlearn.preparation.pictures import crop_middle, open_picture, to_pixels, to_preview
from lightning_unlearn.preparation.records import Record, read_records

SHARD_NAME = "shard"
UNFINISHED = ".unfinished"


@dataclass
class Assembly:
    """What becomes of a source of samples.

    Attributes:
        source: Folder or table, see :func:`~lightning_unlearn.preparation.records.read_records`.
        with_pictures: Whether the samples have pictures.
        key: Column with the samples' keys.
        latents: Where latents come from.
        text: Where text states come from.
        mirrored: Whether latents of mirrored pictures are stored.
        dtype: ``"float16"`` or ``"float32"``.
        picture_size: Longer side of the stored picture; 0 stores none.
        batch_size: Samples encoded at a time.
        skip: Whether bad samples are left out and counted, instead of being an error.
        faults: What was wrong with those left out.
    """

    source: str
    with_pictures: bool
    key: str | None
    latents: LatentSource
    text: TextSource
    mirrored: bool
    dtype: str
    picture_size: int
    batch_size: int
    skip: bool
    faults: list[str] = field(default_factory=list)

    def write(self, folder: Path, samples_per_shard: int) -> list[ShardInfo]:
        """Check all samples as far as that is quick, then encode them and write shards and manifest.

        Args:
            folder: Where they go; shards of this name that are there already are replaced.
            samples_per_shard: The largest number of samples in a shard.

        Returns:
            The shards.

        Raises:
            InputError: If something is wrong with the samples, or the folder can't be written.
        """
        total = self.check()
        unfinished = folder / UNFINISHED
        about = self._about()
        try:
            shutil.rmtree(unfinished, ignore_errors=True)
            # `about` is filled while samples are made; the manifest is written after the last of them.
            written = write_shards(
                self._samples(total, about),
                unfinished,
                name=SHARD_NAME,
                samples_per_shard=samples_per_shard,
                about=about,
            )
            (folder / MANIFEST).unlink(missing_ok=True)
            for old in folder.glob(f"{SHARD_NAME}-*.tar"):
                old.unlink()
            for name in [*(Path(shard.url).name for shard in written), MANIFEST]:
                (unfinished / name).replace(folder / name)
        except OSError as error:
            raise InputError(f"Shards can't be written to {folder} ({error}); see to its space and rights.") from None
        except torch.OutOfMemoryError:
            raise InputError(
                f"The device has too little memory for {self.batch_size} samples; use a smaller batch_size."
            ) from None
        finally:
            shutil.rmtree(unfinished, ignore_errors=True)
        if self.faults:
            first = " ".join(self.faults[:3])
            warnings.warn(f"{len(self.faults)} of {total} samples were left out. The first: {first}")
        return [replace(shard, url=str(folder / Path(shard.url).name)) for shard in written]

    def check(self) -> int:
        """Look at all samples without opening their pictures.

        Returns:
            How many there are, bad ones included.

        Raises:
            InputError: If there is none, two share a key, one is bad and not to be skipped, or ready arrays don't fit.
        """
        keys: set[str] = set()
        total = 0
        for record in self._records():
            total += 1
            if record.key in keys:
                raise InputError(
                    f"Two samples have the key {record.key!r}, the second in {record.place}; "
                    "rename one, or name a column of unique keys with `key`."
                )
            keys.add(record.key)
            fault = self._fault(record)
            if fault is not None and not self.skip:
                raise InputError(fault)
        if total == 0:
            raise InputError(f"{self.source} holds no sample; name a folder with pictures, or a table with rows.")
        for what, rows in (("latents", self.latents.rows), ("text states", self.text.rows)):
            if rows is not None and rows != total:
                raise InputError(
                    f"There are {rows} ready {what} but {total} samples in {self.source}; "
                    "they must go together, row by row."
                )
        return total

    def _records(self) -> Iterator[Record]:
        return read_records(self.source, pictures=self.with_pictures, key=self.key)

    def _fault(self, record: Record) -> str | None:
        if record.fault is not None:
            return record.fault
        if self.text.captions not in (None, len(record.captions)):
            return (
                f"{record.place} has {len(record.captions)} captions, but the ready text has {self.text.captions} "
                "for each sample; they must agree."
            )
        return None

    def _items(self) -> Iterator[Item]:
        """The samples whose pictures can be read."""
        for index, record in enumerate(self._records()):
            fault = self._fault(record)
            if fault is not None:
                self._leave_out(fault)
                continue
            try:
                item = self._item(index, record)
            except InputError as error:
                self._leave_out(str(error))
                continue
            yield item

    def _leave_out(self, fault: str) -> None:
        if not self.skip:
            raise InputError(fault)
        self.faults.append(fault)

    def _item(self, index: int, record: Record) -> Item:
        if record.picture is None or (self.latents.crop is None and not self.picture_size):
            return Item(index, record)
        picture = open_picture(record.picture, self.latents.mode)
        pixels = None
        if self.latents.crop is not None:
            picture = crop_middle(picture, *self.latents.crop)
            pixels = to_pixels(picture, *self.latents.crop)
        return Item(index, record, pixels, to_preview(picture, self.picture_size) if self.picture_size else None)

    def _samples(self, total: int, about: dict[str, Any]) -> Iterator[dict[str, Any]]:
        items = self._items()
        made = 0
        with tqdm(total=total, unit="sample", desc="prepare", mininterval=1) as bar:
            while batch := list(itertools.islice(items, self.batch_size)):
                for sample in self._encode(batch, about):
                    made += 1
                    yield sample
                bar.update(batch[-1].index + 1 - bar.n)
            bar.update(total - bar.n)
        if not made:
            raise InputError(f"None of the {total} samples in {self.source} could be used. The first: {self.faults[0]}")
        about["skipped"] = len(self.faults)

    def _encode(self, batch: list[Item], about: dict[str, Any]) -> Iterator[dict[str, Any]]:
        latents = self.latents.latents(batch, mirrored=False)
        flips = self.latents.latents(batch, mirrored=True) if self.mirrored else None
        states = self.text.states(batch)
        about["latent"]["shape"], about["text"]["shape"] = list(latents.shape[1:]), list(states[0].shape[1:])
        for row, item in enumerate(batch):
            try:
                sample = encode_sample(
                    item.record.key,
                    self._stored(latents[row], "latent", item),
                    self._stored(states[row], "text", item),
                    {**item.record.metadata, "captions": item.record.captions},
                    latent_flip=None if flips is None else self._stored(flips[row], "mirrored latent", item),
                    picture=item.preview,
                    picture_format="webp",
                )
            except InputError as error:
                self._leave_out(str(error))
                continue
            yield sample

    def _stored(self, array: Array, what: str, item: Item) -> Array:
        with np.errstate(over="ignore"):
            stored = np.ascontiguousarray(array, dtype=self.dtype)
        if not np.isfinite(stored).all():
            place = item.record.place
            raise InputError(
                f"The {what} of {place} holds NaN or numbers too large for {self.dtype}; try dtype=float32."
            )
        return stored

    def _about(self) -> dict[str, Any]:
        crop = self.latents.crop
        facts = dict(self.latents.about)
        return {
            "made_by": f"lightning-unlearn {version('lightning-unlearn')} prepare",
            "space": facts.pop("space"),
            "latent": {"shape": None, "dtype": self.dtype, **facts},
            "text": {"shape": None, "dtype": self.dtype, **self.text.about},
            "flips": self.mirrored,
            "pictures": crop and {"height": crop[0], "width": crop[1], "mode": self.latents.mode, "resize": "bicubic"},
            "preview_size": self.picture_size,
            "skipped": 0,
            "versions": {name: version(name) for name in ("torch", "pillow")},
        }
