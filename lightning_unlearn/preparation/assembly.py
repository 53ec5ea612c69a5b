"""Records, their latents and their text put together and written to shards, all of them or none."""

from __future__ import annotations

import itertools
import shutil
import sys
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from tqdm.auto import tqdm

from lightning_unlearn.data.shards import MANIFEST, ShardInfo, write_shards
from lightning_unlearn.errors import InputError
from lightning_unlearn.preparation.disk import say_size, size_on_disk
from lightning_unlearn.preparation.encoding import Encoding
from lightning_unlearn.preparation.inputs import Item
from lightning_unlearn.preparation.layouts import layout_of
from lightning_unlearn.preparation.survey import Survey
from lightning_unlearn.preparation.tally import Tally

SHARD_NAME = "shard"
UNFINISHED = ".unfinished"
FAULTS_KEPT = 100


@dataclass
class Assembly:
    """What becomes of a source of samples.

    Attributes:
        survey: The source, and what is looked at before anything is encoded.
        mirrored: Whether latents of mirrored pictures are stored.
        dtype: ``"float16"`` or ``"float32"``.
        picture_size: Longer side of the stored picture; 0 stores none.
        batch_size: Samples encoded at a time.
        told: What else the manifest says of how the source was read.
        faults: What was wrong with those left out.
    """

    survey: Survey
    mirrored: bool
    dtype: str
    picture_size: int
    batch_size: int
    told: dict[str, Any] = field(default_factory=dict)
    faults: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        survey = self.survey
        self.source, self.reading = survey.source, survey.reading
        self.latents, self.text = survey.latents, survey.text
        self.encoding = Encoding(
            survey.latents,
            survey.text,
            survey.reading.choices,
            self.mirrored,
            self.dtype,
            self.picture_size,
            survey.reading.text,
        )

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
        samples, size = self.check(samples_per_shard)
        if self.latents.crop is not None:
            height, width = self.latents.crop
            shape = "buckets of about the area of " if self.reading.choices.crop == "bucket" else ""
            tqdm.write(f"Pictures are brought to {shape}{width} x {height} pixels.", file=sys.stderr)
        tqdm.write(say_size(samples, size, folder), file=sys.stderr)
        unfinished = folder / UNFINISHED
        try:
            written = self.encode(samples, unfinished, SHARD_NAME, samples_per_shard)
            (folder / MANIFEST).unlink(missing_ok=True)
            for old in folder.glob(f"{SHARD_NAME}-*.tar"):
                old.unlink()
            for name in [*(Path(shard.url).name for shard in written), MANIFEST]:
                (unfinished / name).replace(folder / name)
        except OSError as error:
            raise InputError(f"Shards can't be written to {folder} ({error}); see to its space and rights.") from None
        finally:
            shutil.rmtree(unfinished, ignore_errors=True)
        return [replace(shard, url=str(folder / Path(shard.url).name)) for shard in written]

    def encode(self, samples: int, folder: Path, name: str, samples_per_shard: int) -> list[ShardInfo]:
        """Encode the samples that were checked, and write them with a manifest.

        Args:
            samples: How many there are, bad ones included.
            folder: Where they go; emptied before.
            name: Of the shards.
            samples_per_shard: The largest number of samples in a shard.

        Returns:
            The shards.

        Raises:
            InputError: If a sample is bad that only shows here, or memory is short.
        """
        about = self._about()
        self.text.cut = Tally()
        shutil.rmtree(folder, ignore_errors=True)
        try:
            # `about` is filled while samples are made; the manifest is written after the last of them.
            written = write_shards(
                self._samples(samples, about), folder, name=name, samples_per_shard=samples_per_shard, about=about
            )
        except torch.OutOfMemoryError:
            raise InputError(
                f"The device has too little memory for {self.batch_size} samples; use a smaller batch_size."
            ) from None
        if self.faults:
            first = " ".join(self.faults[:3])
            warnings.warn(f"{len(self.faults)} of {samples} samples were left out. The first: {first}")
        if lines := [*self.reading.tally.lines(), *self.text.cut.lines()]:
            warnings.warn(f"Of {self.source}: {'; '.join(lines)}.")
        return written

    def check(self, samples_per_shard: int | None = None) -> tuple[int, int]:
        """Look at all samples without reading their pictures whole.

        Args:
            samples_per_shard: The largest number of samples in a shard; ``None`` if there is one shard.

        Returns:
            How many there are, bad ones included, and how many bytes they will take.

        Raises:
            InputError: If there is none, one is bad and not to be skipped, or ready arrays don't fit.
        """
        samples, captions = self.survey.take(samples_per_shard)
        sides = (self.latents.shape, self.text.shapes)
        return samples, size_on_disk(samples, captions, *sides, self.dtype, self.mirrored, self.picture_size)

    def _items(self) -> Iterator[Item]:
        """The samples whose pictures can be read."""
        # What is not taken was counted when the samples were checked.
        for index, (record, fault) in enumerate(self.survey.records(Tally())):
            if fault is not None:
                self._leave_out(fault)
                continue
            try:
                item = self.encoding.item(index, record)
            except InputError as error:
                self._leave_out(str(error))
                continue
            yield item

    def _leave_out(self, fault: str) -> None:
        if not self.survey.skip:
            raise InputError(fault)
        self.faults.append(fault)

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
        about["left_out"] = {
            # Without the way to this machine's folder.
            "faults": [fault.replace(f"{self.source}/", "") for fault in self.faults[:FAULTS_KEPT]],
            "counts": [*self.reading.tally.as_json(), *self.text.cut.as_json()],
        }

    def _encode(self, batch: list[Item], about: dict[str, Any]) -> Iterator[dict[str, Any]]:
        latents, flips, states = self.encoding.arrays(batch)
        about["latent"]["shape"] = list(latents[0].shape)
        about["text"]["shape"] = list(states[0]["text"].shape[1:]) if "text" in states[0] else None
        for row, item in enumerate(batch):
            try:
                flip = None if flips is None else flips[row]
                sample = self.encoding.fields(item, latents[row], flip, states[row], self.survey.classes)
            except InputError as error:
                self._leave_out(str(error))
                continue
            yield sample

    def _about(self) -> dict[str, Any]:
        crop = self.latents.crop
        facts = dict(self.latents.about)
        way = self.reading.choices.resize
        return {
            "made_by": f"lightning-unlearn {version('lightning-unlearn')} prepare",
            "space": facts.pop("space"),
            "latent": {"shape": None, "dtype": self.dtype, **facts},
            "text": {"shape": None, "dtype": self.dtype, **self.text.about},
            "flips": self.mirrored,
            "pictures": crop and {"height": crop[0], "width": crop[1], "mode": self.latents.mode, "resize": way},
            "preview_size": self.picture_size,
            "reading": {"layout": layout_of(self.source), **self.told, "choices": self.reading.choices.as_json()},
            "skipped": 0,
            "left_out": None,
            "versions": {name: version(name) for name in ("torch", "pillow")},
        }
