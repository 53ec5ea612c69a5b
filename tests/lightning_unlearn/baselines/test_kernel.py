"""TRAK, D-TRAK, DAS and JourneyTRAK against the explicit ``(P, P)`` formulas."""

from __future__ import annotations

import sys
import warnings
from dataclasses import replace
from typing import Any

import pytest
import torch
from baseline_toys import samples, subject, toy_look, views_of
from reference_baselines import OneView, das, feature, residual, trak
from torch import Tensor
from toys import DIM, LATENT, TOKENS, tiny_unet

from lightning_unlearn.baselines import DAS, DTRAK, TRAK, JourneyTRAK, Subject
from lightning_unlearn.data.samples import Sample
from lightning_unlearn.diffusion.objective import DenoisingObjective
from lightning_unlearn.diffusion.sampling import generate, how_generated
from lightning_unlearn.draws.views import Views
from lightning_unlearn.errors import InputError
from lightning_unlearn.fingerprints import generator_for
from lightning_unlearn.weights.parameters import layer_parameters

TRAINING, QUERIES = samples(6, (1, 2)), samples(3, (2, 1), prefix="query")
VIEWS = Views(timesteps=3, seed=1)
# Fewer samples than weights, and more: the kernel has a form for each.
SMALL = {"parameters": "all"}
LARGE = {"parameters": ["conv_out"]}


def toys(form: dict[str, Any]) -> tuple[Subject, list[Sample]]:
    training = TRAINING if form is SMALL else samples(150)
    return subject(training, QUERIES, VIEWS, batch_size=4 if form is SMALL else 64, **form), training


def features(toy: Subject, group: list[Sample], output: str) -> Tensor:
    parameters, look = toy_look(toy)
    return torch.stack([feature(look, views_of(toy.views, sample), parameters, output) for sample in group])


def close(found: Tensor, expected: Tensor, share: float = 1e-7) -> None:
    """To a share of the largest score."""
    assert found.shape == expected.shape
    torch.testing.assert_close(found, expected, rtol=share, atol=share * float(expected.abs().max()))


@pytest.mark.parametrize("form", [SMALL, LARGE], ids=["fewer samples", "fewer weights"])
@pytest.mark.parametrize("ridge", [0.001, 0.1, 10.0])
def test_trak_and_d_trak_are_their_formulas(form: dict[str, Any], ridge: float) -> None:
    toy, training = toys(form)
    for method, output in ((TRAK(ridge), "loss"), (DTRAK(ridge), "square")):
        close(method.scores(toy), trak(features(toy, training, output), features(toy, QUERIES, output), ridge))


@pytest.mark.parametrize("form", [SMALL, LARGE], ids=["fewer samples", "fewer weights"])
@pytest.mark.parametrize("leverage", [True, False])
@pytest.mark.parametrize("squared", [True, False])
def test_das_is_its_formula(form: dict[str, Any], leverage: bool, squared: bool) -> None:
    toy, training = toys(form)
    _, look = toy_look(toy)
    residuals = [residual(look, views_of(VIEWS, sample)) for sample in training]
    found, queries = features(toy, training, "mean"), features(toy, QUERIES, "mean")
    for ridge in (0.01, 1.0):
        expected = das(found, queries, residuals, ridge, leverage=leverage, squared=squared)
        close(DAS(ridge, leverage, squared).scores(toy), expected)


