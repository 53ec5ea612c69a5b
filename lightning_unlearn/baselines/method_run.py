"""One run of a method other than unlearning, into the same table as that of unlearning."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Trainer
from torch import Tensor
from tqdm import tqdm

from lightning_unlearn.baselines.appearances import Appearances
from lightning_unlearn.baselines.base import Baseline, Subject
from lightning_unlearn.baselines.consensus import UNLEARNED
from lightning_unlearn.baselines.gradients import check_query_views
from lightning_unlearn.baselines.method_record import about_run, columns_of, fingerprints_of
from lightning_unlearn.baselines.scored_data import ScoredData
from lightning_unlearn.baselines.sketch import Sketch, sketch_numbers
from lightning_unlearn.data.files import check_folder
from lightning_unlearn.data.samples import SampleBatch
from lightning_unlearn.errors import InputError
from lightning_unlearn.scores.agreement import agreements
from lightning_unlearn.scores.files import read_deviations, read_scores, run_digest, shard_path, write_shard_scores
from lightning_unlearn.scores.rules import Reduced, mean_losses
from lightning_unlearn.scores.run_record import earlier_run, record_run, scored_shards, write_run
from lightning_unlearn.scores.table import ScoreTable
from lightning_unlearn.unlearning.module import UnlearningModule
from lightning_unlearn.unlearning.scoring import measure_losses, measured
from lightning_unlearn.weights.deltas import DeltaStore
from lightning_unlearn.weights.parameters import layer_parameters
from lightning_unlearn.weights.precision import ExactFloat32


def _nothing(message: str) -> None:
    """Say nothing."""


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
        say: Told what is done, a line each; by default nobody is.

    Raises:
        InputError: If the Trainer has several processes or another precision than the network's.
    """

    def __init__(
        self,
        method: Baseline,
        module: UnlearningModule,
        data: ScoredData,
        trainer: Trainer,
        folder: Path,
        unlearn: Callable[[], ScoreTable] | None = None,
        say: Callable[[str], None] = _nothing,
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
        self._unlearned: dict[str, float] | None = None  # the base losses of what it has scored, by key
        # For methods that say how sure they are.
        self._appearances: Appearances | None = None
        self._say = say

    def run(self) -> None:
        """Score all samples and write the table.

        Raises:
            InputError: If the folder is another run's, a shard can't be read, queries are missing, form sets, have
                masks or lack flips, or scores are not finite.
        """
        started = time.monotonic()
        self.data.setup("predict")
        self._check_queries()
        fingerprints = fingerprints_of(self.method, self.module, self.data)
        earlier = earlier_run(self.folder, fingerprints)
        if earlier and len(scored_shards(self.folder, self.data.shards)) == len(self.data.shards):
            self._say(f"All shards are scored already, in {shard_path(self.folder, '*').parent}.")
            return
        check_folder(self.folder, "choose another --output")
        unlearned = None if self._unlearn is None else self._unlearn()
        if unlearned is not None:
            self._unlearned = dict(zip(unlearned.keys, unlearned.base_losses.tolist(), strict=True))
        about = about_run(self.method, self.module, self.data, fingerprints)
        if unlearned is not None:
            about["unlearning"] = unlearned.run["unlearning"]
            for key, result in about["targets"].items():
                result |= unlearned.run["targets"][key]
        content = record_run(self.folder, about, self.data, earlier)
        self.module.loss.to(self.device)
        if type(self.method).parts is not Baseline.parts:
            self._appearances = Appearances(Subject(self.module.loss, {}, self.module.views, self.data.queries, list))
        with ExactFloat32():
            self._measure()
        self._say(f"Scoring by {self.called} on {self.device} …")
        keys = self._keys
        subject = self._subject(unlearned)
        scores = self.method.scores(subject)
        if scores.shape != (len(keys), len(columns_of(self.method, self.data))) or not scores.isfinite().all():
            rows = (~scores.isfinite()).nonzero()[:1, 0].tolist()
            what = f"not finite for {keys[rows[0]]!r}" if rows else f"of shape {tuple(scores.shape)}"
            raise InputError(f"The scores of {self.called} are {what}; check its settings, the samples and the model.")
        if subject.projection is not None:
            content["sketch"] = sum(subject.projection.sizes.values())
        parts = self.method.parts(subject)
        if parts and self._appearances is not None:
            content["parts"] = list(parts)
            known = self._appearances
            halves = None if unlearned is None else self._halves()
            sure = agreements(parts, scores, known.captions, known.similarities(), halves)
            for query, found in zip(self.data.queries, sure, strict=True):
                content["targets"][query.key]["sure"] = found.record()
        self._write(scores, parts, run_digest(fingerprints), content["shards"])
        content["seconds"] += time.monotonic() - started
        write_run(self.folder, content)
        if self.skipped:
            self._say(f"{self.skipped} bad samples were left out.")
        self._say(f"{len(keys)} samples scored into {shard_path(self.folder, '*').parent}.")

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
        weights = sum(weight.numel() for weight in layer_parameters(self.module.layers).values())
        kinds = self.method.gradient_kinds
        numbers = sketch_numbers(len(self._keys), weights, kinds) if kinds else None
        return Subject(
            self.module.loss,
            self.module.layers,
            self.module.views,
            self.data.queries,
            self._batches,
            fisher,
            unlearned=None if unlearned is None else self._in_order(unlearned),
            projection=None if numbers is None else Sketch(numbers),
        )

    def _halves(self) -> Tensor | None:
        """``(2, N, Q)`` what unlearning says by each half of the draws; ``None`` where there is but one."""
        folder = self.folder / UNLEARNED
        table = read_scores(folder)
        order = self._places_in(table.keys)
        columns = [torch.from_numpy(read_deviations(folder, query.key))[order] for query in self.data.queries]
        if columns[0].shape[2] < 2:
            return None
        by_draw = torch.stack(columns, 1).double().mean(2)  # (N, Q, draws)
        return torch.stack([by_draw[..., first::2].mean(2) for first in range(2)])

    def _places_in(self, keys: Sequence[str]) -> list[int]:
        """Where the samples, in the order in which they come, stand in a table."""
        rows = {key: row for row, key in enumerate(keys)}
        return [rows[key] for key in self._keys]

    def _in_order(self, table: ScoreTable) -> Tensor:
        """A table's scores ``(N, Q)`` in the order in which samples come and that of the queries."""
        columns = [table.queries.index(query.key) for query in self.data.queries]
        return torch.from_numpy(table.scores[self._places_in(table.keys)][:, columns]).double()

    def _pass(self, name: str) -> Iterator[SampleBatch]:
        """The samples of all shards, with their ends."""
        counts = [shard.samples for shard in self.data.shards]
        total = None if None in counts else sum(count for count in counts if count is not None)
        with tqdm(desc=name, total=total, unit=" samples", disable=self.silent, file=sys.stdout) as bar:
            for batch in self.data.predict_dataloader():
                if batch.error is not None:
                    raise InputError(f"Nothing was scored, since a method needs all samples. {batch.error}")
                bar.update(len(batch))
                # Bad samples that unlearning left out are left out of the rest, too.
                kept = batch if self._unlearned is None else batch.only(self._unlearned)
                yield replace(kept, skipped=batch.skipped + len(batch) - len(kept))

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
        """Keys and base losses of all samples; the losses are known where unlearning has measured them."""
        known = self._unlearned
        where: dict[str, str] = {}  # the shard of each key
        for batch in self._pass("Reading and measuring losses" if known is None else "Reading"):
            self._rows.setdefault(batch.shard, []).extend(range(len(self._keys), len(self._keys) + len(batch)))
            self._places |= zip(batch.keys, batch.places, strict=False)
            for key in batch.keys:
                if where.setdefault(key, batch.shard) != batch.shard:
                    raise InputError(
                        f"The key {key!r} stands in {where[key]} and in {batch.shard}; keys must be unique over all "
                        "shards."
                    )
            if len(batch):
                self._keys.extend(batch.keys)
                if self._appearances is not None:
                    self._appearances.add(batch)
                self._base_losses.append(
                    self._losses(batch) if known is None else torch.tensor([known[key] for key in batch.keys])
                )
            self.skipped += batch.skipped
        if not where:
            raise InputError("There are no training samples; name shards that hold some.")

    def _losses(self, batch: SampleBatch) -> Tensor:
        """``(B,)`` under θ₀."""
        module, nothing = self.module, DeltaStore({}, [])
        losses = measure_losses(module.loss, nothing, module.views, batch, self.device)
        good = measured(losses, batch.caption_counts)
        if not good.all():
            bad = batch.keys[int((~good).nonzero()[0])]
            raise InputError(
                f"The loss of sample {bad!r} in shard {batch.shard} is not finite; check the sample and the model."
            )
        return mean_losses(losses[0], batch.caption_weights)

    def _write(self, scores: Tensor, parts: Mapping[str, Tensor], run: str, shards: dict[str, dict[str, Any]]) -> None:
        queries = list(columns_of(self.method, self.data))
        losses = torch.cat(self._base_losses)
        for name, rows in self._rows.items():
            rows = sorted(rows, key=lambda row: self._places[self._keys[row]])
            keys, version = [self._keys[row] for row in rows], shards[name]["version"]
            said = {method: values[rows] for method, values in parts.items()}
            reduced = Reduced(losses[rows], scores[rows], parts=said)
            write_shard_scores(self.folder, name, keys, reduced, queries, run, version)
