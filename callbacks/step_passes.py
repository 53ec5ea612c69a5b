"""The backward passes that one optimizer step takes together, and what becomes of them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from lightning_unlearn.callbacks.batch_watch import BackwardPass
from lightning_unlearn.callbacks.own_loss import own_loss_factor
from lightning_unlearn.callbacks.sample_rows import SampleRows
from lightning_unlearn.errors import InputError
from lightning_unlearn.fisher import Fisher
from lightning_unlearn.weights.capture import Use


@dataclass(frozen=True)
class WeightedPass:
    """A backward pass with what its loss was multiplied with.

    Attributes:
        found: What it left.
        factor: What undoes what the Trainer multiplied its loss with.
        weights: Each sample's weight in its loss, ``(B,)``, if they have any.
    """

    found: BackwardPass
    factor: float
    weights: Tensor | None


class StepPasses:
    """Backward passes wait here for the step that they lead to.

    Those of one batch count together: a sample's gradients are summed over them before they are squared. Those of
    several batches that one step takes, as in gradient accumulation, are of other samples and count by themselves.

    Args:
        rows: Which sample each row is of.
        reduction: How a loss joins its samples.
        loss_scale: A constant factor of the loss.
        sample_weights: The name of the samples' weights, for messages.

    Attributes:
        skipped: How many batches were left out since a gradient was not finite.
    """

    def __init__(
        self, rows: SampleRows, reduction: Literal["mean", "sum"], loss_scale: float, sample_weights: str | None
    ) -> None:
        self.rows = rows
        self.reduction: Literal["mean", "sum"] = reduction
        self.loss_scale = loss_scale
        self.sample_weights = sample_weights
        self.skipped = 0
        self._sizes: tuple[int, ...] = ()
        self._of_batch: list[WeightedPass] = []
        self._parked: Fisher | None = None  # of earlier batches that no step has taken yet
        self._parked_skips = 0

    def begin(self, sizes: tuple[int, ...]) -> None:
        """A batch begins.

        Args:
            sizes: How many samples it may have.
        """
        self._sizes = sizes
        self._of_batch = []

    def add(self, taken: WeightedPass) -> None:
        """A backward pass of this batch waits for its step.

        Args:
            taken: It.
        """
        self._of_batch.append(taken)

    @property
    def waiting(self) -> bool:
        """Whether any pass waits."""
        return bool(self._of_batch) or self._parked is not None or self._parked_skips > 0

    def drop(self) -> None:
        """The gradients were zeroed: what waited leads to no step."""
        self._of_batch, self._parked, self._parked_skips = [], None, 0

    def park(self, like: Fisher) -> None:
        """The batch ends before its step: keep its sums apart until that comes.

        Args:
            like: Of the sums' kind and stage.
        """
        if not self._of_batch:
            return
        parked = self._parked if self._parked is not None else like.empty()
        if self._add_batch(parked):
            self._parked = parked
        else:
            self._parked_skips += 1

    def commit(self, sums: Fisher) -> bool:
        """The step has come: add what waited.

        Args:
            sums: To which.

        Returns:
            Whether there was anything to add.
        """
        added = False
        if self._parked is not None:
            sums.merge(self._parked)
            added = True
        self.skipped += self._parked_skips
        if self._of_batch:
            if self._add_batch(sums):
                added = True
            else:
                self.skipped += 1
        self.drop()
        return added

    def _add_batch(self, sums: Fisher) -> bool:
        """Add the passes of this batch together; returns whether they are finite."""
        passes, self._of_batch = self._of_batch, []
        if not all(taken.found.finite for taken in passes):
            return False  # the GradScaler skips this step too
        factor = passes[0].factor
        uses = [_scaled(taken.found.uses, taken.factor / factor) for taken in passes]
        captured, samples, joined = self.rows.arrange(uses, self._sizes)
        weights = passes[0].weights
        if weights is not None and not all(_equal(weights, taken.weights) for taken in passes):
            raise InputError(
                f"{self.sample_weights!r} changed between backward passes of one step, so one weight a sample undoes "
                "neither; leave sample_weights out, or take a step after each pass."
            )
        own = own_loss_factor(samples, joined, self.reduction, self.loss_scale, weights, self.sample_weights)
        sums.update({name: layer.scaled(own * factor) for name, layer in captured.items()})
        if isinstance(own, Tensor):
            sums.count -= int((own == 0).sum())
        return True


def _equal(one: Tensor, other: Tensor | None) -> bool:
    return other is not None and torch.equal(one, other)


def _scaled(uses: Mapping[str, list[Use]], factor: float) -> Mapping[str, list[Use]]:
    if factor == 1:
        return uses
    return {
        name: [Use(use.order, use.call, use.layer.scaled(factor), use.dtype) for use in found]
        for name, found in uses.items()
    }
