from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from attribution_runs import decoded
from hypothesis import given, settings
from hypothesis import strategies as st
from toys import LATENT, toy_fields

from lightning_unlearn.data.batches import collate_samples
from lightning_unlearn.data.samples import SampleBatch
from lightning_unlearn.draws.unlearning_draws import draw_for_target
from lightning_unlearn.draws.views import Views, place_timesteps
from lightning_unlearn.errors import InputError

RANGES = (
    st.tuples(st.integers(0, 99), st.integers(1, 100))
    .filter(lambda r: r[0] < r[1])
    .map(lambda r: (r[0] / 100, r[1] / 100))
)


def ragged(captions: tuple[int, ...] = (1, 3, 2), *, flip: bool = True) -> SampleBatch:
    return collate_samples("shard", [decoded(toy_fields(n, count, flip=flip)) for n, count in enumerate(captions)])


def all_noise(views: Views, batch: SampleBatch) -> dict[tuple[str, int, int, int], torch.Tensor]:
    return {
        (batch.keys[row], view.flip, view.caption, view.draw): view.noise[place]
        for view in views.of(batch, 1000)
        for place, row in enumerate(view.rows.tolist())
    }


@given(
    strata=st.integers(1, 40),
    noises=st.integers(1, 4),
    span=RANGES,
    length=st.integers(1, 1000),
    seed=st.integers(0, 2**40),
)
def test_each_timestep_lies_in_its_stratum_of_the_range(
    strata: int, noises: int, span: tuple[float, float], length: int, seed: int
) -> None:
    timesteps = Views(strata, span, noises, seed=seed).draw_timesteps(length)
    assert timesteps.shape == (strata * noises,)
    assert timesteps.dtype == torch.int64
    width = (span[1] - span[0]) * length / strata
    for draw, timestep in enumerate(timesteps.tolist()):
        start = span[0] * length + draw // noises * width
        assert math.floor(start - 1e-6) <= timestep <= min(math.ceil(start + width + 1e-6) - 1, length - 1)


@given(length=st.integers(1, 200), seed=st.integers(0, 1000))
def test_as_many_strata_as_timesteps_take_each_timestep_once(length: int, seed: int) -> None:
    assert Views(length, seed=seed).draw_timesteps(length).tolist() == list(range(length))


def test_timesteps_are_spread_uniformly_within_a_stratum() -> None:
    found = torch.cat([Views(2, seed=seed).draw_timesteps(1000) for seed in range(400)]).reshape(-1, 2).double()
    # Mean and deviation of uniform numbers in [0, 500) and [500, 1000), within five standard errors.
    torch.testing.assert_close(found.mean(0), torch.tensor([250.0, 750.0]).double(), atol=5 * 144.3 / 20, rtol=0)
    torch.testing.assert_close(found.std(0), torch.tensor([144.3, 144.3]).double(), atol=20, rtol=0)


def test_a_range_of_less_than_one_timestep_still_gives_one_inside_the_schedule() -> None:
    assert Views(3, (0.999, 1.0)).draw_timesteps(10).tolist() == [9, 9, 9]
    assert place_timesteps(torch.tensor([0.0, 0.999999]).double(), (0.0, 1.0), 1).tolist() == [0, 0]


@pytest.mark.parametrize("noise", ["shared", "per_sample"])
def test_views_are_a_function_of_the_seed_alone(noise: Any) -> None:
    batch = ragged()
    views = Views(3, noises=2, noise=noise, flips=True, seed=4)
    torch.manual_seed(0)
    first = all_noise(views, batch)
    state = torch.get_rng_state()
    torch.manual_seed(99)
    torch.rand(7)
    torch.set_default_dtype(torch.float64)  # as a Trainer of precision 64-true does
    try:
        second = all_noise(views, batch)
        timesteps = views.draw_timesteps(1000)
    finally:
        torch.set_default_dtype(torch.float32)
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert torch.equal(timesteps, views.draw_timesteps(1000))
    torch.manual_seed(0)
    assert torch.equal(torch.get_rng_state(), state)  # and the global random state is left alone
    other = all_noise(Views(3, noises=2, noise=noise, flips=True, seed=5), batch)
    assert not any(torch.equal(first[name], other[name]) for name in first)


def test_per_sample_noise_differs_between_samples_and_shared_noise_does_not() -> None:
    batch = ragged((2, 2, 2))
    own = all_noise(Views(3, noises=2, noise="per_sample", flips=True), batch)
    shared = all_noise(Views(3, noises=2, noise="shared", flips=True), batch)
    for flip, caption, draw in itertools.product(range(2), range(2), range(6)):
        mine = [own[key, flip, caption, draw] for key in batch.keys]
        theirs = [shared[key, flip, caption, draw] for key in batch.keys]
        assert all(torch.equal(noise, theirs[0]) for noise in theirs)
        for one, two in itertools.combinations(mine, 2):
            assert abs(float((one * two).mean())) < 0.4  # 192 products of independent normals


