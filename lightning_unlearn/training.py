"""Plain training of a diffusion model on shards, for those who have no LightningModule of their own."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import Any, get_args

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.utilities.types import OptimizerLRSchedulerConfig
from torch import Tensor, nn

from lightning_unlearn.data.samples import SampleBatch, ViewBatch
from lightning_unlearn.diffusion.contract import Objective, check_drawn, knows_masks
from lightning_unlearn.diffusion.loading import load_network
from lightning_unlearn.diffusion.objective_choice import objective_of
from lightning_unlearn.draws.views import place_timesteps
from lightning_unlearn.errors import InputError
from lightning_unlearn.fingerprints import generator_for, seed_of
from lightning_unlearn.fisher import Targets
from lightning_unlearn.weights.parameters import select_layers

OptimizerFactory = Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer]
SchedulerFactory = Callable[[torch.optim.Optimizer], torch.optim.lr_scheduler.LRScheduler]


class DiffusionModule(LightningModule):
    """Trains a denoiser on ``SampleBatch``es: a random caption, timestep and noise for each sample.

    Args:
        network: The denoiser, or a diffusers folder.
        objective: Its loss; by default what the scheduler in the folder stands for, or ε-prediction.
        optimizer: Makes the optimizer from the weights; AdamW by default.
        lr_scheduler: Makes the learning-rate schedule, stepped after every optimizer step.
        flips: Whether half of the samples are mirrored (needs shards with flips).
        weights: A file to start from.
        prefix: What stands before the network's names in it.
    """

    def __init__(
        self,
        network: nn.Module | str,
        objective: Objective | None = None,
        optimizer: OptimizerFactory = torch.optim.AdamW,
        lr_scheduler: SchedulerFactory | None = None,
        flips: bool = False,
        weights: str | None = None,
        prefix: str = "",
    ) -> None:
        super().__init__()
        self.network = load_network(network, weights, prefix).train()
        self.objective = objective or objective_of(network if isinstance(network, str) else None, self.network)
        self.objective.check_network(self.network)
        self.optimizer = optimizer
        self.lr_scheduler = lr_scheduler
        self.flips = flips

    def training_step(self, batch: SampleBatch, batch_idx: int) -> dict[str, Any]:
        """The mean loss of a batch, and what it is the mean of.

        Args:
            batch: ``B`` samples.
            batch_idx: Its number.

        Returns:
            The scalar ``loss``; for whoever looks on, each sample's own ``sample_losses`` ``(B,)``, ``timesteps``
            ``(B,)`` and ``keys``.
        """
        views, timesteps, noise = self._draw(batch)
        losses = self.objective(self.network, views, timesteps, noise)
        loss = losses.mean()
        self.log("train_loss", loss, prog_bar=True, batch_size=len(batch))
        return {"loss": loss, "sample_losses": losses.detach(), "timesteps": timesteps, "keys": batch.keys}

    def _draw(self, batch: SampleBatch) -> tuple[ViewBatch, Tensor, Tensor]:
        # A random view of each sample, from the global random state as in any training.
        rows = torch.arange(len(batch))
        captions = (torch.rand(len(batch)) * batch.caption_counts).long()  # (B,)
        if batch.caption_weights is not None:
            captions = torch.stack([torch.multinomial(torch.tensor(shares), 1)[0] for shares in batch.caption_weights])
        latents, masks = batch.latents, batch.masks
        if masks is not None and not knows_masks(self.objective):
            raise InputError(
                f"The sample {batch.keys[0]!r}, or one beside it, has a loss mask, of which "
                f"{type(self.objective).__name__} knows nothing; give an objective that takes masks, or prepare the "
                "samples without."
            )
        if self.flips:
            if batch.latents_flip is None:
                raise InputError(
                    "These shards hold no latent_flip.npy; prepare them with flips, or set flips to false."
                )
            mirrored = torch.rand(len(batch), device=self.device) < 0.5
            latents = torch.where(mirrored.view(-1, *[1] * (latents.ndim - 1)), batch.latents_flip, latents)
            if masks is not None:
                masks = torch.where(mirrored[:, None, None], masks.flip(-1), masks)
        length, density = self.objective.num_timesteps, self.objective.density()
        if density is None:
            timesteps = torch.randint(0, length, (len(batch),), device=self.device)
        else:
            places = torch.rand(len(batch), dtype=torch.float64)
            timesteps = place_timesteps(places, (0.0, 1.0), length, density).to(self.device)
        # Drawn in the samples' type, whatever the network's is.
        noise, own = torch.randn_like(latents), next(self.network.parameters())
        views = replace(batch.views(rows, captions, latents), mask=masks).to(own.device, own.dtype)
        return views, timesteps, noise.to(own)

    def configure_optimizers(self) -> torch.optim.Optimizer | OptimizerLRSchedulerConfig:
        """The optimizer over all weights, and the schedule.

        Returns:
            As Lightning takes them.
        """
        optimizer = self.optimizer(self.network.parameters())
        if self.lr_scheduler is None:
            return optimizer
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": self.lr_scheduler(optimizer), "interval": "step"}}


class FisherPass(DiffusionModule):
    """Passes over the shards with frozen weights, for a Fisher of a model that was trained without FisherAccumulator.

    It is run with Trainer.fit and a :class:`~lightning_unlearn.callbacks.FisherAccumulator`, so that gradients take the
    same way as in a training. Frozen means that no optimizer steps: the chosen weights require gradients, or none would
    arrive at layers that are fed by text.

    Args:
        network: The denoiser.
        objective: Its loss.
        parameters: The chosen weights.
        seed: Of captions, timesteps, noise and drawn targets.
        targets: Those of the data, for the empirical Fisher, or drawn from the model, for the true one.

    Raises:
        InputError: If targets are to be drawn and the objective does not say how.
    """

    def __init__(
        self,
        network: nn.Module,
        objective: Objective,
        parameters: str | list[str],
        seed: int = 0,
        targets: Targets = "data",
    ) -> None:
        if targets not in get_args(Targets):
            raise InputError(f"The targets of a Fisher are one of {', '.join(get_args(Targets))}, not {targets!r}.")
        if targets == "model":
            check_drawn(objective)
        super().__init__(network, objective)
        self.automatic_optimization = False
        self.network.requires_grad_(False).eval()
        for layer in select_layers(self.network, parameters).values():
            layer.requires_grad_(True)
        self.seed = seed
        self.targets: Targets = targets

    def on_train_start(self) -> None:
        """Give every rank its own noise, and keep the network in eval mode."""
        torch.manual_seed(seed_of("fisher", self.seed, self.global_rank))
        self.network.eval()

    def training_step(self, batch: SampleBatch, batch_idx: int) -> Tensor:  # type: ignore[override]
        """A backward pass, whose gradients the callback takes, and no step.

        Args:
            batch: ``B`` samples.
            batch_idx: Its number.

        Returns:
            The mean loss; with drawn targets, what has its gradient.
        """
        of_data = self.targets == "data"
        loss: Tensor = super().training_step(batch, batch_idx)["loss"] if of_data else self._drawn(batch).mean()
        self.manual_backward(loss)
        self.zero_grad()
        return loss.detach()

    def _drawn(self, batch: SampleBatch) -> Tensor:
        # Keyed by pass and sample: batches, workers and ranks can't change them, and the random state that captions,
        # timesteps and noise come from is not touched, so that these are the same for either kind of targets.
        views, timesteps, noise = self._draw(batch)
        normal = torch.stack([self.draw_normal(key, noise.shape[1:]) for key in batch.keys])
        return self.objective.drawn(self.network, views, timesteps, noise, normal.to(noise))

    def draw_normal(self, key: str, shape: Sequence[int]) -> Tensor:
        """What a sample's target is drawn with in this pass.

        Args:
            key: The sample's.
            shape: ``(C, H, W)``.

        Returns:
            ``(C, H, W)`` standard normal, float32 on the CPU.
        """
        generator = generator_for("fisher-targets", self.seed, self.current_epoch, key)
        return torch.randn(tuple(shape), generator=generator, dtype=torch.float32)

    def configure_optimizers(self) -> None:  # type: ignore[override]
        """No optimizer."""
