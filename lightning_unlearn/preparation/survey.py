"""A look at all samples before anything long is done with them."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace

from tqdm.auto import tqdm

from lightning_unlearn.data.weights import WEIGHT, caption_weights_of, weight_of
from lightning_unlearn.errors import InputError
from lightning_unlearn.preparation.inputs import LatentSource, TextSource
from lightning_unlearn.preparation.layouts import layout_of, read_records
from lightning_unlearn.preparation.other_conditions import CLASS_LABEL, class_of
from lightning_unlearn.preparation.records import SKIP, Reading, Record, dropped_captions, plain_weights
from lightning_unlearn.preparation.tally import Tally


@dataclass(frozen=True)
class Survey:
    """A source of samples, and what can be told of them quickly.

    Attributes:
        source: Folder, table, tar or data set, see :func:`~lightning_unlearn.preparation.layouts.read_records`.
        reading: How it is read.
        latents: Where latents come from.
        text: Where text states come from.
        skip: Whether bad samples are left out and counted, instead of being an error.
        class_labels: Column with the number of each sample's class, if the network takes one.
    """

    source: str
    reading: Reading
    latents: LatentSource
    text: TextSource
    skip: bool
    class_labels: str | None = None

    def take(self, samples_per_shard: int | None = None) -> tuple[int, int]:
        """Look at all samples without reading their pictures whole.

        Args:
            samples_per_shard: The largest number of samples in a shard; ``None`` if there is one shard.

        Returns:
            How many there are, bad ones included, and for how many captions of the good ones a shard holds states:
            those that samples of a shard share are stored once.

        Raises:
            InputError: If there is none, one is bad and not to be skipped, or ready arrays don't fit.
        """
        samples = captions = good = 0
        stored = set[tuple[str, ...]]()
        folder = layout_of(self.source) == "folder"  # whose numbers of repeats are told of where they are read
        first = last = ""
        for record, fault in self.records(self.reading.tally):
            samples += 1
            first, last = first or record.key, record.key
            if fault is not None:
                if not self.skip:
                    raise InputError(fault)
                continue
            if samples_per_shard is not None and good % samples_per_shard == 0:
                stored.clear()
            good += 1
            own = tuple(record.captions)
            # Ready states of one caption need not be the same.
            if self.text.rows is not None or own not in stored:
                captions += len(own)
            stored.add(own)
            if WEIGHT in record.metadata and not folder:
                self.reading.tally.add(f"samples have the weight in training that {WEIGHT!r} says", record.key)
        if samples == 0:
            lines = "".join(f" ({line})" for line in self.reading.tally.lines())
            raise InputError(
                f"{self.source} holds no sample{lines}; name a folder with pictures, or a table with rows."
            )
        for what, rows in (("latents", self.latents.rows), ("text states", self.text.rows)):
            if rows is not None and rows != samples:
                raise InputError(
                    f"There are {rows} ready {what} but {samples} samples in {self.source}; "
                    "they must go together, row by row."
                )
            # Another order has as many rows, and only a person can see it.
            if rows is not None and self.reading.pictures:
                said = f"Row 0 of the ready {what} is taken for the sample {first!r}, row {rows - 1} for {last!r}."
                tqdm.write(said, file=sys.stderr)
        return samples, captions

    def records(self, tally: Tally) -> Iterator[tuple[Record, str | None]]:
        """The samples, each with what is wrong with it.

        Args:
            tally: Counts what is not taken.

        Yields:
            A sample, and one sentence on what keeps it out, if anything does.
        """
        keys: set[str] = set()
        for record in read_records(self.source, replace(self.reading, tally=tally)):
            if record.key in keys:
                twice = (
                    f"Two samples have the key {record.key!r}, the second in {record.place}; "
                    f"rename one, name a column of unique keys with `key`, or {SKIP}."
                )
                yield record, twice
                continue
            keys.add(record.key)
            record = plain_weights(record)
            found = self._fault(record)
            yield dropped_captions(record, self.reading.choices.caption_dropout), found

    def _fault(self, record: Record) -> str | None:
        if record.fault is not None:
            return record.fault
        if self.text.captions not in (None, len(record.captions)):
            return (
                f"{record.place} has {len(record.captions)} captions, but the ready text has {self.text.captions} "
                "for each sample; they must agree."
            )
        try:
            weight_of(record.metadata, record.place)
            caption_weights_of(record.metadata, len(record.captions), record.place)
            self.latents.facts(record)
            self.classes(record)
        except InputError as error:
            return str(error)
        return None

    def classes(self, record: Record) -> dict[str, list[int]]:
        """The class of a sample, where the network takes one.

        Args:
            record: The sample.

        Returns:
            Name to number.

        Raises:
            InputError: If it has none.
        """
        return {} if self.class_labels is None else {CLASS_LABEL: [class_of(record, self.class_labels)]}
