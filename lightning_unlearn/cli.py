"""The command line. Nothing heavy is imported before a command needs it, so that ``--help`` answers at once."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import lightning_unlearn
from lightning_unlearn.errors import InputError

if TYPE_CHECKING:
    from lightning.pytorch import Trainer

    from lightning_unlearn.module import UnlearningModule
    from lightning_unlearn.samples import Sample
    from lightning_unlearn.scores import ScoreTable

HELP = """\
usage: lightning-unlearn COMMAND [--config FILE] [--print_config] [options]

Which training images made this picture possible?

commands:
  attribute   unlearn queries, score all training images, write a report: the main job
  fit         unlearn queries (or train a model): Lightning's fit
  predict     score training images under the deltas of a checkpoint: Lightning's predict
  fisher      take the Fisher of a trained model, by passes over its training shards
  report      write the report of a finished run again
  prepare     images and captions, or ready latents and embeddings, to shards

`lightning-unlearn COMMAND --help` lists a command's options. Ready configs: {configs}.
"""


def main(args: Sequence[str] | None = None) -> int:
    """Run a command.

    Args:
        args: The command and its options; those of the process by default.

    Returns:
        The process's exit status: 0, or 1 after one sentence on what is wrong.
    """
    arguments = list(sys.argv[1:] if args is None else args)
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(HELP.format(configs=", ".join(sorted(path.name for path in _configs_folder().glob("*.yaml")))), end="")
        return 0
    if arguments[0] == "--version":
        print(f"lightning-unlearn {lightning_unlearn.__version__}")
        return 0
    if arguments[0] not in COMMANDS:
        print(f"lightning-unlearn: there is no command {arguments[0]!r}; choose one of {', '.join(COMMANDS)}.", file=sys.stderr)
        return 1
    # Checkpoints are read without pickle, by Lightning too.
    os.environ.setdefault("TORCH_FORCE_WEIGHTS_ONLY_LOAD", "1")
    os.environ.setdefault("LIGHTNING_UNLEARN_SAMPLE", str(_sample_folder()))
    try:
        COMMANDS[arguments[0]](_find_configs(arguments[1:]))
    except InputError as error:
        print(f"lightning-unlearn: {error}", file=sys.stderr)
        return 1
    return 0


def _configs_folder() -> Path:
    """Where the ready configs lie, in a checkout and in an installed package."""
    import lightning_unlearn.configs

    return Path(str(lightning_unlearn.configs.__file__)).parent


def _sample_folder() -> Path:
    """Where the sample data lies; found without importing the datamodules, which takes seconds."""
    from importlib.util import find_spec

    spec = find_spec("lightning_unlearn.datamodules")
    assert spec is not None
    assert spec.origin is not None
    return Path(spec.origin).parent / "sample"


def _find_configs(arguments: list[str]) -> list[str]:
    """Let ``--config sample.yaml`` name a ready config wherever one is."""
    found = list(arguments)
    for place, word in enumerate(found):
        name = word.removeprefix("--config=") if word.startswith("--config=") else None
        if place and found[place - 1] in ("--config", "-c"):
            name = word
        ready = _configs_folder() / name.removeprefix("configs/") if name is not None else None
        if name is not None and ready is not None and not Path(name).exists() and ready.is_file():
            found[place] = word.removesuffix(name) + str(ready)
    return found


def _lightning_cli(arguments: list[str], run: bool, extra: Callable[[Any], None] | None = None, **defaults: Any) -> Any:
    """A LightningCLI over any LightningModule and datamodule, those of this package by their short names."""
    from lightning.pytorch import LightningDataModule, LightningModule
    from lightning.pytorch.cli import LightningCLI

    # Imported so that their classes can be named without a path.
    import lightning_unlearn.callbacks
    import lightning_unlearn.datamodules
    import lightning_unlearn.training  # noqa: F401

    class UnlearnCLI(LightningCLI):
        def add_arguments_to_parser(self, parser: Any) -> None:
            if extra is not None:
                extra(parser)

    return UnlearnCLI(
        LightningModule,
        LightningDataModule,
        subclass_mode_model=True,
        subclass_mode_data=True,
        # The run's settings are in run.json and the checkpoint; a second config.yaml would only refuse to be overwritten.
        save_config_callback=None,
        trainer_defaults=defaults,
        parser_kwargs={"parser_mode": "omegaconf"},
        auto_configure_optimizers=False,
        args=arguments,
        run=run,
    )


def fit_or_predict(command: str) -> Callable[[list[str]], None]:
    """Lightning's own ``fit`` or ``predict``.

    Args:
        command: Which.

    Returns:
        What runs it with a list of arguments.
    """

    def run(arguments: list[str]) -> None:
        _lightning_cli([command, *arguments], run=True)

    return run


def attribute(arguments: list[str]) -> None:
    """Unlearn, score and report; what is done already is left as it is.

    Args:
        arguments: Options.
    """
    from lightning_unlearn.callbacks import ScoreWriter

    def extra(parser: Any) -> None:
        parser.add_argument("--output", type=str, default="attribution", help="Folder of the run: deltas, scores, report.")
        parser.add_argument("--rule", type=str, default="difference", help="How deviations become a score: difference or ratio.")
        parser.add_argument("--top", type=int, default=12, help="How many images the report shows for each query.")

    cli = _lightning_cli(arguments, False, extra, logger=False, enable_checkpointing=False, enable_model_summary=False)
    module, data, trainer = _checked_parts(cli)
    output = Path(cli.config.output)
    deltas = output / "deltas.ckpt"
    _show_samples(trainer)
    writer = ScoreWriter(str(output), cli.config.rule, data.on_bad_sample)
    trainer.callbacks.append(writer)
    if not _is_unlearned(deltas, module, data):
        trainer.fit(module, data)
        trainer.save_checkpoint(deltas, weights_only=False)
    trainer.predict(module, data, return_predictions=False, ckpt_path=str(deltas))
    if trainer.is_global_zero:
        _wait_for_scores(output)
        write_report(output, top=cli.config.top)


def _checked_parts(cli: Any) -> tuple[UnlearningModule, Any, Trainer]:
    from lightning_unlearn.datamodules import AttributionDataModule
    from lightning_unlearn.module import UnlearningModule

    if not isinstance(cli.model, UnlearningModule) or not isinstance(cli.datamodule, AttributionDataModule):
        raise InputError(
            "This command takes an UnlearningModule as model and an AttributionDataModule as data, "
            f"not {type(cli.model).__name__} and {type(cli.datamodule).__name__}; start from configs/sample.yaml."
        )
    return cli.model, cli.datamodule, cli.trainer


def _show_samples(trainer: Trainer) -> None:
    """Put the bar that counts samples in the place of Lightning's own, if there is one."""
    from lightning.pytorch.callbacks import ProgressBar

    from lightning_unlearn.callbacks import ScoringProgress

    for place, callback in enumerate(trainer.callbacks):
        if isinstance(callback, ProgressBar):
            trainer.callbacks[place] = ScoringProgress()


