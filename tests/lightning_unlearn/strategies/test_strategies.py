from __future__ import annotations

import functools
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from attribution_runs import exact_fisher, random_fisher, toy_data, unlearn
from hypothesis import given, settings
from hypothesis import strategies as st
from reference_attribution import (
    Loss,
    Naive,
    mean_gradient,
    natural_step,
    newton_delta,
    scale_by_bisection,
    toy_loss,
    unet_loss,
)
from torch import Tensor, nn
from toys import ToyDenoiser, ToyObjective, tiny_unet, toy_shards

from lightning_unlearn.data.samples import Sample, ViewBatch
from lightning_unlearn.data.shards import encode_sample, write_shards
from lightning_unlearn.datamodules.reading import read_samples
from lightning_unlearn.datamodules.sources import list_shards
from lightning_unlearn.diffusion.objective import DenoisingObjective, Objective
from lightning_unlearn.draws.unlearning_draws import Stream, draw_for_target
from lightning_unlearn.errors import InputError
from lightning_unlearn.fingerprints import seed_of
from lightning_unlearn.fisher import DiagonalFisher
from lightning_unlearn.strategies import STRATEGIES, NaturalGradient, Newton
from lightning_unlearn.strategies.scale import find_scales
from lightning_unlearn.strategies.search import TOLERANCE
from lightning_unlearn.unlearning.module import UnlearningModule

DRAWS, DAMPING = 6, 0.1


class Problem:
    """One model in float64, with its Fisher, its loss by the package and its loss by hand."""

    def __init__(self, network: nn.Module, objective: Objective, by_hand: Loss, selection: str | list[str]) -> None:
        self.network = network.double()
        self.objective = objective
        self.by_hand = by_hand
        self.selection = selection
        self.fisher: DiagonalFisher = random_fisher(self.network, selection)

    def unlearn(self, folder: Path, strategy: Newton, shards: str = "train") -> tuple[UnlearningModule, list[Sample]]:
        module = UnlearningModule(
            self.network, self.objective, self.fisher, self.selection, strategy, damping=DAMPING, rise_draws=5
        )
        data = toy_data(folder, shards, draws=DRAWS, draw_batch_size=4)
        unlearn(module, data)
        return module, data.queries

    def naive(self) -> Naive:
        return Naive(self.network, list(self.fisher.parameter_shapes))

    def losses(self, query: Sample, stream: Stream, numbers: range, total: int) -> list[Callable[[nn.Module], Tensor]]:
        """A query's loss for each of its draws, which take its captions in turn."""
        length = self.objective.num_timesteps
        timesteps, noises = draw_for_target(stream, 0, query.key, numbers, total, length, query.latent.shape)

        def loss(number: int, place: int) -> Callable[[nn.Module], Tensor]:
            text = query.text[number % len(query.text)].double()
            arguments = (query.latent.double(), text, int(timesteps[place]), noises[place].double())
            return lambda network: self.by_hand(network, *arguments)

        return [loss(number, place) for place, number in enumerate(numbers)]

    def mean_fisher(self) -> dict[str, Tensor]:
        return {name: total / self.fisher.count for name, total in self.fisher.sums.items()}


def toy() -> Problem:
    return Problem(ToyDenoiser(), ToyObjective(), toy_loss, [".*"])


def unet(prediction_type: Any, selection: str) -> Problem:
    return Problem(tiny_unet(), DenoisingObjective({}, prediction_type), unet_loss(prediction_type), selection)


