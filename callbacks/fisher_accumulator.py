"""Fisher information out of anybody's training, by a callback."""

from __future__ import annotations

from functools import reduce
from pathlib import Path
from typing import Any, Literal

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor
from typing_extensions import override

from lightning_unlearn.callbacks.batch_watch import BatchWatch
from lightning_unlearn.callbacks.fisher_file import facts_of_training, is_complete
from lightning_unlearn.callbacks.fisher_sums import FisherSums
from lightning_unlearn.callbacks.own_loss import own_loss_factor
from lightning_unlearn.callbacks.second_stage import SecondStage
from lightning_unlearn.errors import InputError
from lightning_unlearn.fisher import FISHERS, Fisher, Targets
from lightning_unlearn.training import FisherPass
from lightning_unlearn.weights.parameters import find_network, layer_parameters, layer_specs, select_layers


class FisherAccumulator(Callback):
    """Collects the Fisher information of chosen weights in any LightningModule's ``fit``, out of its backward passes.

    Per-sample gradients are taken by hooks, so nothing of the training changes, not a bit of its numbers or its random
    state. The mean of the loss over the batch, gradient accumulation and a GradScaler are undone. Batches with a
    gradient that is not finite are left out and counted. With several ranks, each sees its own samples and sums are
    added. A second ``fit`` with the same Trainer, or one that resumes a checkpoint, goes on with the sums; another
    Trainer starts anew.

    It is the empirical Fisher, whose losses have the targets of the data, since a training's own gradients are all that
    it sees. The true Fisher, with targets drawn from the model, needs passes of its own: ``lightning-unlearn fisher
    --targets model``.

    Since weights move while it accumulates, let it wait for the last part of training (``start_step``,
    ``start_epoch``).

    An EKFAC Fisher is collected in two windows: covariances from the start on, and eigenvalues from
    ``eigenvalue_step`` and ``eigenvalue_epoch`` on, or else from half way between the start and the planned end of
    training. In between, one process decomposes the covariances, on its CPU, and the others wait.

    Args:
        target: Dotted name of the network in the LightningModule, e.g. ``"unet"``; ``""`` for the module itself.
        parameters: Which of its weights: ``text_kv``, ``cross_attention``, ``attention``, ``feed_forward``, ``all``, or
            patterns of layer names (see :func:`lightning_unlearn.weights.parameters.select_layers`).
        fisher: The kind of Fisher: ``diagonal`` or ``ekfac``.
        path: Where the Fisher is written at the end of training, as safetensors; relative to
            ``trainer.default_root_dir``.
        start_step: Optimizer step at which it starts.
        start_epoch: Epoch at which it starts; both must be reached.
        every_n_batches: Take every n-th batch of an epoch.
        reduction: How the training loss joins the batch's samples: ``"mean"`` or ``"sum"``.
        loss_scale: A constant that the training loss is multiplied with, to be undone.
        sample_weights: Dotted name of an attribute of the LightningModule that holds each sample's weight ``(B,)`` in
            the last loss, to be undone; samples of weight 0 are left out.
        save_in_checkpoint: Keep the sums in every checkpoint, so that a resumed training goes on with them. If false
            they are kept in a file beside ``path`` instead, one for each checkpoint's step.
        eigenvalue_step: Optimizer step at which an EKFAC Fisher goes on from covariances to eigenvalues.
        eigenvalue_epoch: The same as an epoch; both must be reached if both are given.

    Raises:
        InputError: If an argument is out of range.

    Example::

        from lightning.pytorch import Trainer
        from lightning_unlearn.callbacks import FisherAccumulator

        trainer = Trainer(callbacks=[FisherAccumulator(target="unet", start_epoch=8)])
    """

    def __init__(
        self,
        target: str = "unet",
        parameters: str | list[str] = "text_kv",
        fisher: Literal["diagonal", "ekfac"] = "ekfac",
        path: str = "fisher.safetensors",
        start_step: int = 0,
        start_epoch: int = 0,
        every_n_batches: int = 1,
        reduction: Literal["mean", "sum"] = "mean",
        loss_scale: float = 1.0,
        sample_weights: str | None = None,
        save_in_checkpoint: bool = True,
        eigenvalue_step: int | None = None,
        eigenvalue_epoch: int | None = None,
    ) -> None:
        if every_n_batches < 1 or loss_scale == 0 or reduction not in ("mean", "sum") or fisher not in FISHERS:
            raise InputError(
                "FisherAccumulator needs every_n_batches of at least 1, a loss_scale that is not 0, reduction 'mean' "
                f"or 'sum', and a fisher among {', '.join(FISHERS)}."
            )
        later = (eigenvalue_step or 0) > start_step or (eigenvalue_epoch or 0) > start_epoch
        given = eigenvalue_step is not None or eigenvalue_epoch is not None
        if given and not (later and FISHERS[fisher].stages):
            raise InputError(
                f"eigenvalue_step {eigenvalue_step} and eigenvalue_epoch {eigenvalue_epoch} are for fisher 'ekfac' "
                f"(here {fisher!r}), and must lie after start_step {start_step} or start_epoch {start_epoch}, so that "
                "there are covariances first."
            )
        self.target = target
        self.parameters = parameters
        self.fisher = fisher
        self.path = path
        self.start_step = start_step
        self.start_epoch = start_epoch
        self.every_n_batches = every_n_batches
        self.reduction = reduction
        self.loss_scale = loss_scale
        self.sample_weights = sample_weights
        self.save_in_checkpoint = save_in_checkpoint

        self.skipped_batches = 0
        self._sums = FisherSums(fisher)
        self._watch: BatchWatch | None = None
        self._trainer: Trainer | None = None
        self._failed = False
        self._steps: list[int] = []  # first and last optimizer step seen
        self._second_stage = SecondStage(start_step, start_epoch, eigenvalue_step, eigenvalue_epoch)
        self._changed_at: int | None = None  # step at which the stages changed

    @property
    @override
    def state_key(self) -> str:
        """One state for each network, selection and kind, so that several accumulators go into one checkpoint."""
        return self._generate_state_key(target=self.target, parameters=self.parameters, fisher=self.fisher)

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Keep the Trainer; a LightningModule may build its network only later."""
        if not isinstance(trainer, Trainer):
            raise InputError(
                f"This Trainer comes from {type(trainer).__module__.split('.')[0]}, but FisherAccumulator needs one of "
                "lightning.pytorch: change the import of pytorch_lightning to lightning.pytorch, everywhere in the run."
            )
        if stage != "fit":
            return
        for other in getattr(trainer, "callbacks", []):
            if isinstance(other, FisherAccumulator) and other is not self and other.path == self.path:
                raise InputError(f"Two FisherAccumulators would write {self.path}; give each a path of its own.")
        if self._trainer is not None and self._trainer is not trainer:
            self._sums.forget()
            self._steps, self.skipped_batches, self._changed_at = [], 0, None
        self._trainer = trainer
        self._failed = False

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Find the layers and put hooks on them; nothing is captured yet."""
        layers = select_layers(find_network(pl_module, self.target), self.parameters)
        frozen = [name for name, layer in layers.items() if not any(p.requires_grad for p in layer.parameters())]
        if frozen:
            raise InputError(
                f"{len(frozen)} of the chosen layers are frozen (e.g. {frozen[0]}), so no gradient reaches them; "
                "choose layers that are trained, or run `lightning-unlearn fisher` afterwards."
            )
        dtypes = [parameter.dtype for parameter in layer_parameters(layers).values()]
        dtype = reduce(torch.promote_types, dtypes, torch.float32)
        # Only that pass draws targets from the model; any training's losses are of the data.
        targets: Targets = pl_module.targets if isinstance(pl_module, FisherPass) else "data"
        local = self._sums.start(trainer, layer_specs(layers), dtype, targets)
        if local.stages:
            self._second_stage.plan(trainer)
        self._watch = BatchWatch(layers, self.target)

    def _stage_ends(self, trainer: Trainer, pl_module: LightningModule) -> bool:
        """Whether covariances are complete and eigenvalues follow; the same on all ranks."""
        assert self._sums.local is not None
        last = self._sums.local.stage in (None, *self._sums.local.stages[-1:])
        return not last and self._second_stage.is_due(trainer, pl_module)

    def should_capture(self, step: int, epoch: int, batch_idx: int) -> bool:
        """Whether a batch is taken; override for another rule.

        Args:
            step: Optimizer steps done.
            epoch: The epoch.
            batch_idx: The batch in the epoch.

        Returns:
            Whether its gradients are added.
        """
        return step >= self.start_step and epoch >= self.start_epoch and batch_idx % self.every_n_batches == 0

    @override
    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Watch this batch if it is to be taken."""
        assert self._watch is not None
        if self._stage_ends(trainer, pl_module):
            self._sums.next_stage()
            self._changed_at = trainer.global_step
        self._watch.begin(take=self.should_capture(trainer.global_step, trainer.current_epoch, batch_idx))

    @override
    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        """Forget gradients that the training step took for purposes of its own with ``torch.autograd.grad``."""
        if self._watch is not None:
            self._watch.before_backward()

    @override
    def on_after_backward(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Add what the backward pass left; runs for every micro-batch, before gradients are unscaled or clipped."""
        captured = self._watch.take() if self._watch is not None else {}
        if not captured:
            return
        rows = len(next(iter(captured.values())))
        factor = own_loss_factor(trainer, pl_module, rows, self.reduction, self.loss_scale, self.sample_weights)
        captured = {name: layer.scaled(factor) for name, layer in captured.items()}
        tensors = [tensor for layer in captured.values() for tensor in (layer.inputs, layer.output_gradients)]
        # Asked once for all tensors: each answer waits for the device.
        if not torch.stack([tensor.isfinite().all() for tensor in tensors]).all():
            self.skipped_batches += 1  # the GradScaler skips this step too
            return
        local = self._sums.local
        assert local is not None
        local.update(captured)
        if isinstance(factor, Tensor):
            local.count -= int((factor == 0).sum())
        self._steps = [self._steps[0] if self._steps else trainer.global_step, trainer.global_step]

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Stop watching until the next batch; validation in between is not seen."""
        assert self._watch is not None
        self._watch.end(automatic_optimization=pl_module.automatic_optimization)

    @override
    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """With manual optimization other networks may have their turn first, but not for a whole epoch."""
        if self._watch is not None:
            self._watch.refuse_silence()

    def total(self) -> Fisher:
        """The sums over all ranks and earlier runs; during training, every rank must call it.

        Returns:
            A new Fisher.

        Raises:
            InputError: If there was no training yet.
        """
        return self._sums.total()

    @override
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Add up the ranks and write the file."""
        total = self._sums.finish()
        if not is_complete(total):
            return
        layers = select_layers(find_network(pl_module, self.target), self.parameters)
        total.weights = {name: parameter.detach() for name, parameter in layer_parameters(layers).items()}
        total.provenance = {
            **facts_of_training(trainer, pl_module),
            "target": self.target,
            "steps": self._steps,
            "skipped_batches": self.skipped_batches,
        }
        if total.stages:
            total.provenance["eigenvalues_from_step"] = self._changed_at
        if trainer.fast_dev_run:  # type: ignore[attr-defined]
            rank_zero_info("fast_dev_run: no Fisher is written, as no checkpoint is.")
            return
        path = Path(trainer.default_root_dir) / self.path
        if trainer.is_global_zero:
            total.save(path)
        rank_zero_info(f"Fisher of {total.count} samples written to {path}")

    @override
    def state_dict(self) -> dict[str, Any]:
        """The sums so far, over all ranks and earlier runs.

        After a failure on one rank there must be no collective, so what is kept then is the last resume's.

        Returns:
            Numbers, strings and tensors only, so that it loads with ``weights_only=True``.
        """
        state: dict[str, Any] = {"steps": self._steps, "skipped_batches": self.skipped_batches}
        if self._changed_at is not None:
            state["changed_at"] = self._changed_at
        if self._sums.local is None or (self._failed and self._trainer is not None and self._trainer.world_size > 1):
            return {**state, "fisher": self._sums.earlier}
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
        self._sums.earlier = (
            FISHERS[self.fisher].load(state_dict["file"]).state() if "file" in state_dict else state_dict["fisher"]
        )

    @override
    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Take the hooks off; a checkpoint written now must not wait for other ranks."""
        self._failed = True
        self._detach()

    @override
    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Take the hooks off."""
        self._detach()

    def _detach(self) -> None:
        if self._watch is not None:
            self._watch.detach()
            self._watch = None
