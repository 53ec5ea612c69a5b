"""One process works while the others wait, however long it takes."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import torch
from torch import distributed

# A training's own group gives up after some minutes, and the training with it.
PATIENCE = timedelta(days=7)


class Waiting:
    """Processes that wait for the first one in a group of their own, over gloo, where no time limit ends them.

    Every process must make it, and call its methods, at the same place.

    Args:
        world_size: Of the training.
    """

    def __init__(self, world_size: int) -> None:
        self._group: Any = None
        if world_size > 1:
            self._group = distributed.new_group(backend="gloo", timeout=PATIENCE)

    def failed(self, here: bool) -> bool:
        """Wait for all processes.

        Args:
            here: Whether this one failed.

        Returns:
            Whether any of them did.
        """
        if self._group is None:
            return here
        said = torch.tensor(float(here))
        distributed.all_reduce(said, group=self._group)
        return bool(said)

    def end(self) -> None:
        """Give the group back."""
        if self._group is not None and distributed.is_initialized():
            distributed.destroy_process_group(self._group)
        self._group = None
