"""What keeps a delta, some 1e-4 of its weight, from being lost in the arithmetic."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor, nn

# Where torch may compute float32 products in TF32 or bfloat16, as `torch.set_float32_matmul_precision` lets it.
BACKENDS = ("cuda.matmul", "cudnn.conv", "cudnn.rnn", "mkldnn.matmul", "mkldnn.conv", "mkldnn.rnn")


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


@contextmanager
def added_deltas(layers: Mapping[str, nn.Module], deltas: Mapping[str, Tensor], target: int | None) -> Iterator[None]:
    """While it lasts, each layer gives ``W₀ a + δ a`` with the second term in float32, outside of autocast.

    ``θ₀ + δ`` cast to half precision would lose the delta. Base losses take the same way, without the second term, so
    that a delta of zero gives deviations of zero.

    Args:
        layers: Layer name to Linear or Conv2d.
        deltas: Parameter name to ``(Q, *parameter)``.
        target: Number of the target, ``None`` for θ₀.

    Yields:
        Nothing.
    """
    handles = []
    for name, layer in layers.items():
        bias = deltas.get(f"{name}.bias")
        weight = None if target is None else deltas[f"{name}.weight"][target]
        hook = _adding(weight, None if bias is None or target is None else bias[target])
        handles.append(layer.register_forward_hook(hook, with_kwargs=True))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _adding(weight: Tensor | None, bias: Tensor | None) -> Any:
    def hook(layer: nn.Module, arguments: tuple[Tensor, ...], named: dict[str, Tensor], output: Tensor) -> Tensor:
        if weight is None:
            return output.float()
        inputs = (arguments[0] if arguments else named["input"]).float()
        with torch.autocast(inputs.device.type, enabled=False):
            if isinstance(layer, nn.Conv2d):
                assert not isinstance(layer.padding, str)
                term = nn.functional.conv2d(inputs, weight, bias, layer.stride, layer.padding, layer.dilation)
            else:
                term = nn.functional.linear(inputs, weight, bias)
            # The sum stays in float32: what comes next casts it, and rounds once instead of twice.
            return output.float() + term

    return hook
