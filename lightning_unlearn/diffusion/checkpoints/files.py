"""A checkpoint's content from a file or a folder, without pickle's power to run code."""

from __future__ import annotations

import json
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lightning_unlearn.diffusion.checkpoints.distributed_folders import refuse_distributed
from lightning_unlearn.diffusion.checkpoints.inert import load_inert
from lightning_unlearn.diffusion.checkpoints.model_folders import check_safetensors, network_parts, weight_files
from lightning_unlearn.errors import InputError


def read_content(path: str) -> Mapping[Any, Any]:
    """Everything that a checkpoint holds.

    Args:
        path: A Lightning ``.ckpt``, a PyTorch file, safetensors, the index of a sharded model, a folder with one of
            these, or a ``checkpoint-N`` of a training by diffusers.

    Returns:
        Names to tensors, or to more of the same.

    Raises:
        InputError: If it is missing, can't be read without running code, or is one of the parts of a distributed one.
    """
    place = Path(path)
    if place.exists():
        refuse_distributed(place)
    if place.is_dir():
        return _folder(place)
    if not place.is_file():
        raise InputError(f"There are no weights at {path}; check the path.")
    if place.name.endswith(".json"):
        return _sharded(place)
    return _safetensors(path) if path.endswith(".safetensors") else _unpickled(path, inert=True)


def read_state(path: str) -> dict[str, Tensor]:
    """The named tensors of a file: of its ``state_dict`` where it has one.

    Args:
        path: See :func:`read_content`.

    Returns:
        Name to tensor.

    Raises:
        InputError: See :func:`read_content`.
    """
    content = read_content(path)
    state = content.get("state_dict", content)
    # A state dict may hold a module's extra state, which need not be a tensor.
    return {name: value for name, value in state.items() if isinstance(value, Tensor)}


def read_checkpoint(path: str) -> dict[str, Any]:
    """A PyTorch or Lightning checkpoint of which everything is wanted, loaded with ``weights_only=True``.

    Args:
        path: The file.

    Returns:
        Its content.

    Raises:
        InputError: If it can't be loaded so.
    """
    return _unpickled(path, inert=False)


def _unpickled(path: str, *, inert: bool) -> dict[str, Any]:
    # Files in the form from before PyTorch 1.6 are no archives, and can't be mapped.
    archive = zipfile.is_zipfile(path)
    try:
        if inert and archive:
            checkpoint = load_inert(path)
        else:
            checkpoint = torch.load(path, map_location="cpu", weights_only=True, mmap=archive)
    except Exception as error:  # a damaged file makes the unpickler raise nearly anything
        reason = f"{type(error).__name__}: {first_line(str(error).split('WeightsUnpickler error:')[-1])}"
        raise InputError(
            f"{path} is damaged, or can't be loaded without running code ({reason}); fetch it again, or, where you "
            "trust it, save its weights alone: torch.save(torch.load(path, weights_only=False)['state_dict'], new)."
        ) from None
    if not isinstance(checkpoint, dict):
        raise InputError(f"{path} holds a {type(checkpoint).__name__}, not a state dict.")
    state = checkpoint.get("state_dict", {})
    if not isinstance(state, Mapping):
        raise InputError(
            f"{path} holds a {type(state).__name__} as its state_dict; save the network's state_dict again."
        )
    return checkpoint


def _safetensors(path: str) -> dict[str, Tensor]:
    import safetensors
    import safetensors.torch

    try:
        return dict(safetensors.torch.load_file(path))
    except safetensors.SafetensorError as error:
        raise InputError(f"{path} is not a safetensors file ({error}); fetch it again.") from None


def _sharded(index: Path) -> dict[str, Tensor]:
    """The tensors of all files that an index names, which must be those that it says are in them."""
    try:
        places = {str(name): str(file) for name, file in json.loads(index.read_bytes())["weight_map"].items()}
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError):
        raise InputError(f"{index} is no index of files of weights; save the model again.") from None
    state: dict[str, Tensor] = {}
    for file in sorted(set(places.values())):
        if Path(file).name != file or file.endswith(".json"):
            raise InputError(f"{index} names {file}, which is no file of weights beside it; save the model again.")
        if not (index.parent / file).is_file():
            raise InputError(f"{index} names {file}, which is not there; fetch it, or save the model again.")
        tensors = read_state(str(index.parent / file))
        lacking = sorted(name for name in places if places[name] == file and name not in tensors)
        if lacking:
            raise InputError(f"{index.parent / file} lacks {lacking[0]}, which {index.name} says is in it; fetch it.")
        state |= {name: tensor for name, tensor in tensors.items() if places.get(name) == file}
    return state


def _folder(folder: Path) -> Mapping[Any, Any]:
    parts = network_parts(folder)
    if parts:
        # Beside each other they stand for the trained and the averaged weights of one network.
        return {part.name: _folder(part) for part in parts}
    files = weight_files(folder)
    if not files:
        check_safetensors(folder)
        raise InputError(
            f"There are no weights at {folder}: the folder has neither a .safetensors file nor a unet/ or "
            "transformer/; name the file."
        )
    if len(files) > 1:
        names = ", ".join(file.name for file in files)
        raise InputError(f"{folder} holds several sets of weights ({names}); name the file that is meant.")
    return read_content(str(files[0]))


def first_line(text: str) -> str:
    """The beginning of a message of a library below, for one sentence.

    Args:
        text: The message.

    Returns:
        At most 200 characters of one line.
    """
    return text.strip().partition("\n")[0][:200]
