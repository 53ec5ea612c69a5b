"""Gradients brought to few numbers: what the map is, that products stay, and that methods see it and nothing else."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from baseline_toys import samples, subject

from lightning_unlearn.baselines import DAS, DTRAK
from lightning_unlearn.baselines.gradients import query_gradients, training_gradients
from lightning_unlearn.baselines.sample_gradients import join
from lightning_unlearn.baselines.sketch import (
    GRADIENT_BYTES,
    KERNEL_SIDE,
    LEAST_NUMBERS,
    MOST_NUMBERS,
    Sketch,
    kernel_bytes,
    sketch_numbers,
)
from lightning_unlearn.draws.views import Views


@pytest.mark.parametrize(("size", "numbers"), [(7, 16), (16, 16), (40, 16), (129, 16)])
def test_each_weight_is_added_to_one_number_with_its_sign(size: int, numbers: int) -> None:
    matrix = Sketch(numbers)("layer", torch.eye(size))
    assert matrix.shape == (size, numbers)
    assert (matrix != 0).sum(1).tolist() == [1] * size
    assert set(matrix.abs().unique().tolist()) == {0.0, 1.0}
    places = matrix.abs().argmax(1)
    for start in range(0, size, numbers):  # two weights of a piece never meet
        piece = places[start : start + numbers]
        assert len(piece.unique()) == len(piece)
    gradients = torch.randn(3, size)
    torch.testing.assert_close(Sketch(numbers)("layer", gradients), gradients @ matrix)
    assert not torch.equal(Sketch(numbers)("another", torch.eye(size)), matrix)


def test_products_stay_on_average_and_scatter_no_more_than_is_said() -> None:
    generator, numbers = torch.Generator().manual_seed(0), 64
    one, other = torch.randn(2, 600, generator=generator, dtype=torch.float64)
    errors = []
    for draw in range(400):
        sketch = Sketch(numbers)
        errors.append(float(sketch(f"{draw}", one[None])[0] @ sketch(f"{draw}", other[None])[0] - one @ other))
    found, bound = torch.tensor(errors), float(one.norm() * other.norm()) * (2 / numbers) ** 0.5
    assert 0.3 * bound < float(found.std()) <= bound
    assert abs(float(found.mean())) < 4 * float(found.std()) / len(errors) ** 0.5


def test_gradients_are_sketched_once_for_samples_and_queries() -> None:
    toy = subject(samples(4, (1, 2)), samples(2, prefix="query"), Views(timesteps=3))
    sketched = replace(toy, projection=Sketch(32))
    for plain, small in (
        (join(list(training_gradients(toy, "square"))), join(list(training_gradients(sketched, "square")))),
        (query_gradients(toy, "square"), query_gradients(sketched, "square")),
    ):
        sketch = Sketch(32)
        expected = torch.stack([sketch(name, gradient) for name, gradient in plain.parameters.items()]).sum(0)
        assert list(small.parameters) == ["sketch"]
        torch.testing.assert_close(small.parameters["sketch"], expected, rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(small.errors, plain.errors)


@pytest.mark.parametrize("method", [DTRAK(0.1), DAS(0.1)], ids=lambda method: method.name)
def test_methods_say_much_the_same_by_many_numbers(method: DTRAK | DAS) -> None:
    toy = subject(samples(8), samples(2, prefix="query"), Views(timesteps=3))
    exact, close = method.scores(toy), method.scores(replace(toy, projection=Sketch(2**15)))
    for query in range(2):
        together = torch.stack([exact[:, query], close[:, query]])
        assert float(torch.corrcoef(together)[0, 1]) > 0.98


def test_there_are_as_many_numbers_as_fit() -> None:
    assert sketch_numbers(100, 10**6, 2) is None
    assert sketch_numbers(544, 1_657_363, 2) == MOST_NUMBERS
    assert sketch_numbers(KERNEL_SIDE, 10**8, 2) == GRADIENT_BYTES // 8 // KERNEL_SIDE
    assert sketch_numbers(KERNEL_SIDE + 1, 10**8, 2) == KERNEL_SIDE  # so that no larger matrix is decomposed
    assert sketch_numbers(KERNEL_SIDE + 1, 9000, 2) == KERNEL_SIDE
    assert sketch_numbers(10**7, 10**8, 2) == LEAST_NUMBERS
    assert sketch_numbers(10**7, 100, 2) is None
    for samples_ in (100, 5000, 20_000, 100_000):
        assert kernel_bytes(samples_, 10**8, 2) < 2**33.2
    assert kernel_bytes(10, 100, 2) == 4 * 2 * 10 * 100 + 8 * 3 * 10**2
    assert kernel_bytes(1000, 10, 1) == 4 * 1000 * 10 + 8 * (3 * 10**2 + 2 * 1000 * 10)
