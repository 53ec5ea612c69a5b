"""A step that leaves the range in which it means something ends there, and says so."""

from __future__ import annotations

import math
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from attribution_runs import random_fisher, toy_data, unlearn
from torch import Tensor, nn
from toys import ToyDenoiser, ToyObjective, toy_shards

from lightning_unlearn.data.samples import ViewBatch
from lightning_unlearn.diffusion.objective import Objective
from lightning_unlearn.errors import InputError
from lightning_unlearn.scores.step_reasons import LENGTH, LINEAR, OTHERS
from lightning_unlearn.strategies import Newton, StepRange
from lightning_unlearn.strategies.others import hold_others
from lightning_unlearn.strategies.scale import find_scales
from lightning_unlearn.strategies.search import TOLERANCE
from lightning_unlearn.strategies.step_range import longest_scales
from lightning_unlearn.unlearning.fixed_draws import FixedDraws
from lightning_unlearn.unlearning.module import UnlearningModule
from lightning_unlearn.weights.parameters import layer_parameters, select_layers

OFF = StepRange(longest=math.inf, least_linear=0.0, most_others=math.inf)

pytestmark = pytest.mark.filterwarnings("ignore:.*max_epochs.*", "ignore:.*many workers.*")


class Levelled(ToyObjective):
    """A loss whose rise all but levels off: it grows with the logarithm of the plain one's square."""

    def __call__(self, network: nn.Module, batch: ViewBatch, timesteps: Tensor, noise: Tensor) -> Tensor:
        """The loss of each view: ``(B,)``."""
        plain = super().__call__(network, batch, timesteps, noise)
        return 1 + 0.02 * torch.log1p(50 * (plain - 1).clamp(min=0) ** 2 + plain)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("range")
    toy_shards(folder / "train", 2, 2)
    toy_shards(folder / "queries", 2, 2, prefix="query")
    return folder


def unlearned(folder: Path, objective: Objective, strategy: Newton) -> UnlearningModule:
    network = ToyDenoiser().double()
    module = UnlearningModule(
        network, objective, random_fisher(network, [".*"]), [".*"], strategy, damping=0.1, rise_draws=5
    )
    unlearn(module, toy_data(folder, draws=6, draw_batch_size=4))
    return module


def lengths(module: UnlearningModule) -> list[float]:
    """Of the deltas, in lengths of the weights, from the deltas themselves."""
    assert module.deltas is not None
    weights = sum(float(weight.square().sum()) for weight in layer_parameters(module.layers).values())
    rows = range(len(module.targets))
    squares = [sum(float(stack[row].square().sum()) for stack in module.deltas.named().values()) for row in rows]
    return [math.sqrt(square / weights) for square in squares]


def test_a_step_along_which_the_loss_hardly_rises_ends_in_its_range_and_says_so(folder: Path) -> None:
    with pytest.warns(UserWarning, match=r"2 targets can't .* \('query-00000': .* its loss rises far less than"):
        held = unlearned(folder, Levelled(), Newton(target_increase=0.5))
    for result in held.results.values():
        assert result["out_of_range"] == [LINEAR]
        assert result["linear"] >= StepRange().least_linear
        assert result["rise"] < 0.5
    # Without the watch it goes on, far away from where a first-order step means anything.
    lost = unlearned(folder, Levelled(), Newton(target_increase=0.5, step_range=OFF))
    for far, near in zip(lengths(lost), lengths(held), strict=True):
        assert far > 5 * near


def test_the_longest_delta_is_as_long_as_allowed(folder: Path) -> None:
    free = unlearned(folder, ToyObjective(), Newton(target_increase=1.0))
    longest = min(lengths(free)) / 2
    assert all(result["out_of_range"] == [] for result in free.results.values())
    assert [result["length"] for result in free.results.values()] == pytest.approx(lengths(free))
    with pytest.warns(UserWarning, match="its delta gets far longer than the weights"):
        held = unlearned(folder, ToyObjective(), Newton(target_increase=1.0, step_range=StepRange(longest=longest)))
    for length, result in zip(lengths(held), held.results.values(), strict=True):
        # Nearly as far as it can: the rise is 0.95 of that at the end, and no less of the length.
        assert 0.5 * longest < length <= 1.002 * longest
        assert result["out_of_range"] == [LENGTH]
        assert 0 < result["rise"] < 1.0


def test_a_step_that_takes_everything_else_along_is_shortened(folder: Path) -> None:
    free = unlearned(folder, ToyObjective(), Newton(toward_data=0.5))
    shares = [
        (result["others_after"] / result["others_before"] - 1) / result["rise"] for result in free.results.values()
    ]
    most = max(shares) / 2
    assert most > 0
    with pytest.warns(UserWarning, match="the loss of everything else rises with it"):
        held = unlearned(folder, ToyObjective(), Newton(toward_data=0.5, step_range=StepRange(most_others=most)))
    place = shares.index(max(shares))
    result = list(held.results.values())[place]
    assert OTHERS in result["out_of_range"]
    # The numbers of the results are those of the deltas that are kept.
    again = held._problem
    assert again is not None
    losses, others = again.losses(again.deltas, None), again.others
    assert others is not None
    assert result["loss_after"] == pytest.approx(float(losses[place]), rel=1e-9)
    assert result["others_after"] == pytest.approx(float(others(again.deltas, None)[place]), rel=1e-9)


