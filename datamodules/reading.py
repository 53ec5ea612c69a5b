"""One shard as a stream of samples."""

from __future__ import annotations

import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from webdataset import tariterators

from lightning_unlearn.errors import InputError
from lightning_unlearn.samples import PICTURE_FIELDS, Sample, decode_sample
from lightning_unlearn.shards import ShardInfo

FIELDS = frozenset({"latent.npy", "latent_flip.npy", "text.npy", "json"})


def read_fields(shard: ShardInfo, *, pictures: bool = False) -> Iterator[dict[str, Any]]:
    """The samples of a shard as undecoded bytes.

    Args:
        shard: Where it is. http(s) addresses are read with retries.
        pictures: Whether pictures are read too.

    Yields:
        Field name to bytes, with ``__key__`` and ``__url__``.

    Raises:
        InputError: If the shard can't be read to its end.
    """
    _check_end(shard)
    wanted = FIELDS | set(PICTURE_FIELDS) if pictures else FIELDS
    count = 0
    try:
        files = tariterators.tar_file_expander(tariterators.url_opener([{"url": shard.url}]))
        for fields in tariterators.group_by_keys(files):
            count += 1
            yield {name: value for name, value in fields.items() if name in wanted or name.startswith("__")}
    except (tarfile.TarError, OSError, EOFError, ValueError) as error:
        raise InputError(f"Shard {shard.url} can't be read past its sample {count} ({_first_line(error)}); fetch or make it again.") from None
    if shard.samples is not None and count != shard.samples:
        raise InputError(f"Shard {shard.url} holds {count} samples, but its manifest says {shard.samples}; it may be cut off: fetch or make it again.")


def read_samples(shard: ShardInfo, *, pictures: bool = False) -> Iterator[Sample]:
    """The samples of a shard, decoded and checked.

    Args:
        shard: Where it is.
        pictures: Whether pictures are read too.

    Yields:
        The samples.
    """
    for fields in read_fields(shard, pictures=pictures):
        yield decode_sample(fields)


def _check_end(shard: ShardInfo) -> None:
    """A tar file ends with two blocks of zeros; one cut off between two files would otherwise just look shorter."""
    path = Path(shard.url.removeprefix("file:"))
    if "://" in shard.url or shard.url.startswith("pipe:") or path.suffix != ".tar":
        return
    if not path.is_file():
        raise InputError(f"There is no shard at {path}; check the path, or the folder you run from.")
    with path.open("rb") as file:
        start = file.read(512)
        file.seek(-min(1024, path.stat().st_size), 2)
        if file.read() != bytes(1024):
            what = "is cut off" if start[257:262] == b"ustar" else "is not a tar file"
            raise InputError(f"Shard {path} {what}; fetch or make it again.")


def _first_line(error: BaseException) -> str:
    text = str(error.args[0]) if error.args else ""
    return (text.splitlines() or [type(error).__name__])[0][:200]
