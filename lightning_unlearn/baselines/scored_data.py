"""What a method's run needs to know of a datamodule."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Protocol

from lightning_unlearn.data.samples import Sample, SampleBatch
from lightning_unlearn.data.shards import ShardInfo


class ScoredData(Protocol):
    """Samples and queries, as :class:`~lightning_unlearn.datamodules.AttributionDataModule` has them."""

    queries: list[Sample]
    shards: list[ShardInfo]
    targets_by: str | None
    keys: frozenset[str] | None

    @property
    def on_bad_sample(self) -> str:
        """What becomes of a sample that can't be used."""

    def setup(self, stage: str) -> None:
        """Read the queries."""

    def predict_dataloader(self) -> Iterable[SampleBatch]:
        """All samples."""
