"""From a file's keys to the adapter of each layer; every key is used, told apart, or named."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from torch import Tensor

from lightning_unlearn.diffusion.adapters.adapter_file import AdapterFile
from lightning_unlearn.diffusion.adapters.keys import Role, is_text_encoder, parse_key, refuse_other_kinds
from lightning_unlearn.diffusion.adapters.layer_names import LayerNames
from lightning_unlearn.diffusion.adapters.low_rank import LowRank, part_of_layers
from lightning_unlearn.diffusion.adapters.scales import Scales
from lightning_unlearn.errors import InputError, some_of


def read_layers(file: AdapterFile, names: LayerNames) -> tuple[dict[str, LowRank], list[str]]:
    """The adapter of each layer of a network.

    Args:
        file: The adapter as it was saved.
        names: The network's.

    Returns:
        Layer name to its adapter, in the network's order; and the keys that are of text encoders.

    Raises:
        InputError: If the adapter is of another kind or model, is damaged, does nothing, or has keys that nothing uses.
    """
    refuse_other_kinds(file.path, list(file.tensors))
    text = [key for key in file.tensors if is_text_encoder(key)]
    own = {key: tensor for key, tensor in file.tensors.items() if not is_text_encoder(key)}
    if not own:
        reason = "only weights of text encoders" if text else "no LoRA weights"
        raise InputError(f"{file.path} holds {reason}, so there is nothing for the network; name another adapter.")
    return layers_of(replace(file, tensors=own), names), text


def layers_of(file: AdapterFile, names: LayerNames) -> dict[str, LowRank]:
    """The adapter of each layer of one model, which every key must be of.

    Args:
        file: The adapter as it was saved, or the part of it that is of this model.
        names: The model's.

    Returns:
        Layer name to its adapter, in the model's order.

    Raises:
        InputError: See :func:`read_layers`.
    """
    grouped = _grouped(file, names)
    scales = Scales(file, {name: tensors.get("alpha") for name, tensors in grouped.items()})
    found: dict[str, LowRank] = {}
    for name, tensors in grouped.items():
        where = f"{file.path}: {name}"
        parts = names.find(name)
        assert parts is not None
        whole = _low_rank(where, tensors, scales.alpha(name, _rank(where, tensors), parts[0].layer))
        for layer, adapter in part_of_layers(where, whole, parts, [names.layers[part.layer] for part in parts]).items():
            if layer in found:
                raise InputError(
                    f"{where} is the layer {layer}, which the file has under another name, too; which one?"
                )
            found[layer] = adapter
    _refuse_dead(file, found)
    return {layer: found[layer] for layer in names.layers if layer in found}


def _grouped(file: AdapterFile, names: LayerNames) -> dict[str, dict[Role, Tensor]]:
    grouped: dict[str, dict[Role, Tensor]] = {}
    unused = []
    for key, tensor in file.tensors.items():
        parsed = parse_key(key)
        if parsed is None or names.find(parsed.layer) is None:
            unused.append(key)
        elif parsed.role in grouped.setdefault(parsed.layer, {}):
            raise InputError(f"{file.path}: {key} is there twice, in two forms; save the adapter in one of them.")
        else:
            grouped[parsed.layer][parsed.role] = tensor
    if unused:
        raise InputError(
            f"{file.path}: {len(unused)} of its {len(file.tensors)} keys fit no layer of this network "
            f"({some_of(unused)}); the adapter is of another model, or of a form that is not known here."
        )
    return grouped


def _rank(where: str, tensors: Mapping[Role, Tensor]) -> int:
    for role, other in (("down", "up"), ("up", "down")):
        if role not in tensors:
            present = ", ".join(tensors)
            raise InputError(
                f"{where} has {present} but no {role} beside {other}; the file is damaged, fetch it again."
            )
    down, up = tensors["down"], tensors["up"]
    if down.ndim not in {2, 4} or up.ndim not in {2, 4} or len(down) != up.shape[1]:
        raise InputError(
            f"{where} has A {tuple(down.shape)} and B {tuple(up.shape)}, which have no rank in common; "
            "the file is damaged, fetch it again."
        )
    return len(down)


def _low_rank(where: str, tensors: Mapping[Role, Tensor], alpha: float) -> LowRank:
    for role, tensor in tensors.items():
        if not tensor.is_floating_point() and role != "alpha":
            raise InputError(f"{where} has {role} in {tensor.dtype}, which is no number of a LoRA; save it in float.")
        if not bool(tensor.isfinite().all()):
            raise InputError(f"{where} has infinite or missing numbers in {role}; its training failed.")
    return LowRank(tensors["down"], tensors["up"], alpha, _magnitude(where, tensors))


def _magnitude(where: str, tensors: Mapping[Role, Tensor]) -> Tensor | None:
    outputs = len(tensors["up"])
    if "magnitude" in tensors:
        flat = tensors["magnitude"].flatten()
        if len(flat) != outputs:
            raise InputError(f"{where} has {len(flat)} magnitudes for {outputs} outputs; the file is damaged.")
        return flat
    if "dora_scale" not in tensors:
        return None
    scale = tensors["dora_scale"]
    # LyCORIS wrote one a column before it took one a row.
    if scale.numel() != outputs or len(scale) != outputs:
        raise InputError(
            f"{where} is DoRA with dora_scale {tuple(scale.shape)}, which is not one number for each of {outputs} "
            "outputs (wd_on_output=False); that form is not read here: merge it with the program that made it."
        )
    return scale.flatten()


def _refuse_dead(file: AdapterFile, layers: Mapping[str, LowRank]) -> None:
    # With DoRA the magnitudes alone may have been trained.
    if not any(bool(layer.up.any()) or layer.magnitude is not None for layer in layers.values()):
        raise InputError(
            f"{file.path} does nothing: B is zero in all of its {len(layers)} layers, as before training; "
            "save the trained adapter."
        )
