"""What exporters over UDP, TCP and TLS share: the collector's addresses, tried in turn, and when the next try is."""

from __future__ import annotations

import logging
import select
import socket
import threading
import time

from appliance.errors import MissingInputError
from appliance.meter.exporter import Exporter, ExporterParts
from appliance.meter.settings import Endpoint, parse_uri

logger = logging.getLogger(__name__)

RETRY_FIRST_S = 1.0
RETRY_LONGEST_S = 60.0  # RFC 7011, 10.4.4: at most one attempt a minute, once a collector stays away
DRAIN_MESSAGES = 256  # sent in one go, so that a slow system call cannot hold the meter for long

Addresses = list[tuple[socket.AddressFamily, tuple[str, int]]]


def resolve(uri: str, endpoint: Endpoint, kind: socket.SocketKind) -> Addresses:
    """A collector's addresses. MissingInputError: it has none."""
    try:
        found = socket.getaddrinfo(endpoint.host, endpoint.port, type=kind)
    except OSError as error:
        reason = error.strerror or str(error)
        raise MissingInputError(f"collector {uri}: {endpoint.host} cannot be resolved ({reason})") from None
    return [(family, address) for family, _, _, _, address in found]  # type: ignore[misc]


def is_address(host: str) -> bool:
    for family in (socket.AF_INET, socket.AF_INET6):
        try:
            socket.inet_pton(family, host)
        except OSError:
            continue
        return True
    return False


class Lookup:
    """Asks for a collector's addresses again, on a thread: a name server must not hold up the meter."""

    def __init__(self, uri: str, endpoint: Endpoint, kind: socket.SocketKind) -> None:
        self._arguments = (uri, endpoint, kind)
        self._is_name = not is_address(endpoint.host)
        self._thread: threading.Thread | None = None
        self._found: Addresses = []

    def begin(self) -> None:
        """Nothing, when it is asking already, or when there is no name to ask for."""
        if self._is_name and (self._thread is None or not self._thread.is_alive()):
            # A daemon: an answer that never comes must not hold up the end.
            self._thread = threading.Thread(target=self._ask, name="collector-name", daemon=True)
            self._thread.start()

    def _ask(self) -> None:
        try:
            self._found = resolve(*self._arguments)
        except MissingInputError as error:
            logger.debug("%s", error)  # what was known before is tried on

    def take(self) -> Addresses:
        """What was found since the last call; empty: nothing."""
        found, self._found = self._found, []
        return found


class SocketExporter(Exporter):
    """What UDP, TCP and TLS share: the addresses, tried in turn, and the growing pause between attempts."""

    kind: socket.SocketKind

    def __init__(self, parts: ExporterParts) -> None:
        super().__init__(parts)
        endpoint = parse_uri(self.settings.uri)
        self.addresses = resolve(self.settings.uri, endpoint, self.kind)
        self.lookup = Lookup(self.settings.uri, endpoint, self.kind)
        self.attempt = 0
        self.socket: socket.socket | None = None
        self.retry_at_s = 0.0
        self.retry_s = RETRY_FIRST_S

    def open_socket(self) -> tuple[socket.socket, tuple[str, int]]:
        if found := self.lookup.take():
            self.addresses = found
        family, address = self.addresses[self.attempt % len(self.addresses)]
        self.attempt += 1
        new = socket.socket(family, self.kind | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC)
        return new, address

    def give_up_socket(self, why: str) -> None:
        """Closes the session; the next attempt comes after a pause that doubles, to where the name leads then."""
        self.lookup.begin()
        if self.socket is not None:
            self.socket.close()
            self.socket = None
        self.page.add("send_errors")
        self.set_up(False, f"{why}; next attempt in {self.retry_s:g} s")
        self.retry_at_s = time.monotonic() + self.retry_s
        self.retry_s = min(self.retry_s * 2, RETRY_LONGEST_S)

    def reset_retry(self) -> None:
        """The collector is there."""
        self.retry_s = RETRY_FIRST_S

    def next_deadline_s(self) -> float:
        deadline = super().next_deadline_s()
        if self.socket is None:
            deadline = min(deadline, self.retry_at_s) if deadline else self.retry_at_s
        return deadline

    def poll_events(self) -> list[tuple[int, int]]:
        if self.socket is None:
            return []
        return [(self.socket.fileno(), select.POLLIN | (select.POLLOUT if self.queue else 0))]

    def wait_writable(self, deadline_s: float) -> None:
        timeout_s = min(deadline_s - time.monotonic(), 0.2)
        if self.socket is None:
            time.sleep(max(0.0, min(self.retry_at_s - time.monotonic(), timeout_s)))
        elif timeout_s > 0:
            poller = select.poll()
            for fd, events in self.poll_events():
                poller.register(fd, events)
            poller.poll(timeout_s * 1000)

    def close(self, deadline_s: float) -> None:
        while True:
            self.drain()
            if not self.queue or time.monotonic() >= deadline_s:
                break
            self.wait_writable(deadline_s)
        self.abandon_queue()
        if self.socket is not None:
            self.close_session(deadline_s)
            self.socket.close()
            self.socket = None
        self.page["up"] = 0

    def close_session(self, deadline_s: float) -> None:
        """What is to be done with the socket before it is closed, until `deadline_s`."""
