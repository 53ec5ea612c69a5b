"""What keeps a delta, some 1e-4 of its weight, from being drowned by the arithmetic."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from operator import attrgetter

import torch

# Where torch may compute float32 products in TF32 or bfloat16, as `torch.set_float32_matmul_precision` lets it.
BACKENDS = ("cuda.matmul", "cudnn.conv", "cudnn.rnn", "mkldnn.matmul", "mkldnn.conv", "mkldnn.rnn")


def autocasts(device: torch.device) -> bool:
    """Whether autocast is on.

    Args:
        device: Where; it is never on the meta device, which torch does not ask.

    Returns:
        Whether it is.
    """
    return device.type != "meta" and torch.is_autocast_enabled(device.type)


def without_autocast(device: torch.device) -> AbstractContextManager[object]:
    """While it lasts, autocast is off.

    Args:
        device: Where.

    Returns:
        What switches it off.
    """
    return torch.autocast(device.type, enabled=False) if autocasts(device) else nullcontext()


class ExactFloat32:
    """Float32 products and convolutions in float32 from :meth:`start` to :meth:`stop`, whatever the process has set."""

    def __init__(self) -> None:
        self._before: dict[str, str] = {}

    def start(self) -> None:
        """Switch lower precisions off; the second time, nothing."""
        for name in BACKENDS:
            backend = attrgetter(name)(torch.backends)
            self._before.setdefault(name, backend.fp32_precision)
            backend.fp32_precision = "ieee"

    def stop(self) -> None:
        """Give back what was set."""
        for name, before in self._before.items():
            attrgetter(name)(torch.backends).fp32_precision = before
        self._before.clear()

    def __enter__(self) -> None:
        self.start()

    def __exit__(self, *exception: object) -> None:
        self.stop()
