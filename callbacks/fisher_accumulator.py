"""Fisher information out of anybody's training, by a callback."""

from __future__ import annotations

from functools import reduce
from pathlib import Path
from typing import Any, Literal

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor
from torch.optim import Optimizer
from typing_extensions import override

from lightning_unlearn.callbacks.collection import Collection
from lightning_unlearn.callbacks.fisher_file import completed, write_fisher
from lightning_unlearn.callbacks.refusals import Refusals
from lightning_unlearn.callbacks.resumed_sums import ResumedSums
from lightning_unlearn.callbacks.sample_rows import RowsPerSample, check_rows_per_sample
from lightning_unlearn.callbacks.second_stage import SecondStage
from lightning_unlearn.callbacks.trained_layers import trained_layers
from lightning_unlearn.errors import InputError
from lightning_unlearn.fisher import FISHERS, Targets
from lightning_unlearn.training import FisherPass
from lightning_unlearn.weights.parameters import find_network, layer_parameters, layer_specs


class FisherAccumulator(ResumedSums):
    """Collects the Fisher information of chosen weights in any LightningModule's ``fit``, out of its backward passes.

    Per-sample gradients are taken by hooks, so nothing of the training changes, not a bit of its numbers or its random
    state. The mean of the loss over the batch, gradient accumulation and a GradScaler are undone. Batches with a
    gradient that is not finite are left out and counted. With several ranks, each sees its own samples and sums are
    added. A second ``fit`` with the same Trainer, or one that resumes a checkpoint, goes on with the sums; another
    Trainer starts anew.

    Nothing is taken on trust: what was captured, summed over rows, must be what each chosen parameter's gradient grew
    by, in every backward pass that counts, and rows must be as many as the batch has samples. What is not so is refused
    by name before any file is written. What one step of the chosen weights' optimizer takes together counts together;
    a backward pass that leads to no such step does not count.

    It is the empirical Fisher, whose losses have the targets of the data, since a training's own gradients are all that
    it sees. The true Fisher, with targets drawn from the model, needs passes of its own: ``lightning-unlearn fisher
    --targets model``.

    Since weights move while it accumulates, let it wait for the last part of training (``start_step``,
    ``start_epoch``).

    An EKFAC Fisher is collected in two windows: covariances from the start on, and eigenvalues from
    ``eigenvalue_step`` and ``eigenvalue_epoch`` on, or else when half of the batches are done from the first one on
    that was taken. In between, one process decomposes the covariances, on its CPU, and the others wait. If training
    ends before the eigenvalues, those of the Kronecker product are written, and a warning says so.

    Two factors of a loss can't be seen from gradients and have to be told. Prior preservation, as in DreamBooth, adds
    two means, ``loss = instance.mean() + prior.mean()``, each over half of the batch: each sample's share is twice that
    of a mean over the whole, so ``loss_scale=2``; with a weight ``w`` of the prior's mean, set
    ``self.shares = torch.cat([torch.full((b,), 2.0), torch.full((b,), 2.0 * w)])`` in ``training_step`` and
    ``sample_weights="shares"``. A ``backward`` of your own that multiplies the loss, ``(loss * 128).backward()``, needs
    ``loss_scale=128``; that one is noticed, and refused until it is told.

    Args:
        target: Dotted name of the network in the LightningModule, e.g. ``"unet"``; ``""`` for the module itself.
        parameters: Which of its weights: ``text_kv``, ``cross_attention``, ``attention``, ``feed_forward``, ``linear``,
            ``all``, or patterns of layer names; in a training of an adapter (PEFT), ``adapter`` for its ``A`` and
            ``B``, whatever layers it is on (see :func:`lightning_unlearn.weights.parameters.select_layers`). By
            default ``auto``: as many as are not too large, and of these the ones that are trained.
        fisher: The kind of Fisher: ``diagonal`` or ``ekfac``.
        path: Where the Fisher is written at the end, as safetensors; relative to ``trainer.default_root_dir``.
        start_step: Optimizer step at which it starts.
        start_epoch: Epoch at which it starts; both must be reached.
        every_n_batches: Take every n-th batch of an epoch.
        reduction: How the training loss joins the batch's samples: ``"mean"`` or ``"sum"``.
        loss_scale: A constant that the training loss is multiplied with, to be undone.
        sample_weights: Dotted name of an attribute of the LightningModule that holds each sample's weight ``(B,)`` in
            the last loss, to be undone; samples of weight 0 are left out.
        rows_per_sample: Where rows of the layers are not the batch's samples: how many rows each sample has over all
            that a step takes together, in parts one after another (2 for a batch that was doubled by ``torch.cat``, for
            preference pairs, and for a network that is called twice on the same samples; 1 where all rows are samples
            of their own, as real and generated ones are). Or a function of the numbers of rows and samples that says
            which sample each row is of, e.g. ``lambda rows, samples: torch.arange(rows) // (rows // samples)`` for
            tokens that were flattened into rows; or the dotted name of such a function of the LightningModule.
            Gradients of one sample's rows are summed before squaring.
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
        parameters: str | list[str] = "auto",
        fisher: Literal["diagonal", "ekfac"] = "ekfac",
        path: str = "fisher.safetensors",
        start_step: int = 0,
        start_epoch: int = 0,
        every_n_batches: int = 1,
        reduction: Literal["mean", "sum"] = "mean",
        loss_scale: float = 1.0,
        sample_weights: str | None = None,
        rows_per_sample: RowsPerSample | None = None,
        save_in_checkpoint: bool = True,
        eigenvalue_step: int | None = None,
        eigenvalue_epoch: int | None = None,
    ) -> None:
        if every_n_batches < 1 or loss_scale == 0 or reduction not in ("mean", "sum") or fisher not in FISHERS:
            raise InputError(
                "FisherAccumulator needs every_n_batches of at least 1, a loss_scale that is not 0, reduction 'mean' "
                f"or 'sum', and a fisher among {', '.join(FISHERS)}."
            )
        check_rows_per_sample(rows_per_sample)
        later = (eigenvalue_step or 0) > start_step or (eigenvalue_epoch or 0) > start_epoch
        given = eigenvalue_step is not None or eigenvalue_epoch is not None
        if given and not (later and FISHERS[fisher].stages):
            raise InputError(
                f"eigenvalue_step {eigenvalue_step} and eigenvalue_epoch {eigenvalue_epoch} are for fisher 'ekfac' "
                f"(here {fisher!r}), and must lie after start_step {start_step} or start_epoch {start_epoch}, so that "
                "there are covariances first."
            )
        super().__init__(fisher, path, SecondStage(eigenvalue_step, eigenvalue_epoch), save_in_checkpoint)
        self.target = target
        self.parameters = parameters
        self.start_step = start_step
        self.start_epoch = start_epoch
        self.every_n_batches = every_n_batches
        self.reduction = reduction
        self.loss_scale = loss_scale
        self.sample_weights = sample_weights
        self.rows_per_sample = rows_per_sample
        self._chosen: list[str] = []  # layers

    @property
    @override
    def state_key(self) -> str:
        """One state for each file, so that several accumulators, and several windows of one network, go together."""
        return self._generate_state_key(
            target=self.target, parameters=self.parameters, fisher=self.fisher, path=self.path
        )

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
            self._steps, self.skipped_batches, self._changed_at, self._second_stage.seen = [], 0, None, 0
        self._trainer = trainer
        self._failed = False

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Find the layers and put hooks on them; nothing is captured yet."""
        self._refusals = Refusals(trainer)
        self._refusals.run(lambda: self._start(trainer, pl_module))
        self._refusals.meet()

    def _start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        network = find_network(pl_module, self.target)
        layers = trained_layers(network, self.parameters)
        self._chosen = list(layers)
        dtype = reduce(torch.promote_types, [one.dtype for one in layer_parameters(layers).values()], torch.float32)
        # Only that pass draws targets from the model.
        targets: Targets = pl_module.targets if isinstance(pl_module, FisherPass) else "data"
        self._sums.start(trainer, layer_specs(layers), dtype, targets)
        if not self._sums.in_last_stage:
            self._second_stage.plan(trainer)
        self._collection = Collection(
            trainer,
            pl_module,
            network,
            layers,
            refusals=self._refusals,
            target=self.target,
            sums=self._sums,
            reduction=self.reduction,
            loss_scale=self.loss_scale,
            sample_weights=self.sample_weights,
            rows_per_sample=self.rows_per_sample,
        )

    def _stage_ends(self, trainer: Trainer, pl_module: LightningModule, batch_idx: int) -> bool:
        """Whether covariances are complete and eigenvalues follow; the same on all ranks."""
        return not self._sums.in_last_stage and self._second_stage.is_due(trainer, pl_module, batch_idx)

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
        if (collection := self._collection) is None:
            return
        if self._stage_ends(trainer, pl_module, batch_idx):
            self._refusals.meet()
            collection.drop_waiting()
            self._sums.next_stage()
            self._changed_at = trainer.global_step
        take = self.should_capture(trainer.global_step, trainer.current_epoch, batch_idx)
        self._second_stage.seen += take or self._second_stage.seen > 0
        # A rule of somebody's own may take other batches on other ranks.
        self._meets = take or type(self).should_capture is not FisherAccumulator.should_capture
        self._refusals.run(lambda: collection.begin(batch, take=take))

    @override
    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        """Forget gradients that the training step took for purposes of its own with ``torch.autograd.grad``."""
        if (collection := self._collection) is not None:
            self._refusals.run(lambda: collection.before_backward(loss))

    @override
    def on_after_backward(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Take what the backward pass left; runs for every micro-batch, before gradients are unscaled or clipped."""
        if (collection := self._collection) is not None:
            self._refusals.run(collection.after_backward)

    @override
    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        """Add what this step takes, if it is one of the chosen weights."""
        if (collection := self._collection) is not None:
            self._refusals.run(lambda: collection.before_step(optimizer))

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Stop watching until the next batch; validation in between is not seen."""
        assert self._collection is not None
        self._refusals.run(self._collection.end)
        if self._meets:
            self._refusals.meet()

    @override
    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """With manual optimization other networks may have their turn first, but not for a whole epoch."""
        if (collection := self._collection) is not None:
            self._refusals.run(collection.refuse_silence)
            self._refusals.meet()

    @override
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Add up the ranks and write the file."""
        self._detach()  # before weights are moved
        self._refusals.meet()
        total = completed(self._sums.finish(), self._sums.product)
        if total is None:
            return
        about: dict[str, Any] = {"target": self.target, "steps": self._steps, "skipped_batches": self.skipped_batches}
        if total.stages:
            about["eigenvalues_from_step"] = self._changed_at
        network = find_network(pl_module, self.target)
        layers = {name: network.get_submodule(name) for name in self._chosen}
        write_fisher(total, layers, trainer, pl_module, Path(trainer.default_root_dir) / self.path, about)

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
        if self._collection is not None:
            self._steps, self.skipped_batches = self._seen()
            self._collection.detach()
            self._collection = None
