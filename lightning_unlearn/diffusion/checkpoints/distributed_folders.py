"""Folders that a distributed training left: their kind, and the command that makes one file of them."""

from __future__ import annotations

from pathlib import Path

from lightning_unlearn.errors import InputError


def refuse_distributed(path: Path) -> None:
    """Refuse parts of a model that lie in a folder by ranks.

    Args:
        path: A folder, or a file within one.

    Raises:
        InputError: If it is of FSDP or DeepSpeed.
    """
    for folder in (path, *_children(path)) if path.is_dir() else (path.parent,):
        if path.is_dir() or path.suffix == ".distcp" or path.name == ".metadata":
            _refuse_torch(path, folder)
        if path.is_dir() or path.name.startswith(("zero_pp_rank_", "bf16_zero_pp_rank_")):
            _refuse_deepspeed(path, folder)


def _refuse_torch(path: Path, folder: Path) -> None:
    if not ((folder / ".metadata").is_file() or any(folder.glob("*.distcp"))):
        return
    command = f"python -m torch.distributed.checkpoint.format_utils dcp_to_torch {folder} {folder}.pt"
    result = f"{folder}.pt"
    if (folder / "meta.pt").is_file():
        command = f"python -m lightning.pytorch.utilities.consolidate_checkpoint {folder}"
        result = f"{folder}.consolidated"
    raise InputError(
        f"{path} is a sharded checkpoint of torch.distributed (FSDP), whose parts are no model by themselves; run "
        f"`{command}` and give {result}."
    )


def _refuse_deepspeed(path: Path, folder: Path) -> None:
    states = [*folder.glob("*mp_rank_*_model_states.pt"), *folder.glob("*zero_pp_rank_*_optim_states.pt")]
    script = next((place / "zero_to_fp32.py" for place in (folder, folder.parent) if _has_script(place)), None)
    if not states and not (script is not None and script.parent == folder):
        return
    root = folder if script is None or script.parent == folder else folder.parent
    # DeepSpeed finds the step's folder by the file `latest` above it.
    root = root.parent if script is None and (root.parent / "latest").is_file() else root
    run = f"python {script}" if script is not None else "python -m deepspeed.utils.zero_to_fp32"
    raise InputError(
        f"{path} is a checkpoint of DeepSpeed, whose parts are no model by themselves; run "
        f"`{run} {root} {root}/consolidated --safe_serialization` and give {root}/consolidated."
    )


def _has_script(folder: Path) -> bool:
    return (folder / "zero_to_fp32.py").is_file()


def _children(folder: Path) -> list[Path]:
    return sorted(child for child in folder.iterdir() if child.is_dir())
