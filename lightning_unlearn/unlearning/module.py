"""The LightningModule: ``fit`` unlearns, ``predict`` gives deviations."""

from __future__ import annotations

from functools import partial

from torch import nn

from lightning_unlearn.data.samples import SampleBatch
from lightning_unlearn.diffusion.adapters import load_adapter, objective_of_training, warn_of_other_loss
from lightning_unlearn.diffusion.checkpoints import AveragedChoice
from lightning_unlearn.diffusion.contract import Objective
from lightning_unlearn.diffusion.loading import load_network_with_origin
from lightning_unlearn.diffusion.objective_choice import objective_of
from lightning_unlearn.draws.views import Views
from lightning_unlearn.errors import InputError
from lightning_unlearn.fingerprints import settings_digest
from lightning_unlearn.fisher import Fisher
from lightning_unlearn.strategies import Newton, Strategy
from lightning_unlearn.unlearning.fitting import Unlearning
from lightning_unlearn.unlearning.saving_memory import DTYPES, WeightsType, checkpoint
from lightning_unlearn.unlearning.scoring import COMPARED, Deviations, measure_losses


class UnlearningModule(Unlearning):
    r"""Unlearns queries in ``fit`` and measures how the loss of training images rose in ``predict``.

    .. math::
        θ_{\hat z} = \arg\min_θ\; -L(\hat z, θ) + \tfrac{N}{2} (θ-θ_0)^T F (θ-θ_0), \qquad
        τ(\hat z, z) = L(z, θ_{\hat z}) - L(z, θ_0)

    Wang et al. (arXiv 2406.09408, Eqs. 4 to 6). The deltas :math:`θ_{\hat z} - θ_0` of all queries are the module's
    parameters, so that gradient accumulation, their reduction over ranks and checkpoints are Lightning's. The network
    is frozen, in eval mode, and left out of checkpoints. It needs a datamodule with ``queries``, such as
    :class:`~lightning_unlearn.datamodules.AttributionDataModule`.

    Args:
        network: The denoiser, or the folder of a diffusers pipeline or network, or a ``checkpoint-N`` of a training by
            diffusers' scripts. Where ``weights`` are given its ``config.json`` suffices.
        objective: The loss it was trained with; by default ε-prediction, or what the scheduler in the network's
            folder and the header of the adapter say.
        fisher: A Fisher or its file; needed in ``fit``, unless the strategy is ``Mirrored``. ``identity`` is
            plain gradient ascent, for comparison.
        parameters: Which weights are unlearned (see :func:`~lightning_unlearn.weights.parameters.select_layers`). By
            default those of the Fisher, and where there is none yet as many as are not too large.
        strategy: How deltas are found; by default one Newton step that brings a query's loss halfway to the mean loss
            of the samples that are scored, but up by at least a half.
        views: The views a sample is scored on.
        damping: Share of each layer's mean Fisher that is added to it.
        seed: Of the unlearning draws.
        rise_draws: Draws over which the query's loss before and after is measured.
        weights: A file or folder to load the network's weights from: a Lightning checkpoint, a state dict, safetensors
            or the index of sharded ones, a single-file model (LDM, SGM), a ``checkpoint-N``.
        prefix: What stands before the network's names in it, e.g. ``"model.unet."``; found where only one fits.
        averaged: Whether averaged weights are taken: ``true``, ``false``, or the place in the file where they lie. By
            default where they stand for the model's own: under Lightning's ``WeightAveraging``, and in ``unet_ema``.
        adapter: A LoRA, LoCon or DoRA to put on the network: a file or folder as diffusers, PEFT, kohya or ai-toolkit
            writes it. ``parameters: adapter`` unlearns its weights alone. Weights of Custom Diffusion take the place of
            the network's.
        merge: Whether the adapter's weights are added to the network's, so that those can be chosen.
        dtype: Of the network's weights: ``bfloat16`` takes half the memory, and each layer is widened for its own
            call, so that all is computed in float32; deltas and an adapter are float32 as ever. A network that is given
            as a module is cast in place.
        checkpointing: Whether unlearning computes layers again in the backward pass, and keeps less for it.
        compile: Whether scoring calls the network compiled, by torch's inductor.

    Raises:
        InputError: If parts don't fit together.
    """

    def __init__(
        self,
        network: nn.Module | str,
        objective: Objective | None = None,
        fisher: Fisher | str | None = None,
        parameters: str | list[str] = "auto",
        strategy: Strategy | None = None,
        views: Views | None = None,
        damping: float = 0.001,
        seed: int = 0,
        rise_draws: int = 64,
        weights: str | None = None,
        prefix: str = "",
        averaged: AveragedChoice = None,
        adapter: str | None = None,
        merge: bool = False,
        dtype: WeightsType = "float32",
        checkpointing: bool = False,
        compile: bool = False,
    ) -> None:
        # Run-time settings are not hyper-parameters: in LightningCLI a checkpoint's override the command line.
        folder = network if isinstance(network, str) else None
        loaded, origin = load_network_with_origin(network, weights, prefix, averaged, DTYPES[dtype])
        training = None if adapter is None else load_adapter(loaded, adapter, merge, weights).training
        if objective is None:
            objective = (
                objective_of(folder, loaded) if training is None else objective_of_training(folder, training, loaded)
            )
        elif training is not None:
            warn_of_other_loss(objective, training)
        objective.check_network(loaded)
        super().__init__(loaded, objective, fisher, parameters, strategy or Newton(), damping, seed, rise_draws)
        if checkpointing:
            checkpoint(self.loss)
        if compile and self.loss.widens:
            raise InputError("Weights in bfloat16 are widened layer by layer, which can't be compiled; choose one.")
        self.compiles = compile
        self._compared = 0  # samples that were scored in float32, too
        self.views = views or Views()
        # Where the weights came from, as it stands in the record of a run.
        self.origin = {**(origin.record() if origin is not None else {}), **({"adapter": adapter} if adapter else {})}

    def on_predict_start(self) -> None:
        """Refuse to score without deltas.

        Raises:
            InputError: If there are none.
        """
        self._exact()
        self._compared = 0
        self.require_deltas()
        if self.compiles:
            self.network.compile()

    def require_deltas(self) -> None:
        """Refuse to score without deltas, or with those of a fit that was cut short.

        Raises:
            InputError: If there are none, or the unlearning has not ended.
        """
        if not self.targets:
            raise InputError("There are no deltas to score with; run fit first, or pass its checkpoint as ckpt_path.")
        if self.unfinished:
            raise InputError(
                "The unlearning of these deltas did not end, so they are not what is asked for; run fit to its end, "
                "or go on from its checkpoint with fit and ckpt_path."
            )

    def predict_step(self, batch: SampleBatch, batch_idx: int) -> Deviations:
        """Losses of a batch under θ₀ and under each target's weights.

        Args:
            batch: ``B`` samples of one shard; may be empty.
            batch_idx: Its number.

        Returns:
            The losses, on the CPU, float32 or wider.
        """
        assert self.deltas is not None
        if self.views.flips and len(batch) and batch.latents_flip is None:
            # Only this shard fails; the others go on.
            batch = SampleBatch(
                batch.shard,
                error=f"Flips are scored, but shard {batch.shard} holds no latent_flip.npy; prepare it with flips, "
                "or set flips to false.",
            )
        measure = partial(measure_losses, self.loss, self.deltas, self.views, batch, self.device)
        losses, exact = measure(), None
        if len(batch) and self._compared < COMPARED and (self.compiles or self.loss.rounds):
            # Once more in float32, to say how far the ranks agree.
            self._compared += len(batch)
            with self.loss.exact():
                exact = measure()
        return Deviations(batch, losses[0], losses[1:], exact, self.computed_in(str(self.trainer.precision)))

    def computed_in(self, precision: str) -> str:
        """How losses are computed, in words.

        Args:
            precision: The Trainer's.

        Returns:
            It, with what differs of the weights.
        """
        return f"{precision}{', weights in half precision' * self.loss.widens}{', compiled' * self.compiles}"

    def fingerprints(self) -> dict[str, str]:
        """What scores depend on: runs with the same fingerprints may share a score table.

        Returns:
            Digests of the deltas and what they come from, and of the views.
        """
        return {**super().fingerprints(), "views": settings_digest(self.views.settings())}
