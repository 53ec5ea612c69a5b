"""What a network is given besides noisy latents and timestep, by name: text states, their mask, pooled text, numbers.

Here is only their form; what a name means to a network, its family knows. An array of a sample has one entry a caption
along its first axis, or a single one that holds for all its captions.

``text.npy``
    ``(captions, tokens, dim)``: the text states.
``text_mask.npy``
    ``(captions, tokens)``: 1 where a token counts, 0 for padding. Where it is there, samples may have text states of
    different length.
``pooled.npy``
    ``(captions, dim)``: one state for the whole caption.
``text_2.npy``, ``text_2_mask.npy``, ``pooled_2.npy``, …
    The same of further encoders, where they don't enter the network as one.
``image.npy``
    ``(captions, dim)``: the state of a picture.

Numbers that a network is conditioned on, such as the original size of a picture or a class, stand in the sample's json,
as ``{"conditions": {"original_size": [1024, 768]}}``: one list a name, for all captions.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor

from lightning_unlearn.data.arrays import LARGEST_TEXT, decode_array
from lightning_unlearn.errors import InputError

Conditions: TypeAlias = dict[str, Tensor]
"""Name to array; of a sample ``(captions or 1, …)``, of views ``(B, …)``, of a batch ``(B, captions or 1, …)``."""

NUMBERS = "conditions"
"""The field of a sample's json with the numbers that its network is conditioned on."""

MASK = "_mask"
"""What stands behind the name of text states in that of their mask."""

_ENCODERS = ("", *(f"_{number}" for number in range(2, 10)))
_DIMENSIONS = (
    {f"text{which}": 3 for which in _ENCODERS}
    | {f"text{which}_mask": 2 for which in _ENCODERS}
    | {f"pooled{which}": 2 for which in _ENCODERS}
    | {"image": 2}
)
CONDITION_FIELDS = frozenset(f"{name}.npy" for name in _DIMENSIONS)
"""The fields of a shard that hold conditions."""

_MOST_NUMBERS = 64


def decode_conditions(fields: Mapping[str, Any], metadata: Mapping[str, Any], captions: int, where: str) -> Conditions:
    """Decode and check all that a sample's network is conditioned on.

    Args:
        fields: Field name to bytes.
        metadata: The sample's json.
        captions: How many captions it has.
        where: Whose they are, for messages.

    Returns:
        Name to ``(captions or 1, …)``; arrays in float32, whole numbers of the json in int64.

    Raises:
        InputError: If an array is malformed, its first axis fits neither the captions nor all of them, or numbers in
            the json are none.
    """
    found: Conditions = {}
    for field in sorted(CONDITION_FIELDS & fields.keys()):
        name = field.removesuffix(".npy")
        array = decode_array(fields[field], field, _DIMENSIONS[name], LARGEST_TEXT, where)
        if len(array) not in (1, captions):
            raise InputError(
                f"{where} has {captions} captions but {name} for {len(array)}; {field} needs one entry a caption."
            )
        if name.endswith(MASK) and not torch.isin(array, torch.tensor([0.0, 1.0])).all():
            raise InputError(f"{where}: {field} holds other numbers than 0 and 1; a mask says which tokens count.")
        found[name] = array
    for name, mask in found.items():
        states = found.get(name.removesuffix(MASK)) if name.endswith(MASK) else None
        if states is not None and mask.shape[1] != states.shape[1]:
            raise InputError(
                f"{where}: {name}.npy is of {mask.shape[1]} tokens, but its text of {states.shape[1]}; make this "
                "sample again."
            )
    if len(found.get("text", ())) not in (0, captions):
        raise InputError(
            f"{where} has {captions} captions but text for {len(found['text'])}; text.npy needs one entry a caption."
        )
    return found | _numbers(metadata.get(NUMBERS), found, where)


def _numbers(said: Any, found: Conditions, where: str) -> Conditions:
    if said is None:
        return {}
    if not isinstance(said, Mapping):
        raise InputError(f"{where}: {NUMBERS!r} in its json is no object of names and lists of numbers; write it anew.")
    made: Conditions = {}
    for name, numbers in said.items():
        listed = numbers if isinstance(numbers, list) else [numbers]
        right = 0 < len(listed) <= _MOST_NUMBERS and all(_is_number(number) for number in listed)
        if not right or name in found:
            raise InputError(
                f"{where}: {name!r} among the {NUMBERS!r} of its json is no list of up to {_MOST_NUMBERS} numbers, or "
                "the name of an array; write it anew."
            )
        whole = all(isinstance(number, int) for number in listed)
        made[name] = torch.tensor([listed], dtype=torch.int64 if whole else torch.float32)  # (1, numbers)
    return made


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value) and abs(value) < 1e9


