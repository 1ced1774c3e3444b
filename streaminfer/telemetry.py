"""What a worker says of itself over HTTP: /metrics, /livez, /readyz."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager

import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response
from starlette.routing import Route

from streaminfer.errors import ConfigError
from streaminfer.metrics import Metrics

__all__ = ["serve"]


@asynccontextmanager
async def serve(
    metrics: Metrics,
    host: str,
    port: int,
    *,
    live: Callable[[], bool],
    ready: Callable[[], bool],
) -> AsyncIterator[str]:
    """Serve while the block runs; yields the address, "http://HOST:PORT".

    `live` is asked by /livez: does the loop go round? `ready` by /readyz: can it take work? Port 0
    takes any free one. Raises ConfigError if the port is taken.
    """

    def answer(asked: Callable[[], bool]) -> Callable[[Request], Response]:
        def handler(request: Request) -> Response:
            fine = asked()
            return PlainTextResponse("ok\n" if fine else "no\n", 200 if fine else 503)

        return handler

    app = Starlette(
        routes=[
            Route("/livez", answer(live)),
            Route("/readyz", answer(ready)),
            Route("/metrics", metrics.asgi()),
        ]
    )
    config = uvicorn.Config(
        app, log_level="warning", lifespan="off", timeout_graceful_shutdown=1, ws="none"
    )
    server = _Server(config)
    with _listen(host, port) as listening:
        address = f"http://{host}:{listening.getsockname()[1]}"
        task = asyncio.create_task(server.serve([listening]), name="telemetry")
        try:
            yield address
        finally:
            server.should_exit = True
            await task


class _Server(uvicorn.Server):
    """Signals are the worker's business, not the server's."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


def _listen(host: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listening = socket.socket(family)
    listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listening.bind((host, port))
    except OSError as error:
        listening.close()
        raise ConfigError(
            f"cannot listen on {host}:{port}: {error.strerror}",
            where="metrics.port",
            hint="another port: metrics.port in the file, or STREAMINFER_METRICS__PORT=0 for any",
        ) from None
    listening.listen(64)
    return listening
