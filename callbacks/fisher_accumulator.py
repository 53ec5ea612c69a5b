"""Fisher information out of anybody's training, by a callback."""

from __future__ import annotations

from collections.abc import Sequence
from functools import reduce
from pathlib import Path
from typing import Any, Literal

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import WeightAveraging
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import Tensor
from typing_extensions import override

from lightning_unlearn.callbacks.own_loss import own_loss_factor
from lightning_unlearn.callbacks.second_stage import SecondStage
from lightning_unlearn.capture import GradientCapture
from lightning_unlearn.errors import InputError
from lightning_unlearn.fisher import FISHERS, Fisher
from lightning_unlearn.objective import Objective
from lightning_unlearn.parameters import find_network, layer_parameters, layer_specs, select_layers


class FisherAccumulator(Callback):
    """Collects the Fisher information of chosen weights in any LightningModule's ``fit``, out of its backward passes.

    Per-sample gradients are taken by hooks, so nothing of the training changes, not a bit of its numbers or its random
    state. The mean of the loss over the batch, gradient accumulation and a GradScaler are undone. Batches with a
    gradient that is not finite are left out and counted. With several ranks, each sees its own samples and sums are
    added. A second ``fit`` with the same Trainer, or one that resumes a checkpoint, goes on with the sums; another
    Trainer starts anew.

    Since weights move while it accumulates, let it wait for the last part of training (``start_step``,
    ``start_epoch``).

    An EKFAC Fisher is collected in two windows: covariances from the start on, and eigenvalues from
    ``eigenvalue_step`` and ``eigenvalue_epoch`` on, or else from half way between the start and the planned end of
    training. In between, one process decomposes the covariances, on its CPU, and the others wait.

    Args:
        target: Dotted name of the network in the LightningModule, e.g. ``"unet"``; ``""`` for the module itself.
        parameters: Which of its weights: ``text_kv``, ``cross_attention``, ``attention``, ``feed_forward``, ``all``, or
            patterns of layer names (see :func:`lightning_unlearn.parameters.select_layers`).
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
        fisher: Literal["diagonal", "ekfac"] = "diagonal",
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
        # Sums of this rank in this fit; what a resume or an earlier fit brought is over all ranks already and kept
        # apart, so that it is counted once however many ranks there are.
        self._local: Fisher | None = None
        self._restored: dict[str, Any] | None = None
        self._capture: GradientCapture | None = None
        self._trainer: Trainer | None = None
        self._running = False
        self._failed = False
        self._steps: list[int] = []  # first and last optimizer step seen
        self._second_stage = SecondStage(start_step, start_epoch, eigenvalue_step, eigenvalue_epoch)
        self._changed_at: int | None = None  # step at which the stages changed
        self._saw_backward = False  # in this batch
        self._watched = self._saw_gradient = False  # in this fit

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
        for other in _callbacks(trainer):
            if isinstance(other, FisherAccumulator) and other is not self and other.path == self.path:
                raise InputError(f"Two FisherAccumulators would write {self.path}; give each a path of its own.")
        if self._trainer is not None and self._trainer is not trainer:
            self._restored, self._local, self._steps, self.skipped_batches = None, None, [], 0
            self._changed_at = None
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
        self._local = FISHERS[self.fisher](layer_specs(layers))
        if self._restored is not None:
            self._local.load_state(self._restored)  # refuses other layers at once
            self._local = self._local.empty()
        if self._local.stages:
            self._second_stage.plan(trainer)
        # All ranks start with one type on one kind of device, so that one that takes no batch can add its zeros.
        dtypes = [parameter.dtype for parameter in layer_parameters(layers).values()]
        self._local.to(pl_module.device, reduce(torch.promote_types, dtypes, torch.float32))
        self._running = True
        self._capture = GradientCapture(layers)
        self._capture.enabled = False
        self._capture.attach()
        self._watched = self._saw_gradient = False

    def _stage_ends(self, trainer: Trainer, pl_module: LightningModule) -> bool:
        """Whether covariances are complete and eigenvalues follow; the same on all ranks."""
        assert self._local is not None
        last = self._local.stage in (None, *self._local.stages[-1:])
        return not last and self._second_stage.is_due(trainer, pl_module)

    def _next_stage(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Go on to the next stage, with the sums over all ranks and earlier runs; every rank must call it."""
        total = self.total()
        taken, stage = total.count, total.stage
        if trainer.is_global_zero:
            total.next_stage()
        # Bases of several decompositions could differ (in signs, or where eigenvalues are equal), and sums within
        # them would not add up; so one rank decomposes for all.
        self._restored = trainer.strategy.broadcast(total.state() if trainer.is_global_zero else None)
        assert self._restored is not None
        total.load_state(self._restored)
        self._local = total.empty().to(pl_module.device)
        self._changed_at = trainer.global_step
        rank_zero_info(f"FisherAccumulator took {stage} of {taken} samples, and goes on to {total.stage}.")

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
        assert self._capture is not None
        if self._stage_ends(trainer, pl_module):
            self._next_stage(trainer, pl_module)
        self._capture.enabled = self.should_capture(trainer.global_step, trainer.current_epoch, batch_idx)
        self._capture.clear()
        self._saw_backward = False

    @override
    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        """Forget gradients that the training step took for purposes of its own with ``torch.autograd.grad``."""
        self._saw_backward = True
        if self._capture is not None:
            self._capture.clear()

    @override
    def on_after_backward(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Add what the backward pass left; runs for every micro-batch, before gradients are unscaled or clipped."""
        if self._capture is None or not self._capture.enabled:
            return
        captured = self._capture.take()
        if not captured:
            return
        self._saw_gradient = True
        rows = len(next(iter(captured.values())))
        factor = own_loss_factor(trainer, pl_module, rows, self.reduction, self.loss_scale, self.sample_weights)
        captured = {name: layer.scaled(factor) for name, layer in captured.items()}
        tensors = [tensor for layer in captured.values() for tensor in (layer.inputs, layer.output_gradients)]
        # Asked once for all tensors: each answer waits for the device.
        if not torch.stack([tensor.isfinite().all() for tensor in tensors]).all():
            self.skipped_batches += 1  # the GradScaler skips this step too
            return
        assert self._local is not None
        self._local.update(captured)
        if isinstance(factor, Tensor):
            self._local.count -= int((factor == 0).sum())
        self._steps = [self._steps[0] if self._steps else trainer.global_step, trainer.global_step]

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Stop watching until the next batch; validation in between is not seen."""
        assert self._capture is not None
        if self._capture.pending and not self._saw_backward:
            raise InputError(
                "loss.backward() in training_step can't be followed; call self.manual_backward(loss) instead."
            )
        if self._capture.enabled and self._saw_backward:
            self._watched = True
            if pl_module.automatic_optimization:
                self._refuse_silence()
        self._capture.enabled = False

    @override
    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """With manual optimization other networks may have their turn first, but not for a whole epoch."""
        self._refuse_silence()

    def _refuse_silence(self) -> None:
        if self._watched and not self._saw_gradient:
            raise InputError(
                f"No gradient reached any chosen layer of {self.target!r} in the batches that were to be taken; "
                "use the network in the loss, and don't compile it."
            )

    def total(self) -> Fisher:
        """The sums over all ranks and earlier runs; during training, every rank must call it.

        Returns:
            A new Fisher.

        Raises:
            InputError: If there was no training yet.
        """
        if self._local is None:
            raise InputError("FisherAccumulator has no sums before training; call total() during fit or after it.")
        total = FISHERS[self.fisher](self._local.layers)
        total.load_tensors({name: tensor.clone() for name, tensor in self._local.tensors().items()})
        count = torch.tensor(float(self._local.count), dtype=torch.float64)
        if self._running and self._trainer is not None and self._trainer.world_size > 1:
            device = self._trainer.strategy.root_device
            total.load_tensors(
                {
                    name: self._sum(tensor.to(device)) if total.is_sum(name) else tensor
                    for name, tensor in total.tensors().items()
                }
            )
            count = self._sum(count.to(device))
        total.count = round(float(count))
        if self._restored is not None:
            earlier = FISHERS[self.fisher](self._local.layers)
            earlier.load_state(self._restored)
            total.merge(earlier)
        return total

    def _sum(self, tensor: Tensor) -> Tensor:
        assert self._trainer is not None
        reduced = self._trainer.strategy.reduce(tensor, reduce_op="sum")
        assert isinstance(reduced, Tensor)
        return reduced

    @override
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Add up the ranks and write the file."""
        total = self.total()
        # A checkpoint may be written after training, and fit may be called again.
        self._restored = total.state()
        self._local = total.empty().to("cpu")
        self._running = False
        if total.count == 0:
            rank_zero_warn(
                "FisherAccumulator took no batch: start_step or start_epoch lies past the end of training, or no "
                "gradient was finite. No Fisher is written."
            )
            return
        if total.stages and total.stage != total.stages[-1]:
            rank_zero_warn(
                f"FisherAccumulator took {total.stage} of {total.count} samples, but training ended before "
                f"{total.stages[-1]}; let them start earlier by eigenvalue_step or eigenvalue_epoch. No Fisher is "
                "written."
            )
            return
        layers = select_layers(find_network(pl_module, self.target), self.parameters)
        total.weights = {name: parameter.detach() for name, parameter in layer_parameters(layers).items()}
        total.provenance = {
            "module": f"{type(pl_module).__module__}.{type(pl_module).__qualname__}",
            "target": self.target,
            "steps": self._steps,
            "averaged_weights_in_run": any(isinstance(callback, WeightAveraging) for callback in _callbacks(trainer)),
            "skipped_batches": self.skipped_batches,
        }
        if total.stages:
            total.provenance["eigenvalues_from_step"] = self._changed_at
        objective = getattr(pl_module, "objective", None)
        if isinstance(objective, Objective):
            total.provenance["objective"] = objective.settings()
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
        if self._local is None or (self._failed and self._trainer is not None and self._trainer.world_size > 1):
            return {**state, "fisher": self._restored}
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
        self._restored = (
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
        if self._capture is not None:
            self._capture.detach()
            self._capture = None


def _callbacks(trainer: Trainer) -> Sequence[Callback]:
    return getattr(trainer, "callbacks", [])
