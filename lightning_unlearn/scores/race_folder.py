"""A race on disk: the tables of its stages, whose turn it is, and the one table that comes out.

A race's folder holds a score table a stage, each with its own ``run.json``: ``first`` (all samples, few views), then
``leaders`` and ``contenders`` (some samples, all views). Who is to be finished is computed from the whole tables
before, so that batches, workers, ranks, the order of shards or a restart can't change it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from lightning_unlearn.draws.views import Views
from lightning_unlearn.errors import InputError
from lightning_unlearn.fingerprints import digest, settings_digest
from lightning_unlearn.scores.files import (
    is_scored,
    read_deviations,
    read_run,
    read_scores,
    run_digest,
    write_shard_scores,
)
from lightning_unlearn.scores.firmness import upper_ends
from lightning_unlearn.scores.racing import Flags, Numbers, Race, contenders, in_reach, leaders, thresholds
from lightning_unlearn.scores.rules import Reduced
from lightning_unlearn.scores.run_record import earlier_run, write_run
from lightning_unlearn.scores.table import ScoreTable

FIRST = "first"
ROUNDS = ("leaders", "contenders")
# What differs between the stages of one race.
OF_STAGE = ("views", "columns", "keys")


@dataclass(frozen=True)
class Turn:
    """Whose turn it is.

    Attributes:
        name: Of the round.
        keys: Of the samples to score by all views, in order.
    """

    name: str
    keys: list[str]


class RaceFolder:
    """What the tables of a race say.

    Args:
        folder: The race's folder.
        race: Its settings; ``views`` are those of the first stage.

    Raises:
        InputError: If the first stage is not finished, is not that of a race, or has too few views for the settings.
    """

    def __init__(self, folder: Path, race: Race) -> None:
        self.folder = folder
        self.race = race
        self.first = read_scores(folder / FIRST)
        self.views = views_of(self.first.run)
        if self.views.every == 1:
            raise InputError(f"{folder / FIRST} was scored by all views, so that nothing is left to race for.")
        if race.views != self.views.draws:
            raise InputError(f"{folder / FIRST} was scored on {self.views.draws} draws, not on {race.views}.")
        if race.judges and "deviations" not in self.first.run["fingerprints"]["columns"]:
            raise InputError(
                f"{folder / FIRST} keeps no deviations, from which a race tells how scores scatter; score it again "
                "with keep_deviations."
            )
        self._uppers = self._upper_ends() if race.judges else None

    def _upper_ends(self) -> Numbers:
        """``(N, Q)`` how high the scores could be."""
        flips, noises = self.first.run["flips"], self.views.noises_scored
        return np.stack(
            [
                upper_ends(
                    torch.from_numpy(read_deviations(self.folder / FIRST, query)), noises, flips, self.race.tail
                ).numpy()
                for query in self.first.queries
            ],
            1,
        )

    def turn(self) -> Turn | None:
        """The next round whose samples are not all scored.

        Returns:
            It, or ``None`` if the race is over.

        Raises:
            InputError: If a round's table is of another race.
        """
        return next((turn for turn in self._turns() if not self._is_finished(turn)), None)

    def _turns(self) -> Iterator[Turn]:
        """The rounds that have samples; one that comes after another is known once that other is finished."""
        scores = self.first.scores.astype(np.float64)
        chosen = leaders(self.race, scores)
        for name in ROUNDS:
            keys = [key for key, wanted in zip(self.first.keys, chosen, strict=True) if wanted]
            if not keys:
                return
            yield Turn(name, keys)
            if name == ROUNDS[-1] or self._uppers is None:
                return
            finished = read_scores(self.folder / name)
            least = thresholds(self.race, finished.scores.astype(np.float64))
            chosen = contenders(self.race, scores, self._uppers, chosen, least)

    def _is_finished(self, turn: Turn) -> bool:
        """Whether a round's table is whole; that it is of this race, too."""
        folder = self.folder / turn.name
        run = read_run(folder)
        if run is None:
            return False
        ours = {name: value for name, value in self.first.run["fingerprints"].items() if name not in OF_STAGE}
        theirs = run["fingerprints"]
        differing = [name for name, value in ours.items() if theirs.get(name) != value]
        if theirs.get("keys") != digest(*sorted(turn.keys)):
            differing.append("keys")
        if views_of(run) != replace(self.views, every=1):
            differing.append("views")
        if differing:
            raise _of_another_race(folder, differing)
        return all(is_scored(folder, shard, info.get("version", "")) for shard, info in run["shards"].items())

    def _finished_turns(self) -> list[Turn]:
        """All rounds of a race that is over."""
        turns = []
        for turn in self._turns():
            if not self._is_finished(turn):
                raise InputError(
                    f"{self.folder / turn.name} lacks scores of the {len(turn.keys)} samples that are to be scored by "
                    "all views; score them before the table is written."
                )
            turns.append(turn)
        for name in ROUNDS[len(turns) :]:
            if read_run(self.folder / name) is not None:  # a round that this race has not
                raise _of_another_race(self.folder / name, ["keys"])
        return turns

    def write(self, output: Path) -> ScoreTable:
        """Write the table of a finished race: all samples, those who were finished with their scores by all views.

        Bad samples that a round left out keep their scores by the few views, and the promise is not given.

        Args:
            output: The folder of the table.

        Returns:
            The table.

        Raises:
            InputError: If a round is missing or of another race, or the folder holds another run.
        """
        turns = self._finished_turns()
        tables = [read_scores(self.folder / turn.name) for turn in turns]
        rows = {key: row for row, key in enumerate(self.first.keys)}
        finished: Flags = np.zeros(len(rows), dtype=np.bool_)
        scores, losses = self.first.scores.copy(), self.first.base_losses.copy()
        errors = None if self.first.errors is None else self.first.errors.copy()
        for table in tables:
            at = [rows[key] for key in table.keys]
            finished[at] = True
            scores[at], losses[at] = table.scores, table.base_losses
            if errors is not None and table.errors is not None:
                errors[at] = table.errors
        due: Flags = np.zeros(len(rows), dtype=np.bool_)
        due[[rows[key] for turn in turns for key in turn.keys]] = True
        run = self._run(tables, scores, finished, due & ~finished)
        earlier = earlier_run(output, run["fingerprints"])
        done = all(is_scored(output, shard, info["version"]) for shard, info in run["shards"].items())
        if not earlier or not done:
            output.mkdir(parents=True, exist_ok=True)
            write_run(output, run)
            for shard, info in run["shards"].items():
                self._write_shard(output, shard, info["version"], run, (scores, losses, errors), finished)
        return read_scores(output)

    def _write_shard(
        self,
        output: Path,
        shard: str,
        version: str,
        run: dict[str, Any],
        columns: tuple[NDArray[np.float32], NDArray[np.float32], NDArray[np.float32] | None],
        finished: Flags,
    ) -> None:
        at = np.flatnonzero(np.asarray(self.first.shards) == shard)
        scores, losses, errors = (None if values is None else torch.from_numpy(values[at]) for values in columns)
        assert scores is not None
        assert losses is not None
        keys = [self.first.keys[row] for row in at]
        reduced = Reduced(losses, scores, errors)
        digested = run_digest(run["fingerprints"])
        write_shard_scores(output, shard, keys, reduced, self.first.queries, digested, version, finished[at])

    def _run(
        self, tables: list[ScoreTable], scores: NDArray[np.float32], finished: Flags, missing: Flags
    ) -> dict[str, Any]:
        """``run.json`` of the table: that of the samples who were finished, and what the race was."""
        whole = tables[0].run
        columns = self.first.run["fingerprints"]["columns"].removesuffix(", deviations")
        settings = self.race.settings()
        fingerprints = {name: value for name, value in whole["fingerprints"].items() if name not in ("keys", "columns")}
        fingerprints |= {"columns": columns, "race": settings_digest(settings)}
        return {
            **whole,
            "fingerprints": fingerprints,
            "seconds": sum(table.run["seconds"] for table in (self.first, *tables)),
            "race": settings | {"all_views": len(whole["timesteps"])} | self._outcome(scores, finished, missing),
        }

    def _outcome(self, scores: NDArray[np.float32], finished: Flags, missing: Flags) -> dict[str, Any]:
        """Who was finished or could not be, who else could be among the best, and whether the upper ends held."""
        outcome: dict[str, Any] = {
            "samples": len(finished),
            "finished": int(finished.sum()),
            "missing": int(missing.sum()),
        }
        if self._uppers is None:
            return outcome | {"left_in_reach": None, "beyond": None}
        by_all = scores[finished].astype(np.float64)
        least = thresholds(self.race, by_all)
        return outcome | {
            # Where a sample that has no score by all views would have been, its few views can't say.
            "left_in_reach": int(((in_reach(self._uppers, least) | missing) & ~finished).sum()),
            "beyond": float((by_all > self._uppers[finished]).mean()),
        }


def _of_another_race(folder: Path, differing: list[str]) -> InputError:
    return InputError(
        f"{folder} holds scores of another race (other {', '.join(differing)}); race in another folder, or remove it."
    )


def views_of(run: dict[str, Any]) -> Views:
    """The views of a run.

    Args:
        run: The content of its ``run.json``.

    Returns:
        The views.
    """
    settings = dict(run["views"])
    return Views(**{**settings, "timestep_range": tuple(settings["timestep_range"])})
