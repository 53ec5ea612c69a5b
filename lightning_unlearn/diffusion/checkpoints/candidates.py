"""Where in a checkpoint all of a network's weights are.

A candidate is a group of tensors and a prefix in it that hold every weight of the network: by their names, by names
that lost their dots (LDM's averages), by numbers in the network's order (diffusers' and torch-ema's averages), or by
the names of the network's first code.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from lightning_unlearn.diffusion.checkpoints.original_names import original_mark
from lightning_unlearn.diffusion.checkpoints.places import Group, says_averaged

# What torch.compile, Fabric, FSDP and activation checkpointing put into names, anywhere.
_WRAPPERS = re.compile(r"(?:_orig_mod|_forward_module|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")


@dataclass(frozen=True)
class Candidate:
    """All weights of a network.

    Attributes:
        group: The tensors among which they are.
        prefix: What stands before their names there.
        names: Name in the network to name in the group; for original names, name without prefix to name in the group.
        averaged: Whether they are averages.
        original: Whether their names are those of the network's first code.
    """

    group: Group
    prefix: str
    names: Mapping[str, str]
    averaged: bool
    original: bool = False

    @property
    def where(self) -> str:
        """Keys and prefix that lead there."""
        return ".".join(part for part in (self.group.place, self.prefix.rstrip(".")) if part)


def unwrapped(name: str) -> str:
    """A name without what wrappers of modules put into it.

    Args:
        name: Of a weight, or what stands before one.

    Returns:
        As it was before.

    Example:
        >>> unwrapped("_forward_module.unet._orig_mod.conv_in.weight")
        'unet.conv_in.weight'
    """
    return _WRAPPERS.sub("", name)


def candidates(network: nn.Module, groups: list[Group]) -> Iterator[Candidate]:
    """All places that hold every weight of a network.

    Args:
        network: The network.
        groups: Of the checkpoint, their names :func:`unwrapped`.

    Yields:
        The candidates; those by original names may turn out to lack some.
    """
    wanted = list(network.state_dict())
    parameters = [name for name, _ in network.named_parameters()]
    mark = original_mark(network)
    # Names by which averages without dots are told apart, where the network's are original.
    originals: dict[str, str] = {}
    for group in groups:
        if group.nameless:
            if [tensor.shape for tensor in group.tensors.values()] == [p.shape for p in network.parameters()]:
                yield Candidate(group, "", dict(zip(parameters, group.tensors, strict=True)), True)
            continue
        for head in heads(group.tensors, wanted[0]):
            if all(f"{head}{name}" in group.tensors for name in wanted):
                yield _named(group, head, {name: f"{head}{name}" for name in wanted})
        for head in heads(group.tensors, mark) if mark else []:
            inner = {name.removeprefix(head): name for name in group.tensors if name.startswith(head)}
            originals |= {name.replace(".", ""): name for name in inner}
            yield _named(group, head, inner, original=True)
    for group in groups:
        for names, original in ((parameters, False), (list(originals.values()), True)):
            yield from _dotless(group, names, mark if original else None)


def _dotless(group: Group, names: list[str], mark: str | None) -> Iterator[Candidate]:
    without = {name: name.replace(".", "") for name in names}
    if group.nameless or not names or len(set(without.values())) < len(names) or without == dict.fromkeys(names):
        return
    probe = without[mark] if mark else next(iter(without.values()))
    for name in group.tensors:
        head = name.removesuffix(probe)
        if not name.endswith(probe) or "." not in (mark or names[0]):
            continue
        found = {whole: f"{head}{short}" for whole, short in without.items() if f"{head}{short}" in group.tensors}
        # LDM averages what is trained, which is every weight of the network, but not what only lies beside it.
        if len(found) == len(names):
            yield _named(group, head, found, original=mark is not None)


def _named(group: Group, head: str, names: Mapping[str, str], original: bool = False) -> Candidate:
    # PyTorch's AveragedModel has only a counter beside its names to be known by.
    counted = head.endswith("module.") and f"{head.removesuffix('module.')}n_averaged" in group.tensors
    return Candidate(group, head, names, group.averaged or says_averaged(head) or counted, original)


def heads(names: Mapping[str, Any], ending: str) -> list[str]:
    """What stands before a name.

    Args:
        names: All names.
        ending: The name.

    Returns:
        All prefixes under which it is there, sorted.
    """
    return sorted({name.removesuffix(ending) for name in names if f".{name}".endswith(f".{ending}")})
