"""The loss of flow matching: a straight line from data to noise, whose direction the network predicts."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from lightning_unlearn.data.samples import ViewBatch
from lightning_unlearn.diffusion.contract import Objective, first_with
from lightning_unlearn.diffusion.families import FAMILIES, family_of
from lightning_unlearn.diffusion.families.base import FlowTraining
from lightning_unlearn.diffusion.families.settings import setting
from lightning_unlearn.diffusion.flow_schedule import load_flow_scheduler
from lightning_unlearn.diffusion.mean_errors import drawn_error, mean_error
from lightning_unlearn.diffusion.noise_schedule import scheduler_config
from lightning_unlearn.diffusion.timestep_density import DENSITIES, Density, timestep_probabilities
from lightning_unlearn.errors import InputError

WEIGHTINGS = ("none", "sigma_sqrt", "cosmap")


class FlowMatchingObjective(Objective):
    r"""Mean squared error of the direction of a flow.

    With :math:`x_t = (1 - σ_t)\, x_0 + σ_t\, ε` the target is :math:`ε - x_0` (Lipman et al., arXiv 2210.02747; Esser
    et al., arXiv 2403.03206, Section 2). Timestep 0 lies next to the data. The weighting of a timestep is 1,
    :math:`σ^{-2}` (``sigma_sqrt``) or :math:`2 / π (1 - 2σ + 2σ^2)` (``cosmap``), as in diffusers' training scripts; a
    network of preconditioned outputs is trained on the error of :math:`x_t - σ f` as :math:`x_0`, which is the same
    error times σ, so its loss has a further factor :math:`σ^2`.

    The scheduler does not say with what density training drew its timesteps, nor whether outputs were preconditioned.
    Where these are left out and ``scheduler`` is a pipeline's folder, they are what diffusers' training script of the
    family has as its default (``logit_normal`` and preconditioned for Stable Diffusion 3, ``uniform`` and not for the
    others); :meth:`settings` says which. Where the scheduler is a solver with a ``flow_shift``, as Sana's is, these
    scripts train without it, so that the density must be said.

    Args:
        scheduler: Settings of ``diffusers.FlowMatchEulerDiscreteScheduler``, or the folder of a saved scheduler or
            pipeline.
        density: Of the timesteps of training.
        logit_mean: Of the density ``logit_normal``.
        logit_std: Of the density ``logit_normal``.
        mode_scale: Of the density ``mode``.
        weighting: Of timesteps.
        preconditioned: Whether training took the network's outputs as preconditioned.
        guidance: The guidance scale that a guidance-distilled network was given in training: diffusers' scripts have
            3.5 as their default, kohya's guide 1.0.
        shift: Overrides the scheduler's: 1.0 for none.

    Raises:
        InputError: If the scheduler can't be read, is not one of a flow, or has a key or value that is not known; if
            the density is not said and the folder's family doesn't have one; or if a number is out of range.
    """

    takes_masks: ClassVar[bool] = True

    def __init__(
        self,
        scheduler: str | dict[str, Any] | None = None,
        density: Density | None = None,
        logit_mean: float = 0.0,
        logit_std: float = 1.0,
        mode_scale: float = 1.29,
        weighting: Literal["none", "sigma_sqrt", "cosmap"] = "none",
        preconditioned: bool | None = None,
        guidance: float | None = None,
        shift: float | None = None,
    ) -> None:
        self.scheduler = load_flow_scheduler(scheduler, shift)
        self.num_timesteps = int(self.scheduler.config.num_train_timesteps)
        usual = _usual_training(scheduler) if isinstance(scheduler, str) else FlowTraining(None)
        if density is None and shift is None and usual.density is not None:
            _refuse_shift_of_a_solver(scheduler)
        found = density if density is not None else usual.density
        if found is None:
            raise InputError(
                "Nothing here says with what density training drew its timesteps; give FlowMatchingObjective its "
                f"density, one of {', '.join(DENSITIES)}, or as `scheduler` the folder of a pipeline of a family for "
                "which diffusers has a training script."
            )
        if weighting not in WEIGHTINGS:
            raise InputError(f"There is no weighting {weighting!r}; choose one of {', '.join(WEIGHTINGS)}.")
        if guidance is not None and not (isinstance(guidance, int | float) and math.isfinite(guidance)):
            raise InputError(f"guidance is a finite number, not {guidance!r}; leave it out where training had none.")
        self.timestep_density: Density = found
        self.weighting = weighting
        self.preconditioned = usual.preconditioned if preconditioned is None else preconditioned
        self.guidance = guidance
        self._density_numbers = {"logit_mean": logit_mean, "logit_std": logit_std, "mode_scale": mode_scale}
        self.density()  # refuses what is out of range
        # From data to noise; diffusers' tables run from noise to data. Both are (num_timesteps,) float32.
        self.sigmas: Tensor = self.scheduler.sigmas.flip(0)
        self.times: Tensor = self.scheduler.timesteps.flip(0)

    def density(self) -> Tensor | None:
        """How often training drew each timestep; see :meth:`Objective.density`.

        Returns:
            ``(num_timesteps,)`` float64, or ``None`` for all alike.
        """
        return timestep_probabilities(self.timestep_density, self.num_timesteps, **self._density_numbers)

    def check_network(self, network: nn.Module) -> None:
        """Refuse a network that the family knows nothing of, or a guidance that is missing or goes nowhere.

        Args:
            network: The denoiser.

        Raises:
            InputError: If no family knows it, it takes more than the samples hold, or is guidance-distilled and it is
                not said with what guidance it was trained, or the other way round.
        """
        # A class that has a loss of its own calls networks of its own.
        if first_with(self, "check_network") is not FlowMatchingObjective:
            return
        family_of(network).check(network)
        name, distilled = type(network).__name__, bool(setting(network, "guidance_embeds"))
        if distilled and self.guidance is None:
            raise InputError(
                f"This {name} is guidance-distilled (its config has guidance_embeds), and no file says which guidance "
                "training gave it; give FlowMatchingObjective its guidance: 3.5 is the default of diffusers' training "
                "scripts, 1.0 what kohya's guide trains with."
            )
        if self.guidance is not None and not distilled:
            raise InputError(
                f"This {name} takes no guidance (its config has no guidance_embeds); leave FlowMatchingObjective's "
                "guidance out."
            )

    def __call__(self, network: nn.Module, batch: ViewBatch, timesteps: Tensor, noise: Tensor) -> Tensor:
        """The loss of each view; see :meth:`Objective.__call__`.

        Args:
            network: A network of a known family.
            batch: ``B`` latents, and what else the network is given.
            timesteps: ``(B,)`` int64, 0 next to the data.
            noise: ``(B, C, H, W)``.

        Returns:
            ``(B,)``, float32 or wider.
        """
        prediction = self._predict(network, batch, timesteps, noise)
        error = prediction - (noise.to(prediction) - batch.latents.to(prediction))
        return mean_error(error.square(), batch.mask) * self._weight(timesteps, prediction)

    def drawn(self, network: nn.Module, batch: ViewBatch, timesteps: Tensor, noise: Tensor, normal: Tensor) -> Tensor:
        """What has the gradient of each view's loss with a drawn target; see :meth:`Objective.drawn`.

        Args:
            network: A network of a known family.
            batch: ``B`` latents, and what else the network is given.
            timesteps: ``(B,)`` int64.
            noise: ``(B, C, H, W)``.
            normal: ``(B, C, H, W)``.

        Returns:
            ``(B,)``, float32 or wider.
        """
        prediction = self._predict(network, batch, timesteps, noise)
        product = drawn_error(prediction, normal.to(prediction), batch.mask)  # (B,)
        return product * self._weight(timesteps, product).sqrt()

    def with_guidance(self, batch: ViewBatch) -> ViewBatch:
        """What the network is given, with the guidance of training where it takes one.

        Args:
            batch: ``B`` views.

        Returns:
            The views, with ``guidance`` ``(B, 1)`` among their conditions.
        """
        if self.guidance is None or "guidance" in batch.conditions:
            return batch
        # Not in the network's type: pipelines hand it over in float32.
        scale = torch.full((len(batch.latents), 1), float(self.guidance), device=batch.latents.device)
        return replace(batch, conditions={**batch.conditions, "guidance": scale})

    def _predict(self, network: nn.Module, batch: ViewBatch, timesteps: Tensor, noise: Tensor) -> Tensor:
        latents = batch.latents
        sigmas = self._sigmas(timesteps, latents).reshape(-1, *[1] * (latents.ndim - 1))
        noisy = ((1 - sigmas) * latents + sigmas * noise).to(latents)
        times = self.times.to(latents.device)[timesteps]
        prediction = family_of(network).predict(network, noisy, times, self.with_guidance(batch))
        # Errors are taken in float32 even where the network runs in half precision.
        return prediction.to(torch.promote_types(prediction.dtype, torch.float32))

    def _sigmas(self, timesteps: Tensor, like: Tensor) -> Tensor:
        """``(B,)``, in float32 or wider."""
        return self.sigmas.to(like.device)[timesteps].to(torch.promote_types(like.dtype, torch.float32))

    def _weight(self, timesteps: Tensor, like: Tensor) -> Tensor:
        sigmas = self._sigmas(timesteps, like)
        weight = torch.ones_like(sigmas)
        if self.weighting == "sigma_sqrt":
            weight = sigmas**-2
        elif self.weighting == "cosmap":
            weight = 2 / (math.pi * (1 - 2 * sigmas + 2 * sigmas**2))
        return weight * sigmas**2 if self.preconditioned else weight

    def settings(self) -> dict[str, Any]:
        """The table of sigmas, the density, the weighting and the guidance.

        Returns:
            JSON-like settings.
        """
        config, used = self.scheduler.config, {"logit_normal": ("logit_mean", "logit_std"), "mode": ("mode_scale",)}
        numbers = {name: float(self._density_numbers[name]) for name in used.get(self.timestep_density, ())}
        shift = 1.0 if config.use_dynamic_shifting else float(config.shift)
        return {**super().settings(), "shift": shift, "density_numbers": numbers}


def _refuse_shift_of_a_solver(scheduler: str | dict[str, Any] | None) -> None:
    """Refuse to join the density of a training script to a shift that the script does not look at."""
    config, where = scheduler_config(scheduler)
    if config.get("use_flow_sigmas") and config.get("flow_shift", 1.0) != 1.0:
        raise InputError(
            f"{where} are of {config.get('_class_name')}, whose flow_shift of {config['flow_shift']} diffusers' "
            "training script does not look at: an adapter of it was trained with a shift of 1.0, a model from scratch "
            "perhaps not; give FlowMatchingObjective its density and its shift."
        )


def _usual_training(folder: str) -> FlowTraining:
    """How diffusers' script trains the family of a pipeline's network, as the pipeline's folder says which it is."""
    for path in (Path(folder) / part / "config.json" for part in ("transformer", "unet", ".")):
        try:
            name = json.loads(path.read_bytes()).get("_class_name")
        except (OSError, ValueError, AttributeError, RecursionError):
            continue
        for family in FAMILIES:
            if name in family.class_names:
                return family.flow or FlowTraining(None)
    return FlowTraining(None)
