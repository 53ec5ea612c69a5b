"""From what a user names to the list of shards: folders, brace patterns, addresses, and the manifests beside them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import braceexpand

from lightning_unlearn.data.shards import MANIFEST, ShardInfo
from lightning_unlearn.errors import InputError


def list_shards(shards: str | Sequence[str], *, allow_pipe: bool = False) -> list[ShardInfo]:
    """All shards that a user named, largest first where a manifest gives sizes, then by address.

    Args:
        shards: Folders, paths or http(s) addresses, with brace patterns such as ``data-{000000..000099}.tar``; a folder
            means the shards in its manifest, or all its ``.tar`` files.
        allow_pipe: Whether ``pipe:`` addresses, which run a command, are let through.

    Returns:
        The shards; the same list on every rank.

    Raises:
        InputError: If there is none, one is missing or of an unknown kind, or is a command that was not asked for.
    """
    named = [shards] if isinstance(shards, str) else list(shards)
    found: dict[str, ShardInfo] = {}
    manifests: dict[str, dict[str, ShardInfo]] = {}
    for url in (url for pattern in named for url in _braces(pattern)):
        if url.startswith("pipe:") and not allow_pipe:
            raise InputError(f"{url!r} runs a command; set allow_pipe=True if you trust it.")
        for info in _expand(url, manifests):
            # The same file may be named in two ways.
            found.setdefault(info.url if _is_address(info.url) else str(Path(info.url).resolve()), info)
    if not found:
        raise InputError(f"No shard found in {named}; name a folder of .tar files, paths, brace patterns or addresses.")
    return sorted(found.values(), key=lambda info: (-(info.bytes or 0), info.url))


def _is_address(url: str) -> bool:
    return "://" in url or url.startswith("pipe:")


def _braces(pattern: str) -> list[str]:
    if pattern.startswith("pipe:"):  # its braces are the shell's
        return [pattern]
    try:
        return list(braceexpand.braceexpand(pattern))
    except ValueError as error:
        raise InputError(f"{pattern!r} is no brace pattern ({error}); write it like data-{{000..099}}.tar.") from None


def _expand(url: str, manifests: dict[str, dict[str, ShardInfo]]) -> list[ShardInfo]:
    if url.startswith(("http://", "https://", "pipe:")):
        return [ShardInfo(url)]
    if _is_address(url):
        raise InputError(f"Shards are not read from {url!r}; give a path, an http(s) address, or a `pipe:` command.")
    path = Path(url).expanduser()
    if path.is_dir():
        entries = _manifest(path, manifests)
        if entries:
            missing = [info.url for info in entries.values() if not Path(info.url).is_file()]
            if missing:
                raise InputError(
                    f"The manifest of {path} names {len(missing)} shards that are not there (e.g. {missing[0]}); "
                    "copy them or make the manifest again."
                )
            return list(entries.values())
        return [ShardInfo(str(tar), bytes=tar.stat().st_size) for tar in sorted(path.glob("*.tar"))]
    if not path.is_file():
        raise InputError(f"There is no shard at {path}; check the path, or the folder you run from.")
    return [_manifest(path.parent, manifests).get(path.name, ShardInfo(str(path), bytes=path.stat().st_size))]


def _manifest(folder: Path, manifests: dict[str, dict[str, ShardInfo]]) -> dict[str, ShardInfo]:
    if str(folder) not in manifests:
        entries: list[dict[str, Any]] = read_manifest(folder).get("shards", [])
        manifests[str(folder)] = {
            entry["name"]: ShardInfo(
                str(folder / entry["name"]), entry.get("samples"), entry.get("bytes"), entry.get("sha256")
            )
            for entry in entries
        }
    return manifests[str(folder)]


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a folder of shards.

    Args:
        folder: The folder.

    Returns:
        Its manifest, empty if there is none.

    Raises:
        InputError: If it can't be read.
    """
    path = folder / MANIFEST
    if not path.is_file():
        return {}
    try:
        manifest = json.loads(path.read_bytes())
        sound = all(
            isinstance(entry["name"], str)
            and isinstance(entry.get("samples"), int | None)
            and isinstance(entry.get("bytes"), int | None)
            for entry in manifest["shards"]
        )
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        sound = False
    if not sound:
        raise InputError(f"{path} is not a manifest of shards; remove it or make it again.")
    return dict(manifest)
