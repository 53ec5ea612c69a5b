"""Folders as ``save_pretrained`` and diffusers' training scripts make them: which part, which variant, which file."""

from __future__ import annotations

import json
import re
from pathlib import Path

from lightning_unlearn.errors import InputError

# The averaged ones beside the trained ones, as diffusers' training scripts and SimpleTuner save them.
AVERAGED_PARTS = ("unet_ema", "transformer_ema")
_PARTS = ("unet", "transformer", *AVERAGED_PARTS)
# What diffusers and transformers call their files; others lie beside them, such as adapters.
_STEMS = ("diffusion_pytorch_model",)
# SimpleTuner's, where it does not write safetensors.
_NUMBERED_AVERAGES = "ema_model.pt"
# diffusers puts a variant before the number of a shard, and before 0.30 put it behind.
_NAME = re.compile(r"(?P<stem>\w+?)(?:\.(?P<variant>\w+))?(?:-\d+-of-\d+)?(?:\.(?P<old>\w+))?\.safetensors")
_INDEX = re.compile(r"(?P<stem>\w+)\.safetensors\.index(?:\.(?P<variant>\w+))?\.json")


def network_parts(folder: Path) -> list[Path]:
    """The folders of a network within a pipeline's or a training's.

    Args:
        folder: Of a pipeline, or a ``checkpoint-N``.

    Returns:
        Those that hold weights or a config; the averaged ones last.
    """
    parts = [folder / name for name in _PARTS]
    return [part for part in parts if (part / "config.json").is_file() or (part.is_dir() and weight_files(part))]


def weight_files(folder: Path) -> list[Path]:
    """The sets of weights of a folder, each by one file: itself, or the index of its shards.

    Args:
        folder: As ``save_pretrained`` made it.

    Returns:
        The files; of several variants all, unless one of them has no name of its own.
    """
    found: dict[tuple[str, str | None], Path] = {}
    for path in sorted(folder.glob("*.safetensors.index*.json")):
        if index := _INDEX.fullmatch(path.name):
            found[index["stem"], index["variant"]] = path
    for path in sorted(folder.glob("*.safetensors")):
        name = _NAME.fullmatch(path.name)
        found.setdefault((name["stem"], name["variant"] or name["old"]) if name else (path.stem, None), path)
    if not found and (folder / _NUMBERED_AVERAGES).is_file():
        return [folder / _NUMBERED_AVERAGES]
    stems = {stem for stem, _ in found}
    stem = next((stem for stem in _STEMS if stem in stems), None)
    files = {key: path for key, path in found.items() if stem is None or key[0] == stem}
    plain = [path for (_, variant), path in files.items() if variant is None]
    return plain or list(files.values())


def variant_of(folder: Path, averaged: bool | None = None) -> str | None:
    """Which variant of its weights a folder has, as ``from_pretrained`` wants to be told.

    Args:
        folder: As ``save_pretrained`` made it.
        averaged: Which is taken where ``ema`` or ``non_ema`` weights lie beside each other.

    Returns:
        ``None`` where the weights are there without one; otherwise the only one that is there.

    Raises:
        InputError: If there are several, and none without a name.
    """
    variants = _variants(folder)
    if averaged and "ema" in variants:
        return "ema"
    if averaged is False and "non_ema" in variants:
        return "non_ema"
    if None in variants or not variants:
        return None
    if len(variants) > 1:
        raise InputError(
            f"{folder} has its weights only as the variants {', '.join(sorted(map(str, variants)))}; leave one of them "
            "there, or give its file as `weights`."
        )
    return next(iter(variants))


def has_variant(folder: Path, variant: str) -> bool:
    """Whether a folder has a variant of its weights, whatever else it has.

    Args:
        folder: As ``save_pretrained`` made it.
        variant: Its name, e.g. ``"non_ema"``.

    Returns:
        Whether it has.
    """
    return variant in _variants(folder)


def _variants(folder: Path) -> set[str | None]:
    names = [_NAME.fullmatch(path.name) for path in folder.glob("*.safetensors")]
    return {name["variant"] or name["old"] for name in names if name}


def check_safetensors(folder: Path) -> None:
    """Refuse a model's folder whose weights lie in ``.bin`` files: these are pickle, whoever loads them.

    Args:
        folder: As ``save_pretrained`` made it.

    Raises:
        InputError: If it has no safetensors, or an index of theirs names other files.
    """
    files = sorted(path.name for path in folder.glob("*.safetensors"))
    for index in folder.glob("*.safetensors.index*.json"):
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
