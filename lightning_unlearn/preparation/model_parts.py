"""Parts of models that `prepare` runs, out of local folders and from safetensors alone."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lightning_unlearn.diffusion.checkpoints import check_safetensors, variant_of
from lightning_unlearn.diffusion.loading import network_without_weights
from lightning_unlearn.errors import InputError
from lightning_unlearn.preparation.inputs import Array


def config_of(folder: Path) -> dict[str, Any]:
    """The config of a model.

    Args:
        folder: Of the model.

    Returns:
        Its ``config.json``.

    Raises:
        InputError: If there is none, or it is none.
    """
    path = folder / "config.json"
    if not path.is_file():
        raise InputError(f"There is no {path}; name a folder that save_pretrained made, of diffusers or transformers.")
    try:
        config = json.loads(path.read_text())
    except ValueError:
        config = None
    if not isinstance(config, dict):
        raise InputError(f"{path} is not a config; save the model again with save_pretrained.")
    return config


def network_size(folder: Path, scale: int) -> tuple[int, int]:
    """What a pipeline's network was trained on.

    Args:
        folder: Of the pipeline.
        scale: Pixels a latent, along a side.

    Returns:
        ``(height, width)`` in pixels.

    Raises:
        InputError: If no config says it.
    """
    for name in ("unet", "transformer"):
        if (folder / name / "config.json").is_file():
            match config_of(folder / name).get("sample_size"):
                case int(side):
                    return side * scale, side * scale
                case [int(height), int(width)]:
                    return height * scale, width * scale
    raise InputError(f"{folder} has no unet or transformer that says its sample_size; set size, in pixels.")


def network_beside(folder: Path) -> nn.Module | None:
    """The network of a pipeline, without its weights.

    Args:
        folder: Of the pipeline.

    Returns:
        The network on the meta device; ``None`` where the folder holds none.
    """
    parts = [name for name in ("unet", "transformer") if (folder / name / "config.json").is_file()]
    return network_without_weights(str(folder / parts[0])) if parts else None


def transformers_library() -> Any:
    """The library, which is an extra.

    Returns:
        It.

    Raises:
        InputError: If it is not installed.
    """
    try:
        import transformers
    except ImportError:
        raise InputError("Text encoders need transformers; `pip install lightning-unlearn[text]`.") from None
    return transformers


def load_model(kind: Any, folder: Path, **settings: Any) -> Any:
    """A model whose weights are all in its folder, in float32 and eval mode.

    Args:
        kind: Its class.
        folder: As ``save_pretrained`` made it.
        **settings: Of the class's ``from_pretrained``.

    Returns:
        The model.

    Raises:
        InputError: If it can't be loaded, or weights are missing.
    """
    check_safetensors(folder)
    if not any(folder.glob("*.safetensors")):
        raise InputError(f"{folder} has no .safetensors file; save the model again with save_pretrained.")
    settings |= {"use_safetensors": True, "output_loading_info": True, "variant": variant_of(folder)}
    model, info = load_part(kind.from_pretrained, folder, **settings)
    # Weights that the file lacks are random; that is harmless only for a decoder and a pooler, which are not used.
    missing = [name for name in info["missing_keys"] if not name.startswith(("decoder.", "post_quant", "pooler."))]
    if missing:
        raise InputError(f"{folder} lacks {len(missing)} weights of its model (e.g. {min(missing)}); save it again.")
    return model.to(torch.float32).eval()


def load_part(loader: Callable[..., Any], folder: Path, **settings: Any) -> Any:
    """What a library's loader makes of a folder, without asking a hub.

    Args:
        loader: Such as a class's ``from_pretrained``.
        folder: As ``save_pretrained`` made it.
        **settings: Of the loader.

    Returns:
        What it makes.

    Raises:
        InputError: If it can't.
    """
    if not folder.is_dir():
        raise InputError(f"There is no folder {folder}; name one that save_pretrained made.")
    try:
        return loader(str(folder), local_files_only=True, **settings)
    except Exception as error:  # loaders raise nearly anything at damaged files
        reason = (str(error).splitlines() or [type(error).__name__])[0][:200]
        raise InputError(f"{folder} can't be loaded ({reason}); save it again with save_pretrained.") from None


def as_numpy(tensor: Tensor) -> Array:
    """A tensor as it is stored.

    Args:
        tensor: On any device.

    Returns:
        The array, float32.
    """
    array: Array = tensor.float().cpu().numpy()
    return array
