"""``fisher: identity``: plain gradient ascent."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from attribution_runs import random_fisher, toy_data, unlearn
from hypothesis import given
from hypothesis import strategies as st
from reference_attribution import Naive, mean_gradient, scale_by_bisection, toy_loss
from torch import Tensor, nn
from toys import ToyDenoiser, ToyObjective, toy_shards

from lightning_unlearn.data.samples import Sample
from lightning_unlearn.draws.unlearning_draws import Stream, draw_for_target
from lightning_unlearn.errors import InputError
from lightning_unlearn.fisher import FISHERS, DiagonalFisher, IdentityFisher, load_fisher
from lightning_unlearn.strategies import Newton
from lightning_unlearn.unlearning.module import UnlearningModule
from lightning_unlearn.weights.capture import CapturedLayer
from lightning_unlearn.weights.parameters import LayerSpec

LINEAR, CONV = LayerSpec("linear", (3, 2), True), LayerSpec("conv", (2, 3, 2, 1), False)
LAYERS = {spec.name: spec for spec in (LINEAR, CONV)}
DRAWS = 6


def identity() -> IdentityFisher:
    fisher = IdentityFisher(LAYERS)
    fisher.finalize(0.1)
    return fisher


def gradients(leading: tuple[int, ...], seed: int = 0) -> dict[str, Tensor]:
    """Of all parameters, float64."""
    generator = torch.Generator().manual_seed(seed)
    shapes = identity().parameter_shapes
    return {name: torch.randn(*leading, *shape, generator=generator).double() for name, shape in shapes.items()}


@given(st.lists(st.integers(1, 3), max_size=2), st.integers(0, 99))
def test_gradients_stay_and_the_quadratic_is_their_squared_length(leading: list[int], seed: int) -> None:
    given = gradients(tuple(leading), seed)
    found = identity().precondition(given)
    assert found.keys() == given.keys()
    assert all(torch.equal(value, given[name]) for name, value in found.items())
    lengths = identity().quadratic(given)
    assert lengths.shape == tuple(leading)
    for place in range(lengths.numel()):
        entries = [
            value.reshape(-1, *value.shape[len(leading) :])[place].flatten().tolist() for value in given.values()
        ]
        expected = math.fsum(entry**2 for values in entries for entry in values)
        assert float(lengths.flatten()[place]) == pytest.approx(expected, rel=1e-12)


def test_part_of_the_layers_may_move() -> None:
    weight = {"linear.weight": torch.full((3, 2), 2.0)}
    assert float(identity().quadratic(weight)) == 24.0
    assert set(identity().precondition(weight)) == {"linear.weight"}


def test_damping_is_of_no_effect() -> None:
    given = gradients((2,))
    for damping in (0.0, 3.0):
        fisher = IdentityFisher(LAYERS)
        fisher.finalize(damping)
        assert all(torch.equal(value, given[name]) for name, value in fisher.precondition(given).items())


def test_it_is_known_by_its_name_and_kept_in_a_file(tmp_path: Path) -> None:
    assert FISHERS["identity"] is IdentityFisher
    fisher = identity()
    fisher.update({"linear": CapturedLayer(torch.ones(4, 1, 2), torch.ones(4, 1, 3))})
    fisher.merge(fisher)
    fisher.save(tmp_path / "identity.safetensors")
    again = load_fisher(tmp_path / "identity.safetensors")
    assert isinstance(again, IdentityFisher)
    assert (again.layers, again.count, again.tensors()) == (LAYERS, 8, {})


def test_sums_of_another_fisher_are_refused(tmp_path: Path) -> None:
    network = ToyDenoiser()
    diagonal = random_fisher(network, ["text"])
    with pytest.raises(InputError, match=r"holds no sums; .*\.$"):
        identity().load_tensors(diagonal.tensors())
    with pytest.raises(InputError, match=r"can't be added .*\.$"):
        IdentityFisher(diagonal.layers).merge(diagonal)
    diagonal.save(tmp_path / "diagonal.safetensors")
    with pytest.raises(InputError, match=r"holds a diagonal Fisher, not .*\.$"):
        IdentityFisher.load(tmp_path / "diagonal.safetensors")
    assert isinstance(load_fisher(tmp_path / "diagonal.safetensors"), DiagonalFisher)


# ---------------------------------------------------------------------------------- in fit


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("identity")
    toy_shards(folder / "train", 2, 2)
    toy_shards(folder / "queries", 2, 2, captions=3, prefix="query")
    return folder


def ascended(folder: Path, strategy: Newton, network: nn.Module | None = None) -> tuple[UnlearningModule, list[Sample]]:
    """Deltas of a float64 toy along its gradients."""
    network = network or ToyDenoiser().double()
    module = UnlearningModule(network, ToyObjective(), "identity", [".*"], strategy, damping=0.5, rise_draws=5)
    data = toy_data(folder, draws=DRAWS, draw_batch_size=4)
    unlearn(module, data)
    return module, data.queries


def by_hand(query: Sample, stream: Stream, total: int) -> list[Any]:
    """A query's loss for each draw, in float64."""
    timesteps, noise = draw_for_target(stream, 0, query.key, range(total), total, 10, query.latent.shape)

    def loss(draw: int) -> Any:
        text = query.text[draw % len(query.text)].double()
        given = (query.latent.double(), text, int(timesteps[draw]), noise[draw].double())
        return lambda network: toy_loss(network, *given)

    return [loss(draw) for draw in range(total)]


