"""One shard as a stream of samples."""

from __future__ import annotations

import tarfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from webdataset.tariterators import base_plus_ext

from lightning_unlearn.data.conditions import CONDITION_FIELDS
from lightning_unlearn.data.masks import MASK_FIELD
from lightning_unlearn.data.samples import LATENT_FIELDS, PICTURE_FIELDS, Sample, decode_sample
from lightning_unlearn.data.shards import ShardInfo
from lightning_unlearn.data.shared import SharedFields, digest_in_name
from lightning_unlearn.datamodules.archive import LARGEST_FILE, Archive
from lightning_unlearn.datamodules.source import OpenShard
from lightning_unlearn.errors import InputError

FIELDS = frozenset({*LATENT_FIELDS, *CONDITION_FIELDS, "json"})
# What macOS adds for a file's attributes, under the file's name with "._" before it.
APPLE_DOUBLE = b"\x00\x05\x16\x07"


def read_fields(
    shard: ShardInfo, *, pictures: bool = False, masks: bool = False, fields: frozenset[str] = FIELDS
) -> Iterator[dict[str, Any]]:
    """The samples of a shard as undecoded bytes.

    Args:
        shard: Where it is.
        pictures: Whether pictures are read too.
        masks: Whether masks are read too, as they are of queries alone.
        fields: What else is read.

    Yields:
        Field name to bytes, with ``__key__`` and ``__url__``; with ``__dotted__`` where a file was meant to be of
        another key (see :func:`~lightning_unlearn.data.samples.decode_sample`).

    Raises:
        InputError: If the shard can't be read to its end, is not the one that its manifest describes, or its files
            don't make samples.
    """
    wanted = frozenset({*fields, *(PICTURE_FIELDS if pictures else ()), *((MASK_FIELD,) if masks else ())})
    count = 0
    try:
        for sample in _read(shard, wanted):
            count += 1
            yield sample
    except InputError:
        raise
    except (tarfile.TarError, OSError, EOFError, ValueError) as error:
        raise InputError(
            f"Shard {shard.shown} can't be read past its sample {count} ({_first_line(error)}); fetch or make it again."
        ) from None
    if shard.samples is not None and count != shard.samples:
        raise InputError(
            f"Shard {shard.shown} holds {count} samples, but its manifest says {shard.samples}; "
            "it may be cut off: fetch or make it again."
        )


def _read(shard: ShardInfo, wanted: frozenset[str]) -> Iterator[dict[str, Any]]:
    with OpenShard(shard) as opened:
        yield from _Groups(shard.shown, wanted).of(Archive(opened.stream, opened.position))
        while opened.stream.read(2**20):  # what is known of the whole is checked at its end
            pass


def read_samples(
    shard: ShardInfo, *, pictures: bool = False, masks: bool = False, keys: frozenset[str] | None = None
) -> Iterator[Sample]:
    """The samples of a shard, decoded and checked.

    Args:
        shard: Where it is.
        pictures: Whether pictures are read too.
        masks: Whether masks are read too, as they are of queries alone.
        keys: If given, only samples with these keys; others are not decoded, and may be bad.

    Yields:
        The samples.
    """
    for fields in read_fields(shard, pictures=pictures, masks=masks):
        if keys is None or fields["__key__"] in keys:
            yield decode_sample(fields)


def find_samples(shards: Iterable[ShardInfo], keys: Iterable[str]) -> dict[str, Sample]:
    """Some samples with their pictures, for people to look at.

    Args:
        shards: Where they may lie; read until all are found.
        keys: Which samples.

    Returns:
        Key to sample; of those that were found.
    """
    wanted, found = frozenset(keys), dict[str, Sample]()
    for shard in shards:
        if len(found) == len(wanted):
            break
        found |= {sample.key: sample for sample in read_samples(shard, pictures=True, keys=wanted)}
    return found


def list_keys(shard: ShardInfo) -> Iterator[str]:
    """The keys of a shard's samples, without reading these.

    Args:
        shard: Where it is.

    Yields:
        The keys.
    """
    for fields in read_fields(shard, fields=frozenset()):
        yield fields["__key__"]


