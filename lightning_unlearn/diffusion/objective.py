"""A diffusion model's training loss, one number a view; the only loss in the package."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar, Literal, cast

import torch
from torch import Tensor, nn

from lightning_unlearn.data.samples import Sample, ViewBatch
from lightning_unlearn.diffusion.families import family_of
from lightning_unlearn.diffusion.mean_errors import drawn_error, mean_error
from lightning_unlearn.diffusion.noise_schedule import load_scheduler
from lightning_unlearn.errors import InputError
from lightning_unlearn.fingerprints import public_name

__all__ = [
    "DenoisingObjective",
    "Objective",
    "check_drawn",
    "check_masks",
    "drawn_error",
    "load_scheduler",
    "mean_error",
]


class Objective(ABC):
    """The loss that a network was trained with; derive from it to attribute a model with a loss of its own.

    Timesteps and noise always come from outside, so that a loss can be evaluated again.

    Attributes:
        num_timesteps: Length of the training schedule; timesteps are drawn from ``[0, num_timesteps)``.
        takes_masks: Whether the loss is that of the region alone where ``batch.mask`` gives one (:func:`mean_error`
            does it). A class that has a ``__call__`` of its own must say so itself.

    Example:
        >>> class Plain(Objective):
        ...     num_timesteps = 10
        ...     def __call__(self, network, batch, timesteps, noise):
        ...         noisy = batch.latents + timesteps[:, None, None, None] / 10 * noise
        ...         return (network(noisy) - noise).square().flatten(1).mean(1)
        >>> batch = ViewBatch(torch.zeros(2, 3, 4, 4), {})
        >>> Plain()(torch.nn.Identity(), batch, torch.tensor([10, 0]), torch.ones(2, 3, 4, 4))
        tensor([0., 1.])
    """

    num_timesteps: int
    takes_masks: ClassVar[bool] = False

    @abstractmethod
    def __call__(self, network: nn.Module, batch: ViewBatch, timesteps: Tensor, noise: Tensor) -> Tensor:
        """The loss of each view.

        Args:
            network: The denoiser, called as it is.
            batch: ``B`` latents, and what else the network is given.
            timesteps: ``(B,)`` int64.
            noise: ``(B, C, H, W)`` standard normal.

        Returns:
            ``(B,)``, float32 or wider, differentiable with respect to the network's weights.
        """

    def drawn(self, network: nn.Module, batch: ViewBatch, timesteps: Tensor, noise: Tensor, normal: Tensor) -> Tensor:
        r"""What has the gradient of each view's loss with a target drawn from the model, in place of the data's.

        For the true Fisher. A loss of squared errors is :math:`-\log p(y|x)` of a normal distribution around the
        prediction, up to a constant; :func:`drawn_error` has the formula. A class that has a ``__call__`` of its own
        must have a ``drawn`` of its own, too; without one it has the empirical Fisher only.

        Args:
            network: The denoiser, called as it is.
            batch: ``B`` latents, and what else the network is given.
            timesteps: ``(B,)`` int64.
            noise: ``(B, C, H, W)`` standard normal, of the noisy latents.
            normal: ``(B, C, H, W)`` standard normal, independent of all else: the prediction less the drawn target, in
                units of the target's standard deviation.

        Returns:
            ``(B,)``, float32 or wider; its gradient matters and its value does not.

        Raises:
            InputError: If this objective has none.
        """
        raise InputError(_NOT_DRAWN.format(type(self).__name__))

    def check_network(self, network: nn.Module) -> None:  # noqa: B027 -- most losses know no network that they refuse
        """Refuse a network that this loss does not fit, before any long work; by default none is refused.

        Args:
            network: The denoiser.

        Raises:
            InputError: If it does not fit.
        """

    def settings(self) -> dict[str, Any]:
        """What tells this objective from another, as JSON; it enters the fingerprint of every run.

        Returns:
            JSON-like settings. By default the name of the class, and those of its attributes that are numbers, strings
            or lists of them.
        """
        plain = {name: value for name, value in vars(self).items() if _is_plain(value)}
        return {"class": public_name(f"{type(self).__module__}.{type(self).__qualname__}"), **plain}


def _is_plain(value: Any) -> bool:
    if isinstance(value, list | tuple):
        return all(map(_is_plain, value))
    return value is None or isinstance(value, bool | int | float | str)


def check_drawn(objective: Objective) -> None:
    """Refuse to draw targets from a model whose loss does not say how.

    Args:
        objective: The loss.

    Raises:
        InputError: If it has a ``__call__`` of its own and no ``drawn`` of its own.
    """
    said = _first_with(objective, "drawn")
    if said is Objective or "drawn" not in vars(said):
        raise InputError(_NOT_DRAWN.format(type(objective).__name__))


_NOT_DRAWN = (
    "{} does not say how targets are drawn from the model; give it a method `drawn` (drawn_error in "
    "lightning_unlearn.diffusion.objective makes it for a squared error), or take the Fisher with the targets of the "
    "data."
)


def _first_with(objective: Objective, name: str) -> type:
    # What a class says holds for its own loss, not for one that a class derived from it puts in its place.
    return next(cls for cls in type(objective).__mro__ if {name, "__call__"} & vars(cls).keys())


def check_masks(objective: Objective, queries: Sequence[Sample]) -> None:
    """Refuse a region that the loss would not know of.

    Args:
        objective: The loss.
        queries: All queries.

    Raises:
        InputError: If one has a mask and the objective takes none.
    """
    masked = [query.key for query in queries if query.mask is not None]
    if masked and not vars(_first_with(objective, "takes_masks")).get("takes_masks", False):
        raise InputError(
            f"The query {masked[0]!r} has a mask, of which {type(objective).__name__} knows nothing; let its loss be "
            "that of batch.mask and set takes_masks to True, or leave masks out."
        )


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
        if _first_with(self, "check_network") is DenoisingObjective:
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
        noisy = self.scheduler.add_noise(batch.latents, noise, timesteps)
        prediction = family_of(network).predict(network, noisy, timesteps, batch)
        # Errors are taken in float32 even where the network runs in half precision.
        return prediction.to(torch.promote_types(prediction.dtype, torch.float32))

    def _target(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        if self.prediction_type == "epsilon":
            return noise
        if self.prediction_type == "v_prediction":
            return cast(Tensor, self.scheduler.get_velocity(latents, noise, timesteps))
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
