"""A training config from which many models are trained, each without some of its samples."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from tempfile import gettempdir
from typing import Any
from uuid import uuid4

from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import Checkpoint, DeviceStatsMonitor, LearningRateMonitor, ModelSummary, ProgressBar

from lightning_unlearn.callbacks import FisherAccumulator
from lightning_unlearn.command_line.trainer_cli import TrainerCLI
from lightning_unlearn.data.samples import Sample
from lightning_unlearn.datamodules import TrainingDataModule
from lightning_unlearn.datamodules.sources import list_shards
from lightning_unlearn.diffusion.objective import Objective
from lightning_unlearn.errors import InputError
from lightning_unlearn.evaluation import Measuring, Run, Study, Training
from lightning_unlearn.evaluation.recipe import recipe

# They write, or need a logger or a terminal; none of them changes what is trained.
SILENCED = (Checkpoint, DeviceStatsMonitor, FisherAccumulator, LearningRateMonitor, ModelSummary, ProgressBar)


class RetrainingCLI(TrainerCLI):
    """Makes a training config's module, data and Trainer anew for each model."""

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """Make a Trainer that writes nothing.

        Args:
            **kwargs: Lightning's.

        Returns:
            The Trainer.
        """
        settings = self._get(self.config_init, "trainer")
        callbacks = settings["callbacks"] or []
        callbacks = callbacks if isinstance(callbacks, list) else [callbacks]
        settings["callbacks"] = [callback for callback in callbacks if not isinstance(callback, SILENCED)]
        # Under SLURM, Lightning goes on from a checkpoint in this folder if it finds one, of whatever model it is: it
        # saves one there before a job is preempted. So each training has a folder of its own, which is only made then.
        kwargs["default_root_dir"] = str(Path(gettempdir()) / f"lightning-unlearn-{uuid4().hex}")
        return super().instantiate_trainer(
            **kwargs, logger=False, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False
        )

    def training_data(self) -> TrainingDataModule:
        """The config's data.

        Returns:
            It.

        Raises:
            InputError: If samples can't be left out of it.
        """
        if not isinstance(self.datamodule, TrainingDataModule):
            raise InputError(
                f"Samples are left out of a TrainingDataModule; give one as data, not {type(self.datamodule).__name__}."
            )
        return self.datamodule

    def build(self, run: Run, keys: Sequence[str]) -> Training:
        """One training of a study, made from the config.

        Args:
            run: Which.
            keys: All samples.

        Returns:
            Its module, data and Trainer.
        """
        self.instantiate_classes()
        data = self.training_data()
        data.seed = run.seed
        if run.removed:
            removed = set(run.removed)
            data.keys = [key for key in keys if key not in removed]
        return Training(self.model, data, self.trainer)


def study_of(
    cli: RetrainingCLI,
    folder: Path,
    queries: Sequence[Sample],
    target: str = "network",
    objective: Objective | None = None,
    **measuring: Any,
) -> tuple[Study, Measuring]:
    """The study of a training config and queries.

    Args:
        cli: The config.
        folder: Where the study is kept.
        queries: On which models are measured.
        target: Dotted name of the network in the module.
        objective: By which models are measured, if not by the module's own.
        **measuring: Settings of :class:`~lightning_unlearn.evaluation.Measuring`.

    Returns:
        The study, and how its models are measured.
    """
    measure = Measuring(queries, **measuring)
    data = cli.training_data()
    shards = list_shards(data.shards, allow_pipe=data.allow_pipe)
    found = recipe(cli.config.model, cli.config.data, cli.config.trainer, shards, SILENCED)
    settings = {
        "recipe": found,
        "measuring": measure.settings(),
        # The usual network and the module's own objective are told by the recipe.
        "target": None if target == "network" else target,
        "objective": None if objective is None else objective.settings(),
    }
    return Study(folder, settings), measure
