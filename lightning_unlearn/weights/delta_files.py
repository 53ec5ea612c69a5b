"""Checkpoints that hold deltas: written whole, and read only where they are what was written by an unlearning."""

from __future__ import annotations

import io
import json
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.plugins.io import TorchCheckpointIO
from packaging.version import InvalidVersion, Version
from torch import Tensor
from typing_extensions import override

from lightning_unlearn.data.files import reason_of, write_atomically
from lightning_unlearn.diffusion.checkpoints import read_checkpoint
from lightning_unlearn.errors import InputError
from lightning_unlearn.fingerprints import settings_digest, tensors_digest
from lightning_unlearn.weights.deltas import CHECKPOINT_KEY

_FIELDS: dict[str, type] = {
    "targets": list,
    "members": dict,
    "results": dict,
    "settings": dict,
    "fingerprints": dict,
    "finished": bool,
    "digest": str,
}
_PRINTS = ("weights", "fisher", "unlearning")


class WholeCheckpointIO(TorchCheckpointIO):
    """Lightning's way to keep checkpoints, but for local files: beside their place, synced, then renamed.

    Lightning's own goes through ``TMPDIR`` and copies from there, which a kill or a full disk cuts short.
    """

    @override
    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any | None = None) -> None:
        """Write a checkpoint.

        Args:
            checkpoint: Lightning's.
            path: Of the file, or an address that Lightning knows.
            storage_options: Lightning's.
        """
        if storage_options is not None or "://" in str(path):
            super().save_checkpoint(checkpoint, path, storage_options)
            return
        stream = io.BytesIO()
        torch.save(checkpoint, stream)
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, stream.getbuffer())


def sealed_targets(about: Mapping[str, Any], deltas: Mapping[str, Tensor]) -> dict[str, Any]:
    """What a checkpoint says of its targets, with a digest of that and of the deltas.

    Args:
        about: Targets, members, results, settings, fingerprints, and whether the unlearning ended.
        deltas: The checkpoint's state dict.

    Returns:
        Plain types.
    """
    return {**about, "digest": _digest(about, deltas)}


def _digest(about: Mapping[str, Any], deltas: Mapping[str, Tensor]) -> str:
    rest = json.loads(json.dumps({name: value for name, value in about.items() if name != "digest"}))
    return settings_digest({"about": rest, "deltas": tensors_digest(deltas)})


def read_targets(checkpoint: Mapping[str, Any], where: str) -> dict[str, Any]:
    """What a checkpoint says of its targets.

    Args:
        checkpoint: As Lightning loads it.
        where: Its path, for the message.

    Returns:
        Keys ``targets``, ``members``, ``results``, ``settings``, ``fingerprints`` and ``finished``.

    Raises:
        InputError: If it is not one of an ``UnlearningModule``, was made by an older version, or was altered.
    """
    if CHECKPOINT_KEY not in checkpoint:
        raise InputError(
            f"{where} holds no deltas; unlearn the queries first, with `lightning-unlearn fit` or `attribute`."
        )
    about, state = checkpoint[CHECKPOINT_KEY], checkpoint.get("state_dict")
    if isinstance(about, dict) and not {"finished", "digest"} & about.keys():
        raise InputError(
            f"{where} does not say whether its unlearning ended, as older versions did not; remove it and unlearn "
            "again."
        )
    if not _has_form(about, state) or not isinstance(state, dict) or not _is_unaltered(about, state):
        raise InputError(f"{where} was altered after it was written; remove it and unlearn again.")
    return dict(about)


def _has_form(about: Any, state: Any) -> bool:
    return (
        isinstance(about, dict)
        and all(isinstance(about.get(name), kind) for name, kind in _FIELDS.items())
        and all(isinstance(about["fingerprints"].get(name), str) for name in _PRINTS)
        and isinstance(state, dict)
        and all(isinstance(value, Tensor) for value in state.values())
    )


def _is_unaltered(about: dict[str, Any], state: dict[str, Tensor]) -> bool:
    try:
        return bool(about["digest"] == _digest(about, state))
    except (TypeError, ValueError, RecursionError):
        return False


def _is_version(text: Any) -> bool:
    """Whether Lightning, which asks for it before anything else, can read a version."""
    try:
        return isinstance(text, str) and bool(Version(text))
    except InvalidVersion:
        return False


def read_deltas(path: str, *, finished: bool = True) -> dict[str, Any]:
    """What a file of deltas says of its targets, once it is certain that the whole file is as it was written.

    Args:
        path: The checkpoint.
        finished: Whether the unlearning must have ended, as for scoring; else it may be gone on with.

    Returns:
        See :func:`read_targets`.

    Raises:
        InputError: If the file is damaged, holds no deltas, was altered, or is of an unlearning that did not end.
    """
    # The checksums of its parts, which nobody compares while a file is mapped into memory.
    try:
        with zipfile.ZipFile(path) as archive:
            spoiled = archive.testzip()
    except (zipfile.BadZipFile, OSError, ValueError, EOFError, NotImplementedError, RuntimeError) as error:
        raise InputError(
            f"{path} is no checkpoint of deltas, or damaged ({reason_of(error)}); give another file, or remove it "
            "and unlearn again."
        ) from None
    if spoiled is not None:
        raise InputError(f"{path} is damaged (a checksum of it is wrong); remove it and unlearn again.")
    checkpoint = read_checkpoint(path)
    about = read_targets(checkpoint, path)
    if not _is_version(checkpoint.get("pytorch-lightning_version")):
        raise InputError(f"{path} was altered after it was written; remove it and unlearn again.")
    if finished and not about["finished"]:
        raise InputError(
            f"{path} is of an unlearning that did not end; go on with it by fit and ckpt_path, or unlearn again."
        )
    return about
