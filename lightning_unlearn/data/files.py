"""Files of a run: written whole or not at all where they will lie, and JSON that shows whether it was altered."""

from __future__ import annotations

import contextlib
import json
import os
import socket
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from uuid import uuid4

from lightning_unlearn.errors import InputError
from lightning_unlearn.fingerprints import settings_digest

# Of a JSON file that holds a digest of the rest of it; files from before there was one have no format either.
FORMAT = 2


def write_atomically(path: str | os.PathLike[str], content: bytes | memoryview) -> None:
    """Write a file whole or not at all: beside its place, synced, then renamed, and the folder synced.

    It lies in its own folder from the first byte on, so that neither another disk nor ``TMPDIR`` has a part in it. What
    a killed process of this machine left under a temporary name of the same file is removed first.

    Args:
        path: The file, in a folder that is there.
        content: Its bytes.
    """
    path = Path(path)
    _remove_leftovers(path)
    temporary = path.with_name(f".{path.name}.{_place()}-{os.getpid()}-{uuid4().hex[:8]}.tmp")
    try:
        with temporary.open("xb") as stream:
            stream.write(content)
            stream.flush()
            os.fsync(stream.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    _sync_folder(path.parent)


def _place() -> str:
    return "".join(letter for letter in socket.gethostname() if letter.isalnum())[:32]


def _remove_leftovers(path: Path) -> None:
    head = f".{path.name}.{_place()}-"
    with contextlib.suppress(OSError):
        for name in os.listdir(path.parent):
            if name.startswith(head) and name.endswith(".tmp"):
                process = name.removeprefix(head).partition("-")[0]
                if process.isdecimal() and not _lives(int(process)):
                    (path.parent / name).unlink(missing_ok=True)


def _lives(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except (PermissionError, OverflowError):
        pass
    return True


def _sync_folder(folder: Path) -> None:
    """Make a renaming last; not every file system knows how to, and the file itself is synced already."""
    with contextlib.suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def check_folder(folder: Path, remedy: str) -> None:
    """Make a folder and write a little into it, so that what keeps files out of it shows before long work.

    Args:
        folder: The folder.
        remedy: What to do where it can't be written to, as the end of a sentence.

    Raises:
        InputError: If it can't be made, or nothing can be written to it.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"The folder {folder} can't be made ({error.strerror}); {remedy}.") from None
    probe = folder / f".probe-{uuid4().hex[:8]}"
    try:
        try:
            write_atomically(probe, bytes(4096))
        finally:
            probe.unlink(missing_ok=True)
    except OSError as error:
        raise InputError(f"Nothing can be written to the folder {folder} ({error.strerror}); {remedy}.") from None


def reason_of(error: BaseException) -> str:
    """What a library below says of a file, as a part of a sentence.

    Args:
        error: Its error.

    Returns:
        One short line of printable characters.
    """
    lines = str(error).strip().splitlines()
    said = "".join(letter if letter.isprintable() else "?" for letter in (lines[0] if lines else ""))[:200]
    return f"{type(error).__name__}: {said}" if said else type(error).__name__


def json_with_digest(content: Mapping[str, Any]) -> bytes:
    """A JSON file that holds a digest of all else in it.

    Args:
        content: JSON-like.

    Returns:
        Its bytes, for :func:`write_atomically`.
    """
    # By way of JSON, in which a tuple is a list and all keys are strings.
    plain = {**json.loads(json.dumps(dict(content))), "format": FORMAT}
    plain.pop("digest", None)
    plain["digest"] = settings_digest(plain)
    # Half a surrogate is no UTF-8; JSON's reader takes it as it is written here.
    return json.dumps(plain, indent=1, ensure_ascii=False).encode("utf-8", "surrogatepass") + b"\n"


def read_json(path: Path, otherwise: str, remedy: str) -> dict[str, Any]:
    """A JSON file of ours, of which it is certain that nobody altered it if it was written with a digest.

    Args:
        path: The file.
        otherwise: What it is if it is no such file, e.g. "is damaged".
        remedy: What to do if it is not, as the end of a sentence.

    Returns:
        Its content, without the digest.

    Raises:
        InputError: If it can't be read, is none, or was altered.
    """
    try:
        content = json.loads(path.read_bytes())
    except OSError as error:
        raise InputError(f"{path} can't be read ({error.strerror}); {remedy}.") from None
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path} {otherwise} ({type(error).__name__}); {remedy}.") from None
    if not isinstance(content, dict):
        raise InputError(f"{path} {otherwise} ({type(content).__name__}); {remedy}.")
    known = content.get("digest")
    rest = {name: value for name, value in content.items() if name != "digest"}
    if ("format" in content or known is not None) and known != _digest(rest):
        raise InputError(f"{path} was altered after it was written; {remedy}.")
    return rest


def _digest(content: dict[str, Any]) -> str | None:
    try:
        return settings_digest(content)
    except (ValueError, RecursionError):
        return None
