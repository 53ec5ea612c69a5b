"""Conditions that several samples of a shard share, stored once: one prompt for a whole set, or no prompt at all.

The text states of a large encoder take megabytes. Where the same bytes recur in a shard, they lie in a member
``shared/<digest>.npy`` before the first sample that has them, and the samples' json says ``"shared": {"text.npy":
"<digest>"}`` in place of a file. WebDataset by itself reads such a shard, too: the member is a sample with one field.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from lightning_unlearn.data.conditions import CONDITION_FIELDS
from lightning_unlearn.errors import InputError

SHARED_FOLDER = "shared"
SHARED = "shared"
"""The field of a sample's json that says what it shares."""

# What is smaller saves nothing beside the headers of a tar and the words in the json.
_LEAST_BYTES = 1024
MOST_BYTES = 256 * 2**20
"""Of all that a shard's samples share, which whoever reads it holds in memory."""

_MEMBER = re.compile(r"(?:.*/)?shared/([0-9a-f]{32})\.npy")


def digest_in_name(name: str) -> str | None:
    """The digest of what samples share, if a file in a shard is called so.

    Args:
        name: The file's.

    Returns:
        32 hexadecimal characters, ``None`` for other files.
    """
    found = _MEMBER.fullmatch(name)
    return None if found is None else found[1]


def digest_of_bytes(content: bytes) -> str:
    """What shared bytes are called.

    Args:
        content: A file's.

    Returns:
        32 hexadecimal characters.
    """
    return hashlib.blake2b(content, digest_size=16).hexdigest()


def names_fields(said: Any) -> bool:
    """Whether a sample's json says what it shares, and does not use our word for something of its own.

    Args:
        said: What it says.

    Returns:
        Whether it names fields.
    """
    return isinstance(said, dict) and bool(said) and said.keys() <= CONDITION_FIELDS


def share(samples: Sequence[Mapping[str, Any]]) -> Iterator[tuple[dict[str, bytes], dict[str, Any]]]:
    """The samples of one shard, each with what must stand before it because it, and others, share it.

    Args:
        samples: Field name to bytes, with ``__key__`` and ``json``.

    Yields:
        Digest to bytes, and the sample without these.
    """
    names = [{field: digest_of_bytes(sample[field]) for field in _shareable(sample)} for sample in samples]
    times = Counter(name for found in names for name in found.values())
    written, held = set[str](), 0
    for sample, found in zip(samples, names, strict=True):
        before: dict[str, bytes] = {}
        said: dict[str, str] = {}
        for field, name in found.items():
            if times[name] < 2:
                continue
            if name not in written:
                if held + len(sample[field]) > MOST_BYTES:
                    continue
                held += len(sample[field])
                written.add(name)
                before[name] = sample[field]
            said[field] = name
        if not said:
            yield {}, dict(sample)
            continue
        told = json.dumps({**json.loads(sample["json"]), SHARED: said}, ensure_ascii=False, sort_keys=True)
        yield before, {field: part for field, part in sample.items() if field not in said} | {"json": told.encode()}


def _shareable(sample: Mapping[str, Any]) -> list[str]:
    large = [field for field in sample if field in CONDITION_FIELDS and len(sample[field]) >= _LEAST_BYTES]
    try:
        told = json.loads(sample["json"]) if large else None
    except (KeyError, ValueError, RecursionError):
        return []
    return large if isinstance(told, dict) and SHARED not in told else []


class SharedFields:
    """What the samples of a shard that is being read share, so far.

    Args:
        shard: As it is called in messages.
    """

    def __init__(self, shard: str) -> None:
        self.shard = shard
        self._held: dict[str, bytes] = {}
        self._bytes = 0

    def add(self, name: str, content: bytes) -> None:
        """Keep what samples that follow share.

        Args:
            name: Its digest, as the file is called.
            content: Its bytes.

        Raises:
            InputError: If they are not those of the digest, or more than memory should hold.
        """
        if digest_of_bytes(content) != name:
            raise InputError(
                f"Shard {self.shard} holds shared/{name}.npy, which is damaged: its bytes are not those that it is "
                "called by; fetch or make the shard again."
            )
        self._bytes += len(content)
        if self._bytes > MOST_BYTES:
            raise InputError(
                f"The samples of shard {self.shard} share more than {MOST_BYTES} bytes, which is more than is held in "
                "memory; make it again with fewer samples a shard."
            )
        self._held[name] = content

    def complete(self, sample: dict[str, Any], wanted: frozenset[str]) -> None:
        """Give a sample the fields that it shares with others.

        Args:
            sample: Field name to bytes, with ``__key__``; changed in place.
            wanted: The fields that are read.

        Raises:
            InputError: If what it says is not there.
        """
        if b'"shared"' not in sample.get("json", b""):
            return
        try:
            said = json.loads(sample["json"])[SHARED]
        except (ValueError, KeyError, TypeError, RecursionError):
            return  # no json, which is told of where it is decoded, or the word stands elsewhere in it
        for field, name in said.items() if names_fields(said) else ():
            if field not in wanted or field in sample:
                continue
            if not isinstance(name, str) or name not in self._held:
                raise InputError(
                    f"Sample {sample['__key__']!r} in shard {self.shard} shares its {field} with others, but no "
                    f"shared/{str(name)[:40]}.npy stands before it; fetch or make the shard again."
                )
            sample[field] = self._held[name]
