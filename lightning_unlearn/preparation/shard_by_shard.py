"""Tars of pictures to shards, one to one: by several processes, and resumed where they stopped.

A shard that is done has a file of its own beside it, which says what it was made of; the manifest is put together from
these by whoever finds that none is missing.
"""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from braceexpand import braceexpand
from tqdm.auto import tqdm

from lightning_unlearn.data.files import write_atomically
from lightning_unlearn.data.groups import groups_from_json
from lightning_unlearn.data.shards import MANIFEST, ShardInfo, write_manifest
from lightning_unlearn.errors import InputError
from lightning_unlearn.preparation.assembly import UNFINISHED, Assembly
from lightning_unlearn.preparation.disk import say_size
from lightning_unlearn.preparation.layouts import TAR_SUFFIXES

DONE = ".done"


def tars_of(images: str | None) -> list[Path] | None:
    """The tars that are meant, if tars are.

    Args:
        images: A path; braces stand for several, as in ``laion/{00000..00099}.tar``.

    Returns:
        The tars in their order; ``None`` if it is something else.

    Raises:
        InputError: If a tar is missing, or two have one name.
    """
    if images is None or not images.lower().endswith(TAR_SUFFIXES):
        return None
    path = Path(images).expanduser()
    # A file may have braces in its own name.
    tars = [path] if path.exists() else [Path(name) for name in braceexpand(str(path))]
    missing = [tar for tar in tars if not tar.is_file()]
    if missing:
        raise InputError(
            f"{len(missing)} of the {len(tars)} tars of {images} are not there, the first {missing[0]}; "
            "fetch them, or name only those that are."
        )
    names = [shard_name(tar) for tar in tars]
    if doubles := {name for name in names if names.count(name) > 1}:
        raise InputError(f"{images} has several tars called {min(doubles)}; shards are called as they are: rename one.")
    return tars


def shard_name(tar: Path) -> str:
    """What the shard made of a tar is called, without its suffix."""
    return tar.name.lower().split(".tar")[0].removesuffix(".tgz").replace(".", "_")


def write_shard_by_shard(
    tars: Sequence[Path],
    make: Callable[[str], Assembly],
    folder: Path,
    *,
    settings: str,
    index: int,
    count: int,
    overwrite: bool,
) -> list[ShardInfo]:
    """Make the shards that fall to one of several processes, but for those that are done.

    Args:
        tars: All of them.
        make: The assembly of one.
        folder: Where the shards go.
        settings: Identifies how they are made.
        index: Of the process, from 0; each takes every ``count``-th tar.
        count: How many processes there are.
        overwrite: Whether shards that are done are made again.

    Returns:
        The shards that are done now, also by others.

    Raises:
        InputError: If a tar can't be used, a shard can't be written, or shards were made with other settings.
    """
    (folder / DONE).mkdir(exist_ok=True)
    mine = list(tars)[index::count]
    left = [tar for tar in mine if overwrite or not _is_done(tar, folder, settings)]
    for number, tar in enumerate(left):
        assembly = make(str(tar))
        samples, size = assembly.check()
        if number == 0:
            told = say_size(samples * len(left), size * len(left), folder)
            tqdm.write(f"{len(left)} of {len(mine)} tars are to be made; if all are as {tar.name}: {told}", sys.stderr)
        _write_one(tar, assembly, samples, folder, settings)
    done = {tar: record for tar in tars if (record := _record(tar, folder)) is not None}
    shards = [
        ShardInfo(
            str(folder / f"{shard_name(tar)}.tar"), *_facts(record), groups=groups_from_json(record.get("groups"))
        )
        for tar, record in done.items()
    ]
    if len(done) == len(tars):
        write_manifest(folder, shards, _together(list(done.values())))
    else:
        tqdm.write(f"{len(done)} of {len(tars)} shards are done; the manifest comes with the last of them.", sys.stderr)
    return shards


def _write_one(tar: Path, assembly: Assembly, samples: int, folder: Path, settings: str) -> None:
    name = shard_name(tar)
    unfinished = folder / f"{UNFINISHED}-{name}"
    try:
        (folder / MANIFEST).unlink(missing_ok=True)
        (folder / DONE / f"{name}.json").unlink(missing_ok=True)
        (shard,) = assembly.encode(samples, unfinished, name, max(1, samples))
        record = {**json.loads((unfinished / MANIFEST).read_bytes()), "source": _source(tar), "settings": settings}
        record["groups"] = [asdict(group) for group in shard.groups]  # a manifest of one form says nothing of it
        Path(shard.url).replace(folder / f"{name}.tar")
        write_atomically(folder / DONE / f"{name}.json", json.dumps(record, ensure_ascii=False).encode())
    except OSError as error:
        raise InputError(f"Shards can't be written to {folder} ({error}); see to its space and rights.") from None
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def _source(tar: Path) -> dict[str, Any]:
    stat = tar.stat()
    return {"name": tar.name, "bytes": stat.st_size, "changed": stat.st_mtime_ns}


def _record(tar: Path, folder: Path) -> dict[str, Any] | None:
    path = folder / DONE / f"{shard_name(tar)}.json"
    try:
        record = json.loads(path.read_bytes())
        _facts(record)
        groups_from_json(record.get("groups"))
    except (OSError, ValueError, KeyError, TypeError, IndexError):
        return None  # what was damaged is made again
    return dict(record) if (folder / f"{shard_name(tar)}.tar").is_file() else None


def _is_done(tar: Path, folder: Path, settings: str) -> bool:
    record = _record(tar, folder)
    if record is None or record.get("source") != _source(tar):
        return False
    if record.get("settings") != settings:
        raise InputError(
            f"{folder} has a shard of {tar.name} that was made with other settings; "
            "choose another output, or set overwrite=true."
        )
    return True


def _facts(record: dict[str, Any]) -> tuple[int, int, str]:
    shard = record["shards"][0]
    return shard["samples"], shard["bytes"], shard["sha256"]


def _together(records: list[dict[str, Any]]) -> dict[str, Any]:
    """What the manifest says of all shards: what the first says, with what was left out of any."""
    counts: dict[str, dict[str, Any]] = {}
    for entry in (entry for record in records for entry in record["left_out"]["counts"]):
        sum_ = counts.setdefault(entry["what"], {**entry, "count": 0})
        sum_["count"] += entry["count"]
    about = {
        name: value for name, value in records[0].items() if name not in {"shards", "source", "settings", "groups"}
    }
    about["skipped"] = sum(record["skipped"] for record in records)
    faults = [fault for record in records for fault in record["left_out"]["faults"]]
    return {**about, "left_out": {"faults": faults[:100], "counts": list(counts.values())}}
