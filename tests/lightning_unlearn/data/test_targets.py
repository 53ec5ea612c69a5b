"""Which queries form a target, what it is called, and what is refused."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any

import pytest
from attribution_runs import decoded
from toys import toy_fields

from lightning_unlearn.data.samples import Sample
from lightning_unlearn.data.targets import targets_of
from lightning_unlearn.errors import InputError


def query(number: int, **facts: Any) -> Sample:
    sample = decoded(toy_fields(number, prefix="query"))
    return replace(sample, metadata={**sample.metadata, **facts})


def found(queries: list[Sample], field: str | None = "artist") -> list[tuple[str, list[str]]]:
    return [(target.name, [member.key[-1] for member in target.members]) for target in targets_of(queries, field)]


def test_without_a_field_each_query_is_its_own_target_in_the_order_given() -> None:
    assert found([query(2), query(0)], None) == [("query-00002", ["2"]), ("query-00000", ["0"])]


def test_queries_with_the_same_value_are_one_target_in_whatever_order_they_come() -> None:
    artists = ["Marc", "Klee", "Marc", "Ærø"]
    queries = [query(number, artist=artist) for number, artist in enumerate(artists)]
    expected = [("Klee", ["1"]), ("Marc", ["0", "2"]), ("Ærø", ["3"])]
    for order in itertools.permutations(queries):
        assert found(list(order)) == expected


@pytest.mark.parametrize(("value", "name"), [(7, "7"), (-1.5, "-1.5"), ("7", "7"), (" a  b", " a  b"), ("Ø\n", "Ø\n")])
def test_a_target_is_called_as_the_value_reads(value: Any, name: str) -> None:
    assert found([query(0, artist=value), query(1, artist=value)]) == [(name, ["0", "1"])]


@pytest.mark.parametrize(
    "value", [None, True, ["Klee"], {"name": "Klee"}, float("nan"), float("inf"), "", " \t", "half \ud800"]
)
def test_a_value_that_is_no_name_is_refused_with_the_querys_key(value: Any) -> None:
    with pytest.raises(
        InputError, match=r"^The query 'query-00001' has .* as 'artist', which can't name .*\.$"
    ) as error:
        targets_of([query(0, artist="Klee"), query(1, artist=value)], "artist")
    assert "\n" not in str(error.value)


def test_a_query_without_the_field_is_refused_with_its_key() -> None:
    with pytest.raises(InputError, match=r"^The query 'query-00001' has no 'artist' in its json, .*\.$"):
        targets_of([query(0, artist="Klee"), query(1, painter="Klee")], "artist")


@pytest.mark.parametrize(
    ("one", "other"), [(3, "3"), ("Klee", "Klee "), ("P. Klee", "P.  Klee"), ("Jos\u00e9", "Jose\u0301"), (0.5, "0.5")]
)
def test_values_that_read_the_same_are_refused_with_both_keys(one: Any, other: Any) -> None:
    assert str(one) != other or type(one) is not type(other)
    with pytest.raises(InputError, match=r"^The queries 'query-00000' and 'query-00002' have .* as 'artist', which"):
        targets_of([query(0, artist=one), query(1, artist="Marc"), query(2, artist=other)], "artist")
