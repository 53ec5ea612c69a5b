"""What a network family has to say about itself."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import ClassVar

from torch import Tensor, nn

from lightning_unlearn.data.samples import ViewBatch


class Family(ABC):
    """How networks of one family are called, and where the text enters them.

    Attributes:
        class_names: Names of the network classes that belong to the family.
        selections: For each named selection of weights, regular expressions that whole layer names match.
    """

    class_names: ClassVar[Sequence[str]]
    selections: ClassVar[Mapping[str, Sequence[str]]]

    @abstractmethod
    def predict(self, network: nn.Module, noisy: Tensor, timesteps: Tensor, batch: ViewBatch) -> Tensor:
        """Call the network.

        Args:
            network: A network of this family.
            noisy: ``(B, C, H, W)`` noisy latents.
            timesteps: ``(B,)`` int64, in the training schedule's units.
            batch: What it is conditioned on.

        Returns:
            The network's prediction, ``(B, C, H, W)``.
        """
