"""The commands that run a Trainer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from lightning.pytorch import Trainer
from lightning.pytorch.cli import LightningArgumentParser

from lightning_unlearn.callbacks import ScoreWriter
from lightning_unlearn.command_line.command_parts import BARE, make_folder, many, say
from lightning_unlearn.command_line.quiet import quiet
from lightning_unlearn.command_line.race_command import RaceRun, check_race
from lightning_unlearn.command_line.scoring_words import Announcer, targets_in_words, wait_for_scores
from lightning_unlearn.command_line.trainer_cli import TrainerCLI, one_sentence
from lightning_unlearn.data.samples import Sample
from lightning_unlearn.data.shards import shard_id
from lightning_unlearn.datamodules import AttributionDataModule
from lightning_unlearn.datamodules.reading import read_samples
from lightning_unlearn.datamodules.sources import list_shards
from lightning_unlearn.diffusion.loading import read_checkpoint
from lightning_unlearn.errors import InputError, some_of
from lightning_unlearn.scores.files import read_scores
from lightning_unlearn.scores.racing import Race
from lightning_unlearn.scores.rules import RULES
from lightning_unlearn.scores.table import ScoreTable
from lightning_unlearn.unlearning.module import UnlearningModule
from lightning_unlearn.weights.deltas import read_targets


def fit(arguments: list[str]) -> None:
    """Lightning's own ``fit``.

    Args:
        arguments: Options.
    """
    with quiet(), one_sentence():
        TrainerCLI("fit", arguments, "Unlearn queries, or train a model: Lightning's fit.", run=True)


def predict(arguments: list[str]) -> None:
    """Lightning's own ``predict``.

    Args:
        arguments: Options.
    """
    # Predict writes no checkpoint, but has Lightning's callback for them.
    with quiet("The dirpath has changed from"), one_sentence():
        TrainerCLI("predict", arguments, "Score under the deltas of a checkpoint: Lightning's predict.", run=True)


def attribute(arguments: list[str]) -> None:
    """Unlearn, score and report; what is done already is left as it is.

    Args:
        arguments: Options.

    Raises:
        InputError: If options contradict each other.
    """

    def options(parser: LightningArgumentParser) -> None:
        parser.add_argument(
            "--output", type=str, default="attribution", help="Folder of the run: deltas, scores, report."
        )
        parser.add_argument(
            "--rule", type=str, default="ratio", help=f"How deviations become a score: {' or '.join(RULES)}."
        )
        parser.add_argument(
            "--flips", type=str, default="max", help="Which of both flips is a score's: the larger (max) or the mean."
        )
        parser.add_argument(
            "--keep_deviations", type=bool, default=False, help="Keep the rule's value at each flip and draw as well."
        )
        parser.add_argument(
            "--race", type=Race | None, default=None, help="Few views of all images, all views of the contenders alone."
        )
        parser.add_argument("--top", type=int, default=12, help="How many images the report shows for each query.")

    description = (
        "Unlearn queries, score all training images, and write a report; what is done already is left as it is."
    )
    with quiet(steps=True), one_sentence():
        cli = TrainerCLI("attribute", arguments, description, options, **BARE)
        module, data, trainer = attribution_parts(cli)
        output, race = Path(cli.config.output), cli.config_init["race"]
        if race is not None:
            check_race(race, module, data, output)
            if cli.config.keep_deviations:
                raise InputError("A race's table has scores of few and of all views; leave keep_deviations out.")
        make_folder(output)
        # Before the progress bar, so that a folder of another run is refused and the step announced before it is drawn.
        writer = ScoreWriter(
            str(output), cli.config.rule, data.on_bad_sample, cli.config.flips, cli.config.keep_deviations
        )
        trainer.callbacks[:0] = [writer, Announcer(output)]  # type: ignore[attr-defined]
        deltas = output / "deltas.ckpt"
        if not _is_unlearned(deltas, module, data, trainer):
            trainer.fit(module, data)
            _save(trainer, deltas)
        if race is not None:
            RaceRun(race, module, data, trainer, output, deltas).run()
        else:
            trainer.predict(module, data, return_predictions=False, ckpt_path=str(deltas))
        if trainer.is_global_zero:
            wait_for_scores(output)
            _name_unscored(data, write_report(output, cli.config.top, allow_pipe=data.allow_pipe, data=data))


def _name_unscored(data: AttributionDataModule, table: ScoreTable) -> None:
    """Say which of the samples that were chosen by their keys have no scores: a key may be written wrongly."""
    unscored = sorted(set(data.keys or ()) - set(table.keys))
    if unscored:
        named = some_of([repr(key) for key in unscored])
        say(f"{many(len(unscored), 'chosen sample')} without a score, in no shard or left out as bad: {named}.")


def attribution_parts(cli: TrainerCLI) -> tuple[UnlearningModule, AttributionDataModule, Trainer]:
    """What the config of an attribution holds.

    Args:
        cli: After its classes are made.

    Returns:
        Model, data and Trainer.

    Raises:
        InputError: If it is the config of something else.
    """
    if not isinstance(cli.model, UnlearningModule) or not isinstance(cli.datamodule, AttributionDataModule):
        raise InputError(
            "This command takes an UnlearningModule as model and an AttributionDataModule as data, "
            f"not {type(cli.model).__name__} and {type(cli.datamodule).__name__}; start from configs/sample.yaml."
        )
    return cli.model, cli.datamodule, cli.trainer


def _save(trainer: Trainer, path: Path) -> None:
    try:
        trainer.save_checkpoint(path, weights_only=False)
    except (OSError, RuntimeError) as error:  # torch's writer raises the latter where the disk is full
        raise InputError(f"The deltas can't be written to {path} ({error}); free the disk and run again.") from None
    say(f"Deltas: {path}")


def _is_unlearned(path: Path, module: UnlearningModule, data: AttributionDataModule, trainer: Trainer) -> bool:
    """Whether a checkpoint holds the deltas that this run would make."""
    if not path.is_file():
        return False
    theirs = read_targets(read_checkpoint(str(path)), str(path))["fingerprints"]
    data.trainer = trainer  # so that each process looks at its own shards only
    data.setup("fit")
    ours = {
        "weights": module.weights_fingerprint(),
        "fisher": module.fisher_fingerprint(),
        "unlearning": module.unlearning_fingerprint(data),
    }
    differing = [name for name, value in ours.items() if theirs[name] != value]
    if differing:
        raise InputError(
            f"{path} was made with other {', '.join(differing)} than this run's; "
            "choose another --output, or remove that folder."
        )
    say(f"{targets_in_words(data)} unlearned already, in {path}.")
    return True


def write_report(
    folder: Path, top: int, *, allow_pipe: bool = False, data: AttributionDataModule | None = None
) -> ScoreTable:
    """Write ``report.html`` of a run and print its path.

    Args:
        folder: The run's folder.
        top: How many images are shown for each query.
        allow_pipe: Whether shards may be commands.
        data: Of the run, if it was just made: its record has no passwords and signatures of addresses.

    Returns:
        The run's scores.
    """
    from lightning_unlearn.report.report import shown_queries
    from lightning_unlearn.report.report import write_report as write

    table = read_scores(folder)
    shown = frozenset(key for target in table.queries for key in shown_queries(table, target))
    urls = table.run["query_shards"] if data is None else data.query_patterns
    queries = [
        sample
        for shard in list_shards(urls, allow_pipe=allow_pipe)
        for sample in read_samples(shard, pictures=True, masks=True, keys=shown)
    ]
    recorded = [info["url"] for info in table.run["shards"].values()]
    all_shards = list_shards(recorded, allow_pipe=allow_pipe) if data is None else data.shards

    def pictures(keys: Sequence[str]) -> Mapping[str, Sample]:
        # Others may be bad and left out: they are not decoded.
        wanted = frozenset(keys)
        shards = {shard for key, shard in zip(table.keys, table.shards, strict=True) if key in wanted}
        return {
            sample.key: sample
            for shard in all_shards
            if shard_id(shard.url) in shards
            for sample in read_samples(shard, pictures=True, keys=wanted)
        }

    path = write(folder / "report.html", table, queries, pictures, top)
    say(f"Report: {path}")
    return table
