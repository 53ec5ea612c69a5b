"""What a model makes of a query, against slow float64 versions with the same draws."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from evaluation_toys import QUERIES, queries
from numpy.typing import NDArray
from reference_attribution import Loss, toy_loss, unet_loss
from torch import nn
from toys import ToyDenoiser, ToyObjective, tiny_unet, toy_fields

from lightning_unlearn.data.samples import Sample, decode_sample
from lightning_unlearn.diffusion.objective import DenoisingObjective, Objective
from lightning_unlearn.diffusion.sampling import generate, how_generated
from lightning_unlearn.draws.unlearning_draws import draw_for_target
from lightning_unlearn.errors import InputError
from lightning_unlearn.evaluation import Measuring, Outcome
from lightning_unlearn.evaluation.measuring import outcome_fields, rounded, structural_similarity


def slow_losses(network: nn.Module, loss: Loss, query: Sample, draws: int, seed: int, length: int) -> list[float]:
    """One draw after the other in float64; captions take turns."""
    network = copy.deepcopy(network).double().eval()
    timesteps, noise = draw_for_target("evaluation", seed, query.key, range(draws), draws, length, query.latent.shape)
    with torch.no_grad():
        return [
            float(
                loss(
                    network,
                    query.latent.double(),
                    query.text[draw % len(query.text)].double(),
                    int(timesteps[draw]),
                    noise[draw].double(),
                )
            )
            for draw in range(draws)
        ]


def slow_ssim(first: NDArray[np.float64], second: NDArray[np.float64]) -> float:
    """Wang et al. (2004), Eq. 13, window by window; pictures in [-1, 1] go on as their mirror image."""
    sigma = min(1.5, min(first.shape[1:]) / 16)
    reach = int(3.5 * sigma + 0.5)
    line = np.array([math.exp(-(((place / sigma) ** 2) / 2)) for place in range(-reach, reach + 1)])
    window = np.outer(line, line) / line.sum() ** 2
    first, second = (np.pad(one, ((0, 0), (reach, reach), (reach, reach)), "reflect") for one in (first, second))
    c1, c2 = (0.01 * 2) ** 2, (0.03 * 2) ** 2
    values = []
    for channel in range(first.shape[0]):
        for row in range(reach, first.shape[1] - reach):
            for column in range(reach, first.shape[2] - reach):
                place = (channel, slice(row - reach, row + reach + 1), slice(column - reach, column + reach + 1))
                x, y = first[place], second[place]
                mx, my = (window * x).sum(), (window * y).sum()
                vx, vy = (window * (x - mx) ** 2).sum(), (window * (y - my) ** 2).sum()
                cov = (window * (x - mx) * (y - my)).sum()
                values.append((2 * mx * my + c1) * (2 * cov + c2) / ((mx**2 + my**2 + c1) * (vx + vy + c2)))
    return math.fsum(values) / len(values)


def own_query(network: nn.Module, objective: DenoisingObjective, seed: int, *, clipped: bool) -> Sample:
    """A query that the network itself made."""
    made = decode_sample(toy_fields(seed))
    (picture,) = generate(network, objective, made.conditions, made.latent.shape, [seed], 2)
    about = {"captions": ["a query"], **how_generated(objective, seed, 2), "clipped": clipped}
    return Sample(f"own-{seed}", (picture.clamp(-1, 1) if clipped else picture).clone(), made.conditions, about)


CASES: dict[str, Callable[[], tuple[nn.Module, Objective, Loss]]] = {
    "toy": lambda: (ToyDenoiser(), ToyObjective(), toy_loss),
    "epsilon": lambda: (tiny_unet(), DenoisingObjective(), unet_loss("epsilon")),
    "v_prediction": lambda: (tiny_unet(), DenoisingObjective({}, "v_prediction"), unet_loss("v_prediction")),
}


@pytest.mark.parametrize("name", CASES)
def test_loss_is_the_mean_over_the_fixed_draws(name: str) -> None:
    network, objective, loss = CASES[name]()
    asked = [decode_sample(toy_fields(number, captions=number)) for number in (1, 3)]
    found = Measuring(asked, draws=20, seed=5, batch_size=7)(network, objective)
    assert list(found) == [query.key for query in asked]
    for query in asked:
        values = slow_losses(network, loss, query, 20, 5, objective.num_timesteps)
        outcome = found[query.key]
        assert outcome.loss == pytest.approx(math.fsum(values) / 20, rel=2e-5)
        # Draws go up the schedule, so that each tenth of them is a tenth of it.
        assert outcome.parts == pytest.approx([(values[n] + values[n + 1]) / 2 for n in range(0, 20, 2)], rel=2e-5)
        assert (outcome.mse, outcome.ssim, outcome.cosine) == (None, None, None)


def test_draws_are_a_function_of_seed_and_key_alone() -> None:
    network, objective = ToyDenoiser(), ToyObjective()
    found = Measuring(queries(), draws=10)(network, objective)
    assert Measuring(list(reversed(queries())), draws=10)(network, objective) == found
    one = Measuring(queries(1), draws=10, batch_size=3)(network, objective)[QUERIES[0]]
    assert one.loss == pytest.approx(found[QUERIES[0]].loss, rel=1e-6)
    assert Measuring(queries(1), draws=10, seed=1)(network, objective)[QUERIES[0]].loss != one.loss
    other = [replace(query, key="other") for query in queries(1)]
    assert Measuring(other, draws=10)(network, objective)["other"].loss != one.loss


@pytest.mark.parametrize("clipped", [True, False])
def test_pictures_are_generated_again_and_compared(clipped: bool) -> None:
    network, objective = tiny_unet(), DenoisingObjective({"clip_sample": False})
    asked = queries(seed=4, steps=2, clipped=clipped) + [
        replace(query, key=f"more-{query.key}") for query in queries(2, seed=9, steps=3, clipped=clipped)
    ]
    found = Measuring(asked, draws=10, batch_size=2, encoder="baseline_toys.rows")(network, objective)
    for query in asked:
        how = query.metadata
        (picture,) = generate(
            network, objective, {"text": query.text[:1]}, query.latent.shape, [how["seed"]], how["steps"]
        )
        first, second = picture.double().numpy(), query.latent.double().numpy()
        if clipped:
            assert np.abs(first).max() > 1  # so that it matters
            first = first.clip(-1, 1)
        outcome = found[query.key]
        assert outcome.mse == pytest.approx(((first - second) ** 2).mean(), rel=1e-4)
        if clipped:
            assert outcome.ssim == pytest.approx(slow_ssim(first, second), rel=1e-3, abs=1e-4)
        else:
            assert outcome.ssim is None
        cosine = (first * second).sum() / np.sqrt((first**2).sum() * (second**2).sum())
        assert outcome.cosine == pytest.approx(cosine, rel=1e-4, abs=1e-5)


@pytest.mark.parametrize("clipped", [True, False])
def test_pictures_are_what_a_decoder_makes_of_latents(clipped: bool) -> None:
    network, objective = tiny_unet(), DenoisingObjective({"clip_sample": False})
    (query,) = queries(1, seed=4, steps=2, clipped=clipped)
    found = Measuring([query], draws=10, encoder="baseline_toys.rows", decoder="baseline_toys.enlarged")(
        network, objective
    )[query.key]
    plain = Measuring([query], draws=10)(network, objective)[query.key]
    assert (found.loss, found.mse) == (plain.loss, plain.mse)
    (picture,) = generate(network, objective, {"text": query.text[:1]}, query.latent.shape, [4], 2)
    first, second = (latent.double().numpy() for latent in (picture, query.latent))
    first = first.clip(-1, 1) if clipped else first
    large = [(one.repeat(2, 1).repeat(2, 2) / 2).clip(-1, 1) for one in (first, second)]
    assert found.ssim == pytest.approx(slow_ssim(*large), rel=1e-3, abs=1e-4)
    assert found.ssim != plain.ssim
    cosine = (large[0] * large[1]).sum() / np.sqrt((large[0] ** 2).sum() * (large[1] ** 2).sum())
    assert found.cosine == pytest.approx(cosine, rel=1e-4, abs=1e-5)


def test_a_decoder_that_gives_no_pictures_is_refused() -> None:
    asked = queries(1, seed=4, steps=2)
    with pytest.raises(InputError, match=r"The decoder 'torch.nn.Flatten' gives \(2, \d+\) for two latents\.$"):
        Measuring(asked, draws=10, decoder="torch.nn.Flatten")(tiny_unet(), DenoisingObjective())


def test_the_network_that_made_a_query_makes_it_again() -> None:
    network, objective = tiny_unet(), DenoisingObjective({"clip_sample": False})
    asked = [own_query(network, objective, 3, clipped=True), own_query(network, objective, 4, clipped=False)]
    first, second = Measuring(asked, draws=10)(network, objective).values()
    assert first.mse == pytest.approx(0, abs=1e-9)
    assert first.ssim == pytest.approx(1, abs=1e-5)
    assert second.mse == pytest.approx(0, abs=1e-9)


@pytest.mark.parametrize("shape", [(1, 8, 8), (3, 28, 26), (2, 40, 40)])
def test_structural_similarity_is_that_of_the_paper(shape: tuple[int, ...]) -> None:
    rng = np.random.default_rng(0)
    first = rng.uniform(-1, 1, shape)
    second = (first + rng.normal(0, 0.2, shape)).clip(-1, 1)
    found = structural_similarity(torch.from_numpy(first).float(), torch.from_numpy(second).float())
    assert found == pytest.approx(slow_ssim(first, second), abs=2e-5)


@pytest.mark.parametrize(
    "about",
    [
        {"seed": None, "steps": 2},
        {"seed": 1},
        {"steps": 2},
        {"seed": 1, "steps": 2, "scheduler": "PNDMScheduler"},
        {"seed": 1, "steps": 2, "guidance": 7.5},
    ],
)
def test_a_query_that_was_made_in_another_way_has_a_loss_only(about: dict[str, Any]) -> None:
    asked = [*queries(1, note="none", **about), replace(queries(1)[0], key="again")]
    plain, made = Measuring(asked, draws=10)(tiny_unet(), DenoisingObjective()).values()
    assert (plain.mse, plain.ssim) == (None, None)
    assert made.mse is not None  # the other one is
    assert set(outcome_fields(plain)) == {"loss", "parts"}
    assert set(outcome_fields(made)) == {"loss", "parts", "mse", "ssim"}


def test_an_objective_without_a_sampler_has_a_loss_only() -> None:
    for outcome in Measuring(queries(), draws=10)(ToyDenoiser(), ToyObjective()).values():
        assert outcome == Outcome(outcome.loss, outcome.parts)


@pytest.mark.parametrize(
    "about", [{"seed": "1", "steps": 2}, {"seed": 1, "steps": 2.0}, {"seed": True, "steps": 2}, {"seed": 1, "steps": 0}]
)
def test_a_query_that_says_its_seed_or_steps_wrongly_is_refused(about: dict[str, Any]) -> None:
    with pytest.raises(InputError, match=r"The query 'query-00000' was made with seed .*, or leave them out\.$"):
        Measuring(queries(1, **about))


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"queries": []}, "There is no query"),
        ({"queries": queries(2) + queries(1)}, "stands twice"),
        ({"draws": 0}, "a multiple of 10, but are 0"),
        ({"draws": 15}, "a multiple of 10, but are 15"),
        ({"encoder": "nowhere"}, "no encoder 'nowhere'"),
        ({"encoder": "no_such_module.encoder"}, "no encoder 'no_such_module.encoder'"),
        ({"encoder": "torch.nn.Nothing"}, "no encoder 'torch.nn.Nothing'"),
        ({"encoder": "baseline_toys.__doc__"}, "is no image encoder"),
        ({"decoder": "nowhere"}, "no decoder 'nowhere'"),
        ({"decoder": "baseline_toys.__doc__"}, "is no image decoder"),
    ],
)
def test_what_cannot_be_measured_with_is_refused(wrong: dict[str, Any], said: str) -> None:
    with pytest.raises(InputError, match=r"\.$") as error:
        Measuring(**{"queries": queries(), **wrong})
    assert said in str(error.value)


def test_a_network_that_broke_is_an_error() -> None:
    network = ToyDenoiser()
    with torch.no_grad():
        network.text.bias.fill_(math.nan)
    with pytest.raises(InputError, match=r"not finite; check its training recipe\.$"):
        Measuring(queries(), draws=10)(network, ToyObjective())


def test_a_network_is_measured_in_eval_mode_and_left_as_it_was() -> None:
    network = nn.Sequential(ToyDenoiser(), nn.Dropout(0.5))

    class Through(ToyObjective):
        def __call__(self, network: nn.Module, *arguments: Any) -> torch.Tensor:
            assert isinstance(network, nn.Sequential)
            assert not torch.is_grad_enabled()
            losses: torch.Tensor = super().__call__(network[0], *arguments)
            return network[1](losses)

    network.train()
    network[0].conv_in.eval()
    before = {name: part.training for name, part in network.named_modules()}
    weights = {name: value.clone() for name, value in network.state_dict().items()}
    found = Measuring(queries(), draws=10)(network, Through())
    assert {name: part.training for name, part in network.named_modules()} == before
    assert len(set(before.values())) == 2
    assert all(torch.equal(value, weights[name]) for name, value in network.state_dict().items())
    assert found == Measuring(queries(), draws=10)(network[0], ToyObjective())


def test_settings_tell_apart_what_changes_outcomes_and_nothing_else() -> None:
    first, *others = queries()
    moved = replace(first, latent=first.latent + 0.5)
    changes: list[Measuring] = [
        Measuring(queries(), draws=10),
        Measuring(queries(), draws=20),
        Measuring(queries(), draws=10, seed=1),
        Measuring(queries(), draws=10, encoder="torch.nn.Flatten"),
        Measuring(queries(), draws=10, decoder="torch.nn.Identity"),
        Measuring(queries(2), draws=10),
        Measuring([moved, *others], draws=10),
        Measuring([replace(first, conditions={"text": first.text + 1}), *others], draws=10),
        Measuring([replace(first, metadata={**first.metadata, "seed": 77}), *others], draws=10),
        Measuring([replace(first, metadata={**first.metadata, "clipped": False}), *others], draws=10),
    ]
    found = [measuring.settings() for measuring in changes]
    assert all(one not in found[:number] for number, one in enumerate(found))
    noted = replace(first, metadata={**first.metadata, "note": "looked at"})
    assert Measuring([noted, *others], draws=10, batch_size=1).settings() == found[0]


@pytest.mark.parametrize(("value", "kept"), [(1 / 3, 0.3333333), (1234567.89, 1234568.0), (-1e-20, -1e-20)])
def test_numbers_are_kept_as_precisely_as_float32_has_them(value: float, kept: float) -> None:
    assert rounded(value) == kept
    assert np.float32(rounded(float(np.float32(value)))) == pytest.approx(np.float32(value), rel=1e-6)
