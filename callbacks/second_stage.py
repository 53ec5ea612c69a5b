"""When a Fisher that is collected in two stages goes on to the second."""

from __future__ import annotations

import math

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import EarlyStopping, GradientAccumulationScheduler, Timer
from lightning.pytorch.utilities import rank_zero_warn

from lightning_unlearn.errors import InputError


class SecondStage:
    """At a given step and epoch, or else when half of the batches are done from the first one on that was taken.

    Half way is counted in batches that were seen and batches that are still planned, not in steps, of which a batch may
    have none or several.

    Args:
        step: Optimizer step of the second stage, if given.
        epoch: Its epoch; both must be reached if both are given.

    Attributes:
        seen: How many batches were seen from the first taken one on, before this one.
    """

    def __init__(self, step: int | None, epoch: int | None) -> None:
        self.step = step
        self.epoch = epoch
        self.seen = 0

    def plan(self, trainer: Trainer) -> None:
        """Say at the start what is at risk.

        Args:
            trainer: At the start of a training.

        Raises:
            InputError: If it is not known how long the training will be, and nothing is given.
        """
        if self.step is None and self.epoch is None and not _has_an_end(trainer):
            raise InputError(
                "How long this training will be is not known, so half way is not either; set eigenvalue_step or "
                "eigenvalue_epoch of FisherAccumulator."
            )
        stopping = [
            type(callback).__name__
            for callback in getattr(trainer, "callbacks", [])
            if isinstance(callback, EarlyStopping | Timer)
        ]
        if stopping:
            rank_zero_warn(
                f"{' and '.join(stopping)} may end training before the EKFAC Fisher's eigenvalues are collected, which "
                "follow its covariances; they would be those of the Kronecker product then. Set eigenvalue_step or "
                "eigenvalue_epoch of FisherAccumulator to where training surely comes."
            )

    def is_due(self, trainer: Trainer, module: LightningModule, batch_idx: int) -> bool:
        """Whether the second stage has come; the same on all ranks.

        Args:
            trainer: Before a batch.
            module: That is trained.
            batch_idx: The batch in its epoch.

        Returns:
            Whether it has.
        """
        if self.step is None and self.epoch is None:
            return self.seen > 0 and self.seen >= _batches_left(trainer, module, batch_idx)
        # As in FisherAccumulator.should_capture, both must be reached.
        return trainer.global_step >= (self.step or 0) and trainer.current_epoch >= (self.epoch or 0)


def _has_an_end(trainer: Trainer) -> bool:
    epochs, steps = trainer.max_epochs, trainer.max_steps
    known = not math.isinf(trainer.num_training_batches)
    return (epochs is not None and epochs >= 0 and known) or steps >= 0


def _batches_left(trainer: Trainer, module: LightningModule, batch_idx: int) -> float:
    """How many batches are planned from this one on, itself among them."""
    in_epoch = float(trainer.num_training_batches)
    left = math.inf
    if trainer.max_epochs is not None and trainer.max_epochs >= 0:
        left = (trainer.max_epochs - trainer.current_epoch) * in_epoch - batch_idx
    if trainer.max_steps < 0:
        return left
    steps = trainer.max_steps - trainer.global_step
    if not module.automatic_optimization:
        # As many steps a batch as there were so far; Lightning counts those of each optimizer.
        batches = trainer.fit_loop.epoch_loop.total_batch_idx
        return min(left, steps * batches / trainer.global_step if trainer.global_step else math.inf)
    return min(left, _batches_for_steps(trainer, steps, batch_idx))


def _batches_for_steps(trainer: Trainer, steps: int, batch_idx: int) -> float:
    """How many batches so many steps take, with the last accumulation of an epoch being as short as it is."""
    schedules = [
        callback
        for callback in getattr(trainer, "callbacks", [])
        if isinstance(callback, GradientAccumulationScheduler)
    ]
    in_epoch = trainer.num_training_batches
    epoch, position, batches = trainer.current_epoch, batch_idx, 0.0
    while True:
        joined = schedules[0].get_accumulate_grad_batches(epoch) if schedules else trainer.accumulate_grad_batches
        if math.isinf(in_epoch):
            return steps * joined
        left = in_epoch - position
        here = math.ceil(in_epoch / joined) - position // joined  # steps left in this epoch
        if steps <= here:
            return batches + min(left, steps * joined - position % joined)
        if here <= 0 and epoch > trainer.current_epoch:
            return math.inf
        steps, batches, epoch, position = steps - here, batches + left, epoch + 1, 0
