"""Networks out of what people have: folders of diffusers, and checkpoints in any of their forms."""

from __future__ import annotations

import json
import warnings
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lightning_unlearn.diffusion.checkpoints import (
    AveragedChoice,
    WeightsOrigin,
    check_safetensors,
    find_weights,
    read_content,
    variant_of,
)
from lightning_unlearn.diffusion.checkpoints.files import first_line
from lightning_unlearn.diffusion.checkpoints.model_folders import AVERAGED_PARTS, has_variant, network_parts
from lightning_unlearn.errors import InputError


def load_weights(network: nn.Module, path: str, prefix: str = "", averaged: AveragedChoice = None) -> WeightsOrigin:
    """Load a network's weights from a file or folder, without running anything that is in it.

    Args:
        network: The network; every weight of it must be there. Weights are cast to its dtype.
        path: A Lightning ``.ckpt``, a PyTorch file, safetensors, the index of sharded safetensors, a single-file model
            (LDM, SGM, …), a ``checkpoint-N`` of diffusers' training scripts, or a network's folder.
        prefix: What stands before the network's names in it, e.g. ``"model.unet."``; found where only one fits.
        averaged: Whether averaged weights are taken: ``True``, ``False``, or the place in the file where they lie. By
            default where they stand for the model's weights: under Lightning's ``WeightAveraging``, which keeps them
            as the state dict, and in ``unet_ema`` beside ``unet``.

    Returns:
        Where the weights were found.

    Raises:
        InputError: If the file is missing or can't be read, lacks weights of the network, or holds several sets that
            could be meant.
    """
    chosen, origin = find_weights(network, path, read_content(path), prefix, averaged)
    wanted = network.state_dict()
    parameters = {name for name, _ in network.named_parameters()}
    missing = [name for name in wanted if name not in chosen]
    trained = [name for name in missing if name in parameters or name.endswith(("running_mean", "running_var"))]
    if trained:
        raise InputError(
            f"{path} lacks {len(trained)} of the network's {len(wanted)} weights in {origin.place or 'its names'} "
            f"(e.g. {trained[0]}); the file is of another model."
        )
    differing = [name for name in wanted if name in chosen and chosen[name].shape != wanted[name].shape]
    if differing:
        name = differing[0]
        raise InputError(
            f"{path}: {name} is {tuple(chosen[name].shape)}, but the network's is {tuple(wanted[name].shape)}; "
            "the file is of another model."
        )
    # What is missing now is constant: averages are kept of what is trained alone.
    taken = {name: chosen.get(name, tensor).to(tensor.dtype) for name, tensor in wanted.items()}
    network.load_state_dict(taken)
    return origin


def load_network(
    network: nn.Module | str, weights: str | None = None, prefix: str = "", averaged: AveragedChoice = None
) -> nn.Module:
    """The denoiser that a config names.

    Args:
        network: A network, or the folder of one that diffusers saved: a pipeline's, the network's own, or a
            ``checkpoint-N`` of a training. With ``weights`` its ``config.json`` suffices.
        weights: See :func:`load_weights`.
        prefix: See :func:`load_weights`.
        averaged: See :func:`load_weights`.

    Returns:
        The network, in eval mode.

    Raises:
        InputError: If a folder holds no network, or only part of its weights.
    """
    return load_network_with_origin(network, weights, prefix, averaged)[0]


def load_network_with_origin(
    network: nn.Module | str,
    weights: str | None = None,
    prefix: str = "",
    averaged: AveragedChoice = None,
    dtype: torch.dtype | None = None,
) -> tuple[nn.Module, WeightsOrigin | None]:
    """The denoiser that a config names, and where its weights came from.

    Args:
        network: See :func:`load_network`.
        weights: See :func:`load_weights`.
        prefix: See :func:`load_weights`.
        averaged: See :func:`load_weights`.
        dtype: To which its weights are rounded; by default they stay as they are loaded, in float32.

    Returns:
        The network, in eval mode; and the origin of its weights, ``None`` for a network that was given with them.

    Raises:
        InputError: See :func:`load_network`.
    """
    origin = None
    if isinstance(network, str):
        part = _network_folder(network, averaged if weights is None else None)
        if weights is not None or not (part / "config.json").is_file():
            origin_folder = weights if weights is not None else str(part)
            network = _from_config(Path(network), part)
            origin = load_weights(network, origin_folder, prefix, averaged)
            return rounded(network, dtype).eval(), origin
        network, origin = _from_diffusers(part, averaged, dtype)
    elif weights is None and averaged:
        warnings.warn("The network was given with its weights, so `averaged` chooses nothing; leave it out.")
    if weights is not None:
        origin = load_weights(network, weights, prefix, averaged)
    return rounded(network, dtype).eval(), origin


