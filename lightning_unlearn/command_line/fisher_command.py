"""The command that takes a trained model's Fisher."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from lightning.pytorch.cli import LightningArgumentParser

from lightning_unlearn.callbacks import FisherAccumulator
from lightning_unlearn.command_line.command_parts import BARE, make_folder, many, say
from lightning_unlearn.command_line.quiet import quiet
from lightning_unlearn.command_line.trainer_cli import TrainerCLI, one_sentence
from lightning_unlearn.datamodules import AttributionDataModule, TrainingDataModule
from lightning_unlearn.errors import InputError
from lightning_unlearn.fisher import FISHERS, Targets
from lightning_unlearn.training import FisherPass
from lightning_unlearn.unlearning.chosen import AUTO
from lightning_unlearn.unlearning.module import UnlearningModule
from lightning_unlearn.weights.parameters import automatic_selection


def fisher(arguments: list[str]) -> None:
    """Take a trained model's Fisher.

    Args:
        arguments: Options.

    Raises:
        InputError: If there is to be no pass.
    """

    def options(parser: LightningArgumentParser) -> None:
        parser.add_argument("--output", type=str, default="fisher.safetensors", help="The file to write.")
        parser.add_argument(
            "--passes", type=int, default=5, help="How often each sample is seen, with new noise each time."
        )
        parser.add_argument(
            "--kind",
            type=Literal["diagonal", "ekfac"],
            default="ekfac",
            help="Of Fisher: diagonal, or ekfac, for which the first half of the passes goes to covariances.",
        )
        parser.add_argument(
            "--targets",
            type=Targets,
            default="data",
            help="Of the losses: those of the data (the empirical Fisher), or drawn from the model (the true Fisher).",
        )
        parser.add_argument("--seed", type=int, default=0, help="Of captions, timesteps, noise and drawn targets.")

    description = "Take the Fisher of a trained model, by passes over its training shards with frozen weights."
    # Frozen weights need no optimizer.
    with quiet("`LightningModule.configure_optimizers` returned `None`", steps=True), one_sentence():
        cli = TrainerCLI("fisher", arguments, description, options, **BARE)
        module, trainer = cli.model, cli.trainer
        if not isinstance(module, UnlearningModule):
            raise InputError(
                "This command takes an UnlearningModule as model, which names the network, its objective and the "
                f"parameters, not {type(module).__name__}; start from configs/sample.yaml."
            )
        kind, passes = cli.config.kind, cli.config.passes
        stages = FISHERS[kind].stages
        if passes < max(1, len(stages)):
            each = f", one for {' and one for '.join(stages)}" if stages else ""
            raise InputError(f"--passes must be at least {max(1, len(stages))}{each}, but is {passes}.")
        targets = cli.config.targets
        parameters = module.parameters_asked
        if parameters == AUTO:
            # An older Fisher that stands in the config says nothing of the new one.
            parameters, why = automatic_selection(module.network)
            say(f"Weights: {parameters!r} ({why}).")
        frozen = FisherPass(module.network, module.objective, parameters, cli.config.seed, targets)
        trainer.fit_loop.max_epochs = passes
        output = Path(cli.config.output).absolute()
        make_folder(output.parent)
        first = passes // 2 if stages else None
        accumulator = FisherAccumulator(
            target="network",
            parameters=parameters,
            fisher=kind,
            path=str(output),
            eigenvalue_epoch=first,
        )
        trainer.callbacks.append(accumulator)  # type: ignore[attr-defined]
        data = _training_data(cli.datamodule, cli.config.seed)
        parts = f" ({first} for {stages[0]}, {passes - first} for {stages[1]})" if first else ""
        drawn = " with targets drawn from the model" if targets == "model" else ""
        say(f"Taking the Fisher{drawn} in {many(passes, 'pass', 'passes')}{parts} over {data.shards} …")
        trainer.fit(frozen, data)


def _training_data(data: Any, seed: int) -> TrainingDataModule:
    """The same shards, shuffled, every sample once a pass: those of a training, or of an attribution's config."""
    if isinstance(data, TrainingDataModule):
        data.every_sample = True
        return data
    if isinstance(data, AttributionDataModule):
        return TrainingDataModule(
            data.shard_patterns, data.batch_size, seed, data.num_workers, allow_pipe=data.allow_pipe, every_sample=True
        )
    raise InputError(
        "This command takes an AttributionDataModule or a TrainingDataModule as data, "
        f"not {type(data).__name__}; start from configs/sample.yaml."
    )
