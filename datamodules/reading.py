"""One shard as a stream of samples."""

from __future__ import annotations

import tarfile
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, BinaryIO, cast

from typing_extensions import override
from webdataset import tariterators
from webdataset.gopen import gopen

from lightning_unlearn.data.masks import MASK_FIELD
from lightning_unlearn.data.samples import PICTURE_FIELDS, Sample, decode_sample
from lightning_unlearn.data.shards import ShardInfo
from lightning_unlearn.datamodules.remote import RemoteFile
from lightning_unlearn.errors import InputError

FIELDS = frozenset({"latent.npy", "latent_flip.npy", "text.npy", "json"})


def read_fields(shard: ShardInfo, *, pictures: bool = False, masks: bool = False) -> Iterator[dict[str, Any]]:
    """The samples of a shard as undecoded bytes.

    Args:
        shard: Where it is. http(s) addresses are read with retries.
        pictures: Whether pictures are read too.
        masks: Whether masks are read too, as they are of queries alone.

    Yields:
        Field name to bytes, with ``__key__`` and ``__url__``.

    Raises:
        InputError: If the shard can't be read to its end.
    """
    wanted = {*FIELDS, *(PICTURE_FIELDS if pictures else ()), *((MASK_FIELD,) if masks else ())}
    count = 0
    try:
        for fields in tariterators.group_by_keys(_read_files(shard.url)):
            count += 1
            yield {name: value for name, value in fields.items() if name in wanted or name.startswith("__")}
    except (tarfile.TarError, OSError, EOFError, ValueError) as error:
        raise InputError(
            f"Shard {shard.url} can't be read past its sample {count} ({_first_line(error)}); fetch or make it again."
        ) from None
    if shard.samples is not None and count != shard.samples:
        raise InputError(
            f"Shard {shard.url} holds {count} samples, but its manifest says {shard.samples}; "
            "it may be cut off: fetch or make it again."
        )


def read_samples(shard: ShardInfo, *, pictures: bool = False, masks: bool = False) -> Iterator[Sample]:
    """The samples of a shard, decoded and checked.

    Args:
        shard: Where it is.
        pictures: Whether pictures are read too.
        masks: Whether masks are read too, as they are of queries alone.

    Yields:
        The samples.
    """
    for fields in read_fields(shard, pictures=pictures, masks=masks):
        yield decode_sample(fields)


def read_keys(keys: str | list[str]) -> frozenset[str]:
    """The keys of some samples.

    Args:
        keys: The keys, or a text file with one key a line.

    Returns:
        All of them.

    Raises:
        InputError: If there is no such file, or it holds none.
    """
    if not isinstance(keys, str):
        return frozenset(keys)
    if not Path(keys).is_file():
        raise InputError(f"There is no list of keys at {keys}; give a text file with one key a line.")
    found = frozenset(line.strip() for line in Path(keys).read_text().splitlines() if line.strip())
    if not found:
        raise InputError(f"The list of keys {keys} is empty; give a text file with one key a line.")
    return found


class _StrictTarInfo(tarfile.TarInfo):
    # A damaged or missing header is an error. tarfile takes either for the end of the archive.

    @classmethod
    @override
    def frombuf(cls, buf: bytes | bytearray, encoding: str, errors: str) -> _StrictTarInfo:
        try:
            return super().frombuf(buf, encoding, errors)
        except tarfile.HeaderError as error:
            if len(buf) == tarfile.BLOCKSIZE and not any(buf):  # a block of zeros is how a tar file ends
                raise
            what = "it is no tar file, or damaged here" if len(buf) == tarfile.BLOCKSIZE else "it is cut off here"
            raise tarfile.ReadError(f"{what}: {error}") from None


def _read_files(url: str) -> Iterator[dict[str, Any]]:
    # As WebDataset's tariterators, but for shards that are cut off between two files, or damaged.
    stream = _open(url)
    try:
        with tarfile.open(fileobj=stream, mode="r|*", tarinfo=_StrictTarInfo) as archive:
            while (member := archive.next()) is not None:
                content = archive.extractfile(member) if member.isreg() else None
                if content is not None:
                    yield {"fname": member.name, "data": content.read(), "__url__": url}
                # It would keep the headers of all files.
                archive.members = []  # type: ignore[attr-defined]
        while stream.read(2**20):  # a command that fails shows it after its last byte
            pass
        stream.close()
    finally:
        with suppress(OSError):  # a command that is still writing when nobody reads on
            stream.close()


def _open(url: str) -> BinaryIO:
    if url.startswith("pipe:"):
        return cast(BinaryIO, gopen(url))
    if url.startswith(("http://", "https://")):
        return cast(BinaryIO, RemoteFile(url))
    return open(url, "rb")


def _first_line(error: BaseException) -> str:
    # WebDataset appends arguments of its own to a ValueError.
    text = str(error.args[0]) if type(error) is ValueError and error.args else str(error)
    return (text.splitlines() or [type(error).__name__])[0][:200]
