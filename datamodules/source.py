"""The bytes of a shard, wherever it lies, watched while they pass by."""

from __future__ import annotations

import hashlib
import io
import os
import stat
from contextlib import suppress
from types import TracebackType
from typing import Any, BinaryIO, Self, cast

from typing_extensions import Buffer, override
from webdataset.gopen import gopen

from lightning_unlearn.data.addresses import is_address, is_command
from lightning_unlearn.data.shards import ShardInfo
from lightning_unlearn.datamodules.remote import RemoteFile

# Enough for one digest to be quick and few calls to be made.
READ_AT_ONCE = 2**18
# Of what says no length: a command, or a server that sends until it closes. Shards have some 1 GB.
LONGEST_UNSAID = 64 * 2**30


class Source(io.RawIOBase):
    """A shard's bytes as they lie there; at their end they are held against what is known of them.

    Args:
        shard: Where it is, its size and its digest.

    Attributes:
        position: How many bytes were read.

    Raises:
        OSError: If it can't be opened.
    """

    def __init__(self, shard: ShardInfo) -> None:
        super().__init__()
        self.shard = shard
        self.position = 0
        self._ended = False
        self._digest = None if shard.sha256 is None else hashlib.sha256()
        self._file: Any = _open(shard)
        self._before = self._state()

    @override
    def readable(self) -> bool:
        """Always."""
        return True

    @override
    def readinto(self, buffer: Buffer) -> int:
        """The next bytes.

        Args:
            buffer: Where to.

        Returns:
            How many; 0 at the end.

        Raises:
            OSError: If they can't be read, or the end has come and they are not what was expected.
        """
        if self._ended:
            return 0
        place = memoryview(buffer).cast("B")
        content = self._file.read(len(place))
        place[: len(content)] = content
        self.position += len(content)
        if self._digest is not None:
            self._digest.update(content)
        if self.position > LONGEST_UNSAID and is_address(self.shard.url):
            raise OSError(f"it sends more than {LONGEST_UNSAID} bytes")
        if not content and len(place):
            self._ended = True
            self._finish()
        return len(content)

    def _finish(self) -> None:
        if is_command(self.shard.url):
            self._file.close()  # a command that fails shows it here
        if self._state() != self._before:
            raise OSError("it was changed while it was read")
        if self._digest is not None and self._digest.hexdigest() != self.shard.sha256:
            raise OSError("its sha256 is not that of its manifest")
        if self.shard.bytes is not None and self.position != self.shard.bytes:
            raise OSError(f"it has {self.position} bytes, and had {self.shard.bytes}")

    def _state(self) -> tuple[int, int] | None:
        if is_address(self.shard.url):
            return None
        state = os.fstat(self._file.fileno())
        return state.st_size, state.st_mtime_ns

    @override
    def close(self) -> None:
        """Close the file, connection or command."""
        if not self.closed:
            with suppress(OSError):  # a command that is still writing when nobody reads on
                self._file.close()
        super().close()


class OpenShard:
    """A shard that is open while it is read.

    Args:
        shard: Where it is.
    """

    def __init__(self, shard: ShardInfo) -> None:
        self.source = Source(shard)
        self.stream = cast(BinaryIO, io.BufferedReader(self.source, READ_AT_ONCE))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.stream.close()

    def position(self) -> int:
        """How many bytes were read so far."""
        return self.source.position


def _open(shard: ShardInfo) -> Any:
    if is_command(shard.url):
        return gopen(shard.url)
    if is_address(shard.url):
        return RemoteFile(shard.url, shard.tag)
    mode = os.stat(shard.url).st_mode
    if not stat.S_ISREG(mode) and not stat.S_ISDIR(mode):
        raise OSError("it is no regular file")  # nobody waits for a pipe, or reads a device to its end
    # Not io.open's buffer: everything here is read in large parts.
    return open(shard.url, "rb", buffering=0)
