"""Settings of a Trainer that would give wrong deltas or scores without a word, and what a strategy can't do without."""

from __future__ import annotations

from typing import Any

from lightning.pytorch import Trainer
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy

from lightning_unlearn.errors import InputError
from lightning_unlearn.strategies import Strategy


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
        InputError: If it measures losses in low precision, clips gradients or was used before.
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
    if trainer.current_epoch > 0:
        raise InputError(
            "This Trainer has run fit before and would count its epochs as steps of the unlearning; make a new Trainer."
        )


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
