"""Weights out of the files that people have: Lightning checkpoints, safetensors, folders of diffusers."""

from __future__ import annotations

import json
import zipfile
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lightning_unlearn.errors import InputError


def load_weights(network: nn.Module, path: str, prefix: str = "", averaged: bool = True) -> None:
    """Load a network's weights from a file, without pickle.

    Args:
        network: The network; every weight of it must be in the file. Weights are cast to its dtype.
        path: A Lightning ``.ckpt``, a PyTorch state dict, or safetensors.
        prefix: What stands before the network's names in the file, e.g. ``"model.unet."`` or ``"unet_ema."``.
        averaged: For a checkpoint made under Lightning's ``WeightAveraging`` or ``EMAWeightAveraging``: whether to take
            the averaged weights, which it keeps as the state dict, or those that were being trained.

    Raises:
        InputError: If the file is missing or unsafe, or lacks weights of the network.
    """
    state = read_state(path, averaged)
    chosen = {name.removeprefix(prefix): tensor for name, tensor in state.items() if name.startswith(prefix)}
    # torch.compile wraps a module and puts this into its names.
    chosen = {name.replace("_orig_mod.", ""): tensor for name, tensor in chosen.items()}
    wanted = network.state_dict()
    missing = [name for name in wanted if name not in chosen]
    if missing:
        heads = sorted({name.removesuffix(missing[0]) for name in state if f".{name}".endswith(f".{missing[0]}")})
        raise InputError(
            f"{path} lacks {len(missing)} of the network's {len(wanted)} weights under the prefix {prefix!r} "
            f"(e.g. {missing[0]}); prefixes that hold it: {', '.join(map(repr, heads)) or 'none'}."
        )
    differing = [name for name in wanted if chosen[name].shape != wanted[name].shape]
    if differing:
        name = differing[0]
        raise InputError(
            f"{path}: {name} is {tuple(chosen[name].shape)}, but the network's is {tuple(wanted[name].shape)}; "
            "the file is of another model."
        )
    network.load_state_dict({name: chosen[name].to(tensor.dtype) for name, tensor in wanted.items()})


def read_state(path: str, averaged: bool = True) -> dict[str, Tensor]:
    """The named tensors of a file.

    Args:
        path: A Lightning ``.ckpt``, a PyTorch state dict, or safetensors.
        averaged: See :func:`load_weights`.

    Returns:
        Name to tensor.

    Raises:
        InputError: If the file is missing, or can't be loaded without pickle.
    """
    if not Path(path).is_file():
        raise InputError(f"There are no weights at {path}; check the path.")
    if path.endswith(".safetensors"):
        import safetensors
        import safetensors.torch

        try:
            return dict(safetensors.torch.load_file(path))
        except safetensors.SafetensorError as error:
            raise InputError(f"{path} is not a safetensors file ({error}); fetch it again.") from None
    checkpoint = read_checkpoint(path)
    trained = checkpoint.get("current_model_state")
    state = trained if trained is not None and not averaged else checkpoint.get("state_dict", checkpoint)
    if not isinstance(state, dict):
        raise InputError(
            f"{path} holds a {type(state).__name__} as its state_dict; save the network's state_dict again."
        )
    # A state dict may hold a module's extra state, which need not be a tensor.
    return {name: value for name, value in state.items() if isinstance(value, Tensor)}


def read_checkpoint(path: str) -> dict[str, Any]:
    """A PyTorch or Lightning checkpoint, loaded with ``weights_only=True``.

    Args:
        path: The file.

    Returns:
        Its content.

    Raises:
        InputError: If it can't be loaded so.
    """
    try:
        # Files in the form from before PyTorch 1.6 are no archives, and can't be mapped.
        checkpoint = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except Exception as error:  # a damaged file makes the unpickler raise nearly anything
        reason = f"{type(error).__name__}: {_first_line(str(error).split('WeightsUnpickler error:')[-1])}"
        raise InputError(
            f"{path} is damaged, or can't be loaded without running code ({reason}); "
            "fetch it again, or save its state_dict alone, with torch.save or safetensors."
        ) from None
    if not isinstance(checkpoint, dict):
        raise InputError(f"{path} holds a {type(checkpoint).__name__}, not a state dict.")
    return checkpoint


def load_network(
    network: nn.Module | str, weights: str | None = None, prefix: str = "", averaged: bool = True
) -> nn.Module:
    """The denoiser that a config names.

    Args:
        network: A network, or the folder of one that diffusers saved: a pipeline's, or the network's own.
        weights: A file to load its weights from.
        prefix: See :func:`load_weights`.
        averaged: See :func:`load_weights`.

    Returns:
        The network, in eval mode.

    Raises:
        InputError: If a folder holds no network, or only part of its weights.
    """
    if isinstance(network, str):
        folder = Path(network)
        parts = [folder / name for name in ("unet", "transformer") if (folder / name / "config.json").is_file()]
        if not parts and not (folder / "config.json").is_file():
            raise InputError(
                f"{folder} is no folder of a diffusers pipeline or network; it needs a unet/ or a config.json."
            )
        network = _from_diffusers(parts[0] if parts else folder)
    if weights is not None:
        load_weights(network, weights, prefix, averaged)
    return network.eval()


def _from_diffusers(folder: Path) -> nn.Module:
    import diffusers

    check_safetensors(folder)
    try:
        name = json.loads((folder / "config.json").read_bytes())["_class_name"]
        # Not AutoModel, which can't say what was missing (diffusers 0.42).
        network_class: Any = getattr(diffusers, name)
        network, found = network_class.from_pretrained(
            str(folder),
            local_files_only=True,
            output_loading_info=True,
            # Without it diffusers falls back on .bin, which is pickle.
            use_safetensors=True,
            # By default it warns where accelerate is not installed.
            low_cpu_mem_usage=find_spec("accelerate") is not None,
        )
    except (OSError, ValueError, RuntimeError, LookupError, TypeError, AttributeError) as error:
        reason = f"{type(error).__name__}: {_first_line(str(error))}"
        raise InputError(f"{folder} holds no network that diffusers can load ({reason}); save it again.") from None
    # diffusers fills what is missing with random weights.
    missing = sorted(found["missing_keys"])
    if missing:
        raise InputError(f"{folder} lacks {len(missing)} weights of its network (e.g. {missing[0]}); save it again.")
    assert isinstance(network, nn.Module)
    return network


def check_safetensors(folder: Path) -> None:
    """Refuse a model's folder whose weights lie in ``.bin`` files: these are pickle, whoever loads them.

    Args:
        folder: As ``save_pretrained`` made it.

    Raises:
        InputError: If it has no safetensors, or an index of theirs names other files.
    """
    files = sorted(path.name for path in folder.glob("*.safetensors"))
    for index in folder.glob("*.safetensors.index.json"):
        try:
            files += map(str, json.loads(index.read_bytes())["weight_map"].values())
        except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError):
            raise InputError(f"{index} is no index of safetensors files; save the model again.") from None
    other = [file for file in files if not file.endswith(".safetensors")]
    pickled = sorted(path.name for path in [*folder.glob("*.bin"), *folder.glob("*.pt")])
    if other or (pickled and not files):
        raise InputError(
            f"The weights in {folder} lie in {(other or pickled)[0]}, which is pickle and is never read; where you "
            "trust the file, convert it with from_pretrained(folder, use_safetensors=False).save_pretrained(folder) "
            "of the model's class, and delete it."
        )


def _first_line(text: str) -> str:
    return text.strip().partition("\n")[0][:200]
