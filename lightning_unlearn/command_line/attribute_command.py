"""The main job: scores of all training images for queries, and the page that shows them."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from lightning.pytorch import Trainer
from lightning.pytorch.cli import LightningArgumentParser

from lightning_unlearn.baselines import Baseline, Consensus
from lightning_unlearn.baselines.consensus import UNLEARNED
from lightning_unlearn.baselines.method_run import MethodRun
from lightning_unlearn.callbacks import ScoreWriter
from lightning_unlearn.command_line.automatic_method import automatic_method
from lightning_unlearn.command_line.command_parts import BARE, check_top, many, say
from lightning_unlearn.command_line.index_run import SHORTLIST, IndexRun
from lightning_unlearn.command_line.quiet import quiet
from lightning_unlearn.command_line.race_command import RaceRun, check_race
from lightning_unlearn.command_line.run_report import write_report
from lightning_unlearn.command_line.scoring_words import say_of_weights, wait_for_scores
from lightning_unlearn.command_line.trainer_cli import TrainerCLI, attribution_parts, one_sentence
from lightning_unlearn.command_line.unlearning_run import scored_by, step_of, unlearn, unlearned_for
from lightning_unlearn.datamodules import AttributionDataModule
from lightning_unlearn.errors import InputError, some_of
from lightning_unlearn.scores.racing import Race
from lightning_unlearn.scores.rules import RULES
from lightning_unlearn.scores.table import ScoreTable
from lightning_unlearn.unlearning.module import UnlearningModule

AUTO = "auto"
# What only unlearning has, with its defaults.
OF_UNLEARNING: dict[str, Any] = {"rule": "ratio", "flips": "max", "keep_deviations": False, "race": None}


def attribute(arguments: list[str]) -> None:
    """Score all samples by a method, and report; what is done already is left as it is.

    Args:
        arguments: Options.
    """

    def options(parser: LightningArgumentParser) -> None:
        parser.add_argument(
            "--method",
            type=Baseline | Literal["auto", "unlearning"],
            default=AUTO,
            help="How the samples are scored: unlearning, or the name of another method, e.g. DTRAK. By default by "
            "Consensus, which asks D-TRAK, DAS and unlearning, and where they can't be asked together by unlearning. "
            "Their base class in Python is called Baseline; --method.help NAME shows a method's settings.",
        )
        parser.add_argument(
            "--output", type=str, default="attribution", help="Folder of the run: deltas, scores, report."
        )
        parser.add_argument(
            "--index",
            type=str | None,
            default=None,
            help="Folder of an index of the samples (`lightning-unlearn index`): it scores all of them, and only its "
            "first ones are scored exactly, by unlearning or Consensus.",
        )
        parser.add_argument(
            "--shortlist", type=int, default=SHORTLIST, help="With --index: how many of each query's first ones."
        )
        parser.add_argument("--top", type=int, default=12, help="How many images the report shows for each query.")
        for name, kind, help_text in (
            ("rule", str, f"How deviations (the changes of an image's loss) become its score: {' or '.join(RULES)}."),
            (
                "flips",
                str,
                "With views.flips: whether a score is the larger (max) or the mean of those of both flips.",
            ),
            ("keep_deviations", bool, "Keep the rule's value at each flip and draw of timestep and noise as well."),
            (
                "race",
                Race | None,
                "Score all images on few views, and on all views only those that may be among the --race.top best.",
            ),
        ):
            parser.add_argument(f"--{name}", type=kind, default=OF_UNLEARNING[name], help=help_text)

    description = (
        "Score all training images for queries, and write a report; what is done already is left as it is. "
        "The options rule, flips, keep_deviations and race are for unlearning."
    )
    with quiet(steps=True), one_sentence():
        cli = TrainerCLI("attribute", arguments, description, options, **BARE)
        module, data, trainer = attribution_parts(cli)
        check_top(cli.config.top)
        output, method = Path(cli.config.output), cli.config_init["method"]
        if method == AUTO:
            method = automatic_method(
                module, data, trainer, _options_of_unlearning(cli), by_index=cli.config.index is not None
            )
        elif isinstance(method, Baseline):
            _refuse_options_of_unlearning(cli, method)
        say_of_weights(module)
        if cli.config.index is not None:
            _by_index(cli, method, module, data, trainer, output)
        elif isinstance(method, Baseline):
            unlearned = unlearned_for(method, module, data, trainer, output)
            MethodRun(method, module, data, trainer, output, unlearned, say).run()
        else:
            _unlearn_and_score(cli, module, data, trainer, output)
        if trainer.is_global_zero:
            _name_unscored(data, write_report(output, cli.config.top, allow_pipe=data.allow_pipe, data=data))


def _options_of_unlearning(cli: TrainerCLI) -> list[str]:
    return [f"--{name}" for name, default in OF_UNLEARNING.items() if cli.config[name] != default]


def _refuse_options_of_unlearning(cli: TrainerCLI, method: Baseline) -> None:
    if given := _options_of_unlearning(cli):
        raise InputError(
            f"{', '.join(given)} {'is' if len(given) == 1 else 'are'} for unlearning, and {type(method).__name__} has "
            "nothing of the kind; leave it out, or take --method unlearning."
        )


def _unlearn_and_score(
    cli: TrainerCLI, module: UnlearningModule, data: AttributionDataModule, trainer: Trainer, output: Path
) -> None:
    race = cli.config_init["race"]
    if race is not None:
        check_race(race, module, data, output)
        if cli.config.keep_deviations:
            raise InputError("A race's table has scores of few and of all views; leave keep_deviations out.")
    writer = ScoreWriter(str(output), cli.config.rule, data.on_bad_sample, cli.config.flips, cli.config.keep_deviations)
    deltas = unlearn(module, data, trainer, output, writer)
    if race is not None:
        RaceRun(race, module, data, trainer, output, deltas).run()
    else:
        trainer.predict(module, data, return_predictions=False, ckpt_path=str(deltas))
    if trainer.is_global_zero:
        wait_for_scores(output)


def _by_index(
    cli: TrainerCLI, method: Any, module: UnlearningModule, data: AttributionDataModule, trainer: Trainer, output: Path
) -> None:
    consensus = method if isinstance(method, Consensus) else None
    if isinstance(method, Baseline):
        if consensus is None:
            raise InputError(
                f"With --index the shortlist is scored by unlearning or Consensus, not by {type(method).__name__}; "
                "take one of these, or leave --index out."
            )
        if consensus.rise:
            step_of(consensus, module)
    if cli.config.race is not None or cli.config.keep_deviations:
        raise InputError("An index says itself who is scored exactly; leave race and keep_deviations out.")
    rule: Any = "difference" if consensus is not None else cli.config.rule
    flips: Any = "max" if consensus is not None else cli.config.flips
    writer = ScoreWriter(str(output / UNLEARNED), rule, data.on_bad_sample, flips)
    IndexRun(
        cli.config.index,
        consensus,
        module,
        data,
        trainer,
        output,
        cli.config.shortlist,
        lambda: scored_by(writer, module, data, trainer),
    ).run({"rule": rule, "flips": flips})


def _name_unscored(data: AttributionDataModule, table: ScoreTable) -> None:
    """Say which of the samples that were chosen by their keys have no scores: a key may be written wrongly."""
    unscored = sorted(set(data.keys or ()) - set(table.keys))
    if unscored:
        named = some_of([repr(key) for key in unscored])
        say(f"{many(len(unscored), 'chosen sample')} without a score, in no shard or left out as bad: {named}.")
