"""From what a user names to the list of shards: folders, brace patterns, addresses, and the manifests beside them."""

from __future__ import annotations

import json
import os
import re
import stat
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import braceexpand

from lightning_unlearn.data.addresses import is_address, is_command, lasting_address, shown_address
from lightning_unlearn.data.groups import groups_from_json
from lightning_unlearn.data.samples import PICTURE_FIELDS
from lightning_unlearn.data.shards import MANIFEST, ShardInfo
from lightning_unlearn.datamodules.remote import check_kind, fresh_facts
from lightning_unlearn.errors import InputError

READ = (".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tbz2", ".tar.xz", ".txz")
UNREAD = (".tar.zst", ".tzst", ".tar.lz4", ".tar.lz", ".tar.z", ".tar.lzma", ".tar.br")
# Servers are asked about so many shards at once.
ASKED_AT_ONCE = 16


def list_shards(shards: str | Sequence[str], *, allow_pipe: bool = False) -> list[ShardInfo]:
    """All shards that a user named, largest first where a manifest gives sizes, then by address.

    Args:
        shards: Folders, paths or addresses (http(s), and what fsspec knows: s3, gs, hf, …), with brace patterns such as
            ``data-{000000..000099}.tar``; a folder means the shards in its manifest, or all its tar files. What exists
            under a name with braces is meant by it.
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
        if is_command(url) and not allow_pipe:
            raise InputError(f"{url!r} runs a command; set allow_pipe=True if you trust it.")
        for info in _expand(url, manifests):
            # The same file may be named in two ways.
            found.setdefault(lasting_address(info.url), info)
    if not found:
        raise InputError(f"No shard found in {named}; name a folder of .tar files, paths, brace patterns or addresses.")
    return sorted(found.values(), key=lambda info: (-(info.bytes or 0), info.url))


def with_facts(shards: Sequence[ShardInfo]) -> list[ShardInfo]:
    """Shards with what their servers say of them now, so that one that is made anew is not taken for the old one.

    Args:
        shards: In any order.

    Returns:
        The same ones in the same order. Of local ones, and those with a digest, enough is known.
    """
    remote = [s for s in shards if is_address(s.url) and not is_command(s.url) and s.sha256 is None and s.tag is None]
    with ThreadPoolExecutor(ASKED_AT_ONCE) as pool:
        found = dict(zip([shard.url for shard in remote], pool.map(fresh_facts, [s.url for s in remote]), strict=True))
    return [
        shard if (facts := found.get(shard.url)) is None else replace(shard, bytes=facts.size, tag=facts.tag)
        for shard in shards
    ]


def _braces(pattern: str) -> list[str]:
    # A command's braces are the shell's, and those of a file that is called so are its own.
    if is_command(pattern) or (not is_address(pattern) and _exists(pattern)):
        return [pattern]
    try:
        return list(braceexpand.braceexpand(pattern))
    except ValueError as error:
        raise InputError(
            f"{shown_address(pattern)!r} is no brace pattern ({error}); write it like data-{{000..099}}.tar."
        ) from None


def _exists(name: str) -> bool:
    try:
        return _local(name).exists()
    except (OSError, ValueError):  # too long, a null byte
        return False


def _local(name: str) -> Path:
    # Not Path.expanduser, which takes ./~x for the home of a user x. An absolute path is never taken for an address or
    # a command, whatever a file is called.
    return Path(os.path.abspath(os.path.expanduser(name)))


def _expand(url: str, manifests: dict[str, dict[str, ShardInfo]]) -> list[ShardInfo]:
    if is_address(url):
        if not is_command(url):
            check_kind(url)
        return [ShardInfo(url)]
    if not url.strip():
        raise InputError("An empty name is given for shards; name a folder, paths, brace patterns or addresses.")
    if not _exists(url):
        raise InputError(
            f"There is no shard at {url}; check the path, or the folder you run from. Several shards are named by "
            "their folder or by braces, and other places by addresses such as http(s)."
        )
    path = _local(url)
    try:
        return _in_folder(path, manifests) if path.is_dir() else [_alone(path, manifests)]
    except UnicodeEncodeError:
        raise InputError(f"The name of {path} is not UTF-8; rename it.") from None
    except OSError as error:
        raise InputError(
            f"{error.filename or path} can't be read ({error.strerror}); check the file and who may read it."
        ) from None


def _alone(path: Path, manifests: dict[str, dict[str, ShardInfo]]) -> ShardInfo:
    return _manifest(path.parent, manifests).get(path.name) or _plain(path)


def _plain(path: Path) -> ShardInfo:
    path.name.encode()
    if path.suffix.lower()[1:] in PICTURE_FIELDS:
        raise _of_pictures(path, path.parent)
    state = path.stat()
    if not stat.S_ISREG(state.st_mode) and not stat.S_ISDIR(state.st_mode):
        raise InputError(f"{path} is no regular file; name files of shards.")
    return ShardInfo(str(path), bytes=state.st_size)


def _in_folder(folder: Path, manifests: dict[str, dict[str, ShardInfo]]) -> list[ShardInfo]:
    entries = _manifest(folder, manifests)
    if entries:
        missing = [info.url for info in entries.values() if not Path(info.url).is_file()]
        if missing:
            raise InputError(
                f"The manifest of {folder} names {len(missing)} shards that are not there (e.g. {missing[0]}); "
                "copy them or make the manifest again."
            )
        return list(entries.values())
    paths = sorted(folder.iterdir())
    unread = [path.name for path in paths if path.name.lower().endswith(UNREAD)]
    if unread:
        raise InputError(
            f"{folder} holds {unread[0]!r}, and shards are read as {', '.join(READ)} alone; pack it in another way."
        )
    found = [_plain(path) for path in paths if path.name.lower().endswith(READ)]
    if not found:
        _refuse_pictures(folder)
        raise InputError(f"No shard found in {folder}; name folders that hold .tar files.")
    return found


def _refuse_pictures(folder: Path) -> None:
    """Tell a person who names pictures, in a folder or those right below it, what shards are."""
    places = [folder, *(path for path in sorted(folder.iterdir()) if path.is_dir())]
    inside = (path for place in places for path in sorted(place.iterdir()))
    picture = next((path for path in inside if path.suffix.lower()[1:] in PICTURE_FIELDS), None)
    if picture is not None:
        raise _of_pictures(picture, folder)


def _of_pictures(picture: Path, folder: Path) -> InputError:
    return InputError(
        f"{folder} holds pictures (e.g. {picture.name!r}), not shards; make shards of them with `lightning-unlearn "
        f"prepare --images {folder} --output FOLDER …`, and name that folder."
    )


def _manifest(folder: Path, manifests: dict[str, dict[str, ShardInfo]]) -> dict[str, ShardInfo]:
    if str(folder) not in manifests:
        entries: list[dict[str, Any]] = read_manifest(folder).get("shards", [])
        manifests[str(folder)] = {
            entry["name"]: ShardInfo(
                str(folder / entry["name"]),
                entry.get("samples"),
                entry.get("bytes"),
                None if entry.get("sha256") is None else entry["sha256"].lower(),
                groups=groups_from_json(entry.get("groups")),
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
        entries = manifest["shards"]
        sound = all(map(_is_entry, entries)) and len({entry["name"] for entry in entries}) == len(entries)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        sound = False
    if not sound:
        raise InputError(f"{path} is not a manifest of shards; remove it or make it again.")
    return dict(manifest)


def _is_entry(entry: Any) -> bool:
    # A name leads to no other folder than those below.
    name, sha256 = entry["name"], entry.get("sha256")
    groups_from_json(entry.get("groups"))  # raises where it is none
    return (
        isinstance(name, str)
        and bool(name)
        and "\0" not in name
        and not Path(name).is_absolute()
        and ".." not in Path(name).parts
        and all(isinstance(entry.get(number), int | None) for number in ("samples", "bytes"))
        and (sha256 is None or (isinstance(sha256, str) and re.fullmatch("[0-9a-fA-F]{64}", sha256) is not None))
    )