@pytest.mark.parametrize("noise", ["shared", "per_sample"])
def test_noise_of_different_views_differs(noise: Any) -> None:
    found = all_noise(Views(3, noises=2, noise=noise, flips=True), ragged((2,)))
    assert len(found) == 2 * 2 * 6
    for one, two in itertools.combinations(found.values(), 2):
        assert abs(float((one * two).mean())) < 0.4


def test_noise_is_standard_normal() -> None:
    found = torch.stack([*all_noise(Views(20, noises=5, noise="per_sample"), ragged()).values()])
    assert abs(float(found.mean())) < 0.02
    assert abs(float(found.std()) - 1) < 0.02


def test_a_samples_noise_does_not_depend_on_its_batch() -> None:
    views = Views(2, noise="per_sample", flips=True)
    batch = ragged()
    together = all_noise(views, batch)
    for number, captions in enumerate((1, 3, 2)):
        alone = all_noise(views, collate_samples("other", [decoded(toy_fields(number, captions, flip=True))]))
        assert all(torch.equal(noise, together[name]) for name, noise in alone.items())


def test_unlearning_draws_rise_draws_and_scoring_views_share_nothing() -> None:
    # The same seed, the same key, the same numbers: only the names of the streams tell them apart.
    batch = ragged((1,), flip=False)
    found = [
        *all_noise(Views(8, noise="per_sample", seed=0), batch).values(),
        *all_noise(Views(8, seed=0), batch).values(),
    ]
    for stream in ("unlearning", "rise"):
        found.extend(draw_for_target(stream, 0, batch.keys[0], range(8), 8, 1000, LATENT)[1])  # type: ignore[arg-type]
    for one, two in itertools.combinations(found, 2):
        assert abs(float((one * two).mean())) < 0.4


def test_each_sample_has_every_caption_it_has_and_no_other() -> None:
    views = Views(2, noises=2, flips=True)
    batch = ragged((1, 3, 2))
    assert sorted(all_noise(views, batch)) == sorted(
        (key, flip, caption, draw)
        for key, count in zip(batch.keys, (1, 3, 2), strict=True)
        for flip in range(2)
        for caption in range(count)
        for draw in range(4)
    )
    for view in views.of(batch, 1000):
        latents = batch.latents_flip if view.flip else batch.latents
        assert latents is not None
        assert torch.equal(view.batch.latents, latents[view.rows])
        assert torch.equal(view.batch.text, batch.text[view.rows, view.caption])
        assert torch.equal(view.timesteps, views.draw_timesteps(1000)[view.draw].expand(len(view.rows)))


def test_only_the_first_captions_are_used_when_a_number_is_given() -> None:
    found = all_noise(Views(1, captions=2), ragged((1, 3, 2)))
    assert {(key[-1], caption) for key, _, caption, _ in found} == {("0", 0), ("1", 0), ("1", 1), ("2", 0), ("2", 1)}
    assert Views(captions=9).caption_slots(ragged((1, 3))) == 3


def test_views_come_in_the_batchs_dtype_with_the_same_draws() -> None:
    batch = ragged((1,))
    wide = SampleBatch("shard", batch.keys, batch.latents.double(), {"text": batch.text.double()}, batch.caption_counts)
    views = Views(1, noise="per_sample")
    (narrow_view,), (wide_view,) = views.of(batch, 1000), views.of(wide, 1000)
    assert wide_view.noise.dtype == torch.float64
    assert torch.equal(wide_view.noise, narrow_view.noise.double())


def test_flips_without_flipped_latents_are_refused() -> None:
    with pytest.raises(InputError, match=r"no latent_flip.npy"):
        list(Views(flips=True).of(ragged(flip=False), 1000))


@pytest.mark.parametrize(
    "wrong",
    [
        {"timesteps": 0},
        {"noises": 0},
        {"captions": 0},
        {"timestep_range": (0.5, 0.5)},
        {"timestep_range": (-0.1, 0.5)},
        {"timestep_range": (0.5, 1.1)},
        {"timestep_range": (math.nan, 1.0)},
        {"noise": "none"},
    ],
)
def test_views_out_of_range_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(InputError, match=r"Views need|noise must be"):
        Views(**wrong)


@settings(max_examples=20)
@given(st.data())
def test_settings_tell_views_apart(data: st.DataObject) -> None:
    choice = st.builds(
        Views,
        timesteps=st.integers(1, 3),
        timestep_range=st.sampled_from([(0.0, 1.0), (0.2, 0.8)]),
        noises=st.integers(1, 2),
        noise=st.sampled_from(["shared", "per_sample"]),
        captions=st.sampled_from([None, 1, 2]),
        flips=st.booleans(),
        seed=st.integers(0, 2),
    )
    one, two = data.draw(choice), data.draw(choice)
    assert (one == two) == (one.settings() == two.settings())
