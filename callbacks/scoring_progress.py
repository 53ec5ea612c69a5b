"""A progress bar that counts samples while predict scores."""

from __future__ import annotations

import math
import sys
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import TQDMProgressBar
from lightning.pytorch.callbacks.progress.tqdm_progress import Tqdm
from typing_extensions import override

from lightning_unlearn.data.shards import ShardInfo


class ScoringProgress(TQDMProgressBar):
    """Lightning's progress bar, but in ``predict`` it shows samples done, samples a second and the time left.

    A stream of shards has no length that Lightning knows, so its own bar can't say how long scoring takes; the shards'
    manifest can. The bar is that of the first rank: its own samples out of those it still has to score, without the
    shards that an earlier run finished. Without a manifest, or when the Trainer is told to stop after some batches,
    there is no total and so no time left. In ``fit``, and in ``predict`` with a datamodule that has no shards to score,
    it is the ordinary bar. Its arguments are those of :class:`lightning.pytorch.callbacks.TQDMProgressBar`; a Trainer
    takes one progress bar only.

    Example::

        from lightning.pytorch import Trainer
        from lightning_unlearn.callbacks import ScoreWriter, ScoringProgress

        trainer = Trainer(callbacks=[ScoreWriter("scores"), ScoringProgress()])
    """

    _counts_samples = False

    @override
    def init_predict_tqdm(self) -> Tqdm:
        """The bar of ``predict``: of samples where shards are scored.

        Returns:
            A new bar.
        """
        shards_to_score = getattr(getattr(self.trainer, "datamodule", None), "shards_to_score", None)
        self._counts_samples = shards_to_score is not None
        if shards_to_score is None:
            return super().init_predict_tqdm()
        return Tqdm(
            desc="Scoring",
            total=self._samples(shards_to_score()),
            unit=" samples",
            position=2 * self.process_position,
            disable=self.is_disabled,
            leave=True,
            dynamic_ncols=True,
            file=sys.stdout,
            smoothing=0,  # the rate since the start
            bar_format=self.BAR_FORMAT,
        )

    def _samples(self, shards: list[ShardInfo]) -> int | None:
        """How many samples will be scored; ``None`` if nobody knows."""
        # The stream has no length: a finite number of batches is a limit that the Trainer was given.
        if not all(math.isinf(batches) for batches in self.trainer.num_predict_batches):
            return None
        if getattr(self.trainer.datamodule, "keys", None) is not None:  # type: ignore[attr-defined]
            return None
        counts = [shard.samples for shard in shards if shard.samples is not None]
        return sum(counts) if len(counts) == len(shards) else None

    @override
    def on_predict_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Nothing where shards are scored: Lightning would put the number of batches as the total."""
        if not self._counts_samples:
            super().on_predict_batch_start(trainer, pl_module, batch, batch_idx, dataloader_idx)

    @override
    def on_predict_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Go on by the samples of the batch."""
        if not self._counts_samples:
            super().on_predict_batch_end(trainer, pl_module, outputs, batch, batch_idx, dataloader_idx)
            return
        bar = self.predict_progress_bar
        if bar.disable:
            return
        bar.n += len(batch)
        if (batch_idx + 1) % self.refresh_rate == 0:  # closing the bar shows the last count
            bar.refresh()

    @override
    def on_predict_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """End the bar's line before anybody says what was scored, in ``on_predict_end``."""
        self.predict_progress_bar.close()

    @override
    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """End the bar's line, so that what is said of the exception gets one of its own."""
        for bar in (self._train_progress_bar, self._predict_progress_bar):
            if bar is not None:
                bar.close()
