"""A file behind an http(s) address, read once from its start to its end."""

from __future__ import annotations

import http
import http.client
import time
import urllib.error
import urllib.request

# Seconds before another attempt: a server that restarts or is busy gets a quarter of a minute, and nobody waits longer.
WAITS = (1.0, 2.0, 4.0, 8.0)
TIMEOUT = 20.0
TRANSIENT = frozenset({408, 425, 429, 500, 502, 503, 504})


class RemoteFile:
    """The bytes at an http(s) address; where a connection breaks, reading goes on from there.

    WebDataset reads from a ``curl`` process, which does not take up a connection that breaks within a file: the shard
    would have to be read again from its start. Nor is a connection that is refused tried again.

    Args:
        url: The address.
    """

    def __init__(self, url: str) -> None:
        self.url = url
        self._position = 0
        self._size: int | None = None
        self._response: http.client.HTTPResponse | None = None

    def read(self, size: int) -> bytes:
        """The next bytes.

        Args:
            size: The most bytes to read.

        Returns:
            At least one byte, but for the end of the file.

        Raises:
            OSError: If they can't be read: at once where another attempt is of no use, or after the last one.
        """
        waits = iter(WAITS)
        while True:
            try:
                return self._read(size)
            except (OSError, http.client.HTTPException) as error:
                self.close()
                if isinstance(error, urllib.error.HTTPError):
                    error.close()  # it holds the connection
                wait = next(waits, None)
                if wait is None or not _is_transient(error):
                    raise OSError(str(error) or type(error).__name__) from error
                time.sleep(wait)

    def close(self) -> None:
        """Close the connection."""
        if self._response is not None:
            self._response.close()
            self._response = None

    def _read(self, size: int) -> bytes:
        if self._response is None:
            self._response = self._connect()
        content = self._response.read(size)
        if not content and self._response.length:
            raise ConnectionError(f"the connection broke {self._response.length} bytes before the end")
        self._position += len(content)
        return content

    def _connect(self) -> http.client.HTTPResponse:
        headers = {"User-Agent": "lightning-unlearn"}
        if self._position:
            headers["Range"] = f"bytes={self._position}-"
        request = urllib.request.Request(self.url, headers=headers)
        response: http.client.HTTPResponse = urllib.request.urlopen(request, timeout=TIMEOUT)
        start = self._position if response.status == http.HTTPStatus.PARTIAL_CONTENT else 0
        size = None if response.length is None else start + response.length
        if self._position and size != self._size:
            raise ValueError(f"it was {self._size} bytes long, and {size} when the connection had to be made again")
        self._size = size
        while start < self._position:  # the server knows no ranges and sends all of it again
            skipped = len(response.read(min(2**20, self._position - start)))
            if not skipped:
                raise ConnectionError("the connection broke")
            start += skipped
        return response


def _is_transient(error: Exception) -> bool:
    if isinstance(error, urllib.error.HTTPError):
        return error.code in TRANSIENT
    if isinstance(error, urllib.error.URLError):
        return isinstance(error.reason, OSError)  # otherwise it is a sentence about the address
    return not isinstance(error, http.client.InvalidURL)
