"""Settings of a Trainer that would give wrong deltas or scores without a word, and what a strategy can't do without."""

from __future__ import annotations

from typing import Any

from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import EarlyStopping, Timer
from lightning.pytorch.plugins.io import TorchCheckpointIO
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy
from lightning.pytorch.strategies.launchers import _MultiProcessingLauncher

from lightning_unlearn.errors import InputError
from lightning_unlearn.strategies import Strategy
from lightning_unlearn.weights.delta_files import WholeCheckpointIO


def check_precision(trainer: Trainer) -> None:
    """Refuse precisions in which weights themselves are rounded: a delta is some 1e-4 of its weight.

    Args:
        trainer: The Trainer.

    Raises:
        InputError: If its precision would lose the deltas.
    """
    if trainer.precision in ("16-true", "bf16-true", "transformer-engine"):
        raise InputError(
            f"Precision {trainer.precision} would round the deltas away; use 32-true, or bf16-mixed for scoring."
        )


def check_unlearning(trainer: Trainer) -> None:
    """Refuse what would change an unlearning step or skip it.

    Args:
        trainer: The Trainer, before it fits.

    Raises:
        InputError: If it measures losses in low precision, clips gradients, would end early or was used before.
    """
    if trainer.precision not in ("32-true", "64-true"):
        raise InputError(
            f"The rise of a query's loss can't be measured in precision {trainer.precision}; unlearn with 32-true."
        )
    if not isinstance(trainer.strategy, SingleDeviceStrategy | DDPStrategy):
        raise InputError(
            f"{type(trainer.strategy).__name__} cuts weights apart, and deltas with them; use strategy auto or ddp."
        )
    if trainer.gradient_clip_val is not None:
        raise InputError(
            "The Trainer clips gradients, which would change the unlearning step; leave gradient_clip_val out."
        )
    check_processes(trainer)
    _refuse_early_ends(trainer)
    if trainer.current_epoch > 0:
        raise InputError(
            "This Trainer has run fit before and would count its epochs as steps of the unlearning; make a new Trainer."
        )


def check_processes(trainer: Trainer) -> None:
    """Refuse to unlearn in processes that end with ``fit``, and the deltas in them.

    Args:
        trainer: The Trainer.

    Raises:
        InputError: If its strategy forks or spawns its processes.
    """
    if isinstance(trainer.strategy.launcher, _MultiProcessingLauncher):
        raise InputError(
            "The Trainer's strategy forks or spawns processes that end with fit, and their deltas with them; unlearn "
            "with strategy ddp in a script, or on one device in a notebook."
        )


def _refuse_early_ends(trainer: Trainer) -> None:
    """Refuse what would end a fit before its last step; what only shows while it runs, it refuses at its end."""
    callbacks = trainer.callbacks  # type: ignore[attr-defined]
    if any(isinstance(callback, Timer) for callback in callbacks):
        what = "max_time or a Timer"
    elif any(isinstance(callback, EarlyStopping) for callback in callbacks):
        what = "EarlyStopping"
    elif trainer.limit_train_batches == 0:
        what = "limit_train_batches: 0"
    else:
        return
    raise InputError(
        f"The Trainer may end the unlearning before its last step, by {what}, and its deltas would be wrong; leave "
        "that out: the strategy says how many steps it takes."
    )


def set_steps(trainer: Trainer, strategy: Strategy) -> None:
    """Give the Trainer the exact number of steps, and a way to keep checkpoints that a kill can't cut short.

    Args:
        trainer: The Trainer, before it fits.
        strategy: How deltas are found.
    """
    trainer.fit_loop.max_epochs, trainer.fit_loop.min_epochs = strategy.steps, None
    trainer.fit_loop.epoch_loop.max_steps, trainer.fit_loop.epoch_loop.min_steps = -1, None
    if type(trainer.strategy.checkpoint_io) is TorchCheckpointIO:
        trainer.strategy.checkpoint_io = WholeCheckpointIO()


def check_needs(strategy: Strategy, fisher: object, datamodule: Any) -> None:
    """Refuse to unlearn without what the strategy needs.

    Args:
        strategy: How deltas are found.
        fisher: Where the Fisher comes from, ``None`` if there is none.
        datamodule: Of the fit.

    Raises:
        InputError: If a Fisher or real samples are missing.
    """
    if strategy.needs_fisher and fisher is None:
        raise InputError(
            "Unlearning needs a Fisher: train with FisherAccumulator or run `lightning-unlearn fisher`, and "
            "pass its file as fisher."
        )
    if strategy.needs_samples and not hasattr(datamodule, "real_samples"):
        why, remedy = ("also trains on real samples", "")
        if not strategy.real_draws:
            why, remedy = ("measures its step by the mean loss of samples", ", or give it a target_increase")
        raise InputError(
            f"{type(strategy).__name__} {why}, but {type(datamodule).__name__} has no real_samples; use "
            f"AttributionDataModule with the training shards{remedy}."
        )
