"""Which sample each row is of that a layer saw in a training step."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import fields, is_dataclass
from operator import attrgetter
from typing import Any

import torch
from lightning.pytorch import LightningModule
from torch import Tensor

from lightning_unlearn.errors import InputError
from lightning_unlearn.weights.capture import CapturedLayer, Use, in_positions

RowsPerSample = int | str | Callable[[int, int], Tensor]

_HOW_TO_SAY = (
    "If a row is a sample all the same, set rows_per_sample=1 of FisherAccumulator; if each sample has r rows that "
    "stand in r parts one after another, as torch.cat puts them, rows_per_sample=r; else give a function of the "
    "numbers of rows and samples that says which sample each row is of, e.g. `lambda rows, samples: "
    "torch.arange(rows) // (rows // samples)` for rows that stand together."
)


def check_rows_per_sample(given: RowsPerSample | None) -> None:
    """Refuse what can't say which sample a row is of.

    Args:
        given: By the user.

    Raises:
        InputError: If it is no number from 1 on, no name and no function.
    """
    number = isinstance(given, int) and not isinstance(given, bool) and given >= 1
    if not (given is None or number or isinstance(given, str) or callable(given)):
        raise InputError(
            f"rows_per_sample must be a number from 1 on, a function or the name of one, but is {given!r}."
        )


def samples_in(batch: Any) -> tuple[int, ...]:
    """How many samples a batch may have: the first dimensions of its tensors.

    Args:
        batch: Of any form that Lightning takes.

    Returns:
        One number if it is certain; several if tensors differ, the first tensor's first, which is what Lightning takes;
        none if there is no tensor with dimensions.
    """
    return tuple(dict.fromkeys(tensor.shape[0] for tensor in _tensors(batch) if tensor.ndim > 0))


def _tensors(batch: Any) -> Iterator[Tensor]:
    if isinstance(batch, Tensor):
        yield batch
    elif isinstance(batch, Mapping):
        for part in batch.values():
            yield from _tensors(part)
    elif isinstance(batch, list | tuple):
        for part in batch:
            yield from _tensors(part)
    elif is_dataclass(batch):
        for field in fields(batch):
            yield from _tensors(getattr(batch, field.name))


class SampleRows:
    """Brings what layers captured in a step to one row a sample.

    Args:
        rows_per_sample: What the user says; ``None`` if a row is a sample.
        module: That has the function, if it is named.

    Raises:
        InputError: If there is no such function.
    """

    def __init__(self, rows_per_sample: RowsPerSample | None, module: LightningModule) -> None:
        self.per_sample: int | Callable[[int, int], Tensor] | None
        if isinstance(rows_per_sample, str):
            try:
                found = attrgetter(rows_per_sample)(module)
            except AttributeError:
                raise InputError(
                    f"{type(module).__name__} has no {rows_per_sample!r}; rows_per_sample names a function of it, "
                    "of the numbers of rows and samples, that says which sample each row is of."
                ) from None
            self.per_sample = found
        else:
            self.per_sample = rows_per_sample

    def arrange(
        self, passes: Sequence[Mapping[str, Sequence[Use]]], sizes: tuple[int, ...]
    ) -> tuple[dict[str, CapturedLayer], int, float]:
        """One row a sample, of all backward passes that one step takes together.

        Args:
            passes: Layer name to its uses, a backward pass after the other.
            sizes: What :func:`samples_in` says of the batch.

        Returns:
            Layer name to its captured gradients ``(S, …)``; ``S``; and how many samples a mean in the loss joins.

        Raises:
            InputError: If rows are not samples and the user didn't say what they are.
        """
        names = {name: None for uses in passes for name in uses}
        found: dict[str, CapturedLayer] = {}
        joins: dict[tuple[int, float], str] = {}
        for name in names:
            calls = [_by_call(name, uses[name], sizes) for uses in passes if name in uses]
            if self.per_sample is None:
                found[name] = in_positions([_as_samples(name, one, sizes) for one in calls])
                joined = float(len(found[name]))
            else:
                found[name], joined = self._grouped(name, [call for one in calls for call in one], sizes)
            joins.setdefault((len(found[name]), joined), name)
        samples, joined = one_join(joins)
        return found, samples, joined

    def _grouped(self, name: str, calls: list[CapturedLayer], sizes: tuple[int, ...]) -> tuple[CapturedLayer, float]:
        """Rows summed by what the user says they are of, and how many samples a mean joins."""
        whole = _one_after_another(calls)
        rows = len(whole)
        if isinstance(self.per_sample, int):
            samples, rest = divmod(rows, self.per_sample)
            # That every row is a sample of its own may be of more samples than the batch has, as generated ones are.
            if rest or (self.per_sample > 1 and len(sizes) == 1 and sizes != (samples,)):
                raise InputError(
                    f"Layer {name} saw {rows} rows for the {' or '.join(map(str, sizes))} samples of the batch, which "
                    f"are not rows_per_sample={self.per_sample} rows for each; correct it, or leave the layer out by "
                    "patterns."
                )
            of = torch.arange(rows) % samples
        else:
            if not sizes:
                raise InputError(
                    "The batch has no tensor, so rows_per_sample can't be told how many samples it has; give a number."
                )
            samples = sizes[0]
            of = self._asked(name, rows, samples)
        joined = float(samples)
        if len(calls) > 1 and sizes != (samples,):  # each call's rows have a mean of their own
            joined = float(max(len(torch.unique(part)) for part in torch.split(of, [len(call) for call in calls])))
        return _summed(whole, of, samples), joined

    def _asked(self, name: str, rows: int, samples: int) -> Tensor:
        """What the user's function says."""
        assert callable(self.per_sample)
        of = torch.as_tensor(self.per_sample(rows, samples)).detach().cpu()
        fits = of.shape == (rows,) and not of.is_floating_point()
        if not fits or int(of.min()) < 0 or int(of.max()) >= samples:
            raise InputError(
                f"rows_per_sample gave {of.dtype} {tuple(of.shape)} for {rows} rows of layer {name} and {samples} "
                f"samples; it must give a sample's number, from 0 to {samples - 1}, for each row."
            )
        return of.long()