def cast_conditions(conditions: Conditions, device: torch.device, dtype: torch.dtype | None = None) -> Conditions:
    """Conditions where a network is; whole numbers stay whole.

    Args:
        conditions: By name.
        device: Where to.
        dtype: Of the network; ``None`` to keep what they have.

    Returns:
        A new mapping.
    """
    return {
        name: array.to(device, dtype if array.is_floating_point() else None, non_blocking=dtype is None)
        for name, array in conditions.items()
    }


def chosen_caption(conditions: Conditions, caption: int | Tensor | Sequence[int]) -> Conditions:
    """Entries of one caption, or of several, of a sample's conditions.

    Args:
        conditions: Name to ``(captions or 1, …)``.
        caption: A number, or ``b`` of them.

    Returns:
        Name to ``(…)``, or to ``(b, …)``.
    """
    rows = torch.as_tensor(caption)
    return {name: array[rows if len(array) > 1 else torch.zeros_like(rows)] for name, array in conditions.items()}


def first_captions(samples: Sequence[Conditions]) -> Conditions:
    """The conditions of several samples with the first caption of each.

    Args:
        samples: Of each sample, name to ``(captions or 1, …)``; with the same names and the same shapes behind the
            first axis.

    Returns:
        Name to ``(B, …)``.
    """
    return {name: torch.stack([conditions[name][0] for conditions in samples]) for name in samples[0]}


def stack_conditions(samples: Sequence[Conditions], captions: Sequence[int]) -> Conditions:
    """The conditions of several samples in one batch.

    Args:
        samples: Of each sample, name to ``(captions or 1, …)``; of one form (:func:`forms_of`).
        captions: How many captions each has.

    Returns:
        Name to ``(B, most captions or 1, …)``; entries past a sample's last caption are zero, and so is the padding of
        text states that are shorter than others of the batch, and its mask.
    """
    most = max(captions)
    stacked: Conditions = {}
    for name, first in samples[0].items():
        one = all(len(conditions[name]) == 1 for conditions in samples)
        length = max(conditions[name].shape[1] for conditions in samples)
        # (B, captions, tokens or dim, …)
        rows = first.new_zeros(len(samples), 1 if one else most, length, *first.shape[2:])
        for row, (conditions, count) in enumerate(zip(samples, captions, strict=True)):
            rows[row, : 1 if one else count, : conditions[name].shape[1]] = conditions[name]
        stacked[name] = rows
    return stacked


def shapes_of(conditions: Conditions) -> dict[str, tuple[int, ...]]:
    """The shapes of one caption's conditions.

    Args:
        conditions: Name to ``(captions or 1, …)``.

    Returns:
        Name to the shape of one entry.
    """
    return {name: tuple(array.shape[1:]) for name, array in sorted(conditions.items())}


def forms_of(shapes: Mapping[str, Sequence[int]]) -> dict[str, tuple[int | None, ...]]:
    """What must be alike in samples of one batch.

    Args:
        shapes: Name to the shape of one entry (:func:`shapes_of`).

    Returns:
        The same; the number of tokens is ``None`` where text states have a mask, which tells padding from them.
    """
    masked = {name for name in shapes if name + MASK in shapes}
    free = masked | {name + MASK for name in masked}
    return {name: (None, *shape[1:]) if name in free else tuple(shape) for name, shape in sorted(shapes.items())}


def widths_of(conditions: Conditions) -> dict[str, tuple[int, int | None]]:
    """What must be alike in all samples that one network is given.

    Args:
        conditions: Name to ``(captions or 1, …)``.

    Returns:
        Name to the number of its axes, and the length of the last one; of a mask, whose last axis are tokens, the
        number alone.
    """
    return {
        name: (array.ndim, None if name.endswith(MASK) else array.shape[-1])
        for name, array in sorted(conditions.items())
    }
