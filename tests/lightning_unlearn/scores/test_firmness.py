from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from reference_attribution import student_quantile as slow_quantile
from torch import Tensor

from lightning_unlearn.scores.firmness import (
    groups_of_draws,
    half_widths,
    rank_ranges,
    student_quantile,
    variance_of_mean,
)

REPETITIONS = 4000
# What each of eight strata adds, and how far its draws scatter: both change along the schedule, as those of losses do.
LEVELS = torch.tensor([9.0, 5.0, 3.0, 2.0, 1.5, 1.0, 0.5, 0.2], dtype=torch.float64)
SCATTERS = torch.tensor([0.1, 0.3, 1.0, 2.0, 1.0, 0.5, 0.3, 0.1], dtype=torch.float64)


def draws_of_strata(noises: int, flips: int = 1, levels: Tensor = LEVELS, shared: float = 0.0) -> Tensor:
    """``(1, repetitions, flips, draws)`` of known means and scatters; both flips have ``shared`` of the noise."""
    generator = torch.Generator().manual_seed(0)
    size = (REPETITIONS, flips, len(levels), noises)
    own = torch.randn(size, generator=generator, dtype=torch.float64)
    common = torch.randn(size[0], 1, *size[2:], generator=generator, dtype=torch.float64)
    noise = math.sqrt(1 - shared) * own + math.sqrt(shared) * common
    return (levels[:, None] + SCATTERS[: len(levels), None] * noise).flatten(-2)[None]


def coverage(values: Tensor, noises: int, flips: Any, truth: float) -> tuple[float, float, float]:
    """How often the truth is inside, the median half-width, and the scatter of the scores."""
    sides = values.mean(-1)  # (1, repetitions, flips)
    scores = (sides.amax(-1) if flips == "max" else sides.mean(-1))[0]
    found = half_widths(values, noises, flips)
    assert found is not None
    return float(((scores - truth).abs() <= found[:, 0]).double().mean()), float(found.median()), float(scores.std())


@pytest.mark.parametrize("noises", [2, 3, 5])
def test_variance_is_right_on_average_whatever_the_strata_scatter(noises: int) -> None:
    values = draws_of_strata(noises)[0, :, 0]
    variance, degrees = variance_of_mean(values, [noises] * 8)
    assert float(variance.mean()) == pytest.approx(float(SCATTERS.square().mean()) / (8 * noises), rel=0.04)
    assert float(variance.mean()) == pytest.approx(float(values.mean(-1).var()), rel=0.06)
    assert degrees.min() >= noises - 1
    assert degrees.max() <= 8 * (noises - 1)


def test_degrees_of_freedom_of_equal_strata_are_nearly_all_there_are() -> None:
    generator = torch.Generator().manual_seed(0)
    _, degrees = variance_of_mean(torch.randn(REPETITIONS, 128, generator=generator, dtype=torch.float64), [2] * 64)
    assert 55 <= float(degrees.median()) <= 64


@pytest.mark.parametrize("noises", [2, 3, 5])
@pytest.mark.parametrize("flips", ["max", "mean"])
def test_intervals_hold_the_truth_as_often_as_they_say_and_are_not_much_wider_than_need_be(
    noises: int, flips: Any
) -> None:
    # Two draws in each of eight strata, of which one scatters most, are hard: nobody knows which.
    inside, half, scatter = coverage(draws_of_strata(noises), noises, flips, float(LEVELS.mean()))
    assert 0.91 <= inside <= 0.97
    assert 1.8 * scatter <= half <= 2.5 * scatter


def test_flips_of_a_draw_are_averaged_before_the_variance() -> None:
    one = draws_of_strata(3)[:, :50]
    alone = half_widths(one, 3, "max")
    # Were they taken as independent, the first would be narrower than one flip, and the second not nothing.
    torch.testing.assert_close(half_widths(torch.cat([one, one + 1], -2), 3, "mean"), alone, rtol=1e-9, atol=0)
    opposite = half_widths(torch.cat([one, 1 - one], -2), 3, "mean")
    assert opposite is not None
    assert opposite.abs().max() < 1e-12
    inside, half, scatter = coverage(draws_of_strata(3, flips=2, shared=0.7), 3, "mean", float(LEVELS.mean()))
    assert 0.93 <= inside <= 0.97
    assert half <= 2.6 * scatter


