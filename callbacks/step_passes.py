"""The backward passes that one optimizer step takes together, and what becomes of them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from lightning_unlearn.callbacks.own_loss import own_loss_factor
from lightning_unlearn.callbacks.sample_rows import SampleRows, one_join
from lightning_unlearn.errors import InputError
from lightning_unlearn.fisher import Fisher
from lightning_unlearn.fisher.parts import add_part, part_of
from lightning_unlearn.weights.capture import Use


@dataclass(frozen=True)
class WeightedLoss:
    """What a backward pass's loss was multiplied with.

    Attributes:
        factor: What undoes what the Trainer multiplied it with.
        weights: Each sample's weight in it, ``(B,)``, if they have any.
    """

    factor: float
    weights: Tensor | None


@dataclass
class Pass:
    """A backward pass.

    Attributes:
        loss: Where it came from.
        uses: Layer name to its uses, where they are held.
        parts: The sums of each layer, where they are not.
        samples: How many it has, without those of weight 0.
        joins: Samples, and how many of them a mean joins, to a layer that saw so many.
        refusal: Why a layer's sums can't be taken.
        finite: Whether all gradients that came are finite.
    """

    loss: WeightedLoss
    uses: dict[str, list[Use]] = field(default_factory=dict)
    parts: dict[str, Fisher] = field(default_factory=dict)
    samples: int = 0
    joins: dict[tuple[int, float], str] = field(default_factory=dict)
    refusal: InputError | None = None
    finite: bool = True


class StepPasses:
    """Backward passes wait here for the step that they lead to.

    Those of one batch count together: a sample's gradients are summed over them before they are squared, so they are
    held. Where a batch has but one, each layer's gradients are squared and summed when they come. Those of several
    batches that one step takes, as in gradient accumulation, are of other samples and count by themselves.

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
        self._of_batch: list[Pass] = []
        self._current: Pass | None = None
        self._like: Fisher | None = None
        self._parked: Fisher | None = None  # of earlier batches that no step has taken yet
        self._parked_skips = 0

    def begin(self, sizes: tuple[int, ...]) -> None:
        """A batch begins.

        Args:
            sizes: How many samples it may have.
        """
        self._sizes = sizes
        self._of_batch = []

    def start(self, loss: WeightedLoss, like: Fisher | None) -> None:
        """A backward pass of this batch begins.

        Args:
            loss: Where it comes from.
            like: Of the sums' kind and stage, if no other pass of this batch will count together with it.
        """
        self._current, self._like = Pass(loss), like

    def take_layer(self, name: str, uses: list[Use]) -> None:
        """What the current pass leaves at a layer; what can't be used is refused when the pass has ended.

        Args:
            name: The layer's.
            uses: All its uses.
        """
        current = self._current
        assert current is not None
        if self._like is None:
            current.uses[name] = uses
            return
        try:
            captured, samples, joined = self.rows.arrange([{name: uses}], self._sizes)
            own = self._own_factor(samples, joined, current.loss)
        except InputError as error:
            current.refusal = current.refusal or error
            return
        current.joins.setdefault((samples, joined), name)
        current.samples = samples - _left_out(own)
        part = current.parts[name] = part_of(self._like, name)
        part.update({name: captured[name].scaled(own * current.loss.factor)})

    def end(self, *, finite: bool) -> None:
        """The current pass has ended, and waits for its step.

        Args:
            finite: Whether all its gradients are finite.

        Raises:
            InputError: If what it left can't be used.
        """
        current, self._current = self._current, None
        assert current is not None
        current.finite = finite
        if finite and current.refusal is not None:
            raise current.refusal
        if finite and current.joins:
            one_join(current.joins)
        self._of_batch.append(current)

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
        if not all(taken.finite for taken in passes):
            return False  # the GradScaler skips this step too
        if any(taken.parts for taken in passes):
            self._add_parts(passes, sums)
        else:
            self._add_held(passes, sums)
        return True

    def _add_parts(self, passes: list[Pass], sums: Fisher) -> None:
        if len(passes) > 1:
            raise InputError(
                f"{len(passes)} backward passes of one batch lead to one step, and with automatic optimization each of "
                "them counts by itself; use manual optimization, with which they count together."
            )
        for part in passes[0].parts.values():
            add_part(sums, part)
        sums.count += passes[0].samples

    def _add_held(self, passes: list[Pass], sums: Fisher) -> None:
        loss = passes[0].loss
        uses = [_scaled(taken.uses, taken.loss.factor / loss.factor) for taken in passes]
        captured, samples, joined = self.rows.arrange(uses, self._sizes)
        if loss.weights is not None and not all(_equal(loss.weights, taken.loss.weights) for taken in passes):
            raise InputError(
                f"{self.sample_weights!r} changed between backward passes of one step, so one weight a sample undoes "
                "neither; leave sample_weights out, or take a step after each pass."
            )
        own = self._own_factor(samples, joined, loss)
        sums.update({name: layer.scaled(own * loss.factor) for name, layer in captured.items()})
        sums.count -= _left_out(own)

    def _own_factor(self, samples: int, joined: float, loss: WeightedLoss) -> float | Tensor:
        return own_loss_factor(samples, joined, self.reduction, self.loss_scale, loss.weights, self.sample_weights)


def _left_out(own: float | Tensor) -> int:
    """How many samples have no weight in the loss."""
    return int((own == 0).sum()) if isinstance(own, Tensor) else 0


def _equal(one: Tensor, other: Tensor | None) -> bool:
    return other is not None and torch.equal(one, other)


def _scaled(uses: Mapping[str, list[Use]], factor: float) -> Mapping[str, list[Use]]:
    if factor == 1:
        return uses
    return {
        name: [Use(use.order, use.call, use.layer.scaled(factor), use.dtype) for use in found]
        for name, found in uses.items()
    }
