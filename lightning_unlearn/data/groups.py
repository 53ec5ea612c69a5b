"""How many samples of which form, and of which weight, a shard holds: what training must know before it deals them."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from lightning_unlearn.data.arrays import read_header
from lightning_unlearn.data.batches import form_name
from lightning_unlearn.data.conditions import CONDITION_FIELDS, NUMBERS
from lightning_unlearn.data.weights import weight_of


@dataclass(frozen=True)
class Group:
    """Samples of one form in a shard.

    Attributes:
        form: See :func:`~lightning_unlearn.data.batches.form_name`.
        samples: How many there are.
        weight: The sum of their weights.
        smallest: The smallest of their weights.
    """

    form: str
    samples: int
    weight: float
    smallest: float


def group_samples(samples: Iterable[Mapping[str, Any]]) -> tuple[Group, ...]:
    """The groups that samples form, by their headers alone.

    Args:
        samples: Field name to bytes, with ``__key__``.

    Returns:
        In the order in which they come first; samples that can't be read are in none.
    """
    weights: dict[str, list[float]] = {}
    for sample in samples:
        try:
            told = json.loads(sample["json"])
            weight = weight_of(told, f"Sample {sample['__key__']!r}")
            form = form_of_fields(sample, told)
        except Exception:  # damaged bytes make NumPy and others raise nearly anything; it shows when they are decoded
            continue
        weights.setdefault(form, []).append(weight)
    return tuple(Group(form, len(found), math.fsum(found), min(found)) for form, found in weights.items())


def form_of_fields(fields: Mapping[str, Any], told: Mapping[str, Any]) -> str:
    """The form of a sample that is not decoded.

    Args:
        fields: Field name to bytes.
        told: Its json.

    Returns:
        The form.

    Raises:
        Exception: Of nearly any kind, if a field is damaged.
    """
    shapes = {
        field.removesuffix(".npy"): read_header(fields[field])[0][1:] for field in CONDITION_FIELDS & fields.keys()
    }
    numbers = told.get(NUMBERS) or {}
    shapes |= {name: (len(listed) if isinstance(listed, list) else 1,) for name, listed in numbers.items()}
    return form_name(read_header(fields["latent.npy"])[0], shapes)


def are_alike(groups: Iterable[Sequence[Group]]) -> bool:
    """Whether training deals all samples alike: they have one form and one weight.

    Args:
        groups: Of each shard.

    Returns:
        Whether it does.
    """
    found = [group for of_shard in groups for group in of_shard]
    if not found:
        return True
    one = found[0].smallest
    plain = all(math.isclose(group.weight, one * group.samples) and group.smallest == one for group in found)
    return plain and len({group.form for group in found}) == 1


def groups_as_json(groups: Sequence[Sequence[Group]]) -> list[dict[str, Any]]:
    """What a manifest says of each shard's groups.

    Args:
        groups: Of each shard.

    Returns:
        Of each shard ``groups``; nothing where all samples of the set are alike.
    """
    if are_alike(groups):
        return [{} for _ in groups]
    return [{"groups": [asdict(group) for group in of_shard]} for of_shard in groups]


def groups_from_json(said: Any) -> tuple[Group, ...]:
    """The groups that a manifest says.

    Args:
        said: As :func:`groups_as_json` has it, or ``None``.

    Returns:
        The groups.

    Raises:
        ValueError: If it is none of ours.
        TypeError: Likewise.
        KeyError: Likewise.
    """
    found = tuple(
        Group(str(one["form"]), int(one["samples"]), float(one["weight"]), float(one["smallest"])) for one in said or ()
    )
    if any(group.samples < 1 or not 0 < group.smallest <= group.weight < math.inf for group in found):
        raise ValueError("a group without samples or weight")
    return found
