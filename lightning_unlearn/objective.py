"""A diffusion model's training loss, one number a view; the only loss in the package."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar, Literal, cast

import torch
from torch import Tensor, nn

from lightning_unlearn.errors import InputError
from lightning_unlearn.families import family_of
from lightning_unlearn.samples import Sample, ViewBatch


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
        >>> batch = ViewBatch(torch.zeros(2, 3, 4, 4), torch.zeros(2, 1, 1))
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
            batch: ``B`` latents and texts.
            timesteps: ``(B,)`` int64.
            noise: ``(B, C, H, W)`` standard normal.

        Returns:
            ``(B,)``, float32 or wider, differentiable with respect to the network's weights.
        """

    def settings(self) -> dict[str, Any]:
        """What tells this objective from another, as JSON; it enters the fingerprint of every run.

        Returns:
            JSON-like settings. By default the name of the class, and those of its attributes that are numbers, strings
            or lists of them.
        """
        plain = {name: value for name, value in vars(self).items() if _is_plain(value)}
        return {"class": f"{type(self).__module__}.{type(self).__qualname__}", **plain}


def _is_plain(value: Any) -> bool:
    if isinstance(value, list | tuple):
        return all(map(_is_plain, value))
    return value is None or isinstance(value, bool | int | float | str)


def mean_error(errors: Tensor, mask: Tensor | None) -> Tensor:
    r"""Mean of each view's errors, over its region: :math:`\sum m ℓ / \sum m`.

    Args:
        errors: ``(B, C, H, W)``, a loss of each element.
        mask: ``(B, H, W)``, how much of each place is in the region; ``None`` for all of it.

    Returns:
        ``(B,)``.

    Example:
        >>> errors = torch.tensor([[[[1.0, 2.0], [3.0, 6.0]]]])
        >>> mean_error(errors, None), mean_error(errors, torch.tensor([[[0.0, 1.0], [0.0, 1.0]]]))
        (tensor([3.]), tensor([4.]))
    """
    if mask is None:
        return errors.flatten(1).mean(1)
    shares = mask.to(errors)[:, None].expand_as(errors)  # (B, C, H, W)
    return (errors * shares).flatten(1).sum(1) / shares.flatten(1).sum(1)


def check_masks(objective: Objective, queries: Sequence[Sample]) -> None:
    """Refuse a region that the loss would not know of.

    Args:
        objective: The loss.
        queries: All queries.

    Raises:
        InputError: If one has a mask and the objective takes none.
    """
    masked = [query.key for query in queries if query.mask is not None]
    # What a class says of masks holds for its own loss, not for one that a class derived from it puts in its place.
    said = next(cls for cls in type(objective).__mro__ if {"takes_masks", "__call__"} & vars(cls).keys())
    if masked and not vars(said).get("takes_masks", False):
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
        InputError: If the scheduler can't be read, or is not one of a noise schedule.
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
        self.snr_gamma = snr_gamma

    def __call__(self, network: nn.Module, batch: ViewBatch, timesteps: Tensor, noise: Tensor) -> Tensor:
        """The loss of each view; see :meth:`Objective.__call__`.

        Args:
            network: A network of a known family.
            batch: ``B`` latents and texts.
            timesteps: ``(B,)`` int64.
            noise: ``(B, C, H, W)``.

        Returns:
            ``(B,)``, float32 or wider.
        """
        noisy = self.scheduler.add_noise(batch.latents, noise, timesteps)
        prediction = family_of(network).predict(network, noisy, timesteps, batch)
        # The difference is taken in float32 even where the network runs in half precision.
        wide = torch.promote_types(prediction.dtype, torch.float32)
        error = prediction.to(wide) - self._target(batch.latents, noise, timesteps).to(wide)
        loss = mean_error(error.square(), batch.mask)  # (B,)
        return loss if self.snr_gamma is None else loss * self._weight(timesteps).to(loss)

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


def load_scheduler(scheduler: str | dict[str, Any] | None, prediction_type: str | None) -> Any:
    """A ``DDPMScheduler`` with the noise schedule that a model was trained with.

    Args:
        scheduler: Its settings, the folder that holds ``scheduler_config.json``, or a pipeline's folder.
        prediction_type: Overrides the one found.

    Returns:
        The scheduler.

    Raises:
        InputError: If it can't be read, or has no noise schedule (flow matching).
    """
    from pathlib import Path

    from diffusers import DDPMScheduler

    if isinstance(scheduler, str):
        folder = Path(scheduler)
        folder = folder / "scheduler" if (folder / "scheduler").is_dir() else folder
        if not (folder / "scheduler_config.json").is_file():
            raise InputError(f"No scheduler_config.json in {folder}; name the folder of a saved scheduler or pipeline.")
        try:
            config = DDPMScheduler.load_config(str(folder), local_files_only=True)
        except OSError as error:
            raise InputError(
                f"{folder / 'scheduler_config.json'} can't be read ({error}); save the scheduler again."
            ) from None
    else:
        config = dict(scheduler or {})
    if "FlowMatch" in str(config.get("_class_name", "")):
        raise InputError(
            f"{config['_class_name']} is a flow-matching schedule, which DenoisingObjective does not cover; "
            "give your own objective."
        )
    if prediction_type is not None:
        config["prediction_type"] = prediction_type
    try:
        built: Any = DDPMScheduler.from_config(config)  # type: ignore[no-untyped-call]
    except (NotImplementedError, TypeError, ValueError) as error:
        raise InputError(f"The scheduler's settings don't make a noise schedule ({error}); correct them.") from None
    if built.config.prediction_type not in ("epsilon", "v_prediction", "sample"):
        raise InputError(
            f"The scheduler's prediction_type {built.config.prediction_type!r} is none of epsilon, v_prediction and "
            "sample; give the one that the model was trained with."
        )
    return built
