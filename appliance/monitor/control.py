"""The control socket: status, rotation and version over a unix socket, guarded by the file's mode alone.

One JSON object a line, in both directions:

    {"request": "status"}   ->  {"ok": true, "result": {...}}        a Snapshot
    {"request": "rotate"}   ->  {"ok": true, "result": "..."}        forwarded to the supervisor
    {"request": "version"}  ->  {"ok": true, "result": "0.1.0"}
    {"request": "capture", ...}                             port capture, see ports.py
    anything else           ->  {"ok": false, "error": "..."}

Clients are not trusted with our time or memory: requests are short, connections few, and a silent one is closed.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import json
import os
import socket
import stat
from collections.abc import Awaitable, Callable, Mapping
from pathlib import Path
from typing import Any

from appliance.errors import (
    EXIT_GAVE_UP,
    ApplianceError,
    CannotCreateError,
    InputOutputError,
    MissingPermissionError,
)

SOCKET_MODE = 0o660
MAX_PATH_BYTES = 107  # sun_path holds 108 with the final zero (sys/un.h)
MAX_REQUEST_BYTES = 4096
MAX_RESPONSE_BYTES = 16 << 20
MAX_CONNECTIONS = 16
IDLE_TIMEOUT_S = 5.0

Handler = Callable[[], object]
Taker = Callable[[Mapping[str, Any]], Awaitable[object]]  # of a request that says more than its name


class NotRunningError(ApplianceError):
    """There is no service behind the control socket."""

    exit_code = EXIT_GAVE_UP  # EX_UNAVAILABLE, sysexits.h: "a service is unavailable"


# The socket -----------------------------------------------------------------------------------------------------------


def open_control_socket(path: Path) -> socket.socket:
    """A listening socket at `path`, mode 0660 whatever the umask; one that a dead service left behind is replaced.

    The directory must be there. CannotCreateError: another service listens there, something else than a socket is
    there, or it cannot be made.
    To be called while the process has one thread: the umask is the process's.
    """
    name = os.fspath(path)
    if len(os.fsencode(name)) > MAX_PATH_BYTES:
        raise CannotCreateError(
            f"control socket {name}: the path has {len(os.fsencode(name))} bytes, a unix socket's holds "
            f"{MAX_PATH_BYTES}; set monitor.control_socket to a shorter one"
        )
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
    try:
        _remove_stale(name)
        # The mode is right from the first moment: a chmod after the bind would look the path up a second time.
        umask = os.umask(0o777 & ~SOCKET_MODE)
        try:
            listener.bind(name)
        finally:
            os.umask(umask)
        listener.listen(MAX_CONNECTIONS)
        listener.setblocking(False)
    except OSError as error:
        listener.close()
        raise CannotCreateError(
            f"control socket {name}: {error.strerror}; set monitor.control_socket to a place that user "
            f'{os.geteuid()} may write to, or to "" for none'
        ) from None
    except ApplianceError:
        listener.close()
        raise
    return listener


def _remove_stale(name: str) -> None:
    """Removes a socket that nobody listens on. Whoever starts twice is stopped by the lock of the directories."""
    try:
        if not stat.S_ISSOCK(os.lstat(name).st_mode):
            raise CannotCreateError(f"control socket {name}: there is something else of that name; it is left alone")
    except FileNotFoundError:
        return
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC) as probe:
        probe.setblocking(False)
        if probe.connect_ex(name) == errno.ECONNREFUSED:
            os.unlink(name)
            return
    raise CannotCreateError(
        f"control socket {name}: another service listens there; stop it, or set monitor.control_socket to another path"
    )


def remove_control_socket(listener: socket.socket, path: Path) -> None:
    """Closes the socket and removes its path; after it, a client is told that there is no service."""
    listener.close()
    with contextlib.suppress(OSError):
        os.unlink(path)


# Serving --------------------------------------------------------------------------------------------------------------


class ControlServer:
    """Answers the requests in `handlers`, which return what json.dumps takes. Runs in the monitor's event loop."""

    def __init__(
        self, handlers: Mapping[str, Handler], count: Callable[[str], None], takers: Mapping[str, Taker] | None = None
    ) -> None:
        """`count` is called with "control_requests" or "rejected_connections". `takers` get the whole request."""
        self._handlers = handlers
        self._takers = takers or {}
        self._count = count
        self._connections = 0

    async def start(self, listener: socket.socket) -> asyncio.AbstractServer:
        return await asyncio.start_unix_server(self._serve, sock=listener, limit=MAX_REQUEST_BYTES)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._connections += 1
        try:
            if self._connections > MAX_CONNECTIONS:
                self._count("rejected_connections")
                return
            while await self._answer_one(reader, writer):
                pass
        except TimeoutError:
            self._count("rejected_connections")
        except OSError:
            pass  # the client went away; it has nobody to tell
        finally:
            self._connections -= 1
            # A client that does not read would keep a graceful close waiting.
            writer.transport.abort() if writer.transport.get_write_buffer_size() else writer.close()

    async def _answer_one(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
        """False: the client is done, or asked for too much."""
        async with asyncio.timeout(IDLE_TIMEOUT_S):
            try:
                line = await reader.readuntil(b"\n")
            except asyncio.IncompleteReadError:
                return False
            except asyncio.LimitOverrunError:
                writer.write(_line({"ok": False, "error": f"a request has at most {MAX_REQUEST_BYTES} bytes"}))
                await writer.drain()
                return False
            self._count("control_requests")
            writer.write(_line(await self._respond(line)))
            await writer.drain()
        return True

    async def _respond(self, line: bytes) -> dict[str, object]:
        try:
            message = json.loads(line)
        except (ValueError, RecursionError):
            return {"ok": False, "error": "the request is not JSON"}
        request = message.get("request") if isinstance(message, dict) else None
        name = request if isinstance(request, str) else ""
        if name not in self._handlers and name not in self._takers:
            known = ", ".join(sorted((*self._handlers, *self._takers)))
            return {"ok": False, "error": f'the request must be {{"request": NAME}} with one of: {known}'}
        try:
            if name in self._takers:
                return {"ok": True, "result": await self._takers[name](message)}
            return {"ok": True, "result": self._handlers[name]()}
        except (ApplianceError, OSError) as error:
            return {"ok": False, "error": str(error)}


def _line(message: Mapping[str, object]) -> bytes:
    return json.dumps(message, separators=(",", ":")).encode() + b"\n"


# Asking ---------------------------------------------------------------------------------------------------------------


class ControlClient:
    """Asks a running service. Every failure is an error that says what to do."""

    def __init__(self, path: Path, timeout_s: float = 5.0) -> None:
        self._path = path
        self._timeout_s = timeout_s

    def ask(self, request: str) -> Any:
        """The result of one request, over a connection of its own.

        NotRunningError: nobody listens. MissingPermissionError: the socket's mode keeps us out. InputOutputError: the
        service does not answer, or answers with an error.
        """
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC) as connection:
            connection.settimeout(self._timeout_s)
            self._connect(connection)
            try:
                connection.sendall(_line({"request": request}))
                answer = json.loads(self._receive_line(connection))
            except TimeoutError:
                raise InputOutputError(
                    f"{self._path}: the service does not answer within {self._timeout_s:g} s"
                ) from None
            except OSError as error:
                raise InputOutputError(f"{self._path}: the service closed the connection ({error.strerror})") from None
            except ValueError:
                raise InputOutputError(f"{self._path}: the answer is not that of an appliance") from None
        if not isinstance(answer, dict) or not answer.get("ok"):
            reason = answer.get("error") if isinstance(answer, dict) else None
            raise InputOutputError(f"{self._path}: the service refuses: {reason or 'no reason given'}")
        return answer.get("result")

    def _connect(self, connection: socket.socket) -> None:
        try:
            connection.connect(os.fspath(self._path))
        except (FileNotFoundError, ConnectionRefusedError, NotADirectoryError):
            raise NotRunningError(
                f"no service listens on {self._path}; start one with `appliance run`, or name its socket "
                "with --socket or its configuration with --config"
            ) from None
        except PermissionError:
            raise MissingPermissionError(
                f"{self._path}: user {os.geteuid()} may not connect; join the socket's group, or use sudo"
            ) from None
        except TimeoutError:
            raise InputOutputError(f"{self._path}: the service does not accept the connection") from None
        except OSError as error:
            raise NotRunningError(f"{self._path}: {error.strerror or error}") from None

    def _receive_line(self, connection: socket.socket) -> bytes:
        received = bytearray()
        while not received.endswith(b"\n"):
            part = connection.recv(1 << 16)
            received += part
            if not part or len(received) > MAX_RESPONSE_BYTES:
                raise ValueError("no whole line")
        return bytes(received)