@pytest.mark.parametrize("form", [SMALL, LARGE], ids=["fewer samples", "fewer weights"])
@pytest.mark.parametrize("ridge", [0.001, 0.1, 10.0])
def test_the_leave_one_out_error_is_that_of_fitting_without_each_sample(form: dict[str, Any], ridge: float) -> None:
    toy, training = toys(form)
    rows = features(toy, training, "loss")
    targets = torch.randn(len(rows), generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    # The ridge stays that of all samples.
    matrix = ridge * float(rows.square().sum()) / len(rows) * torch.eye(len(rows), dtype=torch.float64)
    gram, errors = rows @ rows.mT, []
    for out in range(len(rows)):
        kept = [row for row in range(len(rows)) if row != out]
        weights = torch.linalg.solve((gram + matrix)[kept][:, kept], targets[kept])
        errors.append(float(targets[out] - gram[out, kept] @ weights) ** 2)
    found = TRAK(ridge).kernel(toy).leave_one_out_error(ridge, targets)
    assert found == pytest.approx(sum(errors) / len(errors), rel=1e-6)


def test_a_ridge_has_no_unit() -> None:
    """Losses in other units scale all gradients, and change the scores of no sample against another's."""
    toy, _ = toys(SMALL)

    class Scaled(type(toy.loss.objective)):  # type: ignore[misc]
        def __call__(self, *arguments: Any) -> Tensor:
            return 100 * super().__call__(*arguments)

    scaled = subject(TRAINING, QUERIES, VIEWS, objective=Scaled())
    close(TRAK(0.5).scores(scaled), TRAK(0.5).scores(toy))


@pytest.mark.parametrize("method", [TRAK(), DTRAK(), DAS()], ids=lambda method: method.name)
def test_order_and_size_of_batches_change_nothing(method: TRAK) -> None:
    expected = method.scores(subject(TRAINING, QUERIES, VIEWS))
    order, columns = [5, 2, 0, 3, 1, 4], [2, 0, 1]
    toy = subject([TRAINING[row] for row in order], [QUERIES[c] for c in columns], VIEWS, batch_size=4)
    close(method.scores(toy), expected[order][:, columns])


def test_a_kernel_serves_all_ridges() -> None:
    toy = subject(TRAINING, QUERIES, VIEWS)
    calls: list[int] = []
    toy.loss.network.register_forward_hook(lambda *_: calls.append(1))
    DAS(0.1).scores(toy)
    passes = len(calls)
    for ridge in (0.01, 1.0):
        for leverage in (True, False):
            DAS(ridge, leverage).scores(toy)
    assert len(calls) == passes
    assert not any("training" in key for key in toy.cache)


def test_another_subject_starts_with_nothing() -> None:
    toy = subject(TRAINING, QUERIES, VIEWS, keep=True)
    before = TRAK().scores(toy)
    other = replace(toy, views=Views(timesteps=1, seed=9))
    assert not other.cache
    assert not torch.allclose(TRAK().scores(other), before)


# ---------------------------------------------------------------------- projections


def test_projection_to_many_dimensions_keeps_the_scores() -> None:
    toy = subject(TRAINING, QUERIES, VIEWS, keep=True)
    exact = TRAK(0.1).scores(toy)
    near = TRAK(0.1, projection=20000).scores(toy)
    assert float((near - exact).norm() / exact.norm()) < 0.05
    few = TRAK(0.1, projection=4).scores(toy)
    assert float((few - exact).norm() / exact.norm()) > 0.1
    assert not torch.allclose(few, TRAK(0.1, projection=4, seed=1).scores(toy))


def test_projected_scores_do_not_depend_on_batches() -> None:
    expected = DTRAK(projection=16).scores(subject(TRAINING, QUERIES, VIEWS))
    close(DTRAK(projection=16).scores(subject(TRAINING, QUERIES, VIEWS, batch_size=1)), expected)


def test_projection_without_traker_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "trak.projectors", None)
    with pytest.raises(InputError, match=r"pip install 'lightning-unlearn\[rivals\]'"):
        TRAK(projection=8).scores(subject(TRAINING, QUERIES, VIEWS))


# ---------------------------------------------------------------------- the journey

STEPS = 4


