"""Which of a checkpoint's sets of weights is taken: the only one, or the one that was asked for; never a guess."""

from __future__ import annotations

import re
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NoReturn, TypeAlias

from torch import Tensor, nn

from lightning_unlearn.diffusion.checkpoints.candidates import Candidate, candidates, heads, unwrapped
from lightning_unlearn.diffusion.checkpoints.original_names import converted
from lightning_unlearn.diffusion.checkpoints.places import Group, groups_in
from lightning_unlearn.errors import InputError

# Averages: wherever a form of checkpoint has them for the model's weights, wanted, not wanted, or the place.
AveragedChoice: TypeAlias = bool | str | None

# Where averages stand for the model's weights: Lightning's own, and those of diffusers' training scripts.
_USUAL = ("state_dict", "unet_ema", "transformer_ema")


@dataclass(frozen=True)
class WeightsOrigin:
    """Where a network's weights came from.

    Attributes:
        file: The file or folder.
        place: Keys and prefix that lead to them there.
        averaged: Whether they are averages over a training.
        left: Places of averages that were not taken.
    """

    file: str
    place: str = ""
    averaged: bool = False
    left: tuple[str, ...] = ()

    def record(self) -> dict[str, Any]:
        """As it stands in ``run.json``.

        Returns:
            Plain types.
        """
        return {"file": self.file, "place": self.place, "averaged": self.averaged, "averages_left": list(self.left)}


def find_weights(
    network: nn.Module, path: str, content: Mapping[Any, Any], prefix: str = "", averaged: AveragedChoice = None
) -> tuple[dict[str, Tensor], WeightsOrigin]:
    """A network's weights in a checkpoint.

    Args:
        network: The network.
        path: The checkpoint, for messages.
        content: What it holds.
        prefix: What stands before the network's names; found where it is not given and only one fits.
        averaged: ``True`` for the averaged weights, ``False`` for the trained ones, or the place of those that are
            meant. By default those under the names that a model's weights have in a file of this form.

    Returns:
        The network's names to tensors (averages may lack buffers), and where they were found.

    Raises:
        InputError: If there are none, or more than one set could be meant.
    """
    groups = [_unwrapped(path, group) for group in groups_in(content)]
    asked = unwrapped(prefix)
    every = list(candidates(network, groups))
    fitting = [one for one in every if not asked or asked in (one.prefix, f"{one.where}.")]
    if not fitting and not isinstance(averaged, str):
        _refuse(network, path, groups, prefix, every)
    chosen = _named(path, every, averaged) if isinstance(averaged, str) else _choose(path, fitting, averaged)
    left = tuple(_shown(one) for one in every if one.averaged and one is not chosen)
    _say(path, chosen, averaged, left, any(not one.averaged for one in every))
    state = {name: chosen.group.tensors[inside] for name, inside in chosen.names.items()}
    beside = [name.removeprefix(chosen.prefix) for name in chosen.group.tensors if name.startswith(chosen.prefix)]
    if chosen.original:
        state = converted(path, network, state)
        beside = list(state)
    _refuse_larger(network, path, beside)
    return state, WeightsOrigin(path, chosen.where, chosen.averaged, left)


def _refuse_larger(network: nn.Module, path: str, names: list[str]) -> None:
    """Weights of the network's own parts that it has no place for are of a larger network, or of an adapter on it."""
    own, parts = set(network.state_dict()), {name for name, _ in network.named_children()}
    ignored = getattr(network, "_keys_to_ignore_on_load_unexpected", None) or []
    strange = [
        name
        for name in names
        if name not in own
        and name.partition(".")[0] in parts
        and name.endswith((".weight", ".bias"))
        and not any(re.search(pattern, name) for pattern in ignored)
    ]
    if strange:
        raise InputError(
            f"{path} has all of the network's weights, and {len(strange)} more of its parts (e.g. {strange[0]}): it is "
            "of a larger model, or of one with an adapter; give the config of the model that it is of."
        )


def _unwrapped(path: str, group: Group) -> Group:
    tensors: dict[str, Tensor] = {}
    for name, tensor in group.tensors.items():
        plain = unwrapped(name)
        if plain in tensors:
            raise InputError(f"{path} holds {plain} twice, with and without _orig_mod or the like; save one of them.")
        tensors[plain] = tensor
    return Group(group.place, tensors, group.averaged, group.nameless)