def network_without_weights(path: str, averaged: AveragedChoice = None) -> nn.Module:
    """A network as its config describes it, on torch's meta device: all its layers and shapes, and no numbers.

    Args:
        path: The folder of a diffusers pipeline or network; only its ``config.json`` is read.
        averaged: As in :func:`load_network`.

    Returns:
        The network, frozen and in eval mode.

    Raises:
        InputError: If there is no config, or diffusers can't make a network of it.
    """
    part = _network_folder(path, averaged)
    with torch.device("meta"):
        return _from_config(Path(path), part).eval().requires_grad_(False)


def _network_folder(path: str, averaged: AveragedChoice) -> Path:
    folder = Path(path)
    if folder.is_file():
        raise InputError(
            f"{path} is a file, and no config says what network it is of; give the folder of a pipeline of its kind as "
            "`network` (the config.json files suffice), and the file as `weights`."
        )
    if (folder / "config.json").is_file():
        return folder
    parts = network_parts(folder) if folder.is_dir() else []
    if not parts:
        raise InputError(
            f"{folder} is no folder of a diffusers pipeline or network; it needs a unet/ or a config.json."
        )
    # The name of the place, as of a file's.
    named = [part for part in parts if isinstance(averaged, str) and part.name == averaged]
    averages = [part for part in parts if part.name in AVERAGED_PARTS]
    trained = [part for part in parts if part not in averages]
    if averaged is False and not trained:
        raise InputError(f"{folder} holds only averaged weights ({averages[0].name}), but `averaged` is false.")
    chosen = (named or ([] if averaged is False else averages) or trained)[0]
    if averaged is None and averages and trained:
        warnings.warn(
            f"Of {folder} the averaged weights are taken, in {chosen.name}; with `averaged: false` those in "
            f"{trained[0].name} are."
        )
    return chosen


def _config_of(folder: Path, part: Path) -> Path:
    """SimpleTuner's averages have no config of their own: the one of the weights beside them is theirs."""
    beside = [place for place in (part, folder, *network_parts(folder)) if (place / "config.json").is_file()]
    if not beside:
        raise InputError(f"{part} has no config.json, and none lies beside it; give the pipeline as `network`.")
    return beside[0]


def _from_config(folder: Path, part: Path) -> nn.Module:
    place = _config_of(folder, part)
    network_class = _network_class(place)
    try:
        network = network_class.from_config(network_class.load_config(str(place), local_files_only=True))
    except (OSError, ValueError, RuntimeError, LookupError, TypeError, AttributeError) as error:
        raise _unusable(place, error) from None
    assert isinstance(network, nn.Module)
    return network


def _network_class(folder: Path) -> Any:
    import diffusers

    try:
        # Not AutoModel, which can't say what was missing (diffusers 0.42).
        return getattr(diffusers, json.loads((folder / "config.json").read_bytes())["_class_name"])
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RuntimeError) as error:
        raise _unusable(folder, error) from None


def _unusable(folder: Path, error: Exception) -> InputError:
    reason = f"{type(error).__name__}: {first_line(str(error))}"
    return InputError(f"{folder} holds no network that diffusers can load ({reason}); save it again.")


def rounded(network: nn.Module, dtype: torch.dtype | None) -> nn.Module:
    """A network with its weights in another type.

    Args:
        network: It is cast in place.
        dtype: The type; ``None`` for the one that it has.

    Returns:
        The network.
    """
    # Not diffusers' own `to`, which warns of any type.
    return network if dtype is None else nn.Module.to(network, dtype)


def _from_diffusers(
    folder: Path, averaged: AveragedChoice, dtype: torch.dtype | None = None
) -> tuple[nn.Module, WeightsOrigin]:
    check_safetensors(folder)
    variant = variant_of(folder, averaged if isinstance(averaged, bool) else None)
    network_class = _network_class(folder)
    try:
        network, found = network_class.from_pretrained(
            str(folder),
            local_files_only=True,
            output_loading_info=True,
            variant=variant,
            torch_dtype=dtype,
            # Without it diffusers falls back on .bin, which is pickle.
            use_safetensors=True,
            # By default it warns where accelerate is not installed.
            low_cpu_mem_usage=find_spec("accelerate") is not None,
        )
    except (OSError, ValueError, RuntimeError, LookupError, TypeError, AttributeError) as error:
        raise _unusable(folder, error) from None
    # diffusers fills what is missing with random weights.
    missing = sorted(found["missing_keys"])
    if missing:
        raise InputError(f"{folder} lacks {len(missing)} weights of its network (e.g. {missing[0]}); save it again.")
    assert isinstance(network, nn.Module)
    # Weights beside others that are said not to be averages are averages.
    taken = folder.name in AVERAGED_PARTS or variant == "ema" or (variant is None and has_variant(folder, "non_ema"))
    left = ("ema",) if not taken and has_variant(folder, "ema") else ()
    if left and averaged is None:
        warnings.warn(f"{folder} also holds averaged weights, as the variant ema; `averaged: true` takes them.")
    if averaged is True and not taken:
        warnings.warn(f"{folder} holds no averaged weights of its own; those that are there are taken.")
    return network, WeightsOrigin(str(folder), variant or "", taken, left)
