"""A diffusion model's training loss, one number a view; the only loss in the package."""

from __future__ import annotations

import math
from typing import Any, ClassVar, Literal, cast

import torch
from torch import Tensor, nn

from lightning_unlearn.data.samples import ViewBatch
from lightning_unlearn.diffusion.contract import Objective, check_drawn, check_masks, first_with
from lightning_unlearn.diffusion.families import family_of
from lightning_unlearn.diffusion.mean_errors import drawn_error, mean_error
from lightning_unlearn.diffusion.noise_schedule import load_scheduler
from lightning_unlearn.errors import InputError

__all__ = [
    "DenoisingObjective",
    "Objective",
    "check_drawn",
    "check_masks",
    "drawn_error",
    "load_scheduler",
    "mean_error",
]


class DenoisingObjective(Objective):
    r"""Mean squared error of a noise (ε), velocity (v) or image (x₀) prediction.

    With :math:`x_t = \sqrt{\bar\alpha_t}\, x_0 + \sqrt{1-\bar\alpha_t}\, ε` the target is :math:`ε`,
    :math:`\sqrt{\bar\alpha_t}\, ε - \sqrt{1-\bar\alpha_t}\, x_0`, or :math:`x_0`, as the scheduler's
    ``prediction_type`` has it (Ho et al., arXiv 2006.11239, Eq. 14; Salimans and Ho, arXiv 2202.00512, Section 4 and
    Appendix D).

    Args:
        scheduler: Settings of ``diffusers.DDPMScheduler``, or the folder of a saved scheduler or pipeline.
        prediction_type: Overrides the scheduler's.
        snr_gamma: The clipping point of Min-SNR weighting of timesteps (Hang et al., arXiv 2303.09556, Section 3.4);
            ``None`` for no weighting.

    Raises:
        InputError: If the scheduler can't be read, is not one of a noise schedule, or has a key or value that is not
            known; or if ``snr_gamma`` is not above 0.
    """

    takes_masks: ClassVar[bool] = True

    def __init__(
        self,
        scheduler: str | dict[str, Any] | None = None,
        prediction_type: Literal["epsilon", "v_prediction", "sample"] | None = None,
        snr_gamma: float | None = None,
    ) -> None:
        self.scheduler = load_scheduler(scheduler, prediction_type)
        self.num_timesteps = int(self.scheduler.config.num_train_timesteps)
        self.prediction_type: str = self.scheduler.config.prediction_type
        if snr_gamma is not None and not (isinstance(snr_gamma, int | float) and 0 < snr_gamma < math.inf):
            raise InputError(f"snr_gamma is a finite number above 0, not {snr_gamma!r}; leave it out for no weighting.")
        self.snr_gamma = snr_gamma

    def check_network(self, network: nn.Module) -> None:
        """Refuse a network that the family knows nothing of; see :meth:`Objective.check_network`.

        Args:
            network: The denoiser.

        Raises:
            InputError: If no family knows it, it takes more than the samples hold, or it predicts a variance too.
        """
        # A class that has a loss of its own calls networks of its own.
        if first_with(self, "check_network") is DenoisingObjective:
            family_of(network).check(network)

    def __call__(self, network: nn.Module, batch: ViewBatch, timesteps: Tensor, noise: Tensor) -> Tensor:
        """The loss of each view; see :meth:`Objective.__call__`.

        Args:
            network: A network of a known family.
            batch: ``B`` latents, and what else the network is given.
            timesteps: ``(B,)`` int64.
            noise: ``(B, C, H, W)``.

        Returns:
            ``(B,)``, float32 or wider.
        """
        prediction = self._predict(network, batch, timesteps, noise)
        error = prediction - self._target(batch.latents, noise, timesteps).to(prediction)
        loss = mean_error(error.square(), batch.mask)  # (B,)
        return loss if self.snr_gamma is None else loss * self._weight(timesteps).to(loss)

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
        return product if self.snr_gamma is None else product * self._weight(timesteps).sqrt().to(product)

    def _predict(self, network: nn.Module, batch: ViewBatch, timesteps: Tensor, noise: Tensor) -> Tensor:
        # In half precision a schedule that begins near 1 would be 1 there, and the first steps would have no noise.
        noisy = self.scheduler.add_noise(_wide(batch.latents), _wide(noise), timesteps).to(batch.latents)
        prediction = family_of(network).predict(network, noisy, timesteps, batch)
        # Errors are taken in float32 even where the network runs in half precision.
        return prediction.to(torch.promote_types(prediction.dtype, torch.float32))

    def _target(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        if self.prediction_type == "epsilon":
            return noise
        if self.prediction_type == "v_prediction":
            return cast(Tensor, self.scheduler.get_velocity(_wide(latents), _wide(noise), timesteps))
        return latents

    def _weight(self, timesteps: Tensor) -> Tensor:
        assert self.snr_gamma is not None
        alphas_cumprod = self.scheduler.alphas_cumprod.cpu().double()[timesteps.cpu()]  # (B,)
        snr: Tensor = alphas_cumprod / (1 - alphas_cumprod)
        clipped = snr.clamp(max=self.snr_gamma)
        if self.prediction_type == "epsilon":
            # min(SNR, gamma) / SNR, written so that SNR = 0 (a schedule rescaled to zero terminal SNR) gives 1, no NaN.
            return (self.snr_gamma / snr).clamp(max=1.0)
        return clipped / (snr + 1) if self.prediction_type == "v_prediction" else clipped

    def settings(self) -> dict[str, Any]:
        """The schedule, the prediction type and the weighting.

        Returns:
            JSON-like settings.
        """
        config = {name: value for name, value in self.scheduler.config.items() if not name.startswith("_")}
        return {**super().settings(), "scheduler": config, "snr_gamma": self.snr_gamma}


def _wide(tensor: Tensor) -> Tensor:
    """In float32 or wider."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))