PROBLEMS: dict[str, Callable[[], Problem]] = {
    "Linear, Conv2d, bias": toy,
    "epsilon": functools.partial(unet, "epsilon", "text_kv"),
    "v_prediction": functools.partial(unet, "v_prediction", "cross_attention"),
    "sample": functools.partial(unet, "sample", "text_kv"),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("strategies")
    toy_shards(folder / "train", 2, 2)
    toy_shards(folder / "queries", 2, 2, captions=3, prefix="query")
    # Samples that a model knows less well than the queries.
    loud = [
        encode_sample(sample.key, 30 * sample.latent.numpy(), sample.text.numpy(), sample.metadata)
        for shard in list_shards(str(folder / "train"))
        for sample in read_samples(shard)
    ]
    write_shards(loud, folder / "loud")
    return folder


def assert_same(found: dict[str, Tensor], target: int, expected: dict[str, Tensor], tolerance: float = 1e-6) -> None:
    assert found.keys() == expected.keys()
    for name, delta in expected.items():
        assert found[name].dtype == torch.float64
        assert float((found[name][target] - delta).norm()) <= tolerance * float(delta.norm()), name
        assert float(delta.norm()) > 0, name


@pytest.mark.parametrize("steps", [1, 3])
@pytest.mark.parametrize("name", PROBLEMS)
def test_delta_of_newton_steps_is_that_of_the_plain_loop(name: str, steps: int, folder: Path) -> None:
    problem = PROBLEMS[name]()
    module, queries = problem.unlearn(folder, Newton(steps, alpha=0.7, N=50))
    assert module.deltas is not None
    assert module.trainer.global_step == steps
    for target, query in enumerate(queries):
        draws = [problem.losses(query, "unlearning", range(s * DRAWS, (s + 1) * DRAWS), DRAWS) for s in range(steps)]
        expected = newton_delta(problem.naive(), problem.mean_fisher(), DAMPING, 0.7 / 50, draws)
        assert_same(module.deltas.named(), target, expected)


# A network that was never trained has attention that saturates long before a rise of a tenth.
@pytest.mark.parametrize(("name", "wanted"), [("Linear, Conv2d, bias", 0.1), ("v_prediction", 1e-3)])
def test_delta_of_a_wanted_rise_is_that_of_bisection_along_the_natural_gradient(
    name: str, wanted: float, folder: Path
) -> None:
    problem = PROBLEMS[name]()
    module, queries = problem.unlearn(folder, Newton(target_increase=wanted))
    assert module.deltas is not None
    for target, query in enumerate(queries):
        naive = problem.naive()
        nothing = {key: torch.zeros_like(value) for key, value in naive.base.items()}
        gradient = mean_gradient(naive, nothing, problem.losses(query, "unlearning", range(DRAWS), DRAWS))
        direction = natural_step(gradient, problem.mean_fisher(), DAMPING, 1.0)
        over = problem.losses(query, "rise", range(5), 5)

        def mean_loss(
            scale: float, naive: Naive = naive, direction: dict[str, Tensor] = direction, over: Any = over
        ) -> float:
            delta = {key: scale * value for key, value in direction.items()}
            return math.fsum(naive.value(delta, loss) for loss in over) / len(over)

        before = mean_loss(0.0)
        scale = scale_by_bisection(lambda c, before=before, at=mean_loss: at(c) / before - 1, wanted)  # type: ignore[misc]
        # The rise is only wanted to a thousandth of itself, and the scale follows it; on a loss so smooth the last
        # interpolation is nearer by three digits.
        assert_same(module.deltas.named(), target, {key: scale * value for key, value in direction.items()}, 3e-6)
        result = module.results[query.key]
        assert result["loss_before"] == pytest.approx(before, rel=1e-9)
        assert result["rise"] == pytest.approx(wanted, rel=1.1e-6)
        assert result["loss_after"] == pytest.approx((1 + wanted) * before, rel=1e-6)


@pytest.mark.parametrize("steps", [1, 2, 4])
@pytest.mark.parametrize("target_increase", [0.003, 0.1, 1.0])
def test_the_wanted_rise_is_reached_after_the_last_step(steps: int, target_increase: float, folder: Path) -> None:
    module, _ = toy().unlearn(folder, Newton(steps, target_increase))
    assert len(module.results) == 2
    for result in module.results.values():
        assert result["rise"] == pytest.approx(target_increase, rel=1e-5)


@pytest.mark.parametrize("steps", [1, 3])
def test_the_loss_rises_by_a_share_of_the_way_to_the_mean_loss_of_the_samples(steps: int, folder: Path) -> None:
    problem = toy()
    module, queries = problem.unlearn(folder, Newton(steps, toward_data=9.0), "loud")
    data, length = toy_data(folder, "loud"), problem.objective.num_timesteps
    data.setup("fit")
    naive, losses = problem.naive(), []
    for number, sample in enumerate(data.real_samples("others", 0).take(0, 64)):
        [timestep], [noise] = draw_for_target("others", 0, "", [number], 64, length, sample.latent.shape)
        text = sample.text[seed_of("others", "caption", 0, number) % len(sample.text)]
        losses.append(
            problem.by_hand(naive.network, sample.latent.double(), text.double(), int(timestep), noise.double())
        )
    mean = float(torch.stack(losses).mean().detach())
    found = [module.results[query.key] for query in queries]
    for result in found:
        before = result["loss_before"]
        assert result["loss_after"] == pytest.approx(before + 9.0 * (mean - before), rel=1e-5)
        assert result["rise"] > 1.1


def test_the_loss_of_a_query_that_is_no_better_known_than_the_samples_rises_by_a_half(folder: Path) -> None:
    module, queries = toy().unlearn(folder, Newton(toward_data=0.01), "loud")
    assert [module.results[query.key]["rise"] for query in queries] == pytest.approx([0.5, 0.5], rel=1e-5)


def test_halfway_to_the_mean_loss_of_the_samples_is_the_default(folder: Path) -> None:
    by_default, said = (toy().unlearn(folder, strategy)[0] for strategy in (Newton(), Newton(toward_data=0.5)))
    assert by_default.results == said.results


@pytest.mark.parametrize("loss", [0.0, -1.0])
def test_a_loss_that_is_not_above_zero_is_an_error_that_names_the_query(loss: float, folder: Path) -> None:
    class Shifted(ToyObjective):
        def __call__(self, network: nn.Module, batch: ViewBatch, timesteps: Tensor, noise: Tensor) -> Tensor:
            losses = super().__call__(network, batch, timesteps, noise)
            return losses - losses.detach() + loss

    for strategy in (Newton(), Newton(target_increase=0.1)):
        with pytest.raises(InputError, match=r"The loss of 'query-00000' is .*; give Newton's alpha and N instead"):
            Problem(ToyDenoiser(), Shifted(), toy_loss, [".*"]).unlearn(folder, strategy)


def test_the_rise_grows_step_by_step(folder: Path) -> None:
    problem, rises = toy(), []

    class Watched(Newton):
        def after_step(self, problem: Any, before: Any, step: int) -> None:
            super().after_step(problem, before, step)
            rises.append(problem.losses(problem.deltas) / problem.losses(None) - 1)

    problem.unlearn(folder, Watched(4, 0.2))
    expected = torch.tensor([0.05, 0.1, 0.15, 0.2], dtype=torch.float64)[:, None].expand(4, 2)
    torch.testing.assert_close(torch.stack(rises), expected, rtol=1e-5, atol=0)


def test_small_rises_move_along_the_natural_gradient_in_proportion(folder: Path) -> None:
    # To first order the loss rises by c gᵀF⁻¹g, so half the rise takes half the step.
    small, half = (toy().unlearn(folder, Newton(target_increase=rise))[0].deltas for rise in (2e-4, 1e-4))
    assert small is not None
    assert half is not None
    for name, delta in small.named().items():
        torch.testing.assert_close(delta, 2 * half.named()[name], rtol=0.01, atol=1e-9)


def test_a_newton_step_raises_the_loss_by_its_first_order_guess_with_a_true_fisher(folder: Path) -> None:
    problem = toy()
    sample = toy_data(folder)
    sample.setup("fit")
    problem.fisher = exact_fisher(problem.network, problem.objective, sample.queries, problem.selection)
    module, _ = problem.unlearn(folder, Newton(target_increase=1e-4))
    for result in module.results.values():
        # Along c F⁻¹g the penalty is ½ c² gᵀF⁻¹g and the rise c gᵀF⁻¹g; both are positive.
        assert result["penalty"] > 0
        assert result["rise"] == pytest.approx(1e-4, rel=1e-4)


# ---------------------------------------------------------------------------------- the optimizer


def test_natural_gradient_steps_along_minus_the_preconditioned_gradient() -> None:
    network = ToyDenoiser().double()
    fisher = random_fisher(network, ["text"])
    fisher.finalize(0.5)
    weight, bias = (nn.Parameter(torch.ones(2, *shape).double()) for shape in fisher.parameter_shapes.values())
    optimizer = NaturalGradient([{"params": [weight, bias], "names": ["text.weight", "text.bias"]}], fisher, 0.3)
    calls = []

    def closure() -> float:
        calls.append(torch.is_grad_enabled())
        (2.0 * weight.sum()).backward()
        return 4.0

    with torch.no_grad():
        assert optimizer.step(closure) == 4.0
    assert calls == [True]
    expected = natural_step(
        {"text.weight": torch.full((5, 6), 2.0).double(), "text.bias": torch.zeros(5).double()},
        {name: total / 3 for name, total in fisher.sums.items()},
        0.5,
        0.3,
    )
    torch.testing.assert_close(weight.detach(), 1 - expected["text.weight"].expand(2, 5, 6))
    assert torch.equal(bias.detach(), torch.ones(2, 5).double())  # no gradient came
    assert optimizer.state_dict()["state"] == {}  # the Fisher is no part of it


def test_optimizer_has_one_group_a_layer(folder: Path) -> None:
    module, _ = toy().unlearn(folder, Newton(alpha=1.0, N=10))
    groups = module.trainer.optimizers[0].param_groups
    assert [group["names"] for group in groups] == [
        [f"{n}.weight", f"{n}.bias"] for n in ("conv_in", "text", "conv_out")
    ]


@pytest.mark.parametrize(
    "wrong",
    [
        {"alpha": 1.0},
        {"N": 10},
        {"steps": 0},
        {"target_increase": 0.0},
        {"target_increase": -0.1},
        {"alpha": 0.0, "N": 10},
        {"alpha": 1.0, "N": 0},
        {"target_increase": math.nan},
        {"alpha": math.nan, "N": 10},
        {"alpha": math.inf, "N": 10},
        {"toward_data": 0.0},
        {"toward_data": math.inf},
    ],
)
def test_newton_refuses_numbers_out_of_range(wrong: dict[str, Any]) -> None:
    with pytest.raises(InputError, match="alpha and N"):
        Newton(**wrong)


@pytest.mark.parametrize(
    "sizes",
    [
        {"target_increase": 0.1, "toward_data": 0.1},
        {"target_increase": 0.1, "alpha": 1.0, "N": 10},
        {"alpha": 1.0, "N": 10, "toward_data": 0.5},
    ],
)
def test_newton_refuses_two_sizes_of_one_step(sizes: dict[str, Any]) -> None:
    with pytest.raises(InputError, match="both say how large the step is; give only one of them"):
        Newton(**sizes)


def test_settings_tell_strategies_apart_and_name_one_that_is_registered() -> None:
    found = [Newton(), Newton(2), Newton(target_increase=0.5), Newton(alpha=1.0, N=2), Newton(alpha=1.0, N=3)]
    found.append(Newton(toward_data=0.1))
    assert len({str(one.settings()) for one in found}) == 6
    assert Newton().settings() == Newton(toward_data=0.5).settings()
    assert {STRATEGIES[one.settings()["strategy"]] for one in found} == {Newton}


# ---------------------------------------------------------------------------------- the search


def curve(kind: str, slope: float, bend: float) -> tuple[Callable[[Tensor], Tensor], float]:
    """A rising function with a given slope at 0, and the highest value it can reach."""
    if kind == "power":
        return lambda x: slope * x + bend * (slope * x) ** 3, math.inf
    if kind == "exponential":
        return lambda x: torch.expm1(slope * bend * x) / bend, math.inf
    if kind == "saturating":
        return lambda x: -torch.expm1(-slope * bend * x) / bend, 1 / bend
    if kind == "root":  # slower than its slope says
        return lambda x: ((1 + 2 * bend * slope * x).sqrt() - 1) / bend, math.inf
    # Beyond some point the loss is NaN.
    return lambda x: torch.where(slope * x > bend, torch.nan, slope * x + (slope * x) ** 2), bend + bend**2


CURVES = st.tuples(
    st.sampled_from(["power", "exponential", "saturating", "root", "nan"]),
    st.floats(1e-4, 1e4),
    st.floats(1e-2, 1e2),
)


def rises_of(curves: list[tuple[str, float, float]]) -> Callable[[Tensor], Tensor]:
    functions = [curve(*one)[0] for one in curves]
    return lambda scales: torch.stack([function(scale) for function, scale in zip(functions, scales, strict=True)])


@settings(max_examples=100)
@given(curves=st.lists(CURVES, min_size=1, max_size=4), wanted=st.floats(1e-3, 2.0), misjudged=st.floats(0.01, 100))
def test_scales_are_found_on_any_rising_function(
    curves: list[tuple[str, float, float]], wanted: float, misjudged: float
) -> None:
    curves = [one for one in curves if curve(*one)[1] > 1.01 * wanted] or [("power", 1.0, 1.0)]
    rises, names = rises_of(curves), [f"query-{n}" for n in range(len(curves))]
    slopes = torch.tensor([slope for _, slope, _ in curves], dtype=torch.float64) * misjudged
    scales = find_scales(rises, slopes, wanted, names).scales
    assert scales.dtype == torch.float64
    # As exact as the search promises; nearly always far more so.
    torch.testing.assert_close(rises(scales), torch.full_like(scales, wanted), rtol=TOLERANCE, atol=0)
    # All at once is each alone.
    for place, one in enumerate(curves):
        alone = find_scales(rises_of([one]), slopes[place : place + 1], wanted, names[:1]).scales
        assert torch.equal(alone, scales[place : place + 1])


@settings(max_examples=100)
@given(
    reachable=CURVES, kind=st.sampled_from(["saturating", "nan"]), bend=st.floats(0.1, 10), share=st.floats(1.01, 50)
)
def test_a_rise_that_cannot_be_reached_is_an_error_that_names_the_query(
    reachable: tuple[str, float, float], kind: str, bend: float, share: float
) -> None:
    wanted = share * curve(kind, 1.0, bend)[1]
    if curve(*reachable)[1] <= 1.01 * wanted:
        reachable = ("power", 1.0, 1.0)
    rises = rises_of([reachable, (kind, 1.0, bend)])
    with pytest.raises(InputError, match=r"'the hopeless one' can't be raised by .*target_increase"):
        find_scales(rises, torch.tensor([reachable[1], 1.0]), wanted, ["another", "the hopeless one"])


@settings(max_examples=100)
@given(
    reachable=CURVES, kind=st.sampled_from(["saturating", "nan"]), bend=st.floats(0.1, 10), share=st.floats(1.01, 50)
)
def test_a_rise_that_cannot_be_reached_may_be_had_nearly_as_far_as_it_goes(
    reachable: tuple[str, float, float], kind: str, bend: float, share: float
) -> None:
    top = curve(kind, 1.0, bend)[1]
    wanted = share * top
    if curve(*reachable)[1] <= 1.01 * wanted:
        reachable = ("power", 1.0, 1.0)
    rises, names = rises_of([reachable, (kind, 1.0, bend)]), ["another", "the short one"]
    with pytest.warns(UserWarning, match=r"1 target .* as far as it goes \('the short one': .* of "):
        scales = find_scales(rises, torch.tensor([reachable[1], 1.0]), wanted, names, short=True).scales
    found = rises(scales)
    # The other is where it would be without it, and the short one is just below the top.
    assert float(found[0]) == pytest.approx(wanted, rel=TOLERANCE)
    assert 0.85 * top <= float(found[1]) <= top
    with pytest.warns(UserWarning, match="as far as it goes"):
        alone = find_scales(rises_of([(kind, 1.0, bend)]), torch.tensor([1.0]), wanted, names[1:], short=True)
    assert torch.equal(alone.scales, scales[1:])


def test_a_jump_over_the_wanted_rise_is_not_taken_for_it() -> None:
    def jump(scales: Tensor) -> Tensor:
        return torch.where(scales > 0.5, 3.0, 0.1 * scales)

    with pytest.raises(InputError, match="can't be raised"):
        find_scales(jump, torch.tensor([0.1]), 1.0, ["query"])
    with pytest.warns(UserWarning, match="'query': 0.0475 of 1"):
        assert float(find_scales(jump, torch.tensor([0.1]), 1.0, ["query"], short=True).scales) == pytest.approx(0.475)


@settings(max_examples=100)
@given(top=st.floats(0.05, 0.99), at=st.floats(1e-3, 1e3), width=st.floats(0.05, 1.0), misjudged=st.floats(0.1, 10))
def test_a_loss_that_falls_again_is_raised_nearly_as_far_as_it_was_seen_to_rise(
    top: float, at: float, width: float, misjudged: float
) -> None:
    def hill(scales: Tensor) -> Tensor:
        # Rises to its top, and falls again so steeply that doubled scales may step over it.
        return torch.where(scales < at, scales / at, (1 - (scales / at - 1) / width).clamp(min=-0.5)) * top

    slopes = torch.tensor([misjudged * top / at, 50 * top / at], dtype=torch.float64)
    with pytest.warns(UserWarning, match="as far as it goes"):
        scales = find_scales(hill, slopes[:1], 1.0, ["query"], short=True).scales
    # Of what lies just below the wanted rise, a little more.
    assert 0.95 * 0.5 * top <= float(hill(scales)) <= max(0.951 * top, 2.001 * top - 1)
    assert float(scales) <= at
    with pytest.warns(UserWarning, match="as far as it goes"):
        together = find_scales(hill, slopes, 1.0, ["query", "another"], short=True).scales
    assert torch.equal(together[:1], scales)


@pytest.mark.parametrize("short", [False, True])
def test_a_wanted_rise_that_the_first_guess_stepped_over_is_found(short: bool) -> None:
    def hump(scales: Tensor) -> Tensor:
        return (scales + 100 * scales**2) * (-((scales / 0.2) ** 2)).exp()

    scales = find_scales(hump, torch.tensor([1.0, 0.5]), 1.0, ["query", "another"], short=short).scales
    torch.testing.assert_close(hump(scales), torch.ones(2, dtype=torch.float64), rtol=TOLERANCE, atol=0)


def test_a_loss_that_hardly_rises_is_an_error_all_the_same() -> None:
    def flat(scales: Tensor) -> Tensor:
        return 0.009 * torch.tanh(scales)

    with pytest.raises(InputError, match="'query' can't be raised by 1"):
        find_scales(flat, torch.tensor([0.009]), 1.0, ["query"], short=True)


def test_rounding_of_float32_losses_does_not_stop_the_search() -> None:
    for wanted in (1e-3, 0.1, 1.0):
        found = find_scales(
            lambda c: (1 + c.float() + c.float() ** 2).double() - 1, torch.tensor([1.0]), wanted, ["query"]
        )
        # Half a unit of float32 at 1 or 2 in each of three roundings, and what the last interpolation leaves.
        rounding = 3 * 2 * torch.finfo(torch.float32).eps
        assert float(found.scales + found.scales**2) == pytest.approx(wanted, abs=rounding + 1e-4 * wanted)


@pytest.mark.parametrize("slope", [0.0, -1.0, math.nan, math.inf])
def test_a_loss_without_a_gradient_is_an_error_that_names_the_query(slope: float) -> None:
    with pytest.raises(InputError, match="'flat' has no finite gradient"):
        find_scales(lambda c: c, torch.tensor([1.0, slope]), 0.1, ["fine", "flat"])