def _named(path: str, every: list[Candidate], averaged: str) -> Candidate:
    asked = averaged.rstrip(".")
    found = [one for one in every if asked in (one.where, one.prefix.rstrip("."), one.group.place)]
    places = {id(one): (f".{one.where}", f".{one.group.place}") for one in every}
    found = found or [one for one in every if any(place.endswith(f".{asked}") for place in places[id(one)])]
    if not found:
        there = ", ".join(repr(one.where) for one in every if one.averaged) or "none"
        raise InputError(f"{path} has no weights of this network at {averaged!r}; places of averaged weights: {there}.")
    return _only(path, found, "`averaged`")


def _choose(path: str, fitting: list[Candidate], averaged: bool | None) -> Candidate:
    trained, averages = [one for one in fitting if not one.averaged], [one for one in fitting if one.averaged]
    if averaged is False and not trained:
        raise InputError(
            f"{path} holds only averaged weights of this network ({_listed(averages)}), but `averaged` is false; leave "
            "it out."
        )
    usual = [one for one in averages if one.group.averaged and one.group.place in _USUAL]
    if averaged is not False and (usual if averaged is None else averages):
        return _only(path, usual or averages, "`averaged`")
    return _only(path, _foremost(trained), "`prefix`") if trained else _only(path, averages, "`averaged`")


def _foremost(trained: list[Candidate]) -> list[Candidate]:
    """What Lightning loads, and a file's own names, come before what lies elsewhere."""
    for place in ("state_dict", ""):
        inside = [one for one in trained if one.group.place == place]
        if inside:
            return [one for one in inside if not one.prefix] or inside
    return trained


def _only(path: str, found: list[Candidate], option: str) -> Candidate:
    if len(found) > 1:
        raise InputError(
            f"{path} holds the network's weights more than once ({_listed(found)}); name the one that is meant by "
            f"{option}."
        )
    return found[0]


def _say(path: str, chosen: Candidate, averaged: AveragedChoice, left: tuple[str, ...], others: bool) -> None:
    if averaged is True and not chosen.averaged:
        among = f"; averages that are left: {', '.join(left)}" if left else ""
        warnings.warn(f"{path} holds no averaged weights of this network where it was looked; others are taken{among}.")
    elif averaged is None and chosen.averaged and others:
        warnings.warn(
            f"Of {path} the averaged weights are taken, in {_shown(chosen)}; with `averaged: false` the trained ones "
            "are."
        )
    elif averaged is None and left:
        warnings.warn(
            f"{path} also holds averaged weights, in {' and '.join(left)}; they are not taken unless `averaged` is "
            "true or names the place."
        )


def _shown(candidate: Candidate) -> str:
    return candidate.where or "the top of the file"


def _listed(found: list[Candidate]) -> str:
    return ", ".join(repr(f"{one.where}.") for one in found)


def _refuse(network: nn.Module, path: str, groups: list[Group], prefix: str, every: list[Candidate]) -> NoReturn:
    wanted = network.state_dict()
    nameless = next((group for group in groups if group.nameless), None)
    if nameless is not None and not any(set(wanted) & set(group.tensors) for group in groups):
        shapes = [tuple(parameter.shape) for parameter in network.parameters()]
        theirs = [tuple(tensor.shape) for tensor in nameless.tensors.values()]
        first = next((i for i, (a, b) in enumerate(zip(shapes, theirs, strict=False)) if a != b), None)
        reason = f"has {len(theirs)} tensors without names, but the network has {len(shapes)} weights"
        if len(shapes) == len(theirs) and first is not None:
            reason = f"has {theirs[first]} as number {first}, where the network has {shapes[first]}"
        raise InputError(f"{path}: {nameless.place} {reason}; the averages are of another network.")
    if any(".base_layer." in name for group in groups for name in group.tensors):
        raise InputError(
            f"{path} is of a network with PEFT's adapter on it; save the adapter alone (save_lora_adapter or "
            "save_pretrained) and give it as `adapter`, with the base model as `network`."
        )
    main = next((g for g in groups if g.place == "state_dict"), next(iter(groups), Group("", {}, False)))
    asked = unwrapped(prefix)
    missing = [name for name in wanted if f"{asked}{name}" not in main.tensors]
    found = sorted({one.prefix for one in every} | set(heads(main.tensors, missing[0] if missing else "")))
    raise InputError(
        f"{path} lacks {len(missing)} of the network's {len(wanted)} weights under the prefix {prefix!r} "
        f"(e.g. {missing[0] if missing else next(iter(wanted))}); prefixes that hold it: "
        f"{', '.join(map(repr, found)) or 'none'}."
    )
