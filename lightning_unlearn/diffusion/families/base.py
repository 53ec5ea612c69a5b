"""What a network family has to say about itself."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, final

from torch import Tensor, nn

from lightning_unlearn.data.samples import ViewBatch
from lightning_unlearn.errors import InputError


class Family(ABC):
    """How networks of one family are called, and where the text enters them.

    Attributes:
        class_names: Names of the network classes that belong to the family.
        selections: For each named selection of weights, regular expressions that whole layer names match.
    """

    class_names: ClassVar[Sequence[str]]
    selections: ClassVar[Mapping[str, Sequence[str]]]

    @abstractmethod
    def check(self, network: nn.Module) -> None:
        """Refuse a network that takes or gives what this family knows nothing of, by what its config says.

        Args:
            network: A network of one of its classes.

        Raises:
            InputError: If it needs more than the family gives it, or predicts more than the noise.
        """

    @abstractmethod
    def check_batch(self, network: nn.Module, noisy: Tensor, batch: ViewBatch) -> None:
        """Refuse latents or conditions of another form than the network's.

        Args:
            network: A network of this family.
            noisy: ``(B, C, H, W)`` noisy latents.
            batch: What it is conditioned on.

        Raises:
            InputError: If the network does not take them.
        """

    @abstractmethod
    def call(self, network: nn.Module, noisy: Tensor, timesteps: Tensor, batch: ViewBatch) -> Tensor:
        """Call the network, whose inputs are checked.

        Args:
            network: A network of this family.
            noisy: ``(B, C, H, W)`` noisy latents.
            timesteps: ``(B,)`` int64, in the training schedule's units.
            batch: What it is conditioned on.

        Returns:
            What the network gives.
        """

    @final
    def predict(self, network: nn.Module, noisy: Tensor, timesteps: Tensor, batch: ViewBatch) -> Tensor:
        """The network's prediction, of which it is certain that it is one of the latents and of nothing else.

        Args:
            network: A network of this family.
            noisy: ``(B, C, H, W)`` noisy latents.
            timesteps: ``(B,)`` int64, in the training schedule's units.
            batch: What it is conditioned on.

        Returns:
            The network's prediction, ``(B, C, H, W)``.

        Raises:
            InputError: If the network and what it is given don't fit, or its prediction is of another shape.
        """
        self.check(network)
        self.check_batch(network, noisy, batch)
        prediction = self.call(network, noisy, timesteps, batch)
        # A difference of other shapes would be broadcast, or end in a raw error.
        if prediction.shape != noisy.shape:
            raise InputError(
                f"{type(network).__name__} gives the shape {tuple(prediction.shape)} for latents of "
                f"{tuple(noisy.shape)}"
                f"{_variance(prediction.shape[1:2] == (2 * noisy.shape[1],))}; {OWN_OBJECTIVE}."
            )
        return prediction


OWN_OBJECTIVE = "give an objective of your own (a subclass of Objective)"


def _variance(likely: bool) -> str:
    return ", that is a variance beside the noise" if likely else ""


def setting(network: nn.Module, name: str) -> Any:
    """What a network's config says of one of its settings.

    Args:
        network: One of diffusers, or of a class that derives from one.
        name: Of the setting.

    Returns:
        Its value, ``None`` where the config says nothing.
    """
    config = getattr(network, "config", None)
    return config.get(name) if isinstance(config, Mapping) else None
