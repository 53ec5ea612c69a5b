"""Scores to disk while predict runs."""

from __future__ import annotations

import contextlib
import json
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info
from typing_extensions import override

from lightning_unlearn.callbacks.lower_precision import Agreement
from lightning_unlearn.data.files import check_folder, write_atomically
from lightning_unlearn.data.samples import Sample
from lightning_unlearn.data.shards import ShardInfo, shard_id
from lightning_unlearn.errors import InputError
from lightning_unlearn.fingerprints import digest
from lightning_unlearn.scores.files import FAILED, read_run, run_digest, shard_path, write_shard_scores
from lightning_unlearn.scores.firmness import groups_of_draws
from lightning_unlearn.scores.rules import FLIPS, RULES, Reduced, joined, reduce_losses, score
from lightning_unlearn.scores.run_record import earlier_run, record_run, scored_shards, write_run
from lightning_unlearn.unlearning.module import UnlearningModule
from lightning_unlearn.unlearning.scoring import Deviations, measured


@dataclass
class _Open:
    """A shard whose end has not come yet."""

    keys: list[str] = field(default_factory=list)
    places: dict[str, int] = field(default_factory=dict)
    reduced: list[Reduced] = field(default_factory=list)
    failed: str | None = None
    skipped: int = 0


class ScoreWriter(Callback):
    """Reduces deviations to scores and writes one Parquet file a shard, whole or not at all.

    A restart with the same weights, Fisher, queries, views and rule leaves out the shards that are done; a folder of
    another run is refused. A shard that fails (cut off, NaN losses, a full disk) is noted in ``failed/`` and the others
    go on; at the end a single process raises, several processes say so and leave it to whoever reads the table.

    Args:
        folder: Where ``run.json`` and ``scores/`` are kept.
        rule: How a sample's deviations become its score: ``difference`` or ``ratio``.
        on_bad_sample: Whether a sample with a loss that is not finite fails its shard or is left out and counted.
        flips: Which of a sample's two flips is taken where both are scored: the larger (``max``) or the ``mean``.
        keep_deviations: Whether the table also keeps what the rule gave at each flip and draw
            (:func:`~lightning_unlearn.scores.files.read_deviations`).

    Raises:
        InputError: If there is no such rule, or no such way to take flips.
    """

    def __init__(
        self,
        folder: str,
        rule: Literal["difference", "ratio"] = "ratio",
        on_bad_sample: Literal["error", "skip"] = "error",
        flips: Literal["max", "mean"] = "max",
        keep_deviations: bool = False,
    ) -> None:
        if rule not in RULES:
            raise InputError(f"There is no score rule {rule!r}; choose one of {', '.join(RULES)}.")
        if flips not in FLIPS:
            raise InputError(f"Flips can't be taken by {flips!r}; choose one of {', '.join(FLIPS)}.")
        self.folder = Path(folder)
        self.rule = rule
        self.flips = flips
        self.keep_deviations = keep_deviations
        self.on_bad_sample = on_bad_sample
        self.failures: dict[str, str] = {}
        self.scored = 0
        self.skipped = 0
        self._open: dict[str, _Open] = {}
        # Of the first samples' scores with those in float32, in lower precision.
        self.agreement = Agreement()
        self._run = ""
        self._started = 0.0
        self._finished: set[str] = set()
        self._unnoted = False
        self._shards: dict[str, ShardInfo] = {}
        self._versions: dict[str, str] = {}  # of their content, as it was before the first was read

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Tell the datamodule which shards are done, before it makes its loader."""
        if stage != "predict":
            return
        if not isinstance(pl_module, UnlearningModule):
            raise InputError(
                f"ScoreWriter writes the scores of an UnlearningModule, not of a {type(pl_module).__name__}."
            )
        # Scores go to disk; keeping all losses in memory as well would let it grow with the data.
        trainer.predict_loop.return_predictions = False
        datamodule = getattr(trainer, "datamodule", None)
        skip = getattr(datamodule, "skip_shards", None)
        self._shards = {shard_id(shard.url): shard for shard in getattr(datamodule, "shards", [])}
        self._versions = {name: shard.version for name, shard in self._shards.items()}
        if skip is not None:
            skip(scored_shards(self.folder, list(self._shards.values())))

    @override
    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Refuse to mix runs, and record this one."""
        assert isinstance(pl_module, UnlearningModule)
        pl_module.require_deltas()  # callbacks come before the module, and there is nothing to record without them
        self._open, self.failures, self.scored, self.skipped, self.agreement = {}, {}, 0, 0, Agreement()
        self._finished, self._unnoted = set(), False
        self._started = time.monotonic()
        fingerprints = {
            **pl_module.fingerprints(),
            "rule": self.rule,
            "flips": self.flips,
            "columns": self._columns(pl_module),
            "precision": pl_module.computed_in(str(trainer.precision)),
        }
        keys = getattr(getattr(trainer, "datamodule", None), "keys", None)
        if keys is not None:  # a shard of another selection is another table
            fingerprints["keys"] = digest(*sorted(keys))
        self._run = run_digest(fingerprints)
        check_folder(self.folder, "give ScoreWriter another folder")
        earlier = earlier_run(self.folder, fingerprints)
        # What an earlier run noted of this rank's shards.
        for name in self._to_score(trainer):
            (self.folder / FAILED / f"{name}.json").unlink(missing_ok=True)
        if trainer.is_global_zero:
            self._record(trainer, pl_module, fingerprints, earlier)
        # Nobody must take another rank's old notes for new ones.
        trainer.strategy.barrier("scores")

    def _columns(self, pl_module: UnlearningModule) -> str:
        """What a score's columns are; in one table all files have the same."""
        errors = ["errors"] * bool(groups_of_draws(pl_module.views.draws, pl_module.views.noises_scored))
        return ", ".join(["scores", *errors, *(["deviations"] if self.keep_deviations else [])])

    def _to_score(self, trainer: Trainer) -> list[str]:
        shards = getattr(getattr(trainer, "datamodule", None), "shards_to_score", list)
        return [shard_id(shard.url) for shard in shards()]

    def _record(
        self, trainer: Trainer, pl_module: UnlearningModule, fingerprints: dict[str, str], earlier: dict[str, Any]
    ) -> None:
        datamodule, objective = getattr(trainer, "datamodule", None), pl_module.objective
        queries = {query.key: query for query in getattr(datamodule, "queries", [])}
        about = {
            "fingerprints": fingerprints,
            "rule": self.rule,
            "flips": self.flips,
            "views": pl_module.views.settings(),
            # Of the draws of each flip, in the order in which deviations are kept.
            "timesteps": pl_module.views.draw_timesteps(objective.num_timesteps, objective.density()).tolist(),
            "network": pl_module.origin,
            "unlearning": pl_module.settings,
            "precision": pl_module.computed_in(str(trainer.precision)),
            "targets": {
                name: _about_target(pl_module.members.get(name), queries.get(name)) | pl_module.results.get(name, {})
                for name in pl_module.targets
            },
            "world_size": trainer.world_size,
        }
        content = record_run(self.folder, about, datamodule, earlier)
        done = len(scored_shards(self.folder, list(self._shards.values())))
        if done:
            rank_zero_info(f"{done} of {len(content['shards'])} shards are scored already.")

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
        """Reduce a batch, and write its shard if it was the last one."""
        assert isinstance(pl_module, UnlearningModule)
        assert isinstance(outputs, Deviations)
        if outputs.batch.shard in self.failures:
            return  # what is left of a shard that failed
        shard = self._open.setdefault(outputs.batch.shard, _Open())
        shard.failed = shard.failed or outputs.batch.error
        if shard.failed is None:
            self._reduce(shard, outputs, pl_module.views.noises_scored)
        if outputs.batch.end_of_shard is not None and shard.failed is None:
            try:
                self._finish(shard, outputs, pl_module.targets)
            except InputError as error:
                shard.failed = str(error)
        if outputs.batch.end_of_shard is not None or outputs.batch.error is not None:
            del self._open[outputs.batch.shard]
            if shard.failed is not None:
                self._fail(outputs.batch.shard, shard.failed)

    def _reduce(self, shard: _Open, outputs: Deviations, noises: int) -> None:
        shares = outputs.batch.caption_weights
        found = reduce_losses(
            outputs.base, outputs.unlearned, self.rule, self.flips, noises, shares, keep_deviations=self.keep_deviations
        )
        if outputs.exact is not None:
            exact = score(self.rule, outputs.exact[0], outputs.exact[1:], self.flips, shares)
            self.agreement.add(found.scores, exact, outputs.computed_in)
        keys = outputs.batch.keys
        shard.places |= zip(keys, outputs.batch.places, strict=False)
        losses = torch.cat([outputs.base[None], outputs.unlearned])  # (1 + Q, B, flips, captions, draws)
        good = measured(losses, outputs.batch.caption_counts) & found.scores.isfinite().all(-1)
        if not good.all():
            bad = [key for key, fine in zip(keys, good.tolist(), strict=True) if not fine]
            if self.on_bad_sample == "error":
                shard.failed = (
                    f"The loss of sample {bad[0]!r} in shard {outputs.batch.shard} is not finite; check the sample and "
                    "the model, or set on_bad_sample to skip."
                )
                return
            shard.skipped += len(bad)
            keys, found = [key for key in keys if key not in bad], found.rows(good)
        shard.keys.extend(keys)
        shard.reduced.append(found)

    def _finish(self, shard: _Open, outputs: Deviations, queries: list[str]) -> None:
        name, count = outputs.batch.shard, outputs.batch.end_of_shard
        if len(shard.keys) + shard.skipped != count:
            raise InputError(
                f"Shard {name} has {count} samples, but {len(shard.keys) + shard.skipped} arrived; run the same "
                "command again."
            )
        version = self._versions.get(name, "")
        # Batches of one form each come in another order than the shard's.
        order = sorted(range(len(shard.keys)), key=lambda row: shard.places.get(shard.keys[row], row))
        keys, found = [shard.keys[row] for row in order], joined(shard.reduced).rows(torch.tensor(order).long())
        write_shard_scores(self.folder, name, keys, found, queries, self._run, version)
        self._finished.add(name)
        self.scored += len(shard.keys)
        self.skipped += shard.skipped + outputs.batch.skipped

    def _fail(self, shard: str, error: str) -> None:
        self.failures[shard] = error
        try:
            (self.folder / FAILED).mkdir(exist_ok=True)
            write_atomically(self.folder / FAILED / f"{shard}.json", json.dumps({"error": error}).encode())
        except OSError:  # a full disk, or a folder that is gone
            # Where the disk is full there is no room for a note either, and others would wait for it.
            self._unnoted = True

    @override
    def on_predict_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Say what was done, left out and failed."""
        for name in self._to_score(trainer):
            if name not in self._finished and name not in self.failures:
                self._fail(name, f"Shard {name} was not read to its end; run the same command again, without limits.")
        if trainer.is_global_zero:
            run = read_run(self.folder)
            if run is None:
                raise InputError(
                    f"The folder {self.folder} was removed while the run went on; run the same command again."
                )
            run["seconds"] += time.monotonic() - self._started
            if (found := self.agreement.value) is not None:
                run["rank_correlation_with_float32"] = found
                rank_zero_info(
                    f"Scores in {run['precision']} rank the first {self.agreement.samples} samples as float32 does "
                    f"with a correlation of {found:.3f}."
                )
            with contextlib.suppress(OSError):  # a full disk: the earlier run.json is as good but for the seconds
                write_run(self.folder, run)
        if self.skipped:
            print(f"{self.skipped} bad samples were left out.")
        rank_zero_info(f"{self.scored} samples scored into {shard_path(self.folder, '*').parent}.")
        if self.failures:
            first = next(iter(self.failures.values()))
            message = f"{len(self.failures)} shards could not be scored, the others are kept. {first}"
            # Raising on one of several ranks ends the others' work; whoever reads the table finds the notes.
            if trainer.world_size == 1 or self._unnoted:
                raise InputError(message)
            print(message)


def _about_target(members: list[str] | None, query: Sample | None) -> dict[str, Any]:
    """What is unlearned: which queries, or a query's captions and how much of it its region is."""
    if members is not None:
        return {"members": members}
    about: dict[str, Any] = {"captions": query.captions if query is not None else []}
    if query is not None and query.mask is not None:
        about["region"] = float(query.mask.mean())
    return about
