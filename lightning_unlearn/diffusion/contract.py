"""What a loss is to this package: one number a view, with timesteps and noise from outside."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar

from torch import Tensor, nn

from lightning_unlearn.data.samples import Sample, ViewBatch
from lightning_unlearn.errors import InputError
from lightning_unlearn.fingerprints import public_name


class Objective(ABC):
    """The loss that a network was trained with; derive from it to attribute a model with a loss of its own.

    Timesteps and noise always come from outside, so that a loss can be evaluated again.

    Attributes:
        num_timesteps: Length of the training schedule; timesteps are drawn from ``[0, num_timesteps)``.
        takes_masks: Whether the loss is that of the region alone where ``batch.mask`` gives one (:func:`mean_error`
            does it). A class that has a ``__call__`` of its own must say so itself.

    Example:
        >>> import torch
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

    def density(self) -> Tensor | None:
        """How often training drew each timestep, so that views and draws are strata of that density.

        Returns:
            ``(num_timesteps,)`` float64 probabilities on the CPU; ``None``, as by default, where training drew all
            timesteps alike.
        """
        return None

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
    said = first_with(objective, "drawn")
    if said is Objective or "drawn" not in vars(said):
        raise InputError(_NOT_DRAWN.format(type(objective).__name__))


_NOT_DRAWN = (
    "{} does not say how targets are drawn from the model; give it a method `drawn` (drawn_error in "
    "lightning_unlearn.diffusion.objective makes it for a squared error), or take the Fisher with the targets of the "
    "data."
)


def first_with(objective: Objective, name: str) -> type:
    """The class that has the last word on something of a loss: the first that has it, or a loss of its own.

    What a class says holds for its own loss, not for one that a class derived from it puts in its place.

    Args:
        objective: The loss.
        name: Of a method or attribute.

    Returns:
        One of the objective's classes.
    """
    return next(cls for cls in type(objective).__mro__ if {name, "__call__"} & vars(cls).keys())


def knows_masks(objective: Objective) -> bool:
    """Whether the loss that an objective computes is that of a mask's region.

    Args:
        objective: The loss.

    Returns:
        What the class says that has the loss, not one that it derives from.
    """
    return bool(vars(first_with(objective, "takes_masks")).get("takes_masks", False))


def check_masks(objective: Objective, queries: Sequence[Sample]) -> None:
    """Refuse a region that the loss would not know of.

    Args:
        objective: The loss.
        queries: All queries.

    Raises:
        InputError: If one has a mask and the objective takes none.
    """
    masked = [query.key for query in queries if query.mask is not None]
    if masked and not knows_masks(objective):
        raise InputError(
            f"The query {masked[0]!r} has a mask, of which {type(objective).__name__} knows nothing; let its loss be "
            "that of batch.mask and set takes_masks to True, or leave masks out."
        )
