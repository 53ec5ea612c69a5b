"""Racing on the command line: within ``attribute``, and between several ``predict``s of one's own."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from lightning.pytorch import Trainer

from lightning_unlearn.callbacks import ScoreWriter
from lightning_unlearn.command_line.command_parts import many, say
from lightning_unlearn.command_line.plain_parser import plain_parser
from lightning_unlearn.command_line.scoring_words import Announcer, wait_for_scores
from lightning_unlearn.data.files import write_atomically
from lightning_unlearn.datamodules import AttributionDataModule
from lightning_unlearn.draws.views import Views
from lightning_unlearn.errors import InputError
from lightning_unlearn.fingerprints import settings_digest
from lightning_unlearn.scores.files import read_run, read_scores
from lightning_unlearn.scores.finished_words import outcome
from lightning_unlearn.scores.race_folder import FIRST, ROUNDS, RaceFolder, Turn, views_of
from lightning_unlearn.scores.racing import Race
from lightning_unlearn.unlearning.module import UnlearningModule

# Where a race's stages lie in the folder of its table.
RACE = "race"


def check_race(race: Race, module: UnlearningModule, data: AttributionDataModule, output: Path) -> None:
    """Refuse a race that can't be run, before long work.

    Args:
        race: The race.
        module: With all views.
        data: Of all samples.
        output: Folder of the run.

    Raises:
        InputError: If the views can't be divided so, the samples are chosen already, or the folder holds another run.
    """
    few_views(race, module.views)
    if data.keys is not None:
        raise InputError("A race chooses itself which samples are scored by all views; leave keys out of the data.")
    run = read_run(output)
    if run is not None and run["fingerprints"].get("race") != settings_digest(race.settings()):
        raise InputError(f"{output} holds scores of another run (other race); choose another --output, or remove it.")


def few_views(race: Race, views: Views) -> Views:
    """The views of a race's first stage.

    Args:
        race: The race.
        views: All views.

    Returns:
        Some of these.

    Raises:
        InputError: If there are none such.
    """
    if views.every != 1 or views.draws % race.views or race.views == views.draws:
        raise InputError(
            f"A race on {race.views} of {views.draws} views can't be run; choose race.views that divide them, or "
            "another number of views.timesteps, and leave views.every out."
        )
    return replace(views, every=views.draws // race.views)


class RaceRun:
    """A race with one Trainer, on any number of processes.

    Args:
        race: The race.
        module: After ``fit``, or with its checkpoint.
        data: The samples.
        trainer: With a ScoreWriter and an Announcer.
        output: Folder of the run's table; the stages lie in ``race/`` in it.
        deltas: The checkpoint.
    """

    def __init__(
        self,
        race: Race,
        module: UnlearningModule,
        data: AttributionDataModule,
        trainer: Trainer,
        output: Path,
        deltas: Path,
    ) -> None:
        self.race = race
        self.module = module
        self.data = data
        self.trainer = trainer
        self.output = output
        self.deltas = deltas
        self.folder = output / RACE
        self.views = module.views

    def run(self) -> None:
        """Score stage after stage, each chosen from the whole tables before it, and write the one table."""
        if not self.race.judges:
            say(
                f"{self.race.views} views don't tell how far scores scatter: the {self.race.share:.0%} of the samples "
                "that lead are finished, and nothing is promised."
            )
        self._score(self.folder / FIRST, few_views(self.race, self.views), None)
        found = RaceFolder(self.folder, self.race)
        for _ in ROUNDS:
            turn = found.turn()
            if turn is None:
                break
            self._score(self.folder / turn.name, self.views, turn)
            read_scores(self.folder / turn.name)  # says why a shard failed, on each process
        if self.trainer.is_global_zero:
            say(outcome(found.write(self.output).run["race"]))

    def _score(self, folder: Path, views: Views, turn: Turn | None) -> None:
        self.module.views = views
        self.data.keys = None if turn is None else frozenset(turn.keys)
        few = turn is None
        name = "first, all samples" if turn is None else turn.name
        say(f"Race, {name}: {many(views.draws, 'draw')} of {self.views.draws}.")
        callbacks = self.trainer.callbacks  # type: ignore[attr-defined]
        for place, callback in enumerate(callbacks):
            if isinstance(callback, ScoreWriter):
                callbacks[place] = ScoreWriter(
                    str(folder), callback.rule, callback.on_bad_sample, callback.flips, few and self.race.judges
                )
            elif isinstance(callback, Announcer):
                callbacks[place] = Announcer(folder)
        self.trainer.predict(self.module, self.data, return_predictions=False, ckpt_path=str(self.deltas))
        wait_for_scores(folder)  # each process looks at the whole table


def race(arguments: list[str]) -> None:
    """Do what comes next in a race whose stages are scored by ``predict``.

    Args:
        arguments: Options.

    Raises:
        InputError: If the first stage is missing.
    """
    parser = plain_parser("race", "Choose the samples that a race goes on with, or write its table.")
    parser.add_argument(
        "--output", type=str, default="attribution", help="Folder of the run; its race/ has the stages."
    )
    parser.add_argument("--top", type=int, default=10, help="How many of the best of each query are to be found.")
    parser.add_argument(
        "--confidence", type=float, default=0.95, help="With what probability all of a query's best are found."
    )
    parser.add_argument("--share", type=float | None, default=None, help="Cap on the share of the finished samples.")
    config = parser.parse_args(arguments)
    output = Path(config.output)
    folder = output / RACE
    run = read_run(folder / FIRST)
    if run is None:
        raise InputError(
            f"There are no scores in {folder / FIRST}; score all samples by few views there first, with predict and "
            "views.every."
        )
    found = RaceFolder(folder, Race(config.top, views_of(run).draws, config.confidence, config.share))
    turn = found.turn()
    if turn is None:
        say(outcome(found.write(output).run["race"]))
        return
    path = folder / f"{turn.name}.txt"
    write_atomically(path, "".join(f"{key}\n" for key in turn.keys).encode())
    say(
        f"Score {many(len(turn.keys), 'sample')} of {path} by all views: predict with --data.init_args.keys {path} and "
        f"a ScoreWriter into {folder / turn.name}; then run this again."
    )
