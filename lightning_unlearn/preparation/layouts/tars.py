"""WebDataset tars of pictures with their captions, as img2dataset writes them."""

from __future__ import annotations

import json
import tarfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path, PurePosixPath
from typing import Any

from lightning_unlearn.errors import InputError
from lightning_unlearn.preparation.layouts.caption_files import caption_suffixes, captions_of_text
from lightning_unlearn.preparation.layouts.files import is_mask_name, is_picture_name, readable_suffixes
from lightning_unlearn.preparation.records import SKIP, Reading, Record, captions_of_cell, plain_key

# A picture of 179 megapixels, the largest that Pillow opens, stays below this in any format in use.
LARGEST_MEMBER = 1 << 30
JSON_CAPTIONS = ("captions", "caption", "text")


def tar_records(path: Path, reading: Reading) -> Iterator[Record]:
    """The samples of a tar, in its order: members that follow each other with one name before the first dot.

    Args:
        path: The tar, compressed or not.
        reading: How it is read.

    Yields:
        The samples.

    Raises:
        InputError: If it can't be read to its end.
    """
    count = 0
    try:
        with tarfile.open(path, "r|*") as tar:
            for key, members in _groups(tar, path):
                count += 1
                if record := _record(path, key, members, reading):
                    yield record
    except (tarfile.TarError, OSError, EOFError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise InputError(f"{path} can't be read past its sample {count} ({reason}); fetch it again.") from None


def _groups(tar: tarfile.TarFile, path: Path) -> Iterator[tuple[str, dict[str, bytes]]]:
    key, members = "", dict[str, bytes]()
    for member in tar:
        name = PurePosixPath(member.name)
        if not member.isfile() or name.name.startswith("."):
            continue
        if member.size > LARGEST_MEMBER:
            raise InputError(f"{path}: its member {member.name} has {member.size} bytes; it is no picture.")
        stem, _, suffix = name.name.partition(".")
        this = str(name.parent / stem)
        if this != key and members:
            yield key, members
            members = {}
        file = tar.extractfile(member)
        key = this
        members["." + suffix.lower()] = file.read() if file is not None else b""
    if members:
        yield key, members


def _record(path: Path, key: str, members: dict[str, bytes], reading: Reading) -> Record | None:
    place = f"{path.name}, sample {key}"
    pictures = [suffix for suffix in members if is_picture_name("x" + suffix)]
    if not pictures:
        reading.tally.add("samples of tars have no picture", place)
        return None
    if is_mask_name(key) and reading.choices.masks != "picture":
        reading.tally.add("masks were left out", place)
        return None
    record = Record(plain_key(key), [], {}, place, members[pictures[0]])
    if len(pictures) > 1:
        problem = f"{place} has several pictures, {', '.join(pictures)}; keep one, or {SKIP}."
        return replace(record, problem=problem)
    if pictures[0] not in readable_suffixes():
        problem = f"{place} is a picture of a kind that can't be read here ({pictures[0]}); convert it, or {SKIP}."
        return replace(record, problem=problem)
    try:
        metadata = json.loads(members[".json"]) if ".json" in members else {}
        if not isinstance(metadata, dict):
            raise ValueError("its json is no object")
        captions = _captions(members, metadata, reading)
        if reading.key is not None:
            record = replace(record, key=plain_key(str(metadata.get(reading.key) or "")))
            if not record.key:
                raise ValueError(f"its json has no {reading.key!r} to take the key from")
    except ValueError as error:
        return replace(record, problem=f"{place}: {str(error).splitlines()[0]}; mend it, or {SKIP}.")
    settled = reading.settled(captions)
    if settled == [""] and reading.text:
        reading.tally.add("samples have the empty caption", place)
    known = {name: value for name, value in metadata.items() if name != "captions"}
    return replace(record, captions=settled, metadata=known)


def _captions(members: dict[str, bytes], metadata: dict[str, Any], reading: Reading) -> list[str]:
    if reading.caption_column is not None:
        return captions_of_cell(metadata.get(reading.caption_column))
    for suffix in caption_suffixes(reading.choices):
        if suffix in members:
            return captions_of_text(members[suffix].decode("utf-8-sig"), reading.choices)
    return next((captions_of_cell(metadata[name]) for name in JSON_CAPTIONS if metadata.get(name)), [])