def one_join(joins: Mapping[tuple[int, float], str]) -> tuple[int, float]:
    """The numbers of samples, and of those that a mean joins, that all layers saw.

    Args:
        joins: These numbers to a layer that saw them; at least one.

    Returns:
        The only ones.

    Raises:
        InputError: If there are others.
    """
    if len(joins) > 1:
        seen = ", ".join(f"{name}: {samples}" for (samples, _), name in sorted(joins.items()))
        raise InputError(
            f"Layers see different numbers of rows in one batch ({seen}), so a row is not a sample; choose other "
            "layers by patterns."
        )
    return next(iter(joins))


def _as_samples(name: str, calls: list[CapturedLayer], sizes: tuple[int, ...]) -> CapturedLayer:
    """The calls of one backward pass, whose rows are samples, or say why they are not."""
    rows = [len(call) for call in calls]
    if len(sizes) != 1:
        many = " and ".join(map(str, sizes))
        raise InputError(
            f"Layer {name} saw {_many(rows)} rows, but how many samples the batch has is not certain "
            f"({f'its tensors begin with {many}' if sizes else 'it has no tensor'}). {_HOW_TO_SAY}"
        )
    (samples,) = sizes
    if sum(rows) == samples:  # the batch, whole or in parts
        return _one_after_another(calls)
    if all(count == samples for count in rows):
        raise InputError(
            f"The network was called {len(rows)} times before one backward pass, each time on {samples} rows for the "
            f"{samples} samples of the batch (layer {name}): rows of several calls may be of the same samples (set "
            f"rows_per_sample={len(rows)} of FisherAccumulator, and they are summed before squaring), or of others, "
            "as real and generated ones are (rows_per_sample=1)."
        )
    raise InputError(
        f"Layer {name} saw {_many(rows)} rows for the {samples} samples of the batch, so a row is not a sample; "
        "put the batch first where the network has another axis first, or leave the layer out by patterns. "
        f"{_HOW_TO_SAY}"
    )


def _many(rows: list[int]) -> str:
    return " + ".join(map(str, rows))


def _by_call(name: str, uses: Sequence[Use], sizes: tuple[int, ...]) -> list[CapturedLayer]:
    """A layer's uses in one backward pass, joined call by call of the network.

    Within a call, uses on all rows are positions of one another, as those of a layer that is used again; uses on parts
    of them are the batch in parts.

    Returns:
        A layer's captured gradients of each call.

    Raises:
        InputError: If uses in one call are neither.
    """
    calls: dict[int, list[CapturedLayer]] = {}
    for use in uses:
        calls.setdefault(use.call, []).append(use.layer)
    joined = []
    for parts in calls.values():
        rows = [len(part) for part in parts]
        if len(parts) > 1 and sizes == (sum(rows),):
            joined.append(_one_after_another(parts))
        elif len(set(rows)) == 1:
            joined.append(in_positions(parts))
        else:
            raise InputError(
                f"Layer {name} was used on different numbers of rows in one backward pass ({_many(rows)}), so a row is "
                "not a sample; leave it out by patterns."
            )
    return joined


def _one_after_another(parts: Sequence[CapturedLayer]) -> CapturedLayer:
    """Parts with other samples as one, with positions that are zero where they have fewer."""
    if len(parts) == 1:
        return parts[0]
    positions = max(part.inputs.shape[1] for part in parts)

    def padded(tensor: Tensor) -> Tensor:
        return torch.nn.functional.pad(tensor, (0, 0, 0, positions - tensor.shape[1]))

    return CapturedLayer(
        torch.cat([padded(part.inputs) for part in parts]), torch.cat([padded(part.output_gradients) for part in parts])
    )


def _summed(layer: CapturedLayer, of: Tensor, samples: int) -> CapturedLayer:
    """Rows of one sample as its positions, which a gradient sums over.

    Args:
        layer: ``(R, T, …)``.
        of: The sample of each row ``(R,)``.
        samples: ``S``.

    Returns:
        ``(S, r T, …)`` with the largest number ``r`` of rows that a sample has; zeros where it has fewer.
    """
    counts = of.bincount(minlength=samples)
    order = of.argsort(stable=True)
    starts = counts.cumsum(0) - counts
    place = torch.arange(len(of)) - starts[of[order]]  # among the rows of its sample

    def put(tensor: Tensor) -> Tensor:
        device = tensor.device
        room = tensor.new_zeros(samples, int(counts.max()), *tensor.shape[1:])
        room[of[order].to(device), place.to(device)] = tensor[order.to(device)]
        return room.flatten(1, 2)

    return CapturedLayer(put(layer.inputs), put(layer.output_gradients))
