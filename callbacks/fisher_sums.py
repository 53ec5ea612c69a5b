"""The sums of a Fisher over ranks and over runs that follow one another."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor

from lightning_unlearn.errors import InputError
from lightning_unlearn.fisher import FISHERS, Fisher, Targets
from lightning_unlearn.weights.parameters import LayerSpec


class FisherSums:
    """Sums of this rank in this fit, and those that a resume or an earlier fit brought.

    The latter are over all ranks already and kept apart, so that they are counted once however many ranks there are.

    Args:
        kind: Of Fisher.
        file: Where the total will be written, for messages.

    Attributes:
        local: The sums of this rank in this fit.
        earlier: The state over all ranks of what came before, as :meth:`Fisher.state` gives it.
    """

    def __init__(self, kind: str, file: str) -> None:
        self.kind = kind
        self.file = file
        self.local: Fisher | None = None
        self.earlier: dict[str, Any] | None = None
        self._trainer: Trainer | None = None  # while it trains

    @property
    def in_last_stage(self) -> bool:
        """Whether no further stage follows."""
        return self.local is None or self.local.stage in (None, *self.local.stages[-1:])

    def forget(self) -> None:
        """Start anew."""
        self.local = self.earlier = None

    def start(self, trainer: Trainer, layers: Mapping[str, LayerSpec], dtype: torch.dtype, targets: Targets) -> None:
        """Begin with the sums of a fit, in the stage that an earlier run came to.

        Args:
            trainer: Whose ranks are added up.
            layers: The chosen layers.
            dtype: Of the sums. All ranks start with one type on one kind of device, so that one that takes no batch
                can add its zeros.
            targets: Of the losses.
        """
        self.local = FISHERS[self.kind](layers)
        self.local.targets = targets
        if self.earlier is not None:
            self.local.load_state(self.earlier)  # refuses other layers and targets at once
            self.local = self.local.empty()
        self.local.to(trainer.strategy.root_device, dtype)
        self._trainer = trainer

    def total(self) -> Fisher:
        """The sums over all ranks and earlier runs; during training, every rank must call it.

        Returns:
            A new Fisher.

        Raises:
            InputError: If there was no training yet.
        """
        if self.local is None:
            raise InputError(
                "FisherAccumulator has no sums before training; call total() during fit or after it. If fit ran in "
                "processes of its own (ddp_spawn, ddp_fork, ddp_notebook), the sums stayed there: read the file that "
                f"they wrote, {self.file} in the Trainer's default_root_dir, with load_fisher."
            )
        total = self._new(self.local)
        total.load_tensors({name: tensor.clone() for name, tensor in self.local.tensors().items()})
        count = torch.tensor(float(self.local.count), dtype=torch.float64)
        if self._trainer is not None and self._trainer.world_size > 1:
            device = self._trainer.strategy.root_device
            total.load_tensors(
                {
                    name: self._sum(tensor.to(device)) if total.is_sum(name) else tensor
                    for name, tensor in total.tensors().items()
                }
            )
            count = self._sum(count.to(device))
        total.count = round(float(count))
        if self.earlier is not None:
            earlier = self._new(self.local)
            earlier.load_state(self.earlier)
            total.merge(earlier)
        return total

    def without_this_rank(self) -> dict[str, Any] | None:
        """What all ranks know without asking each other: the state that this stage of this fit began with.

        Returns:
            It; nothing if the fit began with nothing.
        """
        if self.earlier is None and self.local is not None and self.local.stage not in (None, *self.local.stages[:1]):
            return self.local.empty().state()
        return self.earlier

    def _new(self, like: Fisher) -> Fisher:
        """One of the same layers and targets, in its first stage."""
        new = FISHERS[self.kind](like.layers)
        new.targets = like.targets
        return new

    def _sum(self, tensor: Tensor) -> Tensor:
        assert self._trainer is not None
        reduced = self._trainer.strategy.reduce(tensor, reduce_op="sum")
        assert isinstance(reduced, Tensor)
        return reduced

    def next_stage(self) -> None:
        """Go on to the next stage, with the sums over all ranks and earlier runs; every rank must call it."""
        assert self._trainer is not None
        total = self.total()
        taken, stage = total.count, total.stage
        if self._trainer.is_global_zero:
            total.next_stage()
        # Bases of several decompositions could differ (in signs, or where eigenvalues are equal), and sums within
        # them would not add up; so one rank decomposes for all.
        begun = self._trainer.strategy.broadcast(total.state() if self._trainer.is_global_zero else None)
        assert begun is not None
        total.load_state(begun)
        # What came before is in the bases, which are large: they are kept once.
        self.local, self.earlier = total.empty().to(self._trainer.strategy.root_device), None
        rank_zero_info(f"FisherAccumulator took {stage} of {taken} samples, and goes on to {total.stage}.")

    def finish(self) -> Fisher:
        """Add up at the end of a fit; every rank must call it.

        A checkpoint may be written after training, and fit may be called again: both find the sums as earlier ones.

        Returns:
            The total.
        """
        total = self.total()
        self.earlier = total.state()
        self.local = total.empty().to("cpu")
        self._trainer = None
        return total