@pytest.mark.parametrize("wanted", [0.01, 0.3])
def test_deltas_are_along_the_gradient_and_the_loss_rises_as_wanted(wanted: float, folder: Path) -> None:
    module, queries = ascended(folder, Newton(target_increase=wanted))
    assert module.deltas is not None
    found = module.deltas.named()
    naive = Naive(ToyDenoiser(), list(found))
    nothing = {name: torch.zeros_like(value) for name, value in naive.base.items()}
    for target, query in enumerate(queries):
        gradient = mean_gradient(naive, nothing, by_hand(query, "unlearning", DRAWS))
        over = by_hand(query, "rise", 5)

        def mean_loss(scale: float, gradient: dict[str, Tensor] = gradient, over: list[Any] = over) -> float:
            moved = {name: scale * value for name, value in gradient.items()}
            return math.fsum(naive.value(moved, loss) for loss in over) / len(over)

        before = mean_loss(0.0)
        scale = scale_by_bisection(lambda c, at=mean_loss, before=before: at(c) / before - 1, wanted)  # type: ignore[misc]
        for name, value in gradient.items():
            assert float(value.norm()) > 0
            assert float((found[name][target].detach() - scale * value).norm()) <= 3e-6 * scale * float(value.norm()), (
                name
            )
        result = module.results[query.key]
        assert result["rise"] == pytest.approx(wanted, rel=1.1e-6)
        assert result["loss_before"] == pytest.approx(before, rel=1e-9)
        length = math.fsum(float(value.square().sum()) for value in gradient.values())
        assert result["penalty"] == pytest.approx(scale**2 * length / 2, rel=1e-5)


def test_a_step_of_a_given_size_is_that_much_of_the_gradient(folder: Path) -> None:
    module, queries = ascended(folder, Newton(alpha=0.7, N=50))
    assert module.deltas is not None
    naive = Naive(ToyDenoiser(), list(module.deltas.named()))
    nothing = {name: torch.zeros_like(value) for name, value in naive.base.items()}
    for target, query in enumerate(queries):
        gradient = mean_gradient(naive, nothing, by_hand(query, "unlearning", DRAWS))
        for name, value in gradient.items():
            torch.testing.assert_close(module.deltas.named()[name][target], 0.7 / 50 * value, rtol=1e-9, atol=1e-15)


def test_runs_with_and_without_a_fisher_are_told_apart(folder: Path) -> None:
    network = ToyDenoiser().double()
    plain, _ = ascended(folder, Newton(), network)
    fisher = random_fisher(network, [".*"])
    natural = UnlearningModule(network, ToyObjective(), fisher, [".*"], Newton(), damping=0.5, rise_draws=5)
    assert plain.fisher_fingerprint() != natural.fisher_fingerprint()
    assert plain.fingerprints()["fisher"] == plain.fisher_fingerprint()
