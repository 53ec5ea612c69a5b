"""The server: the page and its files at one address of this machine, and nothing from anywhere else."""

from __future__ import annotations

import asyncio
import logging
import os
import tempfile
from collections.abc import Awaitable, Callable, MutableMapping
from importlib.util import find_spec
from typing import Any, NoReturn

from lightning_unlearn.errors import InputError
from lightning_unlearn.serving.desk import Asked, Desk

# Before gradio is imported, which asks for it once.
QUIET = {"GRADIO_ANALYTICS_ENABLED": "False", "HF_HUB_DISABLE_TELEMETRY": "1", "HF_HUB_OFFLINE": "1"}
# Whatever a part of Gradio would load from elsewhere, a browser refuses; eval is how it fills in its templates.
POLICY = "; ".join(
    (
        "default-src 'self'",
        "script-src 'self' 'unsafe-inline' 'unsafe-eval'",
        "style-src 'self' 'unsafe-inline'",
        "img-src 'self' data: blob:",
        "font-src 'self' data:",
        "media-src 'self' blob:",
        "worker-src 'self' blob:",
        "object-src 'none'",
        "base-uri 'self'",
        "form-action 'self'",
        "frame-ancestors 'none'",
    )
)
HEADERS = (
    (b"content-security-policy", POLICY.encode()),
    (b"referrer-policy", b"no-referrer"),
    (b"x-content-type-options", b"nosniff"),
)
LOOPBACK = ("127.0.0.1", "localhost", "::1")

Scope = MutableMapping[str, Any]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]


class Guarded:
    """Adds the headers that keep a browser at home to each answer.

    Args:
        app: What answers.
    """

    def __init__(self, app: Any) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Any, send: Send) -> None:
        """Answer a request, as ASGI has it.

        Args:
            scope: Of the request.
            receive: Gives its parts.
            send: Takes those of the answer.
        """

        async def guarded(message: MutableMapping[str, Any]) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message["headers"], *HEADERS]
            await send(message)

        await self.app(scope, receive, guarded)


def application(desk: Desk, hosts: tuple[str, ...] = LOOPBACK) -> Any:
    """The page, and the files of its answers, as an ASGI application.

    Args:
        desk: Where questions are answered.
        hosts: Names by which the server may be called; ``("*",)`` for any.

    Returns:
        The application.
    """
    check_installed()
    os.environ |= QUIET
    import gradio
    from fastapi import FastAPI, Request
    from fastapi.responses import PlainTextResponse, Response
    from gradio import processing_utils
    from starlette.middleware.trustedhost import TrustedHostMiddleware

    from lightning_unlearn.serving import files, page

    # Gradio would fetch a picture whose address is given in its place.
    processing_utils.async_ssrf_protected_get = _refuse
    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)

    kinds: dict[str, tuple[Callable[[Desk, Asked], bytes], str]] = {
        "scores.csv": (files.as_csv, "text/csv; charset=utf-8"),
        "scores.parquet": (files.as_parquet, "application/vnd.apache.parquet"),
        "sources.png": (files.as_picture, "image/png"),
    }

    @app.get("/answers/{token}/{name}")
    def file(token: str, name: str) -> Response:
        asked = desk.asked(token)
        if asked is None or name not in kinds:
            return PlainTextResponse("This answer is not kept any more; ask again.", 404)
        make, kind = kinds[name]
        disposition = f'attachment; filename="{token}-{name}"'
        return Response(make(desk, asked), media_type=kind, headers={"content-disposition": disposition})

    @app.exception_handler(InputError)
    def sentence(request: Request, error: InputError) -> Response:
        return PlainTextResponse(str(error), 400)

    blocks = page.Page(desk).blocks()
    gradio.mount_gradio_app(
        app,
        blocks,
        path="/",
        theme=page.theme(),
        head=page.head(),
        footer_links=[],
        run_history=False,
        show_error=True,
        ssr_mode=False,
        pwa=False,
        mcp_server=False,
        max_file_size="32mb",
    )
    # Without it an app that is mounted takes the path of any file here for one that was uploaded (Gradio 6.31).
    blocks.has_launched = True
    return Guarded(TrustedHostMiddleware(app, allowed_hosts=list(hosts)))


def check_installed() -> None:
    """See that Gradio is here, before a model is loaded.

    Raises:
        InputError: If it is not.
    """
    if find_spec("gradio") is None:
        raise InputError('The page needs Gradio, which is missing here; `pip install "lightning-unlearn[serve]"`.')


async def _refuse(url: str) -> NoReturn:
    import gradio

    raise gradio.Error("Addresses are not fetched; drop a file.", print_exception=False)


def run(desk: Desk, host: str, port: int, say: Callable[[str], None]) -> None:
    """Serve until a signal ends it.

    Args:
        desk: Where questions are answered.
        host: Where the server listens.
        port: Likewise; 0 for one that is free.
        say: Told the address.

    Raises:
        InputError: If nobody can listen there.
    """
    with listening(host, port) as sock, tempfile.TemporaryDirectory(prefix="lightning-unlearn-serve-") as dropped:
        # Pictures that are dropped lie there while the server runs.
        os.environ["GRADIO_TEMP_DIR"] = dropped
        app = application(desk, LOOPBACK if host in LOOPBACK else ("*",))
        import uvicorn

        shown = f"[{host}]" if ":" in host else host
        say(f"Serving at http://{shown}:{sock.getsockname()[1]}/ until it is stopped (Ctrl-C).")
        if host not in LOOPBACK:
            say("Whoever reaches this machine may ask, and see the training pictures.")
        logging.getLogger("uvicorn.error").addFilter(_of_the_end)
        # Pages that are open hold a connection, and would have the server wait for them.
        config = uvicorn.Config(
            app, log_level="warning", access_log=False, ws="none", timeout_graceful_shutdown=1, server_header=False
        )
        uvicorn.Server(config).run(sockets=[sock])


def _of_the_end(record: logging.LogRecord) -> bool:
    """Whether a message is worth reading: that open pages are left when the server ends is not."""
    cancelled = record.exc_info is not None and record.exc_info[0] is asyncio.CancelledError
    return not cancelled and "graceful shutdown" not in record.getMessage()


def listening(host: str, port: int) -> Any:
    """A socket that listens.

    Args:
        host: Where.
        port: Likewise; 0 for one that is free.

    Returns:
        It.

    Raises:
        InputError: If nobody can listen there.
    """
    import socket

    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        sock = socket.socket(family, kind, protocol)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind(address)
        sock.listen(128)
    except (OSError, OverflowError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise InputError(
            f"Nobody can listen at {host} port {port} ({reason}); choose another --port or --host."
        ) from None
    return sock
