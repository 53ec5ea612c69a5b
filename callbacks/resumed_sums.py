"""What an accumulator has counted so far, in checkpoints and for whoever asks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, Trainer
from typing_extensions import override

from lightning_unlearn.callbacks.collection import Collection
from lightning_unlearn.callbacks.fisher_file import completed
from lightning_unlearn.callbacks.fisher_sums import FisherSums
from lightning_unlearn.callbacks.second_stage import SecondStage
from lightning_unlearn.fisher import FISHERS, Fisher


class ResumedSums(Callback):
    """The sums of a callback that goes on where a checkpoint was written.

    Args:
        fisher: The kind of Fisher.
        path: Of the file at the end of training.
        second_stage: When a second stage comes.
        save_in_checkpoint: Whether the sums are kept in checkpoints, or in files beside ``path``.
    """

    def __init__(self, fisher: str, path: str, second_stage: SecondStage, save_in_checkpoint: bool) -> None:
        self.fisher = fisher
        self.path = path
        self.save_in_checkpoint = save_in_checkpoint
        self.skipped_batches = 0
        self._sums = FisherSums(fisher, path)
        self._collection: Collection | None = None
        self._trainer: Trainer | None = None
        self._failed = False
        self._steps: list[int] = []  # first and last optimizer step seen
        self._second_stage = second_stage
        self._changed_at: int | None = None  # step at which the stages changed

    def total(self) -> Fisher:
        """The sums over all ranks and earlier runs; during training, every rank must call it.

        Returns:
            A new Fisher.

        Raises:
            InputError: If there was no training yet.
        """
        return self._sums.total()

    def usable(self) -> Fisher | None:
        """The Fisher as it is by now, to be used; during training, every rank must call it.

        Returns:
            A new one, which a warning may say something of (:func:`~.fisher_file.completed`); ``None`` if it is of no
            sample.
        """
        return completed(self.total(), self._sums.product)

    def _seen(self) -> tuple[list[int], int]:
        """The first and last optimizer step, and how many batches were left out, over this fit and earlier ones."""
        if self._collection is None:
            return self._steps, self.skipped_batches
        ends = [*self._steps, *self._collection.steps]
        return ends[:1] + ends[-1:], self.skipped_batches + self._collection.skipped_batches

    @override
    def state_dict(self) -> dict[str, Any]:
        """The sums so far, over all ranks and earlier runs.

        After a failure on one rank there must be no collective, so what is kept then is the last resume's.

        Returns:
            Numbers, strings and tensors only, so that it loads with ``weights_only=True``.
        """
        steps, skipped = self._seen()
        state: dict[str, Any] = {"steps": steps, "skipped_batches": skipped, "batches_seen": self._second_stage.seen}
        if self._changed_at is not None:
            state["changed_at"] = self._changed_at
        if self._sums.product is not None:
            state["product"] = self._sums.product
        if self._sums.local is None or (self._failed and self._trainer is not None and self._trainer.world_size > 1):
            return {**state, "fisher": self._sums.without_this_rank()}
        total = self.total()
        if self.save_in_checkpoint:
            return {**state, "fisher": total.state()}
        assert self._trainer is not None
        path = Path(self._trainer.default_root_dir) / self.path
        path = path.with_name(f"{path.stem}-step={self._trainer.global_step}.safetensors")
        if self._trainer.is_global_zero:
            total.save(path)
        return {**state, "file": str(path)}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from a checkpoint; its sums are kept apart from those of this run."""
        self._steps = list(state_dict["steps"])
        self.skipped_batches = int(state_dict["skipped_batches"])
        self._changed_at = state_dict.get("changed_at")
        self._sums.product = state_dict.get("product")
        self._second_stage.seen = int(state_dict.get("batches_seen", 0))
        self._sums.earlier = (
            FISHERS[self.fisher].load(state_dict["file"]).state() if "file" in state_dict else state_dict["fisher"]
        )