def test_interval_of_the_larger_flip_is_that_of_the_flip_that_was_taken() -> None:
    one = draws_of_strata(2)[:, :50]
    other = 3 * one.flip(1) - 100  # far below, and of another scatter
    for both in ([one, other], [other, one]):
        torch.testing.assert_close(half_widths(torch.cat(both, -2), 2, "max"), half_widths(one, 2, "max"))


def test_interval_of_the_larger_flip_holds_where_flips_lie_apart_and_where_they_are_level() -> None:
    apart = draws_of_strata(2, flips=2, shared=0.5)
    apart[:, :, 1] += 3
    inside, _, _ = coverage(apart, 2, "max", float(LEVELS.mean()) + 3)
    assert 0.91 <= inside <= 0.97
    level = draws_of_strata(2, flips=2, shared=0.5)
    inside, half, scatter = coverage(level, 2, "max", float(LEVELS.mean()))
    assert 0.91 <= inside <= 0.97
    assert half <= 2.8 * scatter  # the larger of two means scatters less than either


def test_one_noise_a_stratum_gives_intervals_that_are_rather_too_wide() -> None:
    flat = torch.ones(8, dtype=torch.float64)
    inside, half, _ = coverage(draws_of_strata(1, levels=flat), 1, "max", 1.0)
    assert 0.93 <= inside <= 0.97
    inside, wide, _ = coverage(draws_of_strata(1), 1, "max", float(LEVELS.mean()))
    assert inside >= 0.95
    assert wide > half


def test_groups_are_the_strata_or_neighbouring_strata_and_none_of_a_single_draw() -> None:
    assert groups_of_draws(16, 2) == [2] * 8
    assert groups_of_draws(3, 3) == [3]
    assert groups_of_draws(8, 1) == [2, 2, 2, 2]
    assert groups_of_draws(5, 1) == [2, 3]
    assert groups_of_draws(3, 1) == [3]
    assert groups_of_draws(1, 1) == []
    assert half_widths(torch.ones(2, 3, 1, 1), 1, "max") is None


def test_level_of_a_stratum_does_not_count_as_scatter() -> None:
    values = draws_of_strata(2)
    moved = values + torch.arange(8.0, dtype=torch.float64).repeat_interleave(2) * 100
    torch.testing.assert_close(half_widths(values, 2, "max"), half_widths(moved, 2, "max"), rtol=1e-9, atol=0)


def test_scale_of_a_rise_is_that_of_its_interval_however_small() -> None:
    values = draws_of_strata(2)[:, :50]
    once, small = half_widths(values, 2, "max"), half_widths(1e-30 * values, 2, "max")
    assert once is not None
    torch.testing.assert_close(small, 1e-30 * once, rtol=1e-9, atol=0)


@pytest.mark.parametrize("degrees", [1.0, 1.02, 1.3, 2.0, 3.7, 8.0, 31.4, 400.0])
def test_quantiles_are_students(degrees: float) -> None:
    found = float(student_quantile(torch.tensor([degrees])))
    assert found == pytest.approx(slow_quantile(degrees), rel=5e-4)


def test_quantiles_are_those_of_the_closed_forms() -> None:
    # tan(0.475 π) for one degree; √(2 · 0.95² / (1 − 0.95²)) for two; the normal one for many.
    found = student_quantile(torch.tensor([1.0, 2.0, 1e9])).tolist()
    expected = [math.tan(0.475 * math.pi), math.sqrt(2 * 0.95**2 / (1 - 0.95**2)), 1.95996]
    assert found == pytest.approx(expected, rel=1e-3)


@settings(max_examples=60)
@given(
    scores=arrays(np.float32, st.integers(1, 12), elements=st.integers(-4, 4).map(float)),
    seed=st.integers(0, 1000),
)
def test_rank_ranges_are_those_of_comparing_every_pair(scores: Any, seed: int) -> None:
    errors = np.random.default_rng(seed).integers(0, 4, len(scores)).astype(np.float32)
    found = rank_ranges(scores, errors)
    for row in range(len(scores)):
        others = [other for other in range(len(scores)) if other != row]
        above = sum(scores[other] - errors[other] > scores[row] + errors[row] for other in others)
        below = sum(scores[other] + errors[other] < scores[row] - errors[row] for other in others)
        assert found[row].tolist() == [above, len(others) - below]
        rank = int((scores > scores[row]).sum())
        assert found[row, 0] <= rank <= found[row, 1]
