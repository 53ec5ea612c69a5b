"""Shards and their manifest: what a folder of WebDataset tar files says about itself, and how it is written."""

from __future__ import annotations

import hashlib
import io
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import webdataset

from lightning_unlearn.data.addresses import is_address, lasting_address, name_of, shown_address
from lightning_unlearn.data.conditions import CONDITION_FIELDS
from lightning_unlearn.data.files import write_atomically
from lightning_unlearn.data.groups import Group, group_samples, groups_as_json
from lightning_unlearn.data.masks import LOSS_MASK_FIELD, MASK_FIELD
from lightning_unlearn.data.shared import SHARED_FOLDER, share
from lightning_unlearn.errors import InputError
from lightning_unlearn.fingerprints import digest

MANIFEST = "manifest.json"
Array: TypeAlias = np.ndarray[Any, Any]


@dataclass(frozen=True)
class ShardInfo:
    """One shard as its manifest describes it.

    Attributes:
        url: Path or address.
        samples: How many samples it holds, if known.
        bytes: Its size, if known.
        sha256: Of its bytes, if known; what is read is held against it.
        tag: Of a remote shard, what changes when it is made anew, as its server says; if known.
        groups: How many samples of which form and weight it holds, where its set holds several.
    """

    url: str
    samples: int | None = None
    bytes: int | None = None
    sha256: str | None = None
    tag: str | None = None
    groups: tuple[Group, ...] = ()

    @property
    def shown(self) -> str:
        """What is printed of its address: nothing that is secret."""
        return shown_address(self.url)

    @property
    def version(self) -> str:
        """What changes when a shard is made anew, if only with other numbers in it."""
        if is_address(self.url):
            return f"{self.sha256 or self.tag}-{self.bytes}"
        path = Path(self.url)
        stat = path.stat() if path.is_file() else None
        size = stat.st_size if stat is not None else self.bytes
        if self.sha256 is not None:
            return f"{self.sha256}-{size}"
        return f"{size}-{stat.st_mtime_ns}" if stat is not None else str(size)


def shard_id(url: str) -> str:
    """The name under which a shard's scores are kept: its file name and a digest of its whole address.

    Local paths are made absolute first, so that the same file has one name from any working directory; of an address
    users, passwords and signatures don't count.

    Args:
        url: Path or address.

    Returns:
        E.g. ``"coco-000017-1f0c9a3b5d7e8f90"``.
    """
    stem = "".join(letter if letter.isalnum() or letter in "-_" else "-" for letter in name_of(url).split(".")[0])
    return f"{stem[:64]}-{digest(lasting_address(url))[:16]}"


def npy_bytes(array: np.ndarray[Any, Any]) -> bytes:
    """An array in NumPy's file format, without pickle.

    Args:
        array: Of any shape, with a plain dtype.

    Returns:
        The bytes of an ``.npy`` file.
    """
    stream = io.BytesIO()
    np.save(stream, array, allow_pickle=False)
    return stream.getvalue()


