"""A callback that has a FisherAccumulator inside."""

from __future__ import annotations

from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor
from typing_extensions import override

from lightning_unlearn.callbacks.fisher_accumulator import FisherAccumulator


class WithFisher(Callback):
    """Whatever a Trainer tells this callback, the accumulator inside is told first.

    Args:
        fisher: The accumulator.
        takes: Whether it collects anything; if not, it only names the network and its weights.
    """

    def __init__(self, fisher: FisherAccumulator, *, takes: bool) -> None:
        self.fisher = fisher
        self._takes = takes

    @property
    @override
    def state_key(self) -> str:
        """One state for each accumulator."""
        return f"{type(self).__qualname__} of {self.fisher.state_key}"

    @override
    def state_dict(self) -> dict[str, Any]:
        """What the accumulator keeps."""
        return self.fisher.state_dict() if self._takes else {}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Give it back to the accumulator."""
        if self._takes:
            self.fisher.load_state_dict(state_dict)

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Tell the accumulator."""
        if self._takes:
            self.fisher.setup(trainer, pl_module, stage)

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Tell the accumulator."""
        if self._takes:
            self.fisher.on_train_start(trainer, pl_module)

    @override
    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Tell the accumulator."""
        if self._takes:
            self.fisher.on_train_batch_start(trainer, pl_module, batch, batch_idx)

    @override
    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        """Tell the accumulator."""
        if self._takes:
            self.fisher.on_before_backward(trainer, pl_module, loss)

    @override
    def on_after_backward(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Tell the accumulator."""
        if self._takes:
            self.fisher.on_after_backward(trainer, pl_module)

    @override
    def on_before_optimizer_step(
        self, trainer: Trainer, pl_module: LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        """Tell the accumulator."""
        if self._takes:
            self.fisher.on_before_optimizer_step(trainer, pl_module, optimizer)

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Tell the accumulator."""
        if self._takes:
            self.fisher.on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)

    @override
    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Tell the accumulator."""
        if self._takes:
            self.fisher.on_train_epoch_end(trainer, pl_module)

    @override
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Tell the accumulator."""
        if self._takes:
            self.fisher.on_train_end(trainer, pl_module)

    @override
    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Tell the accumulator."""
        if self._takes:
            self.fisher.on_exception(trainer, pl_module, exception)

    @override
    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Tell the accumulator."""
        if self._takes:
            self.fisher.teardown(trainer, pl_module, stage)
