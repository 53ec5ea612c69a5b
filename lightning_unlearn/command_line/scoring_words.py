"""What the commands that score say, and what they wait for."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from torch.optim import Optimizer
from typing_extensions import override

from lightning_unlearn.command_line.command_parts import many, say
from lightning_unlearn.data.shards import ShardInfo, shard_id
from lightning_unlearn.data.targets import targets_of
from lightning_unlearn.datamodules import AttributionDataModule
from lightning_unlearn.errors import InputError
from lightning_unlearn.scores.files import FAILED, SCORES, is_scored, read_run
from lightning_unlearn.unlearning.module import UnlearningModule


class Announcer(Callback):
    """Says what a Trainer is about to do.

    Args:
        folder: Where scores are written.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._left: list[ShardInfo] = []

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Look what is left, where all ranks have just met: a little later a fast one may have scored a shard."""
        if stage == "predict":
            shards: list[ShardInfo] = trainer.datamodule.shards  # type: ignore[attr-defined]
            self._left = [shard for shard in shards if not is_scored(self.folder, shard_id(shard.url), shard.version)]

    @override
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Say what is unlearned."""
        data: Any = trainer.datamodule  # type: ignore[attr-defined]
        say(f"Unlearning {targets_in_words(data)} with {data.draws} draws each on {pl_module.device} …")

    @override
    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        """Say what happens behind a bar that stands still at its end."""
        if trainer.current_epoch or not trainer.is_global_zero or not pl_module.strategy.searches:  # type: ignore[union-attr]
            return
        bar = trainer.progress_bar_callback
        tell = say if bar is None else bar.print
        tell(f"Searching how far the step should go, on {pl_module.rise_draws} draws a query …")

    @override
    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Say what is scored already, and what is to be."""
        shards: list[ShardInfo] = trainer.datamodule.shards  # type: ignore[attr-defined]
        left = self._left
        if len(left) < len(shards):
            say(f"{len(shards) - len(left)} of {many(len(shards), 'shard')} scored already, in {self.folder / SCORES}.")
        keys, bar = trainer.datamodule.keys, trainer.progress_bar_callback  # type: ignore[attr-defined]
        if left:
            counts = [shard.samples for shard in left if shard.samples is not None]
            samples = f"{sum(counts)} samples in " if len(counts) == len(left) else ""
            if keys is not None:
                samples = f"{many(len(keys), 'chosen sample')} among those of "
            say(f"Scoring {samples}{many(len(left), 'shard')} on {pl_module.device} …")
        # Lightning keeps the bars of the other ranks off; theirs would fall into the middle of what this one says.
        if bar is not None and trainer.is_global_zero:
            bar.enable() if left else bar.disable()


def say_of_weights(module: UnlearningModule) -> None:
    """Say which weights are looked at, where nobody named them.

    Args:
        module: With the chosen weights.
    """
    if module.parameters_reason:
        chosen = module.parameters_selection
        named = repr(chosen) if isinstance(chosen, str) else f"{len(chosen)} layers"
        say(f"Weights: {named} ({module.parameters_reason}).")


def targets_in_words(data: AttributionDataModule) -> str:
    """What is unlearned.

    Args:
        data: After its queries were read.

    Returns:
        E.g. ``2 sets of 5 queries``.
    """
    queries = many(len(data.queries), "query", "queries")
    if data.targets_by is None:
        return queries
    return f"{many(len(targets_of(data.queries, data.targets_by)), 'set')} of {queries}"


def wait_for_scores(folder: Path) -> None:
    """Wait until each shard is scored or failed.

    Other processes may still write; there is no barrier after predict, so that a slow one times nobody out.

    Args:
        folder: The run's folder.

    Raises:
        InputError: If the folder is gone.
    """
    run = read_run(folder)
    if run is None:
        raise InputError(f"The folder {folder} was removed while the run went on; run the same command again.")
    waiting = {shard: info["version"] for shard, info in run["shards"].items()}
    said = False
    while waiting := {
        shard: version
        for shard, version in waiting.items()
        if not is_scored(folder, shard, version) and not (folder / FAILED / f"{shard}.json").is_file()
    }:
        if not said:
            say("Waiting for the scores of other processes …")
            said = True
        time.sleep(0.5)
        if not folder.is_dir():
            raise InputError(f"The folder {folder} was removed while the run went on; run the same command again.")
