"""The pass over all samples that makes an index: Lightning's ``predict`` of projected gradients."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from lightning.pytorch import LightningModule

from lightning_unlearn.baselines.base import Subject
from lightning_unlearn.baselines.d_trak import DTRAK
from lightning_unlearn.baselines.das import DAS
from lightning_unlearn.baselines.gradients import batch_gradients_of
from lightning_unlearn.baselines.per_sample import Output
from lightning_unlearn.baselines.sample_gradients import Gradients
from lightning_unlearn.data.samples import SampleBatch
from lightning_unlearn.errors import InputError
from lightning_unlearn.unlearning.module import UnlearningModule
from lightning_unlearn.weights.projection import Projection

# The output functions whose gradients are kept: of the mean prediction for DAS, of its mean square for D-TRAK.
OUTPUTS: tuple[Output, ...] = (DAS.output, DTRAK.output)


@dataclass(frozen=True)
class IndexedBatch:
    """What is to be kept of a batch.

    Attributes:
        batch: The samples, with the markers of their shard.
        gradients: Output function to their projected gradients; empty for a batch without samples.
    """

    batch: SampleBatch
    gradients: Mapping[Output, Gradients]


class IndexPass(LightningModule):
    """Projected gradients of samples, for :class:`~lightning_unlearn.callbacks.IndexWriter`.

    The Trainer needs ``inference_mode=False``: gradients are taken while it predicts.

    Args:
        module: The model, its objective, the chosen weights and the views.
        projection: Of their gradients.
    """

    def __init__(self, module: UnlearningModule, projection: Projection) -> None:
        super().__init__()
        self.module = module
        self.projection = projection
        self._failed: set[str] = set()  # shards

    def setup(self, stage: str) -> None:
        """Refuse a Trainer whose settings would spoil gradients.

        Args:
            stage: Lightning's.

        Raises:
            InputError: If it predicts in inference mode, or in another precision than the network's.
        """
        if self.trainer.predict_loop.inference_mode:
            raise InputError(
                "An index is of gradients, and in inference mode there are none; set trainer.inference_mode to false."
            )
        if self.trainer.precision != "32-true":
            raise InputError(f"An index is made in precision 32-true, not in {self.trainer.precision}; leave it out.")
        self._failed.clear()

    def predict_step(self, batch: SampleBatch, batch_idx: int) -> IndexedBatch:
        """The projected gradients of a batch.

        Args:
            batch: ``B`` samples of one shard; may be empty.
            batch_idx: Its number.

        Returns:
            What is to be kept of it; what is wrong with a sample fails its shard alone.
        """
        if batch.error is not None or not len(batch) or batch.shard in self._failed:
            return IndexedBatch(batch, {})
        module = self.module
        subject = Subject(module.loss, module.layers, module.views, [], list, projection=self.projection)
        try:
            with torch.enable_grad():
                return IndexedBatch(batch, batch_gradients_of(subject, batch, OUTPUTS))
        except InputError as error:
            self._failed.add(batch.shard)
            return IndexedBatch(replace(batch, error=f"Shard {batch.shard}: {error}"), {})

    def configure_optimizers(self) -> Any:
        """Nothing is trained."""
        return None
