"""One reply of a web server, whole or from a place on, and what it says of its file; on fsspec's connections."""

from __future__ import annotations

import asyncio
import os
import re
from collections.abc import Coroutine
from dataclasses import dataclass
from typing import Any, TypeVar

import aiohttp
import fsspec
import fsspec.asyn

from lightning_unlearn.fingerprints import digest

# Seconds in which something must come: a connection, all headers, the next bytes.
TIMEOUT = 20.0
TRANSIENT = frozenset({408, 425, 429, 500, 502, 503, 504})
_RANGE = re.compile(r"bytes (\d+)-(\d+)/(\d+|\*)")
_Result = TypeVar("_Result")


class UnusableError(OSError):
    """What a server sends can't be used, and asking again would not help."""


@dataclass(frozen=True)
class Facts:
    """What is known of a remote file before it is read.

    Attributes:
        etag: What its server calls this content.
        modified: When it was changed last, as the server writes it.
        size: In bytes.
    """

    etag: str | None
    modified: str | None
    size: int | None

    @property
    def is_exact(self) -> bool:
        """Whether equal facts mean equal bytes; a time has whole seconds, and a weak ETag stands for a meaning."""
        return self.etag is not None and not self.etag.startswith("W/")

    @property
    def tag(self) -> str | None:
        """What differs where the file does; ``None`` if nothing is known."""
        known = [str(fact) for fact in (self.etag, self.modified, self.size)]
        return digest(*known) if any(fact != "None" for fact in known) else None


class HttpReply:
    """A file's bytes from a place on, as one reply brings them.

    Args:
        url: An http(s) address.
        start: Where reading should begin.
        facts: Those of an earlier reply, if there was one.

    Attributes:
        start: Where the reply begins; 0 where a server knows no ranges.
        facts: What the reply says of the file.

    Raises:
        UnusableError: If the reply is not what was asked for.
    """

    def __init__(self, url: str, start: int, facts: Facts | None) -> None:
        timeout = aiohttp.ClientTimeout(total=None, connect=TIMEOUT, sock_connect=TIMEOUT, sock_read=TIMEOUT)
        # As the bytes lie there: an ETag and a length are of these. Proxies and .netrc as everywhere.
        of_client = {"timeout": timeout, "auto_decompress": False, "trust_env": True}
        self._storage = fsspec.filesystem("http", client_kwargs=of_client)
        headers = {"User-Agent": "lightning-unlearn", "Accept-Encoding": "identity"}
        if start:
            headers["Range"] = f"bytes={start}-"
            if facts is not None and facts.etag is not None:
                headers["If-Range"] = facts.etag
        self._reply = self._wait(self._ask(url, headers))
        try:
            self.start, self.facts = self._understand(start)
        except BaseException:
            self.close()
            raise

    def _wait(self, work: Coroutine[Any, Any, _Result]) -> _Result:
        result: _Result = fsspec.asyn.sync(self._storage.loop, lambda: work)
        return result

    async def _ask(self, url: str, headers: dict[str, str]) -> aiohttp.ClientResponse:
        session: aiohttp.ClientSession = await self._storage.set_session()
        # Redirections to what is no http(s) address are refused by aiohttp.
        request = session.get(self._storage.encode_url(url), headers=headers)
        # Headers that come drop by drop would keep each single wait short.
        reply: aiohttp.ClientResponse = await asyncio.wait_for(request, 2 * TIMEOUT)
        return reply

    def _understand(self, start: int) -> tuple[int, Facts]:
        reply = self._reply
        if reply.status not in (200, 206):
            raise aiohttp.ClientResponseError(
                reply.request_info, (), status=reply.status, message=reply.reason or "", headers=reply.headers
            )
        size, begins = reply.content_length, 0
        if reply.status == 206:
            part = _RANGE.fullmatch(reply.headers.get("Content-Range", ""))
            if part is None or int(part[1]) != start:
                raise UnusableError(f"asked for what follows byte {start}, its server sent another part")
            size, begins = (None if part[3] == "*" else int(part[3])), start
            if size is None or int(part[2]) != size - 1:
                raise UnusableError(f"asked for what follows byte {start}, its server sent less than all of it")
        return begins, Facts(reply.headers.get("ETag"), reply.headers.get("Last-Modified"), size)

    def read(self, size: int) -> bytes:
        """The next bytes.

        Args:
            size: The most.

        Returns:
            At least one byte, but for the end.
        """
        return self._wait(self._reply.content.read(size))

    def finish(self, position: int) -> None:
        """At the end, refuse a reply that is shorter than it said.

        Args:
            position: How many bytes of the file were read.

        Raises:
            ConnectionError: If it is.
        """
        if self.facts.size is not None and position < self.facts.size:
            raise ConnectionError(f"the connection broke {self.facts.size - position} bytes before the end")

    def close(self) -> None:
        """Close the connection."""
        self._wait(self._close())

    async def _close(self) -> None:
        self._reply.close()


def is_transient(error: Exception) -> bool:
    """Whether asking again may help.

    Args:
        error: Of a reply, or of a storage that fsspec knows.

    Returns:
        Whether it may.
    """
    if isinstance(error, aiohttp.ClientResponseError):
        return error.status in TRANSIENT
    if isinstance(error, UnusableError | FileNotFoundError | PermissionError | IsADirectoryError):
        return False
    if isinstance(error, aiohttp.InvalidURL | aiohttp.ClientSSLError):
        return False
    return isinstance(error, OSError | aiohttp.ClientError | asyncio.TimeoutError)


def reason_of(error: Exception) -> str:
    """Why something could not be read, in a few words.

    Args:
        error: Any.

    Returns:
        One line.
    """
    if isinstance(error, aiohttp.ClientResponseError):
        return f"HTTP Error {error.status}: {error.message}"
    if isinstance(error, aiohttp.ClientPayloadError):
        return "the connection broke before the end"
    if isinstance(error, asyncio.TimeoutError):
        return "timed out"
    if isinstance(error, aiohttp.ClientConnectorError) and error.os_error.errno is not None:
        return os.strerror(error.os_error.errno) if error.os_error.errno > 0 else str(error.os_error)
    return (str(error).splitlines() or [""])[0] or type(error).__name__
