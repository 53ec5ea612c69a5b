"""What was captured against what a gradient grew by: rounding passes, and an error of a few per cent does not."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional

from lightning_unlearn.weights.capture import GradientCapture
from lightning_unlearn.weights.growth import GradientGrowth


def ratios(positions: int, factor: float) -> list[float]:
    """Those of a layer whose weight a function uses too, so that its gradient is a factor of what hooks can see."""
    generator = torch.Generator().manual_seed(0)
    layer = nn.Linear(4, 4)
    growth, capture = GradientGrowth({"layer": layer}), GradientCapture({"layer": layer}, layer)
    growth.attach()
    capture.attach()
    inputs, wanted = (torch.randn(8, positions // 8, 4, generator=generator) for _ in range(2))
    used = functional.linear(inputs, layer.weight, layer.bias)
    ((layer(inputs) * wanted).sum() + (factor - 1) * (used * wanted).sum()).backward()
    sums = {name: growth.summed(name, uses) for name, uses in capture.take_uses().items()}
    found, _ = growth.differences(sums, growth.take())
    growth.detach()
    capture.detach()
    return [float(value) for value in found]


@pytest.mark.parametrize("positions", [64, 2**12, 2**18])
def test_a_gradient_that_is_two_per_cent_off_is_seen_however_many_positions_there_are(positions: int) -> None:
    assert max(ratios(positions, 1.0)) < 1
    assert min(ratios(positions, 1.02)) > 1
