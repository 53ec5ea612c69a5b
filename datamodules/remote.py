"""A file behind an address, read once from its start to its end, over connections that break."""

from __future__ import annotations

import hashlib
import time

import fsspec

from lightning_unlearn.data.addresses import scheme_of, shown_address
from lightning_unlearn.datamodules.http_reply import Facts, HttpReply, UnusableError, is_transient, reason_of
from lightning_unlearn.errors import InputError

# Seconds before another attempt: a server that restarts or is busy gets a quarter of a minute, and nobody waits longer.
WAITS = (1.0, 2.0, 4.0, 8.0)
# A file may take so many seconds, and one more for each so many bytes of it.
PATIENCE = 300.0
SLOWEST = 16 * 2**10
# What is installed for a kind of address.
EXTRAS = {"s3": "s3", "s3a": "s3", "gs": "gs", "gcs": "gs", "hf": "hf"}


class RemoteFile:
    """The bytes at an address; where a connection breaks, reading goes on from there if the file is still the same.

    A server's ETag says whether it is. Without one, what was read is read again and must have the same digest.

    Args:
        url: The address.
        tag: What is known of the file's content (:attr:`Facts.tag`); it must not have changed since.
    """

    def __init__(self, url: str, tag: str | None = None) -> None:
        self.url = url
        self._tag = tag
        self._position = 0
        self._facts: Facts | None = None
        self._digest = hashlib.sha256()  # of what was read, where there is no ETag
        self._reply: HttpReply | StoredFile | None = None
        self._seconds = 0.0

    @property
    def facts(self) -> Facts:
        """What is known of the file; its connection is opened if it isn't yet.

        Raises:
            OSError: If it can't be opened.
        """
        if self._facts is None:
            self._insistently(0)
        assert self._facts is not None
        return self._facts

    def read(self, size: int) -> bytes:
        """The next bytes.

        Args:
            size: The most bytes to read.

        Returns:
            At least one byte, but for the end of the file.

        Raises:
            OSError: If they can't be read: at once where another attempt is of no use, or after the last one.
        """
        return self._insistently(size)

    def _insistently(self, size: int) -> bytes:
        waits = iter(WAITS)
        wait: float | None = None
        while True:
            started = time.monotonic()
            try:
                content = self._read(size)
            except Exception as error:  # each kind of storage has exceptions of its own
                self.close()
                wait = next(waits, None)
                if wait is None or not is_transient(error):
                    reason = reason_of(error).replace(self.url, shown_address(self.url))
                    raise OSError(reason) from None
                content = None
            self._seconds += time.monotonic() - started
            if self._seconds > PATIENCE + self._position / SLOWEST:
                self.close()
                raise OSError(f"it is too slow: {self._position} bytes took {self._seconds:.0f} seconds")
            if content is not None:
                return content
            assert wait is not None
            time.sleep(wait)

    def close(self) -> None:
        """Close the connection."""
        if self._reply is not None:
            self._reply.close()
            self._reply = None

    def _read(self, size: int) -> bytes:
        if self._reply is None:
            self._reply = self._connect()
        if not size:
            return b""
        content = self._reply.read(size)
        if not content:
            self._reply.finish(self._position)
        self._position += len(content)
        if self._facts is not None and not self._facts.is_exact:
            self._digest.update(content)
        return content

    def _connect(self) -> HttpReply | StoredFile:
        start = self._position if self._facts is not None and self._facts.is_exact else 0
        opened = HttpReply if scheme_of(self.url) in ("http", "https") else StoredFile
        reply: HttpReply | StoredFile = opened(self.url, start, self._facts)
        try:
            if self._facts is not None and reply.facts != self._facts:
                raise UnusableError("it changed while it was read: the connection broke, then it was another file")
            if self._tag is not None and reply.facts.tag != self._tag:
                raise UnusableError("it was changed since this run began")
            self._again(reply)
        except BaseException:
            reply.close()
            raise
        self._facts = reply.facts
        return reply

    def _again(self, reply: HttpReply | StoredFile) -> None:
        digest = hashlib.sha256()
        left = self._position - reply.start
        while left:
            content = reply.read(min(2**18, left))
            if not content:
                raise ConnectionError("the connection broke")
            digest.update(content)
            left -= len(content)
        if not reply.facts.is_exact and digest.digest() != self._digest.digest():
            raise UnusableError(
                "it changed while it was read: the connection broke, what was read before is another now"
            )


class StoredFile:
    """A file of any storage that fsspec knows; how it is reached is said by fsspec's own configuration.

    Args:
        url: The address.
        start: Where reading begins.
        facts: Unused: what is known of the file is asked for.

    Attributes:
        start: Where reading begins.
        facts: What is known of the file.
    """

    def __init__(self, url: str, start: int, facts: Facts | None) -> None:
        self._storage, self._path = fsspec.core.url_to_fs(url, use_listings_cache=False)
        self.start = start
        self.facts = self._ask()
        self._file = self._storage.open(self._path, "rb")
        self._file.seek(start)

    def _ask(self) -> Facts:
        about = self._storage.info(self._path)
        if about.get("type") == "directory":
            raise IsADirectoryError("it is a folder; name its files")
        return Facts(self._storage.ukey(self._path), None, about.get("size"))

    def read(self, size: int) -> bytes:
        """The next bytes.

        Args:
            size: The most.

        Returns:
            The bytes.
        """
        content: bytes = self._file.read(size)
        return content

    def finish(self, position: int) -> None:
        """At the end, refuse a file of which parts came from another one.

        Args:
            position: How many bytes were read.

        Raises:
            UnusableError: If it was changed while it was read.
            ConnectionError: If it is shorter than was said.
        """
        if self._ask() != self.facts:
            raise UnusableError("it changed while it was read")
        if self.facts.size is not None and position < self.facts.size:
            raise ConnectionError(f"it ended {self.facts.size - position} bytes before its end")

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def check_kind(url: str) -> None:
    """Refuse an address of a kind that can't be read here.

    Args:
        url: Not a path, nor a command.

    Raises:
        InputError: If nothing is known of it, or a package is missing for it.
    """
    kind, shown = scheme_of(url), shown_address(url)
    if kind in ("file", "local"):
        raise InputError(f"{shown!r} is on this machine; give its path.")
    try:
        fsspec.get_filesystem_class(kind)
    except ValueError:
        raise InputError(
            f"Shards are not read from {shown!r}; give a path, an address that fsspec knows, such as http(s), s3, gs "
            "or hf, or a `pipe:` command."
        ) from None
    except ImportError as error:
        extra = EXTRAS.get(kind)
        remedy = f"run `pip install 'lightning-unlearn[{extra}]'`" if extra else f"{error}".rstrip(".")
        raise InputError(f"Reading {shown!r} needs another package; {remedy}.") from None


def fresh_facts(url: str) -> Facts | None:
    """What a server says of a file now.

    Args:
        url: Its address.

    Returns:
        What tells it from others; ``None`` if it can't be reached, which shows when it is read.
    """
    file = RemoteFile(url)
    try:
        return file.facts
    except OSError:
        return None
    finally:
        file.close()