def _is_unlearned(path: Path, module: UnlearningModule, data: Any) -> bool:
    """Whether a checkpoint holds the deltas that this run would make."""
    if not path.is_file():
        return False
    from lightning_unlearn.deltas import read_targets
    from lightning_unlearn.loading import read_checkpoint

    theirs = read_targets(read_checkpoint(str(path)), str(path))["fingerprints"]
    data.setup("fit")
    ours = {
        "weights": module.weights_fingerprint(),
        "fisher": module.fisher_fingerprint(),
        "unlearning": module.unlearning_fingerprint(data),
    }
    differing = [name for name, value in ours.items() if theirs[name] != value]
    if differing:
        raise InputError(
            f"{path} was made with other {', '.join(differing)} than this run's; choose another --output, or remove that folder."
        )
    print(f"The queries are unlearned already, in {path}.")
    return True


def _wait_for_scores(folder: Path) -> None:
    """Other processes may still write; there is no barrier after predict, so that a slow one can't time out the rest."""
    from lightning_unlearn.scores import FAILED, read_run, shard_path

    run = read_run(folder)
    assert run is not None
    while any(
        not shard_path(folder, shard).is_file() and not (folder / FAILED / f"{shard}.json").is_file() for shard in run["shards"]
    ):
        time.sleep(0.5)