def encode_sample(
    key: str,
    latent: Array,
    conditions: Array | Mapping[str, Array],
    metadata: Mapping[str, Any],
    *,
    latent_flip: Array | None = None,
    picture: bytes | None = None,
    picture_format: str = "png",
    mask: bytes | None = None,
    loss_mask: bytes | None = None,
) -> dict[str, Any]:
    """The fields of one sample as :func:`write_shards` takes them.

    Their meaning: :mod:`lightning_unlearn.data.samples`.

    Args:
        key: Unique name; a dot in it would end it in a tar file, so dots become underscores.
        latent: ``(C, H, W)`` float16 or float32.
        conditions: What the network is conditioned on, name to ``(captions or 1, …)`` float16 or float32
            (:mod:`lightning_unlearn.data.conditions`); or ``text`` alone, ``(captions, tokens, dim)``.
        metadata: JSON-like, with ``captions``; numbers that the network is conditioned on under ``conditions``.
        latent_flip: ``(C, H, W)`` or ``None``.
        picture: Bytes of an encoded picture or ``None``.
        picture_format: Its field name.
        mask: Bytes of an 8-bit grey PNG or ``None``: of a query, which part of it is unlearned.
        loss_mask: The same of a sample: which part of it training looked at.

    Returns:
        Field name to bytes, and ``__key__``.

    Raises:
        InputError: If a condition has a name that none has.
    """
    named = conditions if isinstance(conditions, Mapping) else {"text": conditions}
    unknown = [name for name in named if f"{name}.npy" not in CONDITION_FIELDS]
    if unknown:
        raise InputError(
            f"Sample {key!r} has a condition {unknown[0]!r}, but they are called text, text_mask, pooled, …; see "
            "lightning_unlearn.data.conditions."
        )
    fields: dict[str, Any] = {
        "__key__": key.replace(".", "_"),
        "latent.npy": npy_bytes(latent),
        **{f"{name}.npy": npy_bytes(array) for name, array in named.items()},
        "json": json.dumps(dict(metadata), ensure_ascii=False, sort_keys=True).encode(),
    }
    if latent_flip is not None:
        fields["latent_flip.npy"] = npy_bytes(latent_flip)
    if picture is not None:
        fields[picture_format] = picture
    if mask is not None:
        fields[MASK_FIELD] = mask
    if loss_mask is not None:
        fields[LOSS_MASK_FIELD] = loss_mask
    return fields


def write_shards(
    samples: Iterable[Mapping[str, Any]],
    folder: str | os.PathLike[str],
    *,
    name: str = "shard",
    samples_per_shard: int = 1000,
    about: Mapping[str, Any] | None = None,
) -> list[ShardInfo]:
    """Write samples to tar files and a manifest beside them.

    The same samples give the same bytes: times and owners in the tar files are fixed. Text states, or other conditions,
    that several samples of a shard share are stored once, before the first of them
    (:mod:`lightning_unlearn.data.shared`).

    Args:
        samples: What :func:`encode_sample` returns.
        folder: Made if it is not there.
        name: Shards are called ``{name}-000000.tar`` and so on.
        samples_per_shard: The largest number of samples in a shard.
        about: More facts for the manifest, e.g. how the latents were made.

    Returns:
        The shards written.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    shards: list[ShardInfo] = []
    pending: list[Mapping[str, Any]] = []

    def flush() -> None:
        path = folder / f"{name}-{len(shards):06d}.tar"
        stream = io.BytesIO()
        with webdataset.TarWriter(stream, encoder=False, mtime=0, user="", group="") as writer:
            for name_of_shared, sample in share(pending):
                for digest_of, content in name_of_shared.items():
                    writer.write({"__key__": f"{SHARED_FOLDER}/{digest_of}", "npy": content})
                writer.write(sample)
        write_atomically(path, stream.getvalue())
        content = stream.getvalue()
        sha256 = hashlib.sha256(content).hexdigest()
        groups = group_samples(pending)
        shards.append(ShardInfo(str(path), len(pending), len(content), sha256, groups=groups))
        pending.clear()

    for sample in samples:
        pending.append(sample)
        if len(pending) == samples_per_shard:
            flush()
    if pending:
        flush()
    write_manifest(folder, shards, about or {})
    return shards


def write_manifest(folder: str | os.PathLike[str], shards: Sequence[ShardInfo], about: Mapping[str, Any]) -> None:
    """Write ``manifest.json``: the shards of a folder with their sizes, and how they were made.

    Args:
        folder: Where the shards are.
        shards: What it holds.
        about: More facts.
    """
    groups = groups_as_json([shard.groups for shard in shards])
    entries = [
        {"name": Path(shard.url).name, "samples": shard.samples, "bytes": shard.bytes, "sha256": shard.sha256, **facts}
        for shard, facts in zip(shards, groups, strict=True)
    ]
    content = json.dumps({**about, "shards": entries}, indent=1, ensure_ascii=False)
    write_atomically(Path(folder) / MANIFEST, content.encode() + b"\n")
