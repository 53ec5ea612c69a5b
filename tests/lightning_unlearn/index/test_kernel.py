"""An index's mathematics against DAS and D-TRAK on whole gradients, and against slow versions in float64."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, cast

import pytest
import reference_baselines as slow
import torch
from baseline_toys import samples, subject
from torch import Tensor

from lightning_unlearn.baselines import DAS, DTRAK, Subject
from lightning_unlearn.baselines.gradients import query_gradients_of, training_gradients
from lightning_unlearn.baselines.per_sample import Output
from lightning_unlearn.baselines.sample_gradients import join
from lightning_unlearn.errors import InputError
from lightning_unlearn.index.kernel import IndexKernel, Vectors
from lightning_unlearn.index.rows import halved, widened
from lightning_unlearn.weights.parameters import layer_specs
from lightning_unlearn.weights.projection import Projection

RIDGE = 0.05


@dataclass
class Kept:
    """A shard's file whose vectors are in memory, and not rounded."""

    vectors: Tensor

    @property
    def count(self) -> int:
        return len(self.vectors)

    def chunks(self, output: str) -> Iterator[tuple[slice, Tensor, Tensor]]:
        for start in range(0, self.count, 2):
            rows = slice(start, min(start + 2, self.count))
            yield rows, self.vectors[rows], torch.zeros(rows.stop - start, dtype=torch.int16)


def vectors(found: Tensor, cut: int) -> Vectors:
    files: Any = [Kept(found[:cut]), Kept(found[cut:])]
    return Vectors(files, "mean", found.shape[1])


def asked(toy: Subject, output: Output) -> tuple[Tensor, Tensor, Tensor]:
    """Training vectors, query vectors and errors."""
    training = join(list(training_gradients(toy, output)))
    return training.wide(), query_gradients_of(toy, [output])[output].wide(), training.errors


def by_index(toy: Subject, output: Output, cut: int = 2) -> Tensor:
    training, queries, errors = asked(toy, output)
    kept = vectors(training, cut)
    kernel = IndexKernel.of(kept, RIDGE)
    found = kernel.influences(kept, queries)
    return found if output == "square" else (found * (errors / kernel.rest)[:, None]).square()


# More samples than numbers, and fewer: each has its own matrix.
SIZES = {"fewer samples": (5, "all"), "fewer numbers": (40, ["text"])}


def made(name: str, side: int) -> Subject:
    count, parameters = SIZES[name]
    toy = subject(samples(count, (1, 2)), samples(2, prefix="query"), parameters=cast("Any", parameters))
    return replace(toy, projection=Projection(layer_specs(toy.layers), side))


@pytest.mark.parametrize("name", SIZES)
def test_with_whole_gradients_it_is_das_and_d_trak(name: str) -> None:
    toy = made(name, side=1000)
    whole = replace(toy, projection=None)
    training = asked(toy, "mean")[0]
    assert (len(training) <= training.shape[1]) == (name == "fewer samples")
    for method, output in ((DAS(RIDGE), "mean"), (DTRAK(RIDGE), "square")):
        expected = method.scores(whole)
        torch.testing.assert_close(by_index(toy, cast("Output", output)), expected, rtol=1e-8, atol=1e-12)


@pytest.mark.parametrize("name", SIZES)
@pytest.mark.parametrize("side", [2, 3])
def test_with_projected_gradients_it_is_what_slow_versions_say_of_them(name: str, side: int) -> None:
    toy = made(name, side)
    training, queries, errors = asked(toy, "mean")
    expected = slow.das(training, queries, errors.tolist(), RIDGE, leverage=True, squared=True)
    torch.testing.assert_close(by_index(toy, "mean"), expected, rtol=1e-7, atol=1e-12)
    training, queries, _ = asked(toy, "square")
    torch.testing.assert_close(by_index(toy, "square"), slow.trak(training, queries, RIDGE), rtol=1e-7, atol=1e-12)


def test_where_shards_are_cut_changes_nothing() -> None:
    toy = made("fewer numbers", 2)
    for cut in (0, 1, 39):
        torch.testing.assert_close(by_index(toy, "mean", cut), by_index(toy, "mean"), rtol=1e-9, atol=1e-15)


def test_many_numbers_in_float32_are_as_good_as_few(monkeypatch: pytest.MonkeyPatch) -> None:
    toy = made("fewer numbers", 3)
    expected = by_index(toy, "square")
    monkeypatch.setattr("lightning_unlearn.index.kernel.EXACT_NUMBERS", 0)
    found = by_index(toy, "square")
    assert not torch.equal(found, expected)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5 * float(expected.abs().max()))


def test_without_samples_or_gradients_there_is_no_kernel() -> None:
    with pytest.raises(InputError, match="holds no sample"):
        IndexKernel.of(vectors(torch.zeros(0, 3), 0), RIDGE)
    with pytest.raises(InputError, match="No gradient reaches"):
        IndexKernel.of(vectors(torch.zeros(2, 3), 1), RIDGE)


@pytest.mark.parametrize("size", [1e-200, 1e-9, 1.0, 1e9, 1e200])
def test_numbers_of_any_size_are_kept_to_three_digits(size: float) -> None:
    generator = torch.Generator().manual_seed(0)
    values = size * torch.randn(5, 300, generator=generator, dtype=torch.float64)
    values[3] = 0
    values[4, 1:] *= 1e-8  # beside a large one, small ones
    halves, exponents = halved(values)
    found = widened(halves, exponents)
    torch.testing.assert_close(found[:4], values[:4], rtol=1e-3, atol=0)
    torch.testing.assert_close(found[4], values[4], rtol=1e-3, atol=1e-9 * float(values[4].abs().max()))
