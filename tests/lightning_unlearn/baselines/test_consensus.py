"""Several methods asked together, against the explicit formulas of each and of their mean."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from baseline_toys import samples, subject, taken, toy_look, views_of
from reference_baselines import das, feature, residual, trak
from torch import Tensor
from toys import ToyObjective

from lightning_unlearn.baselines import DAS, DTRAK, Consensus, Influence, Subject
from lightning_unlearn.baselines.consensus import combined
from lightning_unlearn.draws.views import Views
from lightning_unlearn.errors import InputError
from lightning_unlearn.fisher import FISHERS
from lightning_unlearn.scores.agreement import standardised

TRAINING, QUERIES = samples(6, (1, 2)), samples(3, (2, 1), prefix="query")
VIEWS = Views(timesteps=3, seed=1)


def toy(unlearned: Tensor | None = None, *, keep: bool = False) -> Subject:
    return replace(subject(TRAINING, QUERIES, VIEWS, batch_size=4, keep=keep), unlearned=unlearned)


def rises() -> Tensor:
    return torch.randn(len(TRAINING), len(QUERIES), generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def slow_mean(parts: list[Tensor], weights: list[float]) -> Tensor:
    """Query by query and sample by sample."""
    found = torch.zeros_like(parts[0])
    for query in range(found.shape[1]):
        for part, weight in zip(parts, weights, strict=True):
            column = [float(value) for value in part[:, query]]
            mean = sum(column) / len(column)
            scatter = (sum((value - mean) ** 2 for value in column) / len(column)) ** 0.5
            for row, value in enumerate(column):
                found[row, query] += weight / sum(weights) * (value - mean) / scatter
    return found


def slow_parts(subject: Subject) -> list[Tensor]:
    parameters, look = toy_look(subject)

    def features(group: list, output: str) -> Tensor:  # type: ignore[type-arg]
        return torch.stack([feature(look, views_of(VIEWS, sample), parameters, output) for sample in group])

    residuals = [residual(look, views_of(VIEWS, sample)) for sample in TRAINING]
    means = (features(TRAINING, "mean"), features(QUERIES, "mean"))
    squares = (features(TRAINING, "square"), features(QUERIES, "square"))
    return [das(*means, residuals, 0.05, leverage=True, squared=True), trak(*squares, 0.2)]


@pytest.mark.parametrize("weights", [(1.0, 1.0, 1.0), (0.5, 2.0, 1.0), (1.0, 1.0, 0.0)])
def test_it_is_the_mean_of_the_standardised_parts(weights: tuple[float, float, float]) -> None:
    unlearned = rises()
    method = Consensus(das_ridge=0.05, d_trak_ridge=0.2, das=weights[0], d_trak=weights[1], unlearning=weights[2])
    found = method.scores(toy(unlearned))
    parts = [*slow_parts(toy()), unlearned]
    asked = [(part, weight) for part, weight in zip(parts, weights, strict=True) if weight]
    expected = slow_mean([part for part, _ in asked], [weight for _, weight in asked])
    # Scores of some ten terms a sum, through an inverse whose ridge bounds what rounding becomes.
    torch.testing.assert_close(found, expected, rtol=1e-7, atol=1e-7)


def test_parts_are_what_each_method_says_alone() -> None:
    unlearned = rises()
    parts = Consensus(das_ridge=0.05, d_trak_ridge=0.2).parts(toy(unlearned))
    assert list(parts) == ["das", "d_trak", "unlearning"]
    torch.testing.assert_close(parts["das"], DAS(0.05).scores(toy()), rtol=1e-9, atol=0)
    torch.testing.assert_close(parts["d_trak"], DTRAK(0.2).scores(toy()), rtol=1e-9, atol=0)
    assert torch.equal(parts["unlearning"], unlearned)


def test_influence_stands_in_for_unlearning_by_the_same_pass() -> None:
    fisher = taken(FISHERS["diagonal"], toy())
    calls: list[int] = []
    together = replace(toy(), fisher=fisher)
    together.loss.network.register_forward_hook(lambda *_: calls.append(1))
    method = Consensus(das_ridge=0.05, d_trak_ridge=0.2, unlearning=0.0, influence=2.0, influence_damping=0.3)
    assert (method.rise, method.needs_fisher, Consensus().needs_fisher) == (None, True, False)
    found = method.scores(together)
    of_all = len(calls)
    alone = Influence(0.3).scores(replace(toy(), fisher=fisher))
    torch.testing.assert_close(method.parts(together)["influence"], alone, rtol=1e-9, atol=0)
    torch.testing.assert_close(found, slow_mean([*slow_parts(toy()), alone], [1.0, 1.0, 2.0]), rtol=1e-7, atol=1e-7)
    calls.clear()
    kernels = toy()
    kernels.loss.network.register_forward_hook(lambda *_: calls.append(1))
    Consensus(unlearning=0.0).scores(kernels)
    # Only the queries' own gradients are one pass more.
    queries = sum(1 for _ in VIEWS.of(next(iter(subject(QUERIES, [], VIEWS).batches())), ToyObjective.num_timesteps))
    assert of_all <= len(calls) + queries


def test_both_kernels_see_the_views_that_each_sees_alone() -> None:
    """Views are strata of the density with which training drew timesteps, for whichever method looks at them."""

    class Early(ToyObjective):
        """Drew the first third of the timesteps only."""

        def density(self) -> Tensor:
            weights = torch.zeros(self.num_timesteps, dtype=torch.float64)
            weights[: self.num_timesteps // 3] = 1.0
            return weights

    unlearned = rises()
    early = replace(subject(TRAINING, QUERIES, VIEWS, objective=Early()), unlearned=unlearned)
    parts = Consensus(das_ridge=0.05, d_trak_ridge=0.2).parts(early)
    alone = subject(TRAINING, QUERIES, VIEWS, objective=Early())
    torch.testing.assert_close(parts["das"], DAS(0.05).scores(alone), rtol=1e-9, atol=0)
    assert not torch.allclose(parts["das"], DAS(0.05).scores(toy()))


@pytest.mark.parametrize("keep", [False, True])
def test_one_pass_serves_both_kernels(keep: bool) -> None:
    """As many calls of the network as DAS alone takes, and no gradient left over unless they are to be kept."""
    calls: list[int] = []
    alone = toy()
    alone.loss.network.register_forward_hook(lambda *_: calls.append(1))
    DAS().scores(alone)
    for_one, together = len(calls), toy(rises(), keep=keep)
    queries = sum(1 for _ in VIEWS.of(next(iter(subject(QUERIES, [], VIEWS).batches())), ToyObjective.num_timesteps))
    calls.clear()
    together.loss.network.register_forward_hook(lambda *_: calls.append(1))
    Consensus().scores(together)
    # The queries' own gradients, a few views of few, are taken by each kernel.
    assert for_one <= len(calls) <= for_one + queries
    assert any("training" in key for key in together.cache) == keep


def test_units_and_constant_parts_change_nothing() -> None:
    unlearned = rises()
    expected = Consensus().scores(toy(unlearned))
    torch.testing.assert_close(Consensus().scores(toy(1e200 * unlearned)), expected)
    constant = combined({"one": unlearned, "flat": torch.full_like(unlearned, 0.1)}, {"one": 1.0, "flat": 1.0})
    torch.testing.assert_close(constant, standardised(unlearned) / 2)


def test_what_it_lacks_is_named() -> None:
    with pytest.raises(InputError, match="nothing was unlearned"):
        Consensus().scores(toy())
    with pytest.raises(InputError, match="at least two methods"):
        Consensus(das=0.0, unlearning=0.0)
    with pytest.raises(InputError, match="The rise must be finite and above 0"):
        Consensus(rise=0.0)
    assert Consensus(unlearning=0.0).rise is None
