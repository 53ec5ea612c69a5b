"""A refusal of one process, told to all of them."""

from __future__ import annotations

from collections.abc import Callable

import torch
from lightning.pytorch import Trainer

from lightning_unlearn.errors import InputError


class Refusals:
    """Holds what one process refuses until all meet, so that none waits for it in vain.

    A process that ends in the middle of a step leaves the others in a sum of gradients that never comes. So it goes on
    to where all of them ask each other, and all end there with the same sentence. One process alone ends at once.

    Args:
        trainer: Whose processes these are.
    """

    def __init__(self, trainer: Trainer) -> None:
        self._trainer = trainer
        self._held: InputError | None = None

    def run(self, action: Callable[[], None]) -> None:
        """Do something that may be refused; nothing, if this process refused before.

        Args:
            action: What.

        Raises:
            InputError: If it is refused, and there is but one process.
        """
        if self._held is not None:
            return
        try:
            action()
        except InputError as error:
            if self._trainer.world_size == 1:
                raise
            self._held = error

    def meet(self) -> None:
        """Ask all processes; every one of them must call it.

        Raises:
            InputError: If one refused something: what the first of them did.
        """
        if self._trainer.world_size == 1:
            return
        strategy = self._trainer.strategy
        refused = torch.zeros(self._trainer.world_size, device=strategy.root_device)
        refused[self._trainer.global_rank] = float(self._held is not None)
        refused = strategy.reduce(refused, reduce_op="sum")
        if not bool(refused.any()):
            return
        first = int(refused.nonzero()[0])
        said = strategy.broadcast(str(self._held), src=first)
        raise InputError(said) from self._held
