"""Lightning's ``fit`` as unlearning: from draws to deltas."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from lightning_unlearn.data.samples import Sample
from lightning_unlearn.data.targets import Target, members_of, targets_of
from lightning_unlearn.diffusion.objective import Objective, check_masks
from lightning_unlearn.draws.unlearning_draws import DrawBatch, Stream
from lightning_unlearn.errors import InputError
from lightning_unlearn.fisher import Fisher
from lightning_unlearn.fisher.source import find_fisher
from lightning_unlearn.strategies import Problem, Strategy
from lightning_unlearn.unlearning.chosen import chosen_weights
from lightning_unlearn.unlearning.fixed_draws import draw_losses
from lightning_unlearn.unlearning.frozen import FrozenModule
from lightning_unlearn.unlearning.guards import check_needs, check_precision, check_unlearning, set_steps
from lightning_unlearn.unlearning.outcome import outcomes, tell_of_range
from lightning_unlearn.unlearning.problem import fixed_draws, problem_of
from lightning_unlearn.unlearning.provenance import fisher_digest, unlearning_digest
from lightning_unlearn.weights.deltas import DeltaStore
from lightning_unlearn.weights.parameters import layer_parameters


class Unlearning(FrozenModule):
    """The half of :class:`~lightning_unlearn.unlearning.module.UnlearningModule` that ``fit`` runs.

    An epoch is one step of the strategy over all draws of all targets; Lightning accumulates their gradients.

    Args:
        network: The denoiser.
        objective: Its loss.
        fisher: A Fisher, its file, or ``identity`` for none; ``None`` if the strategy needs none.
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
        selection, reason = chosen_weights(network, parameters, fisher)
        super().__init__(network, objective, selection)
        self.parameters_asked, self.parameters_selection, self.parameters_reason = parameters, selection, reason
        self.fisher_source = fisher
        self.strategy = strategy
        self.damping, self.seed, self.rise_draws = damping, seed, rise_draws
        self._problem: Problem | None = None

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
            InputError: If the Trainer can't be used, what the strategy needs is missing, or the objective does not know
                masks.
        """
        self._gives_back()
        check_precision(self.trainer)
        if stage != "fit":
            return
        check_unlearning(self.trainer)
        check_needs(self.strategy, self.fisher_source, self._datamodule)
        check_masks(self.objective, self._queries())
        # The network is in eval mode on purpose.
        warnings.filterwarnings("ignore", message=r"Found \d+ module\(s\) in eval mode")
        # What an earlier fit of this module left; a checkpoint, if there is one, is loaded after this.
        self._problem, self.results, self.unfinished = None, {}, True
        self._fingerprints = {}
        self.weights_fingerprint()  # before the Trainer's precision converts them
        set_steps(self.trainer, self.strategy)

    def on_fit_start(self) -> None:
        """Load the Fisher, see that it is this network's, and set up the problem.

        Raises:
            InputError: If the Fisher is of another model, or fit goes on from a checkpoint that was made in another
                way.
        """
        if self._problem is not None:
            return
        self._exact()
        fisher = self._given_fisher()
        if fisher is not None:
            fisher = fisher.to(self.device)
            fisher.finalize(self.damping)
        made = {"fisher": fisher_digest(fisher), "unlearning": self.unlearning_fingerprint(self._datamodule)}
        if any(self._fingerprints.get(name, value) != value for name, value in made.items()):
            raise InputError(
                "The checkpoint's deltas were made with another Fisher, other queries, draws or settings; "
                "unlearn anew, without ckpt_path."
            )
        self._fingerprints |= made
        reason = {"parameters_reason": self.parameters_reason} if self.parameters_reason else {}
        self.settings = {**self.unlearning_settings(), **reason, "draws": self._datamodule.draws}
        if self.members:
            self.settings["targets_by"] = self._datamodule.targets_by
        assert self.deltas is not None
        targets = self._targets()
        about = (self.loss, targets, self._datamodule, self.seed, self.rise_draws, self.trainer)
        fixed = fixed_draws(self.strategy, *about)
        self._problem = problem_of(self.strategy, self.deltas, self.layers, fisher, targets, fixed)

    def _given_fisher(self) -> Fisher | None:
        if self.fisher_source is None and not self.strategy.needs_fisher:
            return None
        return self.checked_fisher()

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
        """What is to fall: minus the loss of some of a target's draws, or the loss of real samples.

        Args:
            batch: The draws.
            batch_idx: Its number.

        Returns:
            A scalar. Scaled so that the gradient that reaches the optimizer is that of the sum over all of a query's
            draws divided by their number, and summed over a set's queries, whatever gradient accumulation and DDP's
            mean divide by; with real draws, plus that of their mean.
        """
        assert self.deltas is not None
        weights = self.loss.target_weights(self.deltas.named(), batch.target)
        parts = batch.parts()
        stream: Stream = "real" if batch.real else "unlearning"
        losses = torch.cat([draw_losses(self.loss, part, weights, stream, self.seed) for part in parts])
        falling = losses if batch.real else -self.strategy.ascended(losses, batch.key)
        scale = self.trainer.accumulate_grad_batches * self.trainer.world_size / batch.total
        # DDP waits for a gradient of every delta: layers that the loss does not reach get one of zero.
        reached = 0 * torch.stack([weight.flatten()[0] for weight in weights.values()]).sum()
        counted = torch.cat([part.weights for part in parts])
        return scale * (falling * counted.to(falling)).sum() + reached

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
        """Log what each target's delta changed, and what of it is out of range.

        Raises:
            InputError: If a loss is beyond all numbers.
        """
        self.results = outcomes(self._ready(), self.strategy)
        for target, result in self.results.items():
            numbers = {f"{name}/{target}": value for name, value in result.items() if isinstance(value, float)}
            self.log_dict(numbers, rank_zero_only=True)
        self.unfinished = not (self.strategy.finished or self.trainer.global_step >= self.strategy.steps)
        self.trainer.should_stop |= self.strategy.finished
        if self.strategy.finished or self.current_epoch + 1 == self.strategy.steps:
            tell_of_range(self.results, self.strategy)

    def on_train_end(self) -> None:
        """Refuse deltas of a fit that something stopped: they are not what was asked for, and look as if they were.

        Raises:
            InputError: If not all steps were taken.
        """
        if self.unfinished:
            raise InputError(
                f"The unlearning was stopped after {self.trainer.global_step} of {self.strategy.steps} steps, so its "
                "deltas are of no use; leave out the callback or the limit that stopped it, or go on from a checkpoint."
            )

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
            32 hexadecimal characters; ``none`` where there is none and none is needed.
        """
        return fisher_digest(self._given_fisher())

    def unlearning_fingerprint(self, datamodule: Any) -> str:
        """Digest of what deltas depend on besides weights and Fisher: settings, queries and their draws.

        Args:
            datamodule: With ``queries``, ``draws`` and, for sets, ``targets_by``, as in ``fit``; with ``shards`` where
                the strategy draws real samples.

        Returns:
            32 hexadecimal characters.
        """
        return unlearning_digest(self.unlearning_settings(), datamodule, real=self.strategy.needs_samples)
