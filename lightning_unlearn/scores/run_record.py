"""The record of a run, ``run.json``: what its scores depend on, and where they come from."""

from __future__ import annotations

from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

from lightning_unlearn.data.addresses import is_address, shown_address
from lightning_unlearn.data.files import json_with_digest, write_atomically
from lightning_unlearn.data.shards import ShardInfo, shard_id
from lightning_unlearn.errors import InputError
from lightning_unlearn.scores.files import RUN_FILE, is_scored, read_run

PACKAGES = ("lightning-unlearn", "torch", "lightning", "diffusers", "webdataset")


def earlier_run(folder: Path, fingerprints: Mapping[str, str]) -> dict[str, Any]:
    """What the folder says of the same run, begun before.

    Args:
        folder: The run's folder.
        fingerprints: Of this run.

    Returns:
        The content of ``run.json``, nothing if there is none.

    Raises:
        InputError: If the folder holds another run.
    """
    run = read_run(folder)
    if run is not None and run["fingerprints"] != fingerprints:
        names = [*fingerprints, *(name for name in run["fingerprints"] if name not in fingerprints)]
        differing = [name for name in names if run["fingerprints"].get(name) != fingerprints.get(name)]
        raise InputError(
            f"{folder} holds scores of another run (other {', '.join(differing)}); score into another "
            "folder, or remove it."
        )
    return run or {}


def record_run(folder: Path, about: Mapping[str, Any], datamodule: Any, earlier: Mapping[str, Any]) -> dict[str, Any]:
    """Write what is known of a run before its first score.

    Args:
        folder: The run's folder; it is made.
        about: What the run says of itself: fingerprints, settings, targets.
        datamodule: With ``shards`` and ``query_patterns``.
        earlier: What :func:`earlier_run` gave, for the time that it took already.

    Returns:
        The content of ``run.json``.

    Raises:
        InputError: If it can't be written.
    """
    content = {
        **about,
        "shards": {
            shard_id(s.url): {"url": _absolute(s.url), "samples": s.samples, "bytes": s.bytes, "version": s.version}
            for s in getattr(datamodule, "shards", [])
        },
        "query_shards": [_absolute(pattern) for pattern in _as_list(getattr(datamodule, "query_patterns", []))],
        "versions": {name: _version(name) for name in PACKAGES},
        "seconds": earlier.get("seconds", 0.0),
    }
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_run(folder, content)
    except OSError as error:
        raise InputError(
            f"The run can't be recorded in {folder} ({error.strerror}); free the disk, or score into another folder."
        ) from None
    return content


def write_run(folder: Path, content: Mapping[str, Any]) -> None:
    """Write ``run.json``, whole or not at all, with a digest of what it says.

    Args:
        folder: The run's folder.
        content: What it holds.
    """
    write_atomically(folder / RUN_FILE, json_with_digest(content))


def scored_shards(folder: Path, shards: list[ShardInfo]) -> frozenset[str]:
    """The shards whose scores are written, and are of the samples that they hold now.

    Args:
        folder: The run's folder.
        shards: All shards.

    Returns:
        Their identifiers.
    """
    return frozenset(shard_id(shard.url) for shard in shards if is_scored(folder, shard_id(shard.url), shard.version))


def _as_list(patterns: str | list[str] | None) -> list[str]:
    return [patterns] if isinstance(patterns, str) else patterns or []


def _absolute(url: str) -> str:
    # A local path as it is called from any folder, so that the report can be written from another one; of an address
    # only what is not secret.
    return shown_address(url) if is_address(url) else str(Path(url).expanduser().resolve())


def _version(package: str) -> str:
    try:
        return version(package)
    except Exception:  # not installed as a package, e.g. run from a staged tree
        return "unknown"
