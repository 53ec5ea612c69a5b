"""Weights out of the files that people have: Lightning checkpoints, safetensors, folders of diffusers."""

from __future__ import annotations

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
        averaged: For a checkpoint made under Lightning's ``WeightAveraging`` or ``EMAWeightAveraging``: whether to take the
            averaged weights, which it keeps as the state dict, or those that were being trained.

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
        heads = ", ".join(sorted({name.rsplit(missing[0], 1)[0] for name in state if name.endswith(missing[0])})) or "none"
        raise InputError(
            f"{path} lacks {len(missing)} of the network's {len(wanted)} weights under the prefix {prefix!r} "
            f"(e.g. {missing[0]}); prefixes that hold it: {heads}."
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
    if "state_dict" not in checkpoint:
        return {name: value for name, value in checkpoint.items() if isinstance(value, Tensor)}
    raw = checkpoint.get("current_model_state")
    state: dict[str, Tensor] = raw if raw is not None and not averaged else checkpoint["state_dict"]
    return state


def read_checkpoint(path: str) -> dict[str, Any]:
    """A PyTorch or Lightning checkpoint, loaded with ``weights_only=True``.

    Args:
        path: The file.

    Returns:
        Its content.

    Raises:
        InputError: If it can't be loaded so.
    """
    import pickle

    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, OSError) as error:
        reason = str(error).splitlines()[0][:160] if str(error) else type(error).__name__
        raise InputError(
            f"{path} can't be loaded without running code ({reason}); save its state_dict alone, with torch.save or safetensors."
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
        InputError: If a folder holds no network.
    """
    if isinstance(network, str):
        folder = Path(network)
        parts = [folder / name for name in ("unet", "transformer") if (folder / name / "config.json").is_file()]
        if not parts and not (folder / "config.json").is_file():
            raise InputError(f"{folder} is no folder of a diffusers pipeline or network; it needs a unet/ or a config.json.")
        from diffusers import AutoModel

        network = AutoModel.from_pretrained(str(parts[0] if parts else folder), local_files_only=True)
        assert isinstance(network, nn.Module)
    if weights is not None:
        load_weights(network, weights, prefix, averaged)
    return network.eval()
