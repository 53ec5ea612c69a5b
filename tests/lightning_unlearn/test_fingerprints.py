from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_unlearn.fingerprints import digest, generator_for, seed_of, settings_digest, tensors_digest

PARTS = st.lists(st.one_of(st.text(max_size=4), st.integers(-9, 9), st.floats(allow_nan=False)), max_size=3)


@given(PARTS, PARTS)
@settings(max_examples=100)
def test_digests_are_equal_only_for_equal_parts(
    first: list[str | int | float], second: list[str | int | float]
) -> None:
    same = [(type(part), repr(part)) for part in first] == [(type(part), repr(part)) for part in second]
    assert (digest(*first) == digest(*second)) is same


@pytest.mark.parametrize(
    ("first", "second"), [(("ab", "c"), ("a", "bc")), (("a",), ("a", "")), ((1,), ("1",)), ((1,), (1.0,)), ((), ("",))]
)
def test_digest_tells_splits_and_types_apart(first: tuple[str, ...], second: tuple[str, ...]) -> None:
    assert digest(*first) != digest(*second)


def test_seeds_and_digests_are_the_same_in_every_process_and_release() -> None:
    # Written down once: a change would silently give every stored run other noise.
    assert digest("scoring", 0, 1.5) == "34ea4704f5c996aa73d8d7584eaa84fe"
    assert seed_of("scoring", 0, 1.5) == 1906469060575808341
    other = subprocess.run(
        [sys.executable, "-c", "from lightning_unlearn.fingerprints import seed_of; print(seed_of('scoring', 0, 1.5))"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert int(other.stdout) == seed_of("scoring", 0, 1.5)


@given(PARTS)
@settings(max_examples=50)
def test_seed_fits_a_generator(parts: list[str | int | float]) -> None:
    assert 0 <= seed_of(*parts) < 2**63


def test_generators_of_the_same_parts_draw_the_same_and_leave_the_global_state_alone() -> None:
    state = torch.get_rng_state()
    draws = [torch.randn(4, generator=generator_for(*parts)) for parts in (("a", 1), ("a", 1), ("a", 2))]
    assert torch.equal(draws[0], draws[1])
    assert not torch.equal(draws[0], draws[2])
    assert torch.equal(torch.get_rng_state(), state)
    assert generator_for("a").device.type == "cpu"


def test_tensors_digest_is_the_same_in_any_order_and_memory_layout() -> None:
    a, b = torch.arange(6.0).reshape(2, 3), torch.tensor(True)
    assert tensors_digest({"a": a, "b": b}) == tensors_digest([("b", b), ("a", a)])
    assert tensors_digest({"a": a}) == tensors_digest({"a": a.T.contiguous().T})
    assert tensors_digest({"a": a}) == tensors_digest({"a": nn_parameter(a)})


def nn_parameter(tensor: torch.Tensor) -> torch.nn.Parameter:
    return torch.nn.Parameter(tensor.clone())


@pytest.mark.parametrize(
    "other",
    [
        {"b": torch.arange(6.0).reshape(2, 3)},
        {"a": torch.arange(6.0)},
        {"a": torch.arange(6.0).reshape(2, 3).double()},
        {"a": torch.arange(6.0).reshape(2, 3) + torch.tensor([0.0, 0.0, 1e-6])},
        {"a": torch.arange(6.0).reshape(2, 3), "b": torch.empty(0)},
        {},
    ],
)
def test_tensors_digest_tells_names_shapes_types_and_bytes_apart(other: dict[str, torch.Tensor]) -> None:
    assert tensors_digest(other) != tensors_digest({"a": torch.arange(6.0).reshape(2, 3)})


def test_tensors_digest_tells_types_of_equal_bytes_apart() -> None:
    assert tensors_digest({"a": torch.zeros(2)}) != tensors_digest({"a": torch.zeros(2, dtype=torch.int32)})


def test_tensors_digest_takes_every_dtype_and_shape() -> None:
    tensors = [
        torch.tensor(1.0),
        torch.empty(0, 3),
        torch.ones(2, dtype=torch.bfloat16),
        torch.ones(2, dtype=torch.float16),
        torch.ones(2, dtype=torch.int64),
        torch.ones(2, dtype=torch.bool),
    ]
    assert len({tensors_digest({"a": tensor}) for tensor in tensors}) == len(tensors)


def test_settings_digest_is_the_same_in_any_order_of_keys() -> None:
    assert settings_digest({"a": 1, "b": {"c": [1, None], "d": 2.0}}) == settings_digest(
        {"b": {"d": 2.0, "c": [1, None]}, "a": 1}
    )
    assert settings_digest({"a": 1}) != settings_digest({"a": "1"})
    assert settings_digest({"a": [1, 2]}) != settings_digest({"a": [2, 1]})