def read_keys(keys: str | list[str]) -> frozenset[str]:
    """The keys of some samples.

    Args:
        keys: The keys, or a text file with one key a line.

    Returns:
        All of them.

    Raises:
        InputError: If there is no such file, it is no text, or it holds none.
    """
    if not isinstance(keys, str):
        return frozenset(keys)
    remedy = "give a text file with one key a line"
    try:
        # Editors on Windows begin a text with a mark.
        lines = Path(keys).read_text("utf-8-sig").splitlines()
    except UnicodeDecodeError:
        raise InputError(f"The list of keys {keys} is not UTF-8; {remedy}, in UTF-8.") from None
    except (OSError, ValueError):
        raise InputError(f"There is no list of keys at {keys}; {remedy}.") from None
    found = frozenset(line.strip() for line in lines if line.strip())
    if not found:
        raise InputError(f"The list of keys {keys} is empty; {remedy}.")
    return found


class _Groups:
    """Files that lie side by side and have one key make a sample, as in WebDataset; what it passes over is refused.

    Args:
        shard: As it is called in messages.
        wanted: The fields that are read.
    """

    def __init__(self, shard: str, wanted: frozenset[str]) -> None:
        self.shard = shard
        self.wanted = wanted
        self._fields_of: dict[str, frozenset[str]] = {}  # of each key that came
        self._shared = SharedFields(shard)

    def of(self, archive: Archive) -> Iterator[dict[str, Any]]:
        """The samples of an archive.

        Args:
            archive: Not read yet.

        Yields:
            Field name to bytes, with ``__key__`` and ``__url__``.

        Raises:
            InputError: If files don't make samples.
        """
        sample: dict[str, Any] | None = None
        seen: set[str] = set()
        for name, content in archive.files(self._is_read):
            if (digest := digest_in_name(name)) is not None:
                if content:  # nobody reads it where no condition is wanted
                    self._shared.add(digest, content)
                continue
            key, field = self._parts(name, content)
            if key is None:
                continue
            if sample is None or key != sample["__key__"]:
                if sample is not None:
                    self._fields_of[sample["__key__"]] = frozenset(seen)
                    yield self._whole(sample)
                self._check_new(key, field)
                sample, seen = {"__key__": key, "__url__": self.shard}, set()
            if field in seen:
                raise InputError(
                    f"Shard {self.shard} can't be used ({name}: duplicate file name); keys must be unique, and upper "
                    "and lower case don't tell fields apart."
                )
            seen.add(field)
            if field in self.wanted:
                sample[field] = content
            elif any(field.endswith("." + known) for known in ("latent.npy", "text.npy")):
                sample["__dotted__"] = field
            if sum(len(part) for part in sample.values() if isinstance(part, bytes)) > LARGEST_FILE:
                raise InputError(
                    f"Sample {key!r} in shard {self.shard} has more than {LARGEST_FILE} bytes; leave it out."
                )
        if sample is not None:
            yield self._whole(sample)

    def _whole(self, sample: dict[str, Any]) -> dict[str, Any]:
        self._shared.complete(sample, self.wanted)
        return sample

    def _is_read(self, name: str) -> bool:
        if digest_in_name(name) is not None:
            return not self.wanted.isdisjoint(CONDITION_FIELDS)
        field = base_plus_ext(name)[1]
        return name.rpartition("/")[2].startswith("._") or (field is not None and field.lower() in self.wanted)

    def _parts(self, name: str, content: bytes) -> tuple[str | None, str]:
        key, field = base_plus_ext(name)
        if key is not None:
            return key, field.lower()
        own = name.rpartition("/")[2]
        fields = (*FIELDS, *PICTURE_FIELDS)
        if own.startswith(".") and own.lower().endswith(fields) and not content.startswith(APPLE_DOUBLE):
            raise InputError(
                f"Shard {self.shard} holds the file {name!r}, which begins with a dot and so has no key; pack the "
                "shard again under another name."
            )
        return None, ""

    def _check_new(self, key: str, field: str) -> None:
        earlier = self._fields_of.get(key)
        if earlier is None:
            return
        if field in earlier:
            raise InputError(f"Shard {self.shard} holds the key {key!r} twice; keys must be unique.")
        raise InputError(
            f"Shard {self.shard} holds files of {key!r} in two places; a sample's files must follow each other, as "
            "`tar --sort=name` packs them."
        )


def _first_line(error: BaseException) -> str:
    # WebDataset appends arguments of its own to a ValueError.
    text = str(error.args[0]) if type(error) is ValueError and error.args else str(error)
    return (text.splitlines() or [type(error).__name__])[0][:200]
