"""What was captured against what a gradient grew by: rounding passes, and an error of a few per cent does not."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional

from lightning_unlearn.weights.capture import GradientCapture
from lightning_unlearn.weights.growth import GradientGrowth
from lightning_unlearn.weights.precision import ExactFloat32
from lightning_unlearn.weights.rounding import unit_of


def ratios(positions: int, factor: float, dtype: torch.dtype = torch.float32) -> list[float]:
    """Those of a layer whose weight a function uses too, so that its gradient is a factor of what hooks can see."""
    generator = torch.Generator().manual_seed(0)
    layer = nn.Linear(4, 4).to(dtype)
    growth, capture = GradientGrowth({"layer": layer}), GradientCapture({"layer": layer}, layer)
    growth.attach()
    capture.attach()
    inputs, wanted = (torch.randn(8, positions // 8, 4, generator=generator).to(dtype) for _ in range(2))
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


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("positions", [64, 2**12])
def test_three_roundings_of_a_narrow_type_pass_and_no_more(dtype: torch.dtype, positions: int) -> None:
    """3 √2 units are let through where rows have random signs, and less where they don't: 1.7 % in bfloat16."""
    assert max(ratios(positions, 1.0, dtype)) < 1
    off = 8 * torch.finfo(dtype).eps / 2  # what was let through before, for each of the two
    assert min(ratios(positions, 1 + off, dtype)) > 1


def test_several_uses_are_rounded_several_times() -> None:
    """Thirty uses' gradients, and their sums one after the other, in bfloat16."""
    generator = torch.Generator().manual_seed(0)
    layer = nn.Linear(8, 8).to(torch.bfloat16)
    growth, capture = GradientGrowth({"layer": layer}), GradientCapture({"layer": layer}, layer)
    growth.attach()
    capture.attach()
    inputs = torch.randn(8, 4, 8, generator=generator).to(torch.bfloat16)
    sum((layer(inputs) * inputs).sum() for _ in range(30)).backward()  # type: ignore[union-attr]
    sums = {name: growth.summed(name, uses) for name, uses in capture.take_uses().items()}
    assert float(growth.differences(sums, growth.take())[0].max()) < 1


def test_tf32_counts_only_where_it_is_used() -> None:
    linear, convolution = nn.Linear(1, 1), nn.Conv2d(1, 1, 1)
    exact, tf32, bfloat16 = 2.0**-24, 2.0**-11, 2.0**-8
    with ExactFloat32():
        backends: Any = torch.backends
        assert unit_of(torch.float32, "cuda", convolution) == unit_of(torch.float32, "cpu", linear) == exact
        backends.cudnn.conv.fp32_precision = "tf32"  # torch's default
        assert unit_of(torch.float32, "cuda", convolution) == tf32
        assert unit_of(torch.float32, "cuda", linear) == exact
        assert unit_of(torch.float32, "cpu", convolution) == exact
        backends.cuda.matmul.fp32_precision = "tf32"
        assert unit_of(torch.float32, "cuda", linear) == tf32
        assert unit_of(torch.float32, "cpu", linear) == exact
        backends.mkldnn.matmul.fp32_precision = "bf16"
        assert unit_of(torch.float32, "cpu", linear) == bfloat16
        assert unit_of(torch.float32, "cuda", linear) == tf32
    assert unit_of(torch.float64, "cuda", convolution) == 2.0**-53
    assert unit_of(torch.bfloat16, "cpu", linear) == bfloat16


def test_a_bias_of_equal_numbers_is_rounded_one_way() -> None:
    """The mean over a prediction has one gradient everywhere, and a convolution's kernel adds its parts one by one."""
    layer = nn.Conv2d(8, 3, 3, padding=1)
    growth, capture = GradientGrowth({"layer": layer}), GradientCapture({"layer": layer}, layer)
    growth.attach()
    capture.attach()
    layer(torch.randn(64, 8, 16, 16, generator=torch.Generator().manual_seed(0))).flatten(1).mean(1).sum().backward()
    assert layer.bias is not None
    assert layer.bias.grad is not None
    sums = {name: growth.summed(name, uses) for name, uses in capture.take_uses().items()}
    found, names = growth.differences(sums, growth.take())
    assert names == [("layer", "weight"), ("layer", "bias")]
    assert float(found.max()) < 1
