"""A web server on this machine that serves one file and goes wrong in the ways that are asked for."""

from __future__ import annotations

import hashlib
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


@dataclass
class Server:
    """How the next answers are; a list is used up, an answer an entry."""

    content: bytes
    address: str = ""
    ranges: bool = True
    etag: bool | str = True
    length: bool = True
    chunked: bool = False
    modified: str | None = None
    failures: list[int] = field(default_factory=list)  # statuses
    reason: str | None = None
    breaks: list[int] = field(default_factory=list)  # how many bytes arrive
    later: list[bytes] = field(default_factory=list)  # what the file is from the next answer on
    wrong_part: int = 0  # the part begins so many bytes later than asked for
    unnamed_part: bool = False  # a part without Content-Range
    hang: str = ""  # "headers" or "body": nothing more comes
    drip: bool = False  # a byte, and a pause
    endless: bytes = b""  # sent over and over after the content
    redirect: str = ""
    requests: list[str | None] = field(default_factory=list)  # the ranges that were asked for
    authorizations: list[str | None] = field(default_factory=list)
    stopped: threading.Event = field(default_factory=threading.Event)

    def answer(self, handler: BaseHTTPRequestHandler) -> None:
        """One answer."""
        self.requests.append(handler.headers["Range"])
        self.authorizations.append(handler.headers["Authorization"])
        handler.close_connection = True
        if self.hang == "headers":
            self.stopped.wait(30)
            return
        if self.failures:
            handler.send_error(self.failures.pop(0), self.reason)
            return
        if handler.path.startswith("/moved"):
            handler.send_response(302)
            handler.send_header("Location", self.redirect or self.address)
            handler.send_header("Content-Length", "0")
            handler.end_headers()
            return
        self._send(handler)
        if self.later:
            self.content = self.later.pop(0)

    def _send(self, handler: BaseHTTPRequestHandler) -> None:
        start = 0
        if self.ranges and handler.headers["Range"]:
            start = int(handler.headers["Range"].removeprefix("bytes=").removesuffix("-")) + self.wrong_part
            handler.send_response(206)
            if not self.unnamed_part:
                handler.send_header("Content-Range", f"bytes {start}-{len(self.content) - 1}/{len(self.content)}")
        else:
            handler.send_response(200)
        if self.length and not self.endless:
            handler.send_header("Content-Length", str(len(self.content) - start))
        if self.etag:
            own = f'"{hashlib.sha256(self.content).hexdigest()[:16]}"'
            handler.send_header("ETag", own if self.etag is True else self.etag)
        if self.modified is not None:
            handler.send_header("Last-Modified", self.modified)
        handler.end_headers()
        arriving = self.breaks.pop(0) if self.breaks else len(self.content)
        try:
            self._write(handler, self.content[start:][:arriving])
        except OSError:  # the reader has had enough
            return

    def _write(self, handler: BaseHTTPRequestHandler, content: bytes) -> None:
        if self.drip:
            for place in range(len(content)):
                handler.wfile.write(content[place : place + 1])
                if self.stopped.wait(0.05):
                    return
        handler.wfile.write(content)
        handler.wfile.flush()
        if self.hang == "body":
            self.stopped.wait(30)
        while self.endless and not self.stopped.is_set():
            handler.wfile.write(self.endless)


@contextmanager
def serving(content: bytes) -> Iterator[Server]:
    """A server of a file, while it is needed."""
    server = Server(content)

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            server.answer(self)

        def log_message(self, format: str, *args: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as http_server:
        thread = threading.Thread(target=http_server.serve_forever, args=(0.01,), daemon=True)
        thread.start()
        server.address = f"http://127.0.0.1:{http_server.server_port}/shard-000000.tar"
        try:
            yield server
        finally:
            server.stopped.set()
            http_server.shutdown()
            thread.join()


def pause() -> None:
    """Let the server's thread go on."""
    time.sleep(0.05)
