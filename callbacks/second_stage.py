"""When a Fisher that is collected in two stages goes on to the second."""

from __future__ import annotations

import math

from lightning.pytorch import LightningModule, Trainer

from lightning_unlearn.errors import InputError


class SecondStage:
    """At a given step and epoch, or else half way between the start of collection and the planned end of training.

    Args:
        start_step: Optimizer step at which the first stage starts.
        start_epoch: Epoch at which it does.
        step: Optimizer step of the second stage, if given.
        epoch: Its epoch; both must be reached if both are given.
    """

    def __init__(self, start_step: int, start_epoch: int, step: int | None, epoch: int | None) -> None:
        self.start_step = start_step
        self.start_epoch = start_epoch
        self.step = step
        self.epoch = epoch
        self._half_way: int | None = None

    def plan(self, trainer: Trainer) -> None:
        """Find half way, if nothing is given.

        Args:
            trainer: At the start of a training.

        Raises:
            InputError: If it is not known how long the training will be.
        """
        self._half_way = None
        if self.step is None and self.epoch is None:
            self._half_way = self._find_half_way(trainer)

    def is_due(self, trainer: Trainer, module: LightningModule) -> bool:
        """Whether the second stage has come; the same on all ranks.

        Args:
            trainer: Before a batch.
            module: That is trained.

        Returns:
            Whether it has.
        """
        if self._half_way is not None:
            epoch_loop = trainer.fit_loop.epoch_loop
            done = trainer.global_step if module.automatic_optimization else epoch_loop.total_batch_idx
            return done >= self._half_way
        # As in FisherAccumulator.should_capture, both must be reached.
        return trainer.global_step >= (self.step or 0) and trainer.current_epoch >= (self.epoch or 0)

    def _find_half_way(self, trainer: Trainer) -> int:
        """The step, with manual optimization the batch."""
        end = trainer.estimated_stepping_batches
        start: float = self.start_step
        if self.start_epoch > 0:
            start = max(
                start, self.start_epoch * math.ceil(trainer.num_training_batches / trainer.accumulate_grad_batches)
            )
        if end < 0 or math.isinf(end) or math.isinf(start):
            raise InputError(
                "How long this training will be is not known, so half way is not either; set eigenvalue_step or "
                "eigenvalue_epoch of FisherAccumulator."
            )
        return math.ceil((start + end) / 2)