def test_a_step_of_a_given_size_goes_as_far_as_it_is_told_and_is_told_of(folder: Path) -> None:
    free = unlearned(folder, ToyObjective(), Newton(alpha=1.0, N=10))
    with pytest.warns(UserWarning, match=r"The steps of 2 of 2 targets leave the range .* longer than the weights"):
        watched = unlearned(folder, ToyObjective(), Newton(alpha=1.0, N=10, step_range=StepRange(longest=1e-6)))
    assert lengths(watched) == lengths(free)
    assert all(LENGTH in result["out_of_range"] for result in watched.results.values())


def test_the_first_order_rise_is_that_of_small_steps(folder: Path) -> None:
    for strategy in (Newton(target_increase=1e-5), Newton(alpha=1e-5, N=10)):
        # One query's rise is measured on other draws than its slope, so they agree in their order only.
        for result in unlearned(folder, ToyObjective(), strategy).results.values():
            assert 0.3 < result["linear"] < 3


def test_the_boundary_is_the_smaller_of_the_two_and_targets_do_not_depend_on_each_other() -> None:
    slopes = torch.tensor([1.0, 1.0, 1.0], dtype=torch.float64)
    ends = torch.tensor([math.inf, 0.25, math.inf], dtype=torch.float64)

    def rises(scales: Tensor) -> Tensor:
        # Reaches what is wanted; is too long before it does; rises ever less than its slope says.
        return torch.stack([scales[0], scales[1], 0.1 * torch.log1p(10 * scales[2])])

    names = ["fine", "long", "slow"]
    with pytest.warns(UserWarning, match="2 targets"):
        found = find_scales(rises, slopes, 1.0, names, longest=ends, least_linear=0.2, short=True)
    assert found.limited == [None, LENGTH, LINEAR]
    assert float(found.scales[0]) == pytest.approx(1.0)
    assert 0.95 * 0.25 <= float(found.scales[1]) * 1.002 <= 0.25 * 1.004
    slow = float(found.scales[2])
    assert 0.2 <= math.log1p(10 * slow) / (10 * slow) < 0.25
    assert int(found.evaluations[0]) <= 3
    for place, name in enumerate(names):
        one = slice(place, place + 1)

        def alone(scales: Tensor, place: int = place) -> Tensor:
            return rises(scales.expand(3))[place : place + 1]

        about: dict[str, Any] = {"longest": ends[one], "least_linear": 0.2, "short": True}
        assert torch.equal(find_scales(alone, slopes[one], 1.0, [name], **about).scales, found.scales[one])


def test_a_search_moves_by_no_more_than_its_losses_over_their_slope() -> None:
    """What a number of processes changes is the rounding of losses; the scale follows them smoothly.

    The rise is c + 2 c² + c³ for a wanted rise of 1. Losses that are off by ε move the root by ε over the slope there,
    which is above 2. The last interpolation leaves some 1e-5 of the scale where another point ends the search.
    """
    eps, moved = torch.finfo(torch.float32).eps, []
    for seed in range(200):
        generator = torch.Generator().manual_seed(seed)

        def rises(scales: Tensor, generator: torch.Generator = generator) -> Tensor:
            noise = eps * (2 * torch.rand(1, generator=generator, dtype=torch.float64) - 1)
            return scales + 2 * scales**2 + scales**3 + noise

        found = find_scales(rises, torch.tensor([3.0], dtype=torch.float64), 1.0, ["query"])
        moved.append(float(found.scales))
    assert max(moved) - min(moved) <= 2 * eps / 2


@pytest.mark.parametrize("bound", ["length", "loss"])
def test_a_little_more_of_what_is_wanted_changes_little_at_the_boundary(bound: str) -> None:
    """The rise is the scale, up to 1, where it is too long, or falls again.

    Just above the boundary as much is kept back as is wanted too much, so both ends move by that; the search is off by
    its tolerance.
    """
    ends = torch.tensor([1.0 if bound == "length" else math.inf], dtype=torch.float64)

    def rises(scales: Tensor) -> Tensor:
        return scales if bound == "length" else torch.where(scales < 1, scales, 2 - scales)

    scales = []
    for wanted in (0.999, 1.001):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            found = find_scales(rises, torch.ones(1).double(), wanted, ["query"], longest=ends, short=True)
        scales.append(float(found.scales))
    assert abs(scales[1] - scales[0]) <= 2 * 0.002 + 2 * TOLERANCE


