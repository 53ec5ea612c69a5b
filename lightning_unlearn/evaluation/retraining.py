"""Training the models of a study, one after the other; each finished one is kept at once."""

from __future__ import annotations

import platform
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from lightning.pytorch import seed_everything as seed_all
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch import nn
from tqdm import tqdm

from lightning_unlearn.data.files import write_atomically
from lightning_unlearn.diffusion.objective import Objective, check_masks
from lightning_unlearn.errors import InputError
from lightning_unlearn.evaluation.measuring import Measuring
from lightning_unlearn.evaluation.runs import Run
from lightning_unlearn.evaluation.study import Study
from lightning_unlearn.weights.parameters import find_network


@dataclass(frozen=True)
class Training:
    """Everything that one training needs, made anew for each, from the run's seed.

    Attributes:
        module: Any LightningModule that trains on the data.
        data: Its data, without the run's removed samples.
        trainer: An unused Trainer of one process.
    """

    module: LightningModule
    data: LightningDataModule
    trainer: Trainer


@dataclass(frozen=True)
class Share:
    """Which of several processes this one is, and how many there are.

    Attributes:
        index: From 0.
        count: How many processes the models are dealt to.

    Raises:
        InputError: If there is no such process among so many.
    """

    index: int = 0
    count: int = 1

    def __post_init__(self) -> None:
        if not 0 <= self.index < self.count:
            raise InputError(f"Share {self.index} of {self.count} is none; the index goes from 0 to the count - 1.")

    def of(self, runs: Sequence[Run]) -> list[Run]:
        """This process's runs.

        The full list is dealt, and only then are finished ones left out, so that a process that starts later or again
        takes the same share.

        Args:
            runs: All runs of an evaluation.

        Returns:
            Every ``count``-th.
        """
        return list(dict.fromkeys(runs))[self.index :: self.count]


class Retrainer:
    """Trains and measures the models of a study.

    Args:
        build: Makes a run's module, data and Trainer; everything random has been seeded with the run's seed before.
        measure: What is measured of a trained network.
        study: Where the numbers are kept.
        target: Dotted name of the network in the module; empty for the module itself.
        objective: Its loss; by default the module's attribute ``objective``.
        weights: Folder to keep each trained network's weights in; they are dropped if not given.
    """

    def __init__(
        self,
        build: Callable[[Run], Training],
        measure: Measuring,
        study: Study,
        target: str = "network",
        objective: Objective | None = None,
        weights: Path | None = None,
    ) -> None:
        self.build = build
        self.measure = measure
        self.study = study
        self.target = target
        self.objective = objective
        self.weights = weights

    def train(self, runs: Sequence[Run], share: Share | None = None) -> int:
        """Train this process's share of the runs that are not finished.

        Args:
            runs: All runs of an evaluation.
            share: This process's place among several; alone by default.

        Returns:
            How many models were trained.
        """
        missing = self.study.missing((share or Share()).of(runs))
        trained = 0
        for run in tqdm(missing, desc="Retraining", unit="model", disable=not missing, dynamic_ncols=True):
            if not self.study.is_finished(run):  # another evaluation of the same study may have come to it
                self.train_one(run)
                trained += 1
        return trained

    def train_one(self, run: Run) -> None:
        """Train one model from scratch, measure it, and keep the numbers.

        Args:
            run: Which.
        """
        started = time.monotonic()
        module = fit_run(self._checked, run)
        network = find_network(module, self.target)
        outcomes = self.measure(network, self._objective(module))
        seconds = time.monotonic() - started
        if self.weights is not None:
            self._keep(network, run)
        self.study.write(run, outcomes, seconds, about(network))

    def _checked(self, run: Run) -> Training:
        training = self.build(run)
        # What can't be measured need not be trained; a module that makes its parts later is looked at afterwards.
        if not is_overridden("configure_model", training.module):
            find_network(training.module, self.target)
            self._objective(training.module)
        return training

    def _keep(self, network: nn.Module, run: Run) -> None:
        assert self.weights is not None
        # Copies, since safetensors refuses tied weights.
        state = {
            name: weight.detach().to("cpu", copy=True).contiguous() for name, weight in network.state_dict().items()
        }
        try:
            self.weights.mkdir(parents=True, exist_ok=True)
            write_atomically(self.weights / f"{run.name}.safetensors", safetensors.torch.save(state))
        except OSError as error:
            raise InputError(
                f"A network's weights can't be written to {self.weights} ({error.strerror}); choose another folder."
            ) from None

    def _objective(self, module: LightningModule) -> Objective:
        found = self.objective if self.objective is not None else getattr(module, "objective", None)
        if not isinstance(found, Objective):
            raise InputError(
                f"{type(module).__name__} has no attribute `objective`, by which the queries' losses are measured; "
                "give one with --objective."
            )
        check_masks(found, self.measure.queries)
        return found


def fit_run(build: Callable[[Run], Training], run: Run) -> LightningModule:
    """Train a run's model from scratch.

    Args:
        build: Makes its module, data and Trainer, after everything random was seeded.
        run: Which.

    Returns:
        The trained module, on the device where it was trained.

    Raises:
        InputError: If its Trainer has several processes.
        KeyboardInterrupt: If the training was interrupted.
    """
    seed_all(run.seed, workers=True, verbose=False)
    training = build(run)
    if training.trainer.world_size > 1:
        raise InputError(
            "Each model is retrained by one process; set devices to 1 and deal the models to processes by index."
        )
    training.trainer.fit(training.module, training.data)
    if training.trainer.interrupted:  # the model is half trained, whether or not Lightning raises something itself
        raise KeyboardInterrupt
    # Lightning leaves a module on the CPU.
    return training.module.to(training.trainer.strategy.root_device)


def about(network: nn.Module) -> dict[str, Any]:
    """Where and with what a model was trained.

    Args:
        network: The model.

    Returns:
        Versions and device; they are no part of the recipe.
    """
    return {
        "torch": torch.__version__,
        "lightning": version("lightning"),
        "device": str(next(network.parameters()).device.type),
        "machine": platform.machine(),
        "threads": torch.get_num_threads(),
    }
