"""One run of a method other than unlearning, into the same table as that of unlearning."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Trainer
from torch import Tensor
from tqdm import tqdm

from lightning_unlearn.baselines import Baseline, Subject
from lightning_unlearn.baselines.gradients import check_query_views
from lightning_unlearn.command_line.command_parts import make_folder, say
from lightning_unlearn.data.samples import Sample, SampleBatch, named_arrays
from lightning_unlearn.data.shards import shard_id
from lightning_unlearn.datamodules import AttributionDataModule
from lightning_unlearn.errors import InputError
from lightning_unlearn.fingerprints import digest, settings_digest, tensors_digest
from lightning_unlearn.scores.agreement import agreements, caption_digests
from lightning_unlearn.scores.files import run_digest, shard_path, write_shard_scores
from lightning_unlearn.scores.rules import Reduced, mean_losses
from lightning_unlearn.scores.run_record import earlier_run, record_run, scored_shards, write_run
from lightning_unlearn.scores.table import ScoreTable
from lightning_unlearn.unlearning.module import UnlearningModule
from lightning_unlearn.unlearning.scoring import measure_losses, measured
from lightning_unlearn.weights.deltas import DeltaStore
from lightning_unlearn.weights.precision import ExactFloat32


class MethodRun:
    """One run of a method over all shards; its scores are written when all of them are known.

    Methods compare samples with one another, so a shard that can't be read ends the run, and a run that was cut short
    starts anew; files that it wrote are kept, as they are of the same scores.

    Args:
        method: The method.
        module: Names the network, its objective, the chosen weights, the views and the Fisher.
        data: Names the training shards and the queries.
        trainer: Names the device.
        folder: Where ``run.json`` and ``scores/`` are kept.
        unlearn: What unlearns the queries and scores all samples, for a method that asks unlearning, too.

    Raises:
        InputError: If the Trainer has several processes or another precision than the network's.
    """

    def __init__(
        self,
        method: Baseline,
        module: UnlearningModule,
        data: AttributionDataModule,
        trainer: Trainer,
        folder: Path,
        unlearn: Callable[[], ScoreTable] | None = None,
    ) -> None:
        # In messages it is called as a person named it.
        self.called = type(method).__name__
        if trainer.world_size > 1:
            raise InputError(
                f"{self.called} compares all samples in one process, but the Trainer has {trainer.world_size}; set "
                "trainer.devices to 1."
            )
        if trainer.precision != "32-true":
            raise InputError(
                f"{self.called} is computed in precision 32-true, not in {trainer.precision}; leave it out."
            )
        self.method = method
        self.module = module
        self.data = data
        self.folder = folder
        self.device: torch.device = trainer.strategy.root_device
        self.silent = trainer.progress_bar_callback is None
        self.skipped = 0
        # Of all samples, in the order in which they come: workers take turns, and so do their shards.
        self._keys: list[str] = []
        self._base_losses: list[Tensor] = []
        # Each shard's samples, by their places in that order.
        self._rows: dict[str, list[int]] = {}
        self._places: dict[str, int] = {}  # of each key in its shard, whose order batches of one form each don't keep
        self._passes = 0
        self._unlearn = unlearn
        # What tells captions apart, of the samples that have one.
        self._captions: list[str] = []

    def run(self) -> None:
        """Score all samples and write the table.

        Raises:
            InputError: If the folder is another run's, a shard can't be read, queries are missing, form sets, have
                masks or lack flips, or scores are not finite.
        """
        started = time.monotonic()
        self.data.setup("predict")
        self._check_queries()
        versions = {shard_id(shard.url): shard.version for shard in self.data.shards}
        fingerprints = self._fingerprints(versions)
        earlier = earlier_run(self.folder, fingerprints)
        if earlier and len(scored_shards(self.folder, self.data.shards)) == len(self.data.shards):
            say(f"All shards are scored already, in {shard_path(self.folder, '*').parent}.")
            return
        make_folder(self.folder)
        unlearned = None if self._unlearn is None else self._unlearn()
        content = record_run(self.folder, self._about(fingerprints), self.data, earlier)
        self.module.loss.to(self.device)
        with ExactFloat32():
            self._measure()
        say(f"Scoring by {self.called} on {self.device} …")
        keys = self._keys
        subject = self._subject(unlearned)
        scores = self.method.scores(subject)
        if scores.shape != (len(keys), len(self._columns())) or not scores.isfinite().all():
            rows = (~scores.isfinite()).nonzero()[:1, 0].tolist()
            what = f"not finite for {keys[rows[0]]!r}" if rows else f"of shape {tuple(scores.shape)}"
            raise InputError(f"The scores of {self.called} are {what}; check its settings, the samples and the model.")
        parts = self.method.parts(subject)
        if parts:
            content["parts"] = list(parts)
            for query, found in zip(self.data.queries, agreements(parts, scores, self._captions), strict=True):
                content["targets"][query.key]["sure"] = found.record()
        self._write(scores, parts, run_digest(fingerprints), content["shards"])
        content["seconds"] += time.monotonic() - started
        write_run(self.folder, content)
        if self.skipped:
            say(f"{self.skipped} bad samples were left out.")
        say(f"{len(keys)} samples scored into {shard_path(self.folder, '*').parent}.")

    def _check_queries(self) -> None:
        """Refuse sets and regions, of which methods know nothing, and queries without the views that they need."""
        if self.method.columns is not None:
            return
        if not self.data.queries:
            raise InputError(f"{self.method.name} scores samples for queries; name some as `queries`.")
        if self.data.targets_by is not None:
            raise InputError(
                f"{self.called} scores each query by itself, not sets of them; leave targets_by out, or take "
                "--method unlearning."
            )
        masked = [query.key for query in self.data.queries if query.mask is not None]
        if masked:
            raise InputError(
                f"{self.called} looks at whole pictures, but the query {masked[0]!r} has a mask; leave the mask "
                "out, or take --method unlearning."
            )
        if self.method.needs_query_views:
            check_query_views(self.data.queries, self.module.views)

    def _subject(self, unlearned: ScoreTable | None) -> Subject:
        fisher = self.module.checked_fisher() if self.method.needs_fisher else None
        return Subject(
            self.module.loss,
            self.module.layers,
            self.module.views,
            self.data.queries,
            self._batches,
            fisher,
            unlearned=None if unlearned is None else self._in_order(unlearned),
        )

    def _in_order(self, table: ScoreTable) -> Tensor:
        """A table's scores ``(N, Q)`` in the order in which samples come and that of the queries."""
        rows = {key: row for row, key in enumerate(table.keys)}
        lacking = [key for key in self._keys if key not in rows]
        if lacking:
            raise InputError(
                f"Unlearning has no score of {lacking[0]!r}, since its shard changed while it was scored; run the same "
                "command again."
            )
        columns = [table.queries.index(query.key) for query in self.data.queries]
        return torch.from_numpy(table.scores[[rows[key] for key in self._keys]][:, columns]).double()

    def _fingerprints(self, versions: dict[str, str]) -> dict[str, str]:
        settings: dict[str, dict[str, Any]] = {
            "objective": self.module.objective.settings(),
            "parameters": {"parameters": self.module.parameters_selection},
            "views": self.module.views.settings(),
            "method": self.method.settings(),
            # Every score may depend on every sample.
            "samples": {"shards": versions, "on_bad_sample": self.data.on_bad_sample},
        }
        prints = {name: settings_digest(values) for name, values in settings.items()}
        prints["weights"] = self.module.weights_fingerprint()
        if self.method.columns is None:
            prints["queries"] = queries_digest(self.data.queries)
        if self._unlearn is not None:
            prints["unlearning"] = self.module.unlearning_fingerprint(self.data)
        if self.method.needs_fisher or self._unlearn is not None:
            prints["fisher"] = self.module.fisher_fingerprint()
        return prints

    def _about(self, fingerprints: dict[str, str]) -> dict[str, Any]:
        return {
            "fingerprints": fingerprints,
            "method": self.method.settings(),
            "method_class": self.called,
            "network": self.module.origin,
            "parameters": self.module.parameters_selection,
            "objective": self.module.objective.settings(),
            "views": self.module.views.settings(),
            "precision": "32-true",
            "targets": self._columns(),
            "world_size": 1,
        }

    def _columns(self) -> dict[str, dict[str, Any]]:
        """The table's columns, with what ``run.json`` says of each."""
        if self.method.columns is not None:
            return {name: {} for name in self.method.columns}
        return {query.key: {"captions": query.captions} for query in self.data.queries}

    def _pass(self, name: str) -> Iterator[SampleBatch]:
        """The samples of all shards, with their ends."""
        counts = [shard.samples for shard in self.data.shards]
        total = None if None in counts else sum(count for count in counts if count is not None)
        with tqdm(desc=name, total=total, unit=" samples", disable=self.silent, file=sys.stdout) as bar:
            for batch in self.data.predict_dataloader():
                if batch.error is not None:
                    raise InputError(f"Nothing was scored, since a method needs all samples. {batch.error}")
                yield batch
                bar.update(len(batch))

    def _batches(self) -> Iterator[SampleBatch]:
        """A pass for the method, which must find the samples that the first pass found."""
        self._passes += 1
        seen = 0
        for batch in self._pass(f"Pass {self._passes}"):
            if batch.keys != self._keys[seen : seen + len(batch)]:
                raise InputError(f"Shard {batch.shard} changed while it was scored; run the same command again.")
            seen += len(batch)
            if len(batch):
                yield batch

    @torch.no_grad()
    def _measure(self) -> None:
        """Base losses and keys of all samples."""
        module = self.module
        nothing = DeltaStore({}, [])  # losses of θ₀ alone
        where: dict[str, str] = {}  # the shard of each key
        for batch in self._pass("Reading and measuring losses"):
            self._rows.setdefault(batch.shard, []).extend(range(len(self._keys), len(self._keys) + len(batch)))
            self._places |= zip(batch.keys, batch.places, strict=False)
            for key in batch.keys:
                if where.setdefault(key, batch.shard) != batch.shard:
                    raise InputError(
                        f"The key {key!r} stands in {where[key]} and in {batch.shard}; keys must be unique over all "
                        "shards."
                    )
            if len(batch):
                losses = measure_losses(module.loss, module.layers, nothing, module.views, batch, self.device)
                good = measured(losses, batch.caption_counts)
                if not good.all():
                    bad = batch.keys[int((~good).nonzero()[0])]
                    raise InputError(
                        f"The loss of sample {bad!r} in shard {batch.shard} is not finite; check the sample and the "
                        "model."
                    )
                self._keys.extend(batch.keys)
                self._captions.extend(caption_digests(batch))
                self._base_losses.append(mean_losses(losses[0], batch.caption_weights))
            self.skipped += batch.skipped
        if not where:
            raise InputError("There are no training samples; name shards that hold some.")

    def _write(self, scores: Tensor, parts: Mapping[str, Tensor], run: str, shards: dict[str, dict[str, Any]]) -> None:
        queries = list(self._columns())
        losses = torch.cat(self._base_losses)
        for name, rows in self._rows.items():
            rows = sorted(rows, key=lambda row: self._places[self._keys[row]])
            keys, version = [self._keys[row] for row in rows], shards[name]["version"]
            said = {method: values[rows] for method, values in parts.items()}
            reduced = Reduced(losses[rows], scores[rows], parts=said)
            write_shard_scores(self.folder, name, keys, reduced, queries, run, version)


def queries_digest(queries: list[Sample]) -> str:
    """Digest of what queries are: their keys, their json and what the network sees of them.

    Args:
        queries: With unique keys.

    Returns:
        32 hexadecimal characters.
    """
    about = [[query.key, query.metadata] for query in queries]
    return digest(settings_digest({"queries": about}), tensors_digest(named_arrays(queries)))
