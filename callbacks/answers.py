"""An answer beside a training: queries unlearned and all samples scored, as by ``lightning-unlearn attribute``."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins.environments.lightning import LightningEnvironment
from lightning.pytorch import Callback, LightningDataModule, Trainer
from torch import nn

from lightning_unlearn.baselines import Baseline
from lightning_unlearn.baselines.method_run import MethodRun
from lightning_unlearn.callbacks.score_writer import ScoreWriter
from lightning_unlearn.diffusion.contract import Objective
from lightning_unlearn.draws.views import Views
from lightning_unlearn.errors import InputError
from lightning_unlearn.fisher import Fisher
from lightning_unlearn.scores.files import read_scores
from lightning_unlearn.scores.table import ScoreTable
from lightning_unlearn.strategies import Newton, Strategy
from lightning_unlearn.unlearning.module import UnlearningModule


@dataclass(frozen=True)
class Asked:
    """What is asked of a network.

    Attributes:
        parameters: Which weights are looked at.
        objective: The loss it was trained with.
        method: Another method than unlearning.
        strategy: How far unlearning goes; by default :class:`~lightning_unlearn.strategies.Newton`'s way.
        views: On which samples are looked at.
    """

    parameters: str | list[str]
    objective: Objective
    method: Baseline | None
    strategy: Strategy | None
    views: Views | None


def answer(
    asked: Asked, network: nn.Module, fisher: Fisher | None, data: LightningDataModule, folder: Path
) -> ScoreTable:
    """Score all samples, in this process alone, into a folder as ``attribute`` leaves it.

    Args:
        asked: What is asked.
        network: Frozen, and nobody else's: it is moved to the CPU in the end.
        fisher: Of the chosen weights.
        data: An :class:`~lightning_unlearn.datamodules.AttributionDataModule`, nobody else's, with queries.
        folder: Of the run; ``lightning-unlearn report`` shows it.

    Returns:
        The scores.

    Raises:
        InputError: If they can't be had.
    """
    device = next(network.parameters()).device
    strategy = copy.deepcopy(asked.strategy)
    method = asked.method
    if method is not None and method.rise is not None:
        strategy = Newton(target_increase=method.rise)
    module = UnlearningModule(network, asked.objective, fisher, asked.parameters, strategy, copy.deepcopy(asked.views))

    def unlearned(place: Path, rule: Any) -> ScoreTable:
        writer = ScoreWriter(str(place), rule, getattr(data, "on_bad_sample", "error"))
        trainer = _trainer(place, device, writer)
        trainer.fit(module, data)
        trainer.predict(module, data, return_predictions=False)
        if writer.failures:
            raise InputError(f"{len(writer.failures)} shards were not scored: {next(iter(writer.failures.values()))}")
        data.skip_shards(frozenset())  # type: ignore[attr-defined]  # whoever comes now looks at all of them
        return read_scores(place)

    if method is None:
        return unlearned(folder, "ratio")
    asks = method.rise is not None
    before = (lambda: unlearned(folder / "unlearning", "difference")) if asks else None
    MethodRun(method, module, data, _trainer(folder, device), folder, before).run()  # type: ignore[arg-type]
    return read_scores(folder)


def _trainer(folder: Path, device: torch.device, *callbacks: Callback) -> Trainer:
    """A Trainer of one process, whatever processes the training has, that says, logs and keeps nothing."""
    return Trainer(
        accelerator="gpu" if device.type == "cuda" else device.type,
        devices=[device.index or 0] if device.type == "cuda" else 1,
        plugins=[LightningEnvironment()],
        callbacks=list(callbacks),
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=str(folder),
    )
