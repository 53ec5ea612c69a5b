"""What one fit collects: which backward passes it hears, holds until their step, and adds to the sums."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_pre_hook

from lightning_unlearn.callbacks.batch_watch import BatchWatch
from lightning_unlearn.callbacks.fisher_sums import FisherSums
from lightning_unlearn.callbacks.own_loss import trainers_factor, weights_of_samples
from lightning_unlearn.callbacks.refusals import Refusals
from lightning_unlearn.callbacks.sample_rows import RowsPerSample, SampleRows, samples_in
from lightning_unlearn.callbacks.step_passes import StepPasses, WeightedLoss
from lightning_unlearn.callbacks.what_mixes_samples import (
    holds,
    refuse_batch_norm,
    refuse_repeated_closures,
    trains_nothing,
)
from lightning_unlearn.errors import InputError
from lightning_unlearn.training import FisherPass
from lightning_unlearn.weights.parameters import layer_parameters


class Collection:
    """The hooks and the waiting backward passes of one fit.

    With automatic optimization there is one backward pass a batch, which counts by itself. With manual optimization
    passes wait for the step of an optimizer that holds a chosen weight, and are forgotten where gradients are zeroed
    before it; in a fit without any optimizer, where they are zeroed or the batch ends is where they count.

    Args:
        trainer: Of the fit.
        module: That is trained.
        network: The part of it whose layers are chosen.
        layers: The chosen layers, by name.
        refusals: Holds what a step is refused for.
        target: The network's dotted name, for messages.
        sums: To which gradients are added.
        reduction: How the loss joins its samples.
        loss_scale: A constant factor of the loss.
        sample_weights: Name of the attribute that holds each sample's weight.
        rows_per_sample: Which sample each row is of.

    Attributes:
        steps: The first and the last optimizer step of which something was added.

    Raises:
        InputError: If an optimizer can't be followed.
    """

    def __init__(
        self,
        trainer: Trainer,
        module: LightningModule,
        network: nn.Module,
        layers: Mapping[str, nn.Module],
        *,
        refusals: Refusals,
        target: str,
        sums: FisherSums,
        reduction: Literal["mean", "sum"],
        loss_scale: float,
        sample_weights: str | None,
        rows_per_sample: RowsPerSample | None,
    ) -> None:
        self.steps: list[int] = []
        self._refusals = refusals
        self._trainer = trainer
        self._module = module
        self._network = network
        self._layers = layers
        self._target = target
        self._sums = sums
        self._sample_weights = sample_weights
        refuse_repeated_closures(trainer.optimizers, layer_parameters(layers).values())
        self._alone = trains_nothing(trainer.optimizers, module)
        self._passes = StepPasses(SampleRows(rows_per_sample, module), reduction, loss_scale, sample_weights)
        self._loss_scale = loss_scale
        self._takes = False  # this batch
        self._stepped: set[str] = set()  # the parameters that a step has come to of the passes that wait
        self._watch = BatchWatch(network, layers, target, self._passes.take_layer)
        self._one_pass = has_one_pass(module)
        # Lightning says so for its own optimizers' steps only, and torch not for those that a GradScaler skips.
        self._handle = register_optimizer_step_pre_hook(self._before_step)

    @property
    def skipped_batches(self) -> int:
        """How many batches were left out since a gradient was not finite."""
        return self._passes.skipped

    def begin(self, batch: Any, *, take: bool) -> None:
        """A batch begins.

        Args:
            batch: It.
            take: Whether its gradients are to be taken.
        """
        self._takes = take
        self._passes.begin(samples_in(batch) if take else ())
        self._watch.begin(take=take)

    def before_backward(self, loss: Tensor) -> None:
        """Lightning's backward pass begins.

        Args:
            loss: From which it goes.

        Raises:
            InputError: If only some of the chosen parameters were stepped after the pass before.
        """
        if self._stepped:
            raise InputError(
                f"Several optimizers step parts of the chosen layers of {self._target!r} after backward passes of "
                "their own, so the layers would be of different losses; use a FisherAccumulator for each optimizer, "
                "with the layers that it steps and a path of its own."
            )
        if self._passes.waiting and self._watch.no_gradients():
            if self._alone:
                self._commit()
            self._passes.drop()
        if self._takes:
            weights = weights_of_samples(self._module, self._sample_weights)
            like = self._sums.local if self._one_pass else None
            self._passes.start(WeightedLoss(trainers_factor(self._trainer), weights), like)
        self._watch.before_backward(loss)

    def after_backward(self) -> None:
        """Lightning's backward pass has ended; gradients are not yet unscaled or clipped."""
        finite = self._watch.take(self._loss_scale)
        if finite is None:
            return
        refuse_batch_norm(self._network, self._target)
        self._passes.end(finite=finite)
        if self._module.automatic_optimization:
            self._commit()

    def _before_step(self, optimizer: Optimizer, *arguments: Any) -> None:
        self._refusals.run(lambda: self.before_step(optimizer))

    def before_step(self, optimizer: Optimizer) -> None:
        """An optimizer will step, whoever it belongs to.

        Args:
            optimizer: It.
        """
        chosen = layer_parameters(self._layers)
        if not holds(optimizer, chosen.values()):
            return
        self._alone = False
        self._watch.refuse_foreign()
        if self._passes.waiting:
            self._stepped |= {name for name, parameter in chosen.items() if holds(optimizer, [parameter])}
            if len(self._stepped) == len(chosen):  # several optimizers may take their parts of the same passes
                self._commit()

    def _commit(self) -> None:
        assert self._sums.local is not None
        self._stepped = set()
        if self._passes.commit(self._sums.local):
            now = self._trainer.global_step
            self.steps = [self.steps[0] if self.steps else now, now]

    def end(self) -> None:
        """A batch ends."""
        self._watch.end(automatic_optimization=self._module.automatic_optimization)
        if self._alone:
            self._commit()
        assert self._sums.local is not None
        self._passes.park(self._sums.local)

    def drop_waiting(self) -> None:
        """Forget what waits for a step, since the sums go on to another stage."""
        self._passes.drop()

    def refuse_silence(self) -> None:
        """Refuse to go on if batches were watched and no gradient came.

        Raises:
            InputError: If so.
        """
        self._watch.refuse_silence()

    def detach(self) -> None:
        """Take the hooks off."""
        self._watch.detach()
        self._handle.remove()


def has_one_pass(module: LightningModule) -> bool:
    """Whether each batch surely has one backward pass, so that none counts together with another.

    Args:
        module: That is trained.

    Returns:
        Whether Lightning runs it, or it is a pass for a Fisher.
    """
    if isinstance(module, FisherPass):
        return True
    return module.automatic_optimization and not is_overridden("backward", module)
