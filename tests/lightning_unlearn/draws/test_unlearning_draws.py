from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from attribution_runs import decoded
from hypothesis import given
from hypothesis import strategies as st
from toys import LATENT, toy_fields

from lightning_unlearn.draws.unlearning_draws import DrawBatch, draw_batches, draw_for_target

CASES = {
    "first": st.integers(0, 500),
    "total": st.integers(1, 60),
    "world_size": st.integers(1, 7),
    "batch_size": st.integers(1, 20),
    "captions": st.integers(1, 3),
}


def dealt(first: int, total: int, world_size: int, batch_size: int, captions: int) -> list[list[DrawBatch]]:
    sample = decoded(toy_fields(0, captions))
    return [draw_batches(sample, 3, first, total, rank, world_size, batch_size) for rank in range(world_size)]


@given(**CASES)
def test_every_draw_of_a_step_counts_once_over_all_ranks(**case: int) -> None:
    ranks = dealt(**case)
    counted = [
        number
        for batches in ranks
        for batch in batches
        for number, weight in zip(batch.numbers, batch.weights.tolist(), strict=True)
        if weight == 1
    ]
    assert sorted(counted) == list(range(case["first"], case["first"] + case["total"]))
    weights = torch.cat([batch.weights for batches in ranks for batch in batches])
    assert set(weights.tolist()) <= {0.0, 1.0}


@given(**CASES)
def test_every_rank_has_as_many_batches_of_the_same_sizes(**case: int) -> None:
    sizes = [[len(batch.numbers) for batch in batches] for batches in dealt(**case)]
    assert all(size == sizes[0] for size in sizes)
    assert all(0 < count <= case["batch_size"] for count in sizes[0])
    assert len(sizes[0]) == math.ceil(math.ceil(case["total"] / case["world_size"]) / case["batch_size"])


@given(**CASES)
def test_a_draw_takes_the_caption_of_its_number_whoever_has_it(**case: int) -> None:
    sample = decoded(toy_fields(0, case["captions"]))
    for batches in dealt(**case):
        for batch in batches:
            assert (batch.target, batch.total) == (3, case["total"])
            assert batch.latents.shape == (len(batch.numbers), *LATENT)
            for row, number in enumerate(batch.numbers):
                assert torch.equal(batch.conditions["text"][row], sample.text[number % case["captions"]])
                assert torch.equal(batch.latents[row], sample.latent)


@given(total=st.integers(1, 50), step=st.integers(0, 3), length=st.integers(1, 1000), seed=st.integers(0, 100))
def test_the_draws_of_a_step_are_one_in_each_stratum_of_the_schedule(
    total: int, step: int, length: int, seed: int
) -> None:
    timesteps, _ = draw_for_target(
        "unlearning", seed, "key", range(step * total, (step + 1) * total), total, length, (1,)
    )
    for place, timestep in enumerate(timesteps.tolist()):
        start, end = place * length / total, (place + 1) * length / total
        assert math.floor(start - 1e-6) <= timestep <= math.ceil(end + 1e-6) - 1


@given(numbers=st.lists(st.integers(0, 40), min_size=1, max_size=6))
def test_a_draw_is_keyed_by_its_number_alone(numbers: list[int]) -> None:
    every, noise = draw_for_target("unlearning", 1, "key", range(41), 20, 1000, (2, 2))
    some, some_noise = draw_for_target("unlearning", 1, "key", numbers, 20, 1000, (2, 2))
    assert torch.equal(some, every[numbers])
    assert torch.equal(some_noise, noise[numbers])


@pytest.mark.parametrize("change", [{"stream": "rise"}, {"seed": 2}, {"key": "other"}, {"numbers": range(20, 40)}])
def test_streams_seeds_targets_and_steps_have_draws_of_their_own(change: dict[str, Any]) -> None:
    arguments: dict[str, Any] = {
        "stream": "unlearning",
        "seed": 1,
        "key": "key",
        "numbers": range(20),
        "total": 20,
        "num_timesteps": 1000,
        "shape": LATENT,
    }
    timesteps, noise = draw_for_target(**arguments)
    others, other_noise = draw_for_target(**{**arguments, **change})
    assert not torch.equal(timesteps, others)
    products = (noise[:, None] * other_noise[None]).flatten(2).mean(2)
    assert float(products.abs().max()) < 0.4  # means of 192 products of independent normals


def test_draws_are_float32_whatever_the_default_dtype_and_leave_the_global_random_state_alone() -> None:
    timesteps, noise = draw_for_target("rise", 0, "key", range(4), 4, 1000, LATENT)
    torch.manual_seed(8)
    state = torch.get_rng_state()
    torch.set_default_dtype(torch.float64)
    try:
        again, noise_again = draw_for_target("rise", 0, "key", range(4), 4, 1000, LATENT)
    finally:
        torch.set_default_dtype(torch.float32)
    assert noise_again.dtype == torch.float32
    assert torch.equal(noise, noise_again)
    assert torch.equal(timesteps, again)
    assert torch.equal(torch.get_rng_state(), state)


def test_a_batch_moves_with_all_its_tensors() -> None:
    (batch,) = draw_batches(decoded(toy_fields(0)), 0, 0, 3, 0, 1, 8)
    moved = batch.to(torch.device("meta"))
    assert {moved.latents.device.type, moved.conditions["text"].device.type, moved.weights.device.type} == {"meta"}
    assert moved.numbers == batch.numbers