def write_report(folder: Path, top: int) -> None:
    """Write ``report.html`` of a run and print its path.

    Args:
        folder: The run's folder.
        top: How many images are shown for each query.
    """
    from lightning_unlearn.datamodules.reading import read_samples
    from lightning_unlearn.datamodules.sources import list_shards
    from lightning_unlearn.report import write_report as write
    from lightning_unlearn.scores import read_scores
    from lightning_unlearn.shards import shard_id

    table = read_scores(folder)
    queries = {
        sample.key: sample
        for shard in list_shards(table.run["query_shards"])
        for sample in read_samples(shard, pictures=True)
        if sample.key in table.queries
    }
    urls = [info["url"] for info in table.run["shards"].values()]

    def pictures(keys: Sequence[str]) -> Mapping[str, Sample]:
        wanted = set(keys)
        shards = {shard for key, shard in zip(table.keys, table.shards, strict=True) if key in wanted}
        return {
            sample.key: sample
            for shard in list_shards(urls)
            if shard_id(shard.url) in shards
            for sample in read_samples(shard, pictures=True)
            if sample.key in wanted
        }

    path = write(folder / "report.html", table, [queries[key] for key in table.queries], pictures, top)
    print(f"Report: {path}")


def report(arguments: list[str]) -> None:
    """Write a finished run's report.

    Args:
        arguments: Options.
    """
    parser = _parser("report", "Write the report of a finished run again.")
    parser.add_argument("--folder", type=str, default="attribution", help="The run's folder.")
    parser.add_argument("--top", type=int, default=12, help="How many images are shown for each query.")
    config = parser.parse_args(arguments)
    write_report(Path(config.folder), config.top)


def fisher(arguments: list[str]) -> None:
    """Take a trained model's Fisher.

    Args:
        arguments: Options.
    """
    from lightning_unlearn.callbacks import FisherAccumulator
    from lightning_unlearn.datamodules import TrainingDataModule
    from lightning_unlearn.training import FisherPass

    def extra(parser: Any) -> None:
        parser.add_argument("--output", type=str, default="fisher.safetensors", help="The file to write.")
        parser.add_argument("--passes", type=int, default=5, help="How often each sample is seen, with new noise each time.")
        parser.add_argument("--seed", type=int, default=0, help="Of captions, timesteps and noise.")

    cli = _lightning_cli(arguments, False, extra, logger=False, enable_checkpointing=False, enable_model_summary=False)
    module, data, trainer = _checked_parts(cli)
    trainer.fit_loop.max_epochs = cli.config.passes
    selection = module.parameters_selection
    trainer.callbacks.append(
        FisherAccumulator(target="network", parameters=selection, path=str(Path(cli.config.output).resolve()))
    )
    training = TrainingDataModule(
        data.shard_patterns, data.batch_size, cli.config.seed, data.num_workers, allow_pipe=data.allow_pipe
    )
    trainer.fit(FisherPass(module.network, module.objective, selection, cli.config.seed), training)


def prepare(arguments: list[str]) -> None:
    """Make shards.

    Args:
        arguments: Options.
    """
    from lightning_unlearn.prepare import prepare as run

    parser = _parser("prepare", "Images and captions, or ready latents and embeddings, to shards.")
    parser.add_function_arguments(run)
    config = parser.parse_args(arguments)
    config.pop("config", None)
    run(**parser.instantiate_classes(config).as_dict())


def _parser(command: str, description: str) -> Any:
    from jsonargparse import ArgumentParser

    parser = ArgumentParser(prog=f"lightning-unlearn {command}", description=description, parser_mode="omegaconf")
    parser.add_argument("-c", "--config", action="config", help="A YAML file of options.")
    return parser


COMMANDS: dict[str, Callable[[list[str]], None]] = {
    "attribute": attribute,
    "fit": fit_or_predict("fit"),
    "predict": fit_or_predict("predict"),
    "fisher": fisher,
    "report": report,
    "prepare": prepare,
}
