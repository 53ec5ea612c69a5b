"""An index to disk while predict runs."""

from __future__ import annotations

import json
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info
from typing_extensions import override

from lightning_unlearn.data.files import check_folder, write_atomically
from lightning_unlearn.data.shards import ShardInfo, shard_id
from lightning_unlearn.errors import InputError
from lightning_unlearn.index.index_pass import OUTPUTS, IndexedBatch, IndexPass
from lightning_unlearn.index.record import (
    FAILED,
    differing,
    index_digest,
    index_fingerprints,
    is_indexed,
    read_index,
    recorded_shards,
    write_index,
)
from lightning_unlearn.index.rows import Rows, joined
from lightning_unlearn.index.shard_file import write_shard
from lightning_unlearn.scores.agreement import caption_digests


@dataclass
class _Open:
    """A shard whose end has not come yet."""

    rows: list[Rows] = field(default_factory=list)
    places: list[int] = field(default_factory=list)


class IndexWriter(Callback):
    """Keeps what an :class:`~lightning_unlearn.index.IndexPass` gives: one file a shard, whole or not at all.

    A restart leaves out the shards that are done, and so does a run over more shards; a folder of another model, other
    weights, views or projection is refused. A shard that fails is noted in ``failed/`` and the others go on.

    Args:
        folder: Where ``index.json`` and ``shards/`` are kept.

    Attributes:
        failures: Shard to what is wrong with it, of this rank's.
        kept: How many samples this rank kept.
    """

    def __init__(self, folder: str) -> None:
        self.folder = Path(folder)
        self.failures: dict[str, str] = {}
        self.kept = 0
        self._skipped = 0
        self._open: dict[str, _Open] = {}
        self._finished: set[str] = set()
        self._sizes: dict[str, int] = {}
        self._index = ""
        self._versions: dict[str, str] = {}  # of their content, as it was before the first was read
        self._started = 0.0
        self._unnoted = False

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse another index's folder, and tell the datamodule which shards are done."""
        if not isinstance(pl_module, IndexPass) or stage != "predict":
            raise InputError(f"IndexWriter keeps what an IndexPass predicts, not a {type(pl_module).__name__}.")
        trainer.predict_loop.return_predictions = False
        datamodule: Any = trainer.datamodule  # type: ignore[attr-defined]
        if datamodule.keys is not None:
            raise InputError("An index is of all samples of its shards; leave keys out of the data.")
        fingerprints = index_fingerprints(pl_module.module, pl_module.projection, datamodule.on_bad_sample)
        self._sizes = dict.fromkeys(OUTPUTS, pl_module.projection.numbers)
        self._index = index_digest(fingerprints)
        record = read_index(self.folder)
        others = [] if record is None else differing(record, fingerprints)
        if others:
            raise InputError(
                f"{self.folder} holds an index of another model (other {', '.join(others)}); make this one in another "
                "folder, or remove that one."
            )
        self._versions = {shard_id(shard.url): shard.version for shard in datamodule.shards}
        done = {name for name, version in self._versions.items() if self._is_done(name, version)}
        datamodule.skip_shards(frozenset(done))

    def _is_done(self, shard: str, version: str) -> bool:
        return is_indexed(self.folder, shard, version, self._sizes, self._index)

    @override
    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Record the index, before its first shard."""
        assert isinstance(pl_module, IndexPass)
        self._open, self.failures, self.kept, self._skipped, self._finished = {}, {}, 0, 0, set()
        self._started, self._unnoted = time.monotonic(), False
        check_folder(self.folder, "make the index in another folder")
        for name in self._due(trainer):
            (self.folder / FAILED / f"{name}.json").unlink(missing_ok=True)
        if trainer.is_global_zero:
            self._record(trainer, pl_module)
        # Nobody must take another rank's old notes for new ones.
        trainer.strategy.barrier("index")

    def _record(self, trainer: Trainer, pl_module: IndexPass) -> None:
        module, data = pl_module.module, trainer.datamodule  # type: ignore[attr-defined]
        content = {
            "fingerprints": index_fingerprints(module, pl_module.projection, data.on_bad_sample),
            "projection": pl_module.projection.settings(),
            "sizes": self._sizes,
            "network": module.origin,
            "objective": module.objective.settings(),
            "parameters": module.parameters_selection,
            "views": module.views.settings(),
            "shards": recorded_shards(data.shards),
        }
        try:
            write_index(self.folder, content)
        except OSError as error:
            raise InputError(
                f"The index can't be recorded in {self.folder} ({error.strerror}); free the disk, or choose another "
                "folder."
            ) from None

    def _due(self, trainer: Trainer) -> list[str]:
        shards: list[ShardInfo] = trainer.datamodule.shards_to_score()  # type: ignore[attr-defined]
        return [shard_id(shard.url) for shard in shards]

    @override
    def on_predict_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Keep a batch, and write its shard if it was the last one."""
        assert isinstance(outputs, IndexedBatch)
        of = outputs.batch
        if of.shard in self.failures:
            return  # what is left of a shard that failed
        shard = self._open.setdefault(of.shard, _Open())
        failed = of.error
        if failed is None and len(of):
            shard.rows.append(_rows(outputs))
            shard.places.extend(of.places or range(len(shard.places), len(shard.places) + len(of)))
        if of.end_of_shard is not None and failed is None:
            try:
                self._finish(of.shard, shard, of.end_of_shard)
                self._skipped += of.skipped
            except InputError as error:
                failed = str(error)
        if failed is not None:
            self._fail(of.shard, failed)
        if of.end_of_shard is not None or failed is not None:
            del self._open[of.shard]

    def _finish(self, name: str, shard: _Open, count: int) -> None:
        if len(shard.places) != count:
            raise InputError(
                f"Shard {name} has {count} samples, but {len(shard.places)} arrived; run the same command again."
            )
        # Batches of one form each come in another order than the shard's.
        order = sorted(range(count), key=shard.places.__getitem__)
        rows = joined(shard.rows, order) if count else None
        write_shard(self.folder, name, rows, self._sizes, self._index, self._versions[name])
        self._finished.add(name)
        self.kept += count

    def _fail(self, shard: str, error: str) -> None:
        self.failures[shard] = error
        try:
            (self.folder / FAILED).mkdir(exist_ok=True)
            write_atomically(self.folder / FAILED / f"{shard}.json", json.dumps({"error": error}).encode())
        except OSError:  # a full disk, or a folder that is gone: others would wait for the note
            self._unnoted = True

    @override
    def on_predict_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Say what was kept, left out and failed."""
        for name in self._due(trainer):
            if name not in self._finished and name not in self.failures:
                self._fail(name, f"Shard {name} was not read to its end; run the same command again, without limits.")
        if self._skipped:
            print(f"{self._skipped} bad samples were left out.")
        if self._finished:
            rank_zero_info(f"{self.kept} samples kept in {time.monotonic() - self._started:.0f} s.")
        if self.failures:
            first = next(iter(self.failures.values()))
            message = f"{len(self.failures)} shards could not be indexed, the others are kept. {first}"
            # Raising on one of several ranks ends the others' work; whoever opens the index finds shards missing.
            if trainer.world_size == 1 or self._unnoted:
                raise InputError(message)
            print(message)


def _rows(outputs: IndexedBatch) -> Rows:
    batch, gradients = outputs.batch, next(iter(outputs.gradients.values()))
    return Rows(
        keys=batch.keys,
        captions=[list(metadata["captions"]) for metadata in batch.metadata],
        said=caption_digests(batch),
        metadata=[{name: value for name, value in one.items() if name != "captions"} for one in batch.metadata],
        vectors={output: found.wide() for output, found in outputs.gradients.items()},
        errors=gradients.errors,
        losses=gradients.losses,
    )
