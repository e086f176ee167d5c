"""HTTP on the monitor's address: /metrics, /healthz, /status.json and the status page. It tells and changes nothing.

Clients may be slow, silent or many. An exchange that is not over in time is cut off; when there are too many
connections, the one that has idled longest goes, so that a scrape always finds a place.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import json
from collections.abc import Callable, Iterator
from typing import Any

import uvicorn
from prometheus_client import CollectorRegistry
from prometheus_client.exposition import choose_encoder
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route
from uvicorn.protocols.http.h11_impl import H11Protocol

from appliance.monitor.listener import BACKLOG
from appliance.monitor.metrics import SnapshotCollector
from appliance.monitor.page import CONTENT_SECURITY_POLICY, PAGE
from appliance.monitor.view import Snapshot

MAX_CONNECTIONS = 64
EXCHANGE_TIMEOUT_S = 5.0  # from a connection or a request's first byte to the last byte of the response
KEEP_ALIVE_TIMEOUT_S = 5
MAX_HEADER_BYTES = 16384

Count = Callable[[str], None]  # called with "scrapes" or "rejected_connections"


def application(take: Callable[[], Snapshot], count: Count) -> Starlette:
    """The four pages over one source of snapshots."""
    registry = CollectorRegistry(auto_describe=False)
    registry.register(SnapshotCollector(take))

    async def metrics(request: Request) -> Response:
        count("scrapes")
        encode, content_type = choose_encoder(request.headers.get("accept", ""))
        return Response(encode(registry), headers={"content-type": content_type})

    async def health(request: Request) -> Response:
        problems = take().problems
        return _json({"status": "failing" if problems else "ok", "reasons": problems}, 503 if problems else 200)

    async def status(request: Request) -> Response:
        return _json(take().as_json())

    async def page(request: Request) -> Response:
        headers = {"content-security-policy": CONTENT_SECURITY_POLICY, "x-content-type-options": "nosniff"}
        return Response(PAGE, media_type="text/html", headers=headers)

    return Starlette(
        routes=[
            Route("/metrics", metrics),
            Route("/healthz", health),
            Route("/status.json", status),
            Route("/", page),
        ]
    )


def _json(value: object, status_code: int = 200) -> Response:
    body = json.dumps(value, separators=(",", ":"))
    return Response(body, status_code, {"cache-control": "no-store"}, media_type="application/json")


class WebServer(uvicorn.Server):
    """uvicorn without its signal handlers, which are the supervisor's business; `serve` returns after `end`."""

    def __init__(self, app: Starlette, count: Count) -> None:
        guard = _Guard(count)
        self._ended = asyncio.Event()
        super().__init__(
            uvicorn.Config(
                app,
                http=functools.partial(_GuardedProtocol, guard=guard),  # type: ignore[arg-type]
                ws="none",
                loop="asyncio",
                lifespan="off",
                log_config=None,
                log_level="error",  # anybody can send nonsense; it is counted, not logged
                access_log=False,
                server_header=False,
                proxy_headers=False,
                backlog=BACKLOG,
                timeout_keep_alive=KEEP_ALIVE_TIMEOUT_S,
                timeout_graceful_shutdown=1,
                h11_max_incomplete_event_size=MAX_HEADER_BYTES,
            )
        )

    def end(self) -> None:
        """From the event loop's thread."""
        self.should_exit = True
        self._ended.set()

    async def main_loop(self) -> None:
        # uvicorn's own loop wakes ten times a second, which an idle service would feel.
        while not await self.on_tick(0):  # 0: refreshes the Date header
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(1.0):
                    await self._ended.wait()

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


class _Guard:
    """The open connections, oldest first."""

    def __init__(self, count: Count) -> None:
        self._count = count
        self._open: dict[_GuardedProtocol, None] = {}

    def enter(self, newest: _GuardedProtocol) -> None:
        self._open[newest] = None
        if len(self._open) > MAX_CONNECTIONS:
            self.reject(next((one for one in self._open if not one.is_answering), newest))

    def leave(self, one: _GuardedProtocol) -> None:
        self._open.pop(one, None)

    def reject(self, one: _GuardedProtocol) -> None:
        self._count("rejected_connections")
        self.leave(one)
        # Not close(): that waits until the client has read what is buffered for it.
        one.transport.abort()


class _GuardedProtocol(H11Protocol):
    """uvicorn's protocol has a time-out between requests only; this one has one for each exchange, too."""

    def __init__(self, *args: Any, guard: _Guard, **keywords: Any) -> None:
        super().__init__(*args, **keywords)
        self._guard = guard
        self._deadline: asyncio.TimerHandle | None = None

    @property
    def is_answering(self) -> bool:
        return self.cycle is not None and not self.cycle.response_complete

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._set_deadline()
        self._guard.enter(self)

    def data_received(self, data: bytes) -> None:
        # Only the first byte of an exchange sets the deadline: one byte every second does not put it off.
        if self._deadline is None:
            self._set_deadline()
        super().data_received(data)

    def on_response_complete(self) -> None:
        # While the client has not taken the response, the exchange is not over.
        if not self.transport.get_write_buffer_size():
            self._clear_deadline()
        super().on_response_complete()
        if self.is_answering and self._deadline is None:
            self._set_deadline()  # the next request had arrived along with the last one

    def connection_lost(self, exc: Exception | None) -> None:
        self._clear_deadline()
        self._guard.leave(self)
        super().connection_lost(exc)

    def _set_deadline(self) -> None:
        self._deadline = self.loop.call_later(EXCHANGE_TIMEOUT_S, self._guard.reject, self)

    def _clear_deadline(self) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None
