"""Lightning's ``fit`` as unlearning: from draws to deltas."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from lightning_unlearn.deltas import DeltaStore, target_weights
from lightning_unlearn.draws import DrawBatch, Stream, draw_batches, draw_for_target
from lightning_unlearn.errors import InputError
from lightning_unlearn.fingerprints import digest, settings_digest, tensors_digest
from lightning_unlearn.fisher import Fisher
from lightning_unlearn.fisher_source import find_fisher
from lightning_unlearn.frozen import FrozenModule
from lightning_unlearn.guards import check_precision, check_unlearning
from lightning_unlearn.objective import Objective, check_masks
from lightning_unlearn.parameters import layer_parameters, layer_specs
from lightning_unlearn.samples import Sample, ViewBatch, named_arrays
from lightning_unlearn.strategies import Problem, Strategy
from lightning_unlearn.targets import Target, members_of, targets_of


class Unlearning(FrozenModule):
    """The half of :class:`~lightning_unlearn.module.UnlearningModule` that ``fit`` runs.

    An epoch is one step of the strategy over all draws of all targets; Lightning accumulates their gradients.

    Args:
        network: The denoiser.
        objective: Its loss.
        fisher: A Fisher, its file, or ``identity`` for none.
        parameters: Which weights are unlearned.
        strategy: How deltas are found.
        damping: Share of each layer's mean Fisher that is added to it.
        seed: Of the unlearning draws.
        rise_draws: Draws over which a target's loss before and after is measured.

    Raises:
        InputError: If ``rise_draws`` is below 1.
    """

    def __init__(
        self,
        network: nn.Module,
        objective: Objective,
        fisher: Fisher | str | None,
        parameters: str | list[str],
        strategy: Strategy,
        damping: float,
        seed: int,
        rise_draws: int,
    ) -> None:
        if rise_draws < 1:
            raise InputError(f"rise_draws must be at least 1, but is {rise_draws}.")
        super().__init__(network, objective, parameters)
        self.fisher_source = fisher
        self.strategy = strategy
        self.damping = damping
        self.seed = seed
        self.rise_draws = rise_draws
        self.parameters_selection = parameters
        self._problem: Problem | None = None
        self._base_losses: Tensor | None = None

    @property
    def _datamodule(self) -> Any:
        return getattr(self.trainer, "datamodule", None)

    def _queries(self) -> list[Sample]:
        queries: list[Sample] | None = getattr(self._datamodule, "queries", None)
        if queries is None:
            raise InputError(
                "UnlearningModule needs a datamodule with queries: pass AttributionDataModule(queries=…) to "
                "trainer.fit."
            )
        return queries

    def _targets(self) -> list[Target]:
        return targets_of(self._queries(), getattr(self._datamodule, "targets_by", None))

    def configure_model(self) -> None:
        """Make the deltas, one a target, before a checkpoint is restored; in predict they come from the checkpoint."""
        if self.trainer.state.fn == "fit":
            names = [target.name for target in self._targets()]
            self.deltas = DeltaStore(layer_parameters(self.layers), names)
            self.members = members_of(self._queries(), getattr(self._datamodule, "targets_by", None))

    def setup(self, stage: str) -> None:
        """Refuse what would spoil a step, and give the Trainer the exact number of steps.

        Args:
            stage: Lightning's.

        Raises:
            InputError: If the Trainer can't be used, the Fisher is missing, or the objective does not know masks.
        """
        check_precision(self.trainer)
        if stage != "fit":
            return
        check_unlearning(self.trainer)
        if self.fisher_source is None:
            raise InputError(
                "Unlearning needs a Fisher: train with FisherAccumulator or run `lightning-unlearn fisher`, and "
                "pass its file as fisher."
            )
        check_masks(self.objective, self._queries())
        # The network is in eval mode on purpose.
        warnings.filterwarnings("ignore", message=r"Found \d+ module\(s\) in eval mode")
        # What an earlier fit of this module left; a checkpoint, if there is one, is loaded after this.
        self._problem, self._base_losses, self.results = None, None, {}
        self._fingerprints = {}
        self.weights_fingerprint()  # before the Trainer's precision converts them
        self.trainer.fit_loop.max_epochs = self.strategy.steps
        self.trainer.fit_loop.epoch_loop.max_steps = -1

    def on_fit_start(self) -> None:
        """Load the Fisher, see that it is this network's, and set up the problem.

        Raises:
            InputError: If the Fisher is of another model, or fit goes on from a checkpoint that was made in another
                way.
        """
        if self._problem is not None:
            return
        self._exact()
        fisher = self.checked_fisher().to(self.device)
        fisher.finalize(self.damping)
        made = {
            "fisher": _fisher_digest(fisher),
            "unlearning": self.unlearning_fingerprint(self._datamodule),
        }
        if any(self._fingerprints.get(name, value) != value for name, value in made.items()):
            raise InputError(
                "The checkpoint's deltas were made with another Fisher, other queries, draws or settings; "
                "unlearn anew, without ckpt_path."
            )
        self._fingerprints |= made
        self.settings = {**self.unlearning_settings(), "draws": self._datamodule.draws}
        if self.members:
            self.settings["targets_by"] = self._datamodule.targets_by
        assert self.deltas is not None
        self._problem = Problem(
            deltas=self.deltas.named(),
            layers={name: list(spec.parameter_shapes) for name, spec in layer_specs(self.layers).items()},
            fisher=fisher,
            targets=self.targets,
            losses=self._target_losses,
        )

    def checked_fisher(self) -> Fisher:
        """The Fisher, of which it is certain that it is this network's.

        Returns:
            The Fisher, with its sums.

        Raises:
            InputError: If there is none, or it is of another model.
        """
        return find_fisher(self.fisher_source, self.layers)

    def on_train_start(self) -> None:
        """Keep the network in eval mode, whatever mode fit puts the module in."""
        self.loss.eval()

    def on_train_epoch_start(self) -> None:
        """An epoch is one step: accumulate all of its micro-batches.

        Raises:
            InputError: If the Trainer would leave some of them out.
        """
        batches = int(self.trainer.num_training_batches)
        if batches < len(self._datamodule.train_dataloader()):
            raise InputError(
                "The Trainer leaves draws out, so the step would be wrong; don't use limit_train_batches, "
                "overfit_batches or fast_dev_run, but fewer draws."
            )
        self.trainer.accumulate_grad_batches = batches

    def training_step(self, batch: DrawBatch, batch_idx: int) -> Tensor:
        """Minus the loss of some of a target's draws.

        Args:
            batch: The draws.
            batch_idx: Its number.

        Returns:
            A scalar. Scaled so that the gradient that reaches the optimizer is that of the sum over all of a query's
            draws divided by their number, and summed over a set's queries, whatever gradient accumulation and DDP's
            mean divide by.
        """
        assert self.deltas is not None
        weights = target_weights(layer_parameters(self.layers), self.deltas.named(), batch.target)
        losses = self._draw_losses(batch, weights, "unlearning")
        scale = self.trainer.accumulate_grad_batches * self.trainer.world_size / batch.total
        # DDP waits for a gradient of every delta: layers that the loss does not reach get one of zero.
        reached = 0 * torch.stack([weight.flatten()[0] for weight in weights.values()]).sum()
        return -scale * (losses * batch.weights.to(losses)).sum() + reached

    def _draw_losses(self, batch: DrawBatch, weights: dict[str, Tensor], stream: Stream) -> Tensor:
        """Losses ``(b,)`` of a query's draws."""
        timesteps, noise = draw_for_target(
            stream,
            self.seed,
            batch.key,
            batch.numbers,
            batch.total,
            self.objective.num_timesteps,
            batch.latents.shape[1:],
        )
        views = self._cast(ViewBatch(batch.latents, batch.text, batch.mask))
        return self.loss.under(weights, views, timesteps.to(self.device), noise.to(views.latents))

    @torch.no_grad()
    def _target_losses(self, deltas: dict[str, Tensor] | None) -> Tensor:
        """Losses ``(Q,)`` of all targets over the fixed draws, over all ranks; under θ₀ measured only once."""
        if deltas is None and self._base_losses is not None:
            return self._base_losses
        trainer = self.trainer
        sums = torch.zeros(len(self.targets), dtype=torch.float64)
        places = (trainer.global_rank, trainer.world_size)
        size = getattr(self._datamodule, "draw_batch_size", self.rise_draws)
        for number, target in enumerate(self._targets()):
            weights = {} if deltas is None else target_weights(layer_parameters(self.layers), deltas, number)
            for query in target.members:
                for batch in draw_batches(query, number, 0, self.rise_draws, *places, size):
                    losses = self._draw_losses(batch, weights, "rise").cpu().double()
                    sums[number] += (losses * batch.weights).sum()  # a set's loss is the sum of its queries'
        if trainer.world_size > 1:
            reduced = trainer.strategy.reduce(sums.to(self.device), reduce_op="sum")
            assert isinstance(reduced, Tensor)
            sums = reduced.cpu()
        if deltas is None:
            self._base_losses = sums / self.rise_draws
        return sums / self.rise_draws

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """The strategy's optimizer of the deltas.

        Returns:
            The optimizer.
        """
        return self.strategy.configure_optimizer(self._ready())

    def _ready(self) -> Problem:
        if self._problem is None:  # Lightning configures optimizers before on_fit_start
            self.on_fit_start()
        assert self._problem is not None
        return self._problem

    def optimizer_step(
        self, epoch: int, batch_idx: int, optimizer: Any, optimizer_closure: Callable[[], Any] | None = None
    ) -> None:
        """One step, and what the strategy does after it; here, so that no checkpoint sees a step before its scale.

        Args:
            epoch: Number of the step, from 0.
            batch_idx: Lightning's.
            optimizer: The strategy's.
            optimizer_closure: Lightning's forward and backward.
        """
        problem = self._ready()
        before = {name: delta.detach().clone() for name, delta in problem.deltas.items()}
        super().optimizer_step(epoch, batch_idx, optimizer, optimizer_closure)
        with torch.no_grad():
            self.strategy.after_step(problem, before, epoch + 1)

    @torch.no_grad()
    def on_train_epoch_end(self) -> None:
        """Log each target's loss before and after, and the Fisher penalty of its delta, ½ δᵀFδ."""
        problem = self._ready()
        before, after = self._target_losses(None).tolist(), self._target_losses(problem.deltas).tolist()
        penalties = (0.5 * problem.fisher.quadratic(problem.deltas)).tolist()
        for target, loss_before, loss_after, penalty in zip(self.targets, before, after, penalties, strict=True):
            if not abs(loss_after) < float("inf"):
                raise InputError(
                    f"The loss of {target!r} is {loss_after} after unlearning; choose a smaller step or a "
                    "larger N, and check the model and the Fisher."
                )
            result = {
                "loss_before": loss_before,
                "loss_after": loss_after,
                "rise": loss_after / loss_before - 1,
                "penalty": penalty,
            }
            self.results[target] = result
            self.log_dict({f"{name}/{target}": value for name, value in result.items()}, rank_zero_only=True)
        self.trainer.should_stop |= self.strategy.finished

    def unlearning_settings(self) -> dict[str, Any]:
        """What deltas depend on besides weights, Fisher and queries.

        Returns:
            JSON-like settings.
        """
        return {
            **self.strategy.settings(),
            "parameters": self.parameters_selection,
            "damping": self.damping,
            "seed": self.seed,
            "rise_draws": self.rise_draws,
            "objective": self.objective.settings(),
        }

    def fisher_fingerprint(self) -> str:
        """Digest of the Fisher that ``fit`` uses.

        Returns:
            32 hexadecimal characters.
        """
        return _fisher_digest(self.checked_fisher())

    def unlearning_fingerprint(self, datamodule: Any) -> str:
        """Digest of what deltas depend on besides weights and Fisher: settings, queries and their draws.

        Args:
            datamodule: With ``queries``, ``draws`` and, for sets, ``targets_by``, as in ``fit``.

        Returns:
            32 hexadecimal characters.
        """
        order = [query.key for query in datamodule.queries]
        settings = {**self.unlearning_settings(), "draws": datamodule.draws, "queries": order}
        if members := members_of(datamodule.queries, getattr(datamodule, "targets_by", None)):
            settings["members"] = members
        return digest(settings_digest(settings), tensors_digest(named_arrays(datamodule.queries)))


def _fisher_digest(fisher: Fisher) -> str:
    # Those of the data, which were the only ones once, have no part of their own, so that older runs are known again.
    targets = [] if fisher.targets == "data" else [fisher.targets]
    return digest(fisher.kind, fisher.count, tensors_digest(fisher.tensors()), *targets)