def generated(count: int = 3, steps: tuple[int, ...] = (STEPS, 2)) -> tuple[Subject, list[Sample]]:
    """A tiny UNet and queries that it made itself."""
    network, objective = tiny_unet().double(), DenoisingObjective({"num_train_timesteps": 20})
    found = []
    for number in range(count):
        many = steps[number % len(steps)]
        text = torch.randn(1, TOKENS, DIM, generator=torch.Generator().manual_seed(number))
        latent = generate(network, objective, {"text": text}, LATENT, [number], many)[0].float().clamp(-1, 1)
        about = {"captions": ["made"], **how_generated(objective, number, many)}
        found.append(Sample(f"made-{number}", latent, {"text": text}, about))
    toy = subject(samples(4), found, Views(timesteps=2), network=network, objective=objective, parameters="text_kv")
    return toy, found


def looking(toy: Subject) -> tuple[dict[str, Tensor], Any]:
    """The loss of a view under ε-prediction, from the formula."""
    parameters: dict[str, Tensor] = dict(layer_parameters(toy.layers))
    for weight in parameters.values():
        weight.requires_grad_(True)
    alphas = torch.cumprod(1 - torch.linspace(0.0001, 0.02, 20, dtype=torch.float64), 0)

    def look(view: OneView) -> tuple[Tensor, Tensor]:
        alpha = alphas[view.timestep]
        noisy = alpha.sqrt() * view.latent + (1 - alpha).sqrt() * view.noise
        prediction = toy.loss.network(
            noisy[None], torch.tensor([view.timestep]), encoder_hidden_states=view.text[None]
        ).sample[0]
        return ((prediction - view.noise) ** 2).mean(), prediction

    return parameters, look


def journey(toy: Subject, query: Sample, noises: int, *, own: bool) -> list[OneView]:
    """The image expected at each step of DDIM (Song et al., arXiv 2010.02502, Eq. 12), with the toy schedule."""
    alphas = torch.cumprod(1 - torch.linspace(0.0001, 0.02, 20, dtype=torch.float64), 0)
    steps = query.metadata["steps"]
    stride = 20 // steps
    x = torch.randn(LATENT, generator=generator_for("sampling", query.metadata["seed"])).double()
    views = []
    for number, timestep in enumerate(reversed(range(0, 20, stride))):
        alpha = alphas[timestep]
        after = alphas[timestep - stride] if timestep else torch.ones((), dtype=torch.float64)
        with torch.no_grad():
            noise = toy.loss.network(
                x[None], torch.tensor([timestep]), encoder_hidden_states=query.text[:1].double()
            ).sample[0]
        image = ((x - (1 - alpha).sqrt() * noise) / alpha.sqrt()).clamp(-1, 1)
        for draw in range(number * noises, (number + 1) * noises):
            names: tuple[Any, ...] = ("journey", toy.views.seed, draw, *([query.key] if own else []))
            drawn = torch.randn(LATENT, generator=generator_for(*names)).double()
            views.append(OneView(image, query.text[0].double(), timestep, drawn))
        x = after.sqrt() * image + (1 - after).sqrt() * noise
    return views


@pytest.mark.parametrize("noise", ["shared", "per_sample"])
@pytest.mark.parametrize("noises", [1, 2])
def test_journey_trak_is_trak_along_the_trajectory(noise: Any, noises: int) -> None:
    toy, queries = generated()
    toy = replace(toy, views=Views(timesteps=2, noise=noise))
    training = [sample for batch in toy.batches() for sample in batch.keys]
    found = JourneyTRAK(0.1, noises).scores(toy)
    parameters, look = looking(toy)
    rows = torch.stack(
        [feature(look, views_of(toy.views, sample, 20), parameters, "loss") for sample in samples(len(training))]
    )
    columns = torch.stack(
        [feature(look, journey(toy, query, noises, own=noise == "per_sample"), parameters, "loss") for query in queries]
    )
    close(found, trak(rows, columns, 0.1), 1e-3)  # diffusers keeps the schedule in float32


def test_a_trajectory_is_not_taken_for_views_where_both_are_kept() -> None:
    toy, _ = generated()
    apart = [method.scores(replace(toy)) for method in (TRAK(), JourneyTRAK(), JourneyTRAK(noises=2))]
    together = [method.scores(toy) for method in (TRAK(), JourneyTRAK(), JourneyTRAK(noises=2))]
    for ours, theirs in zip(together, apart, strict=True):
        close(ours, theirs)
    assert not torch.allclose(apart[0], apart[1])
    assert not torch.allclose(apart[1], apart[2])