@pytest.mark.parametrize(("bend", "kept"), [(0.0105, 0.0105), (0.0099, 0.0109), (0.0075, 0.1), (0.0049, 1.0)])
def test_steps_are_shortened_by_less_where_a_short_one_takes_everything_else_along(bend: float, kept: float) -> None:
    """Everything else rises by a quarter of the query's rise where the scale is the bend, and by more behind it."""
    one = torch.ones(1, dtype=torch.float64)
    deltas = {"a": torch.zeros(1, 1, dtype=torch.float64)}
    problem: Any = SimpleNamespace(
        targets=["query"],
        others=lambda stacks, mask: one if stacks is None else 1 + 0.25 * stacks["a"][:, 0] ** 2 / bend,
    )
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        held = hold_others(problem, deltas, {"a": torch.ones(1, 1).double()}, lambda scales: scales, one, 0.25)
    # From a hundredth down to half of it, 0.01^(2 share / 0.01 - 1) is kept.
    assert float(held.scales) == pytest.approx(kept, rel=0.02)
    assert held.limited == [None if kept == 1 else OTHERS]
    if kept < 1:
        (warned,) = said
        assert str(warned.message).startswith("The step of 1 target is shortened, since the loss of everything else")
    # The numbers are those of what is kept.
    assert float(held.rises) == pytest.approx(float(held.scales))


def test_what_is_decided_by_is_what_the_first_rank_has(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ranks on other devices may be off by rounding; here by far more, as the first rank would have it."""
    longest = min(lengths(unlearned(folder, ToyObjective(), Newton(target_increase=1.0)))) / 2
    strategy = Newton(target_increase=1.0, step_range=StepRange(longest=longest))
    monkeypatch.setattr(FixedDraws, "agreed", lambda self, numbers: numbers.double().cpu() / 2)
    with pytest.warns(UserWarning, match="as far as it goes"):
        half = unlearned(folder, ToyObjective(), strategy)
    assert all(0.25 * longest < length <= 0.501 * longest for length in lengths(half))
    monkeypatch.undo()
    plain = unlearned(folder, ToyObjective(), Newton(target_increase=0.01))
    monkeypatch.setattr(FixedDraws, "agreed", lambda self, numbers: numbers.double().cpu() / 2)
    half = unlearned(folder, ToyObjective(), Newton(target_increase=0.01))
    for whole, other in zip(plain.results.values(), half.results.values(), strict=True):
        assert other["linear"] == pytest.approx(2 * whole["linear"], rel=0.01)


def test_weights_that_are_all_zero_have_no_length(folder: Path) -> None:
    def zero(strategy: Newton) -> UnlearningModule:
        network = ToyDenoiser().double()
        for parameter in layer_parameters(select_layers(network, ["text"])).values():
            torch.nn.init.zeros_(parameter)
        module = UnlearningModule(
            network, ToyObjective(), random_fisher(network, ["text"]), ["text"], strategy, damping=0.1, rise_draws=5
        )
        unlearn(module, toy_data(folder, draws=6, draw_batch_size=4))
        return module

    with pytest.raises(InputError, match=r"All chosen weights are zero.*longest"):
        zero(Newton(target_increase=1e-3))
    found = zero(Newton(target_increase=1e-3, step_range=OFF)).results
    assert all("length" not in result and result["rise"] == pytest.approx(1e-3, rel=0.01) for result in found.values())


def test_longest_scales_end_on_the_sphere() -> None:
    generator = torch.Generator().manual_seed(1)
    before, directions = ({"a": torch.randn(3, 4, 2, generator=generator)} for _ in range(2))
    scales = longest_scales(before, directions, 50.0)
    ends = before["a"].double() + scales[:, None, None] * directions["a"].double()
    torch.testing.assert_close(ends.flatten(1).norm(dim=1), torch.full((3,), 50.0).double())


@pytest.mark.parametrize("wrong", [{"longest": 0.0}, {"least_linear": -0.1}, {"least_linear": 1.0}, {"most_others": 0}])
def test_bounds_that_hold_nothing_are_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(InputError, match="A step's range needs"):
        StepRange(**wrong)


def test_the_range_is_part_of_the_settings() -> None:
    assert Newton().settings()["range"] == {"longest": 100.0, "least_linear": 0.1, "most_others": 0.25}
    assert Newton(step_range=OFF).settings()["range"] == {}


def test_a_target_that_earlier_steps_brought_as_far_as_it_goes_stays_there_and_stops_nobody() -> None:
    """A straight rise within a length of 0.3, in three steps that want a rise of 1."""
    position, limits = 0.0, []
    for step in (1, 2, 3):
        start = torch.tensor([position], dtype=torch.float64)
        with pytest.warns(UserWarning, match="as far as it goes"):
            found = find_scales(
                lambda scale, start=start: start + scale.double(),
                torch.tensor([1.0]),
                torch.tensor([step / 3]),
                ["query"],
                start,
                longest=torch.tensor([0.3 - position]),
                short=True,
            )
        position += float(found.scales)
        limits += found.limited
    assert 0.29 < position < 0.3
    assert limits == ["length"] * 3
