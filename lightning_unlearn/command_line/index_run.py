"""An attribution by an index: its answer for all samples, and the exact one for those that it puts first."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Trainer
from torch import Tensor

from lightning_unlearn.baselines import Consensus
from lightning_unlearn.baselines.consensus import UNLEARNED
from lightning_unlearn.baselines.method_record import queries_digest
from lightning_unlearn.command_line.command_parts import make_folder, many, say
from lightning_unlearn.command_line.index_answers import IndexAnswerer
from lightning_unlearn.data.shards import shard_id
from lightning_unlearn.datamodules import AttributionDataModule
from lightning_unlearn.errors import InputError
from lightning_unlearn.fingerprints import settings_digest
from lightning_unlearn.index import Index, IndexAnswer
from lightning_unlearn.scores.files import read_scores, run_digest, shard_path, write_shard_scores
from lightning_unlearn.scores.finished_words import outcome
from lightning_unlearn.scores.rules import Reduced
from lightning_unlearn.scores.run_record import earlier_run, record_run, scored_shards, write_run
from lightning_unlearn.scores.table import ScoreTable
from lightning_unlearn.unlearning.module import UnlearningModule

# Chosen from the benches' recall (docs/second_look.md).
SHORTLIST = 200


class IndexRun:
    """Scores of all samples by an index; of each query's first ones by unlearning, alone or with what the index says.

    Args:
        index: Where the index lies.
        method: ``Consensus``, or ``None`` for unlearning alone.
        module: Of which the index is.
        data: Names the queries, and the shards of the index.
        trainer: Fits and predicts.
        output: The folder of the run.
        shortlist: How many samples of each query are scored exactly.
        unlearn: Unlearns the queries and scores the samples that ``data.keys`` names.

    Raises:
        InputError: If the index is of another model or other shards, or the queries can't be answered by one.
    """

    def __init__(
        self,
        index: str,
        method: Consensus | None,
        module: UnlearningModule,
        data: AttributionDataModule,
        trainer: Trainer,
        output: Path,
        shortlist: int,
        unlearn: Callable[[], ScoreTable],
    ) -> None:
        if shortlist < 1:
            raise InputError(f"--shortlist must be at least 1, but is {shortlist}.")
        if data.keys is not None:
            raise InputError("An index chooses itself which samples are scored exactly; leave keys out of the data.")
        if data.targets_by is not None:
            raise InputError("An index answers for each query by itself, not for sets; leave targets_by out.")
        if method is not None and not method.rise:
            raise InputError(
                "With an index a consensus is asked of the shortlist, for what the index has not: unlearning; give it "
                "a weight above 0."
            )
        if method is not None:
            self._check_settings(method)
        self.index = Index.open(index)
        self.answerer = IndexAnswerer(module, self.index)
        self.method, self.module, self.data, self.trainer = method, module, data, trainer
        self.output, self.unlearn = output, unlearn
        self.shortlist = min(shortlist, len(self.index))

    @staticmethod
    def _check_settings(method: Consensus) -> None:
        """Refuse what a consensus with an index would not heed: its scores would be recorded as of other settings."""
        usual = Consensus()
        given = [
            f"--method.{name}"
            for name in ("das_ridge", "d_trak_ridge", "every", "influence", "das", "d_trak")
            if getattr(method, name) != getattr(usual, name)
        ]
        if given:
            raise InputError(
                f"With an index a consensus has the index's own ridges, weights and views, and no influence function; "
                f"leave {', '.join(given)} out, or leave --index out."
            )

    @staticmethod
    def _heeded(method: Consensus) -> dict[str, Any]:
        """The settings of a consensus that an index's run heeds."""
        unheeded = ("every", "influence", "influence_damping")
        return {name: value for name, value in method.settings().items() if name not in unheeded}

    def run(self, settings: Mapping[str, Any]) -> None:
        """Score, and write the table.

        Args:
            settings: Of the unlearning's scores, as JSON: what the run depends on besides the model.
        """
        started = time.monotonic()
        self.data.trainer = self.trainer
        self.data.setup("predict")
        self._check_shards()
        fingerprints = self._fingerprints(settings)
        earlier = earlier_run(self.output, fingerprints)
        if earlier and len(scored_shards(self.output, self.data.shards)) == len(self.data.shards):
            say(f"All shards are scored already, in {shard_path(self.output, '*').parent}.")
            return
        make_folder(self.output)
        self.module.loss.to(self.trainer.strategy.root_device)
        answer = self.answerer.answer(self.data.queries)
        first = sorted(set(answer.scores.topk(self.shortlist, 0).indices.flatten().tolist()))
        say(
            f"The index in {self.index.folder} answers for {many(len(self.index), 'sample')}; {len(first):,} of them "
            "are scored exactly."
        )
        self.data.keys = frozenset(self.index.keys[row] for row in first)
        exact = self.unlearn()
        if self.trainer.is_global_zero:
            self._write(answer, exact, fingerprints, earlier, started)
        self.data.keys = None

    def _check_shards(self) -> None:
        made_with = self.index.record["fingerprints"].get("on_bad_sample")
        if made_with != self.data.on_bad_sample:
            raise InputError(
                f"The index in {self.index.folder} was made with on_bad_sample {made_with}, not "
                f"{self.data.on_bad_sample}; set data.on_bad_sample to that, or make another index."
            )
        ours = {shard_id(shard.url): shard.version for shard in self.data.shards}
        theirs = {name: about["version"] for name, about in self.index.record["shards"].items()}
        differing = [name for name in {**ours, **theirs} if ours.get(name) != theirs.get(name)]
        if differing:
            raise InputError(
                f"The index in {self.index.folder} is of other shards than the data ({many(len(differing), 'shard')} "
                f"differ, e.g. {differing[0]}); run `lightning-unlearn index` again with the same data."
            )

    def _fingerprints(self, settings: Mapping[str, Any]) -> dict[str, str]:
        return {
            **self.index.record["fingerprints"],
            "index": settings_digest({"files": [file.digest for file in self.index.files]}),
            "method": settings_digest({"method": None if self.method is None else self.method.settings(), **settings}),
            "queries": queries_digest(self.data.queries),
            "unlearning": self.module.unlearning_fingerprint(self.data),
            "fisher": self.module.fisher_fingerprint(),
            "shortlist": str(self.shortlist),
            "precision": self.module.computed_in(str(self.trainer.precision)),
            "on_bad_sample": self.data.on_bad_sample,
        }

    def _exact(self, answer: IndexAnswer, exact: ScoreTable) -> tuple[list[int], Tensor]:
        """Which samples have an exact score ``(F, Q)``, on the scale of the index's scores.

        Units are those of a query's own shortlist, so that its scores don't depend on who else is asked.

        Returns:
            The samples' rows in the index, and their scores.
        """
        rows_of = {key: row for row, key in enumerate(self.index.keys)}
        rows = [rows_of[key] for key in exact.keys]
        columns = [exact.queries.index(query.key) for query in self.data.queries]
        scores = torch.from_numpy(exact.scores[:, columns]).double()
        firsts = answer.scores.topk(self.shortlist, 0).indices
        own = [torch.isin(torch.tensor(rows), first) for first in firsts.unbind(1)]  # bad samples may be missing
        if self.method is None:
            together = _in_units_of(scores, own)
        else:
            weights = {name: getattr(self.method, name) for name in (*answer.parts, UNLEARNED)}
            said = {name: part[rows] for name, part in answer.parts.items()} | {UNLEARNED: scores}
            asked = [weights[name] * _in_units_of(said[name], own) for name in said if weights[name]]
            together = _in_units_of(torch.stack(asked).sum(0), own)
        by_index, placed = answer.scores[rows].double(), together.clone()
        for column, mine in enumerate(own):
            if mine.any():
                known = by_index[mine, column]
                placed[:, column] = known.mean() + known.std(correction=0) * together[:, column]
        return rows, placed

    def _write(
        self, answer: IndexAnswer, table: ScoreTable, fingerprints: dict[str, str], earlier: Any, started: float
    ) -> None:
        rows, exact = self._exact(answer, table)
        scores = answer.scores.double().clone()
        scores[rows] = exact
        finished = torch.zeros(len(scores), dtype=torch.bool)
        finished[rows] = True
        losses = self.index.losses.clone()
        losses[rows] = torch.from_numpy(table.base_losses).double()
        race = {"index": str(self.index.folder), "top": self.shortlist, "samples": len(scores), "finished": len(rows)}
        content = record_run(self.output, self._about(fingerprints, answer, table, race), self.data, earlier)
        digest, queries, start = run_digest(fingerprints), [query.key for query in self.data.queries], 0
        for name, file in zip(self.index.record["shards"], self.index.files, strict=True):
            part = slice(start, start + file.count)
            said = {method: values[part] for method, values in answer.parts.items()}
            reduced = Reduced(losses[part], scores[part], parts=said)
            keys, version = list(self.index.keys[part]), content["shards"][name]["version"]
            write_shard_scores(
                self.output, name, keys, reduced, queries, digest, version, finished=finished[part].numpy()
            )
            start += file.count
        content["seconds"] += time.monotonic() - started
        write_run(self.output, content)
        say(outcome(content["race"]))
        read_scores(self.output)

    def _about(
        self, fingerprints: dict[str, str], answer: IndexAnswer, table: ScoreTable, race: dict[str, Any]
    ) -> dict[str, Any]:
        targets = {
            query.key: {"captions": query.captions, **table.run["targets"].get(query.key, {}), "sure": sure.record()}
            for query, sure in zip(self.data.queries, answer.sure, strict=True)
        }
        # Without a method the page would say of the index's scores that they are changes of losses.
        by_index = {"method": {"method": "index", "exactly": UNLEARNED}, "method_class": "Index"}
        exactly = (
            by_index if self.method is None else {"method": self._heeded(self.method), "method_class": "Consensus"}
        )
        return {
            "fingerprints": fingerprints,
            **exactly,
            "parts": list(answer.parts),
            "race": race,
            "network": self.module.origin,
            "parameters": self.module.parameters_selection,
            "objective": self.module.objective.settings(),
            "unlearning": table.run.get("unlearning", {}),
            "views": self.module.views.settings(),
            "precision": self.module.computed_in(str(self.trainer.precision)),
            "targets": targets,
            "world_size": self.trainer.world_size,
        }


def _in_units_of(scores: Tensor, own: Sequence[Tensor]) -> Tensor:
    """``(F, Q)`` scores less the mean of each query's own rows, by their scatter; 0 where those are alike."""
    found = torch.zeros(scores.shape, dtype=torch.float64)
    for column, mine in enumerate(own):
        values = scores[:, column].double()
        values = values / values.abs().max().clamp(min=torch.finfo(torch.float64).tiny)
        known = values[mine]
        if len(known) and (scatter := float(known.std(correction=0))) > 8 * torch.finfo(torch.float64).eps:
            found[:, column] = (values - known.mean()) / scatter
    return found