def test_queries_of_several_shapes_have_journeys_of_their_own() -> None:
    toy, (first, *_) = generated(1)
    objective = toy.loss.objective
    assert isinstance(objective, DenoisingObjective)
    shape = (LATENT[0], LATENT[1], 2 * LATENT[2])
    latent = generate(toy.loss.network, objective, {"text": first.text}, shape, [5], STEPS)[0].float().clamp(-1, 1)
    wide = Sample("wide", latent, first.conditions, {"captions": ["made"], **how_generated(objective, 5, STEPS)})
    together = JourneyTRAK().scores(replace(toy, queries=[wide, first]))
    for column, query in enumerate((wide, first)):
        close(JourneyTRAK().scores(replace(toy, queries=[query]))[:, 0], together[:, column], 1e-6)


def test_journey_of_a_query_does_not_depend_on_the_others() -> None:
    toy, queries = generated(4)
    together = JourneyTRAK().scores(toy)
    for column, query in enumerate(queries):
        close(JourneyTRAK().scores(replace(toy, queries=[query]))[:, 0], together[:, column], 1e-6)


@pytest.mark.parametrize(
    "change",
    [{"seed": None}, {"seed": "7"}, {"steps": 0}, {"scheduler": "PNDMScheduler"}, {"guidance": 7.5}],
    ids=str,
)
def test_a_query_that_does_not_say_how_it_was_made_is_refused(change: dict[str, Any]) -> None:
    toy, queries = generated(2)
    odd = replace(queries[1], metadata={**queries[1].metadata, **change})
    with pytest.raises(InputError, match="'made-1' can't be made again for JourneyTRAK: its json must have"):
        JourneyTRAK().scores(replace(toy, queries=[queries[0], odd]))


def test_a_query_that_another_model_made_is_told() -> None:
    toy, queries = generated(1)
    other = replace(queries[0], latent=-queries[0].latent)
    with pytest.warns(UserWarning, match=r"'made-0' is said to come from ends \d+% of its size away"):
        JourneyTRAK().scores(replace(toy, queries=[other]))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        JourneyTRAK().scores(replace(toy, queries=queries))


def test_journey_needs_an_objective_with_a_sampler() -> None:
    with pytest.raises(InputError, match="the objective is a ToyObjective; choose another method"):
        JourneyTRAK().scores(subject(TRAINING, QUERIES))


# ---------------------------------------------------------------------- bad input


@pytest.mark.parametrize("ridge", [0.0, -1.0, float("inf"), float("nan")])
def test_ridges_that_give_no_kernel_are_refused(ridge: float) -> None:
    with pytest.raises(InputError, match="ridge must be finite and above 0"):
        TRAK(ridge)


def test_numbers_out_of_range_are_refused() -> None:
    with pytest.raises(InputError, match="at least one dimension, but has 0"):
        DTRAK(projection=0)
    with pytest.raises(InputError, match="at least one noise, but noises is 0"):
        JourneyTRAK(noises=0)


def test_layers_without_gradient_are_refused() -> None:
    toy = subject(TRAINING, QUERIES, parameters=["text"])
    for weight in toy.loss.network.parameters():
        weight.zero_()
    with pytest.raises(InputError, match="No gradient reaches the chosen layers"):
        TRAK().scores(toy)


def test_das_refuses_losses_without_a_root() -> None:
    toy, _ = toys(SMALL)

    class Below(type(toy.loss.objective)):  # type: ignore[misc]
        def __call__(self, *arguments: Any) -> Tensor:
            return super().__call__(*arguments) - 1e6

    with pytest.raises(InputError, match="some losses are negative or NaN"):
        DAS().scores(subject(TRAINING, QUERIES, objective=Below()))
