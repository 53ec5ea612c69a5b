from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch

from lightning_unlearn.diffusion.timestep_density import LARGEST_MODE_SCALE, timestep_probabilities
from lightning_unlearn.errors import InputError


def slow_logit_normal(length: int, mean: float, std: float) -> list[float]:
    """The probability that a normal number's logistic function lies in each part, from noise to data, turned round."""

    def below(share: float) -> float:
        if share in (0.0, 1.0):
            return share
        return 0.5 * math.erfc(-(math.log(share / (1 - share)) - mean) / std / math.sqrt(2))

    ends = [below(number / length) for number in range(length + 1)]
    return [after - before for before, after in pairwise(ends)][::-1]


def slow_mode(length: int, scale: float, parts: int = 2_000_000) -> list[float]:
    """How many of many uniform numbers the map brings into each part, from noise to data, turned round."""
    u = (torch.arange(parts, dtype=torch.float64) + 0.5) / parts
    mapped = 1 - u - scale * (torch.cos(math.pi * u / 2) ** 2 - 1 + u)
    return (torch.bincount((mapped * length).long(), minlength=length).double() / parts).tolist()[::-1]


@pytest.mark.parametrize(("mean", "std"), [(0.0, 1.0), (-0.7, 0.5), (1.5, 2.0)])
@pytest.mark.parametrize("length", [1, 10, 1000])
def test_logit_normal(length: int, mean: float, std: float) -> None:
    found = timestep_probabilities("logit_normal", length, logit_mean=mean, logit_std=std)
    assert found is not None
    # A difference of two numbers up to 1 in double precision.
    assert found.tolist() == pytest.approx(slow_logit_normal(length, mean, std), rel=1e-9, abs=4e-16)
    assert float(found.sum()) == pytest.approx(1, rel=1e-12)


@pytest.mark.parametrize("scale", [1.29, 0.0, -1.0, LARGEST_MODE_SCALE])
def test_mode(scale: float) -> None:
    found = timestep_probabilities("mode", 20, mode_scale=scale)
    assert found is not None
    # At either end of a part one of the uniform numbers may be missing. At the largest scale the map is flat to third
    # order where a part ends, so that the cube root of float64's rounding is what can be known of that end.
    grain = 3 * 1e-16 ** (1 / 3) if scale == LARGEST_MODE_SCALE else 0.0
    assert found.tolist() == pytest.approx(slow_mode(20, scale), abs=2 / 2_000_000 + grain)
    assert float(found.sum()) == pytest.approx(1, rel=1e-12)


@pytest.mark.parametrize("density", ["logit_normal", "mode"])
def test_as_often_as_the_training_scripts_draw_them(density: str) -> None:
    from diffusers.training_utils import compute_density_for_timestep_sampling

    length, draws = 10, 100_000
    u = compute_density_for_timestep_sampling(
        density, draws, 0.4, 0.8, 1.29, generator=torch.Generator().manual_seed(0)
    )
    indices = (u * length).long().clamp(max=length - 1)
    seen = torch.bincount(length - 1 - indices, minlength=length).double() / draws
    found = timestep_probabilities(density, length, 0.4, 0.8, 1.29)  # type: ignore[arg-type]
    assert found is not None
    spread = (found * (1 - found) / draws).sqrt()
    assert bool(((seen - found).abs() < 6 * spread).all())


def test_uniform_has_no_table() -> None:
    assert timestep_probabilities("uniform", 1000) is None


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"density": "normal"}, "no density of timesteps 'normal'"),
        ({"density": "logit_normal", "logit_std": 0.0}, "logit_std one above 0"),
        ({"density": "logit_normal", "logit_mean": math.nan}, "logit_mean is a number"),
        ({"density": "mode", "mode_scale": 2.0}, "mode_scale"),
        ({"density": "mode", "mode_scale": math.nan}, "mode_scale"),
    ],
)
def test_what_is_no_density_is_refused(settings: dict[str, object], words: str) -> None:
    with pytest.raises(InputError, match=words):
        timestep_probabilities(length=10, **settings)  # type: ignore[arg-type]
