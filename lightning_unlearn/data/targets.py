"""What is unlearned: each query by itself, or together all those whose json says the same in a field."""

from __future__ import annotations

import math
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from lightning_unlearn.data.samples import Sample
from lightning_unlearn.errors import InputError


@dataclass(frozen=True)
class Target:
    """What one delta unlearns; its loss is the *sum* of its members' losses.

    With a sum, and a given α, the Newton step of a set is the sum of its members' steps.

    Attributes:
        name: As it is called in score tables.
        members: The queries in it; one, if queries are unlearned by themselves.
    """

    name: str
    members: list[Sample]


def targets_of(queries: Sequence[Sample], field: str | None) -> list[Target]:
    """The targets that queries form.

    Args:
        queries: With unique keys.
        field: Field of the queries' json whose value names a query's target; ``None``: each query is a target.

    Returns:
        In the order of the queries; with a field sorted by name, and members by key, in whatever order queries come.

    Raises:
        InputError: If a query does not say its target, or two values can't be told apart as names.

    Example:
        >>> import torch
        >>> def painted(key, artist):
        ...     return Sample(key, torch.zeros(1, 1, 1), {}, {"captions": [""], "artist": artist})
        >>> targets = targets_of([painted("c", "Klee"), painted("b", "Klee"), painted("a", "Marc")], "artist")
        >>> [(target.name, [query.key for query in target.members]) for target in targets]
        [('Klee', ['b', 'c']), ('Marc', ['a'])]
    """
    if field is None:
        return [Target(query.key, [query]) for query in queries]
    members: dict[str, list[Sample]] = {}
    for query in queries:
        reading = _reading(_name(query, field))
        first = members.setdefault(reading, [query])[0]
        ours, theirs = query.metadata[field], first.metadata[field]
        if type(ours) is not type(theirs) or ours != theirs:
            raise InputError(
                f"The queries {first.key!r} and {query.key!r} have {theirs!r} and {ours!r} as {field!r}, which read "
                "the same as names of targets; write them alike, or apart."
            )
        if query is not first:
            members[reading].append(query)
    found = [Target(_name(part[0], field), sorted(part, key=lambda query: query.key)) for part in members.values()]
    return sorted(found, key=lambda target: target.name)


def members_of(queries: Sequence[Sample], field: str | None) -> dict[str, list[str]]:
    """Which queries are in which set, for records.

    Args:
        queries: With unique keys.
        field: As in :func:`targets_of`.

    Returns:
        Name to keys; empty where queries are unlearned by themselves.
    """
    if field is None:
        return {}
    return {target.name: [query.key for query in target.members] for target in targets_of(queries, field)}


def _name(query: Sample, field: str) -> str:
    if field not in query.metadata:
        raise InputError(
            f"The query {query.key!r} has no {field!r} in its json, which names its target; add it, or leave "
            "targets_by out."
        )
    value = query.metadata[field]
    if not _is_name(value):
        raise InputError(
            f"The query {query.key!r} has {repr(value)[:60]} as {field!r}, which can't name its target; give a text or "
            "a number, or leave targets_by out."
        )
    return str(value)


def _is_name(value: Any) -> bool:
    if isinstance(value, str):
        # JSON can write half a surrogate pair, and a column of a score table can't be called so.
        return bool(value.strip()) and value.encode(errors="replace").decode() == value
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _reading(name: str) -> str:
    """A name without what nobody sees: how letters are put together, and how many spaces stand where."""
    return unicodedata.normalize("NFC", " ".join(name.split()))
