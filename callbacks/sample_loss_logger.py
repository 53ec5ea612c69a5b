"""Which pictures and captions a training finds hard: each sample's own loss as it goes by."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, distributed
from typing_extensions import override

from lightning_unlearn.callbacks.aside import aside
from lightning_unlearn.callbacks.run_loggers import log_numbers, log_pictures
from lightning_unlearn.callbacks.sample_losses import LossSums, LossTable, strata_of
from lightning_unlearn.callbacks.shown_samples import FindsSamples, shown
from lightning_unlearn.data.files import reason_of
from lightning_unlearn.diffusion.contract import Objective
from lightning_unlearn.errors import InputError

Pick: TypeAlias = str | Callable[[Any, Any], Any]
"""A name in what ``training_step`` returns, or a function of that and the batch."""

SUFFIXES = (".csv", ".parquet")
# Losses wait on their device for so many batches: each copy would wait for the device.
AT_ONCE = 64


class SampleLossLogger(Callback):
    """Keeps each training sample's losses as they go by, and says whose are high for their noise levels.

    A sample's loss says little by itself: a draw at a low noise level has a far higher one than at a high level, or the
    other way round. So each loss is compared with those of all samples at the same noise level, in 20 strata of the
    training's density of timesteps: ``corrected`` is the mean of ``(loss - mean) / standard deviation`` of its strata,
    over all draws of the sample (:class:`~lightning_unlearn.callbacks.sample_losses.LossSums` has the formula). By
    chance alone it lies within some 2/√count of 0.

    A table (key, count, mean_loss, corrected, last_epoch, not_finite) is written into the logger's folder at the end of
    each epoch, and the worst pictures with their captions go to TensorBoard and Weights & Biases. No bit of the
    training changes. A training that resumes a checkpoint, or goes on with the same Trainer, goes on with the sums;
    over several processes they are added up.

    It needs what ``training_step`` knows and a mean over the batch does not say: let it return a dictionary with
    ``loss``, ``sample_losses`` ``(B,)``, ``timesteps`` ``(B,)`` and ``keys`` (``B`` names of the samples), as
    :class:`DiffusionModule` does; or say by ``losses``, ``timesteps`` and ``keys`` where they are.

    Args:
        losses: Each sample's own loss, before the mean and without weights: a name in what ``training_step`` returns,
            or a function of that and the batch.
        timesteps: The same of the timesteps.
        keys: The same of the samples' names, text or whole numbers.
        num_timesteps: Length of the schedule that timesteps are of; by default that of the LightningModule's
            ``objective``, whose density of timesteps is known, too.
        data: Finds samples with their pictures by key; by default the training's datamodule, if it can.
        path: The table, ``.csv`` or ``.parquet``, in the logger's folder.
        every_n_epochs: Show the worst pictures after so many epochs each, too; by default only at the end.
        top: How many are shown.
        start_epoch: Epoch from which on losses count: those of the first ones are high for all.

    Raises:
        InputError: If an argument is out of range.
    """

    def __init__(
        self,
        losses: Pick = "sample_losses",
        timesteps: Pick = "timesteps",
        keys: Pick = "keys",
        num_timesteps: float | None = None,
        data: FindsSamples | None = None,
        path: str = "sample_losses.csv",
        every_n_epochs: int | None = None,
        top: int = 16,
        start_epoch: int = 0,
    ) -> None:
        if min(top, every_n_epochs or 1) < 1 or not (num_timesteps is None or num_timesteps > 0):
            raise InputError("SampleLossLogger needs top and every_n_epochs of at least 1, and num_timesteps above 0.")
        if Path(path).suffix not in SUFFIXES:
            raise InputError(f"The table of losses ends in {' or '.join(SUFFIXES)}, but path is {path!r}.")
        self.losses = losses
        self.timesteps = timesteps
        self.keys = keys
        self.num_timesteps = num_timesteps
        self.data = data
        self.path = path
        self.every_n_epochs = every_n_epochs
        self.top = top
        self.start_epoch = start_epoch
        self._local = LossSums()  # of this process in this run
        self._earlier = LossSums()  # over all processes, of a run that this one goes on with
        self._waiting: list[tuple[list[str], Tensor, Tensor, int]] = []
        self._schedule: tuple[float, Tensor | None] = (1.0, None)
        self._trainer: Trainer | None = None
        self._failed = False

    @property
    @override
    def state_key(self) -> str:
        """One state for each table."""
        return self._generate_state_key(path=self.path)

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Another Trainer starts anew."""
        if stage != "fit":
            return
        if self._trainer is not None and self._trainer is not trainer:
            self._local, self._earlier = LossSums(), LossSums()
        self._trainer, self._failed, self._waiting = trainer, False, []

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Know the schedule."""
        objective = getattr(pl_module, "objective", None)
        known = objective if isinstance(objective, Objective) else None
        if self.num_timesteps is not None:
            density = known.density() if known is not None and known.num_timesteps == self.num_timesteps else None
            self._schedule = (self.num_timesteps, density)
        elif known is not None:
            self._schedule = (known.num_timesteps, known.density())
        else:
            raise InputError(
                f"{type(pl_module).__name__} does not say how long its schedule is; set num_timesteps of "
                "SampleLossLogger, e.g. 1000, or 1.0 for the timesteps of a flow."
            )

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Keep a batch's losses."""
        if trainer.current_epoch < self.start_epoch or not outputs:  # a step that was left out gives nothing
            return
        losses = self._picked("losses", outputs, batch)
        timesteps = self._picked("timesteps", outputs, batch)
        keys = self._picked("keys", outputs, batch)
        names = [str(key) for key in (keys.tolist() if isinstance(keys, Tensor) else keys)]
        found = [torch.as_tensor(one).detach().clone() for one in (losses, timesteps)]
        if any(one.shape != (len(names),) for one in found):
            raise InputError(
                f"SampleLossLogger was given {len(names)} keys, losses {tuple(found[0].shape)} and timesteps "
                f"{tuple(found[1].shape)} of a batch; each must be one a sample, (B,), before any mean."
            )
        self._waiting.append((names, found[0], found[1], trainer.current_epoch))
        if len(self._waiting) >= AT_ONCE:
            self._take()

    def _picked(self, what: str, outputs: Any, batch: Any) -> Any:
        pick: Pick = getattr(self, what)
        if callable(pick):
            return pick(outputs, batch)
        if not isinstance(outputs, Mapping) or pick not in outputs:
            raise InputError(
                f"SampleLossLogger finds no {pick!r} in what training_step returns; let it return a dictionary with "
                "loss, sample_losses (B,), timesteps (B,) and keys, or give a function of what it returns and the "
                f"batch as {what}."
            )
        return outputs[pick]

    def _take(self) -> None:
        for keys, losses, timesteps, epoch in self._waiting:
            strata = strata_of(timesteps, *self._schedule)
            self._local.add(keys, losses.cpu().double().numpy().astype(np.float64), strata, epoch)
        self._waiting = []

    def total(self) -> LossSums:
        """The sums over all processes and the runs before; during training, every process must call it.

        Returns:
            New sums; :meth:`~lightning_unlearn.callbacks.sample_losses.LossSums.table` gives the table.
        """
        self._take()
        total = LossSums.of_state(self._earlier.state())
        states = [self._local.state()]
        if self._trainer is not None and self._trainer.world_size > 1 and distributed.is_initialized():
            states = [{} for _ in range(self._trainer.world_size)]
            distributed.all_gather_object(states, self._local.state())
        for state in states:
            total.merge(LossSums.of_state(state))
        return total

    @override
    def state_dict(self) -> dict[str, Any]:
        """The sums; after a failure on one of several processes those that the run began with."""
        alone = self._trainer is None or self._trainer.world_size == 1
        return (self._earlier if self._failed and not alone else self.total()).state()

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from a checkpoint."""
        self._earlier, self._local, self._waiting = LossSums.of_state(state_dict), LossSums(), []

    @override
    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the table, and show the worst if it is time."""
        epoch = trainer.current_epoch + 1
        self._tell(trainer, show=self.every_n_epochs is not None and epoch % self.every_n_epochs == 0)

    @override
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the table, and show the worst."""
        self._tell(trainer, show=True)

    @override
    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """A checkpoint that is written now must not wait for other processes."""
        self._failed = True

    def _tell(self, trainer: Trainer, *, show: bool) -> None:
        table = self.total().table()
        folder = Path(trainer.log_dir or trainer.default_root_dir)
        if not trainer.is_global_zero or trainer.fast_dev_run or not table.keys:  # type: ignore[attr-defined]
            return
        try:
            table.write(folder / self.path)
            if show:
                with aside():
                    self._show(trainer, table)
        except Exception as error:  # whatever it is, it is not worth a training
            why = str(error) if isinstance(error, InputError) else reason_of(error)
            rank_zero_warn(f"SampleLossLogger could not write or show its table, and the training goes on: {why}")

    def _show(self, trainer: Trainer, table: LossTable) -> None:
        worst = table.worst(self.top)
        data = self.data or getattr(trainer, "datamodule", None)
        finds = getattr(data, "find_samples", None)
        samples = {} if finds is None else finds([table.keys[row] for row in worst])
        pictures = []
        for rank, row in enumerate(worst, 1):
            key, count = table.keys[row], table.counts[row]
            said = f"{key} · {table.corrected[row]:+.2f} σ, loss {table.means[row]:.4g}, seen {count} times"
            if table.not_finite[row]:
                said += f", {table.not_finite[row]} times not finite"
            pictures.append(shown(samples.get(key), f"{rank}. {table.corrected[row]:+.2f} {key}", said))
        log_pictures(trainer, "sample_losses/worst", pictures)
        highest = table.corrected[np.isfinite(table.corrected)]
        numbers = {"sample_losses/samples": float(len(table.keys))}
        if len(highest):
            numbers["sample_losses/highest_corrected"] = float(highest.max())
        log_numbers(trainer, numbers)
