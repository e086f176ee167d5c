"""Collecting: IPFIX messages from a file, a pipe, or from exporters over UDP, TCP and TLS, to a decoder each.

    file -> read_stream -> Session                          one session
    sockets -> Listener.run -> Session per exporter          UDP: by address and port; TCP, TLS: by connection

One thread, nothing blocks but the waiting for all. How many sessions, connections and octets there may be is bounded.
"""

from __future__ import annotations

import contextlib
import selectors
import socket
import ssl
import time
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, fields
from typing import BinaryIO

from appliance.errors import ConfigError, FormatError, InputOutputError, MissingInputError, MissingPermissionError
from appliance.meter.decode import MESSAGE_HEADER, VERSION, Counts, Limits, MalformedMessageError, Message, Session
from appliance.meter.settings import Endpoint, parse_uri
from appliance.meter.tls import ServerTls, reason_of, server_context

RECEIVE_BYTES = 65535
SOCKET_BUFFER_BYTES = 4 << 20
DATAGRAMS_AT_ONCE = 256  # of one socket, before the others are looked at
IDLE_S = 1.0  # how often the clock is looked at when nothing comes
NOT_IPFIX = {
    b"\x0c\xa5": "a file of nfdump; nfdump reads it",
    b"\xa5\x0c": "a file of nfdump; nfdump reads it",
    b"\xd4\xc3": "a capture; `appliance flows` meters it",
    b"\xa1\xb2": "a capture; `appliance flows` meters it",
    b"\x0a\x0d": "a capture; `appliance flows` meters it",
    b"\x1f\x8b": "compressed; unpack it first, as in `zcat FILE | appliance ipfix read -`",
    b"\x28\xb5": "compressed; unpack it first, as in `zstdcat FILE | appliance ipfix read -`",
    b"\x04\x22": "compressed; unpack it first, as in `lz4 -dc FILE | appliance ipfix read -`",
}

Handle = Callable[[str, Message], None]
"""Called with the exporter's name ("" for a file) and each message."""


# Files ----------------------------------------------------------------------------------------------------------------


def read_stream(stream: BinaryIO, name: str, session: Session) -> Iterator[Message]:
    """The messages of an IPFIX file (RFC 5655) or pipe, decoded as they are read. FormatError tells where it is
    damaged; what stood before has been given out then."""
    offset = 0
    while header := _read_exactly(stream, MESSAGE_HEADER.size):
        try:
            length = framed_length(header)
            rest = _read_exactly(stream, length - MESSAGE_HEADER.size)
            if len(rest) < length - MESSAGE_HEADER.size:
                raise MalformedMessageError("the file ends in the middle of a message")
            message = session.message(header + rest)
        except MalformedMessageError as error:
            what = NOT_IPFIX.get(header[:2]) if offset == 0 else None
            reason = f"no IPFIX: this is {what}" if what else f"at octet {offset}: {error}"
            whole = session.counts.messages
            raise FormatError(f"{name}: {reason}; {whole} whole messages before") from None
        yield message
        offset += length


def _read_exactly(stream: BinaryIO, wanted: int) -> bytes:
    """Fewer octets only at the end of the stream."""
    data = b""
    while len(data) < wanted and (more := stream.read(wanted - len(data))):
        data += more
    return data


def framed_length(header: bytes) -> int:
    """The length of the message that begins with `header`. MalformedMessageError: it is none."""
    if len(header) < MESSAGE_HEADER.size:
        raise MalformedMessageError(f"{len(header)} octets are no message")
    version, length = int.from_bytes(header[:2], "big"), int.from_bytes(header[2:4], "big")
    if version != VERSION:
        raise MalformedMessageError(f"version {version}, not {VERSION} (IPFIX)")
    if length < MESSAGE_HEADER.size:
        raise MalformedMessageError(f"a message of {length} octets")
    return length


class Framer:
    """Cuts a stream of octets into whole messages."""

    def __init__(self) -> None:
        self._buffer = bytearray()

    def feed(self, data: bytes) -> Iterator[bytes]:
        """MalformedMessageError: nothing behind this can be found any more."""
        self._buffer += data
        while len(self._buffer) >= MESSAGE_HEADER.size:
            length = framed_length(bytes(self._buffer[: MESSAGE_HEADER.size]))
            if len(self._buffer) < length:
                return
            message = bytes(self._buffer[:length])
            del self._buffer[:length]
            yield message

    @property
    def waiting(self) -> int:
        """Octets of a message that is not whole yet."""
        return len(self._buffer)


# Sockets --------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class CollectorLimits:
    """What a listener may keep; `session` for each of them."""

    sessions: int = 256  # over UDP; the one that was silent for longest goes first
    connections: int = 256  # over TCP and TLS; more are closed at once
    silence_s: float = 1800.0  # a connection without a message for so long is closed (RFC 7011, 10.4.5)
    handshake_s: float = 10.0
    session: Limits = field(default_factory=Limits)


@dataclass(slots=True)
class Totals:
    """Of a listener: all sessions that ever were, together."""

    counts: Counts = field(default_factory=Counts)
    sessions: int = 0
    refused_connections: int = 0

    def add(self, counts: Counts) -> None:
        for one in fields(Counts):
            setattr(self.counts, one.name, getattr(self.counts, one.name) + getattr(counts, one.name))


@dataclass(slots=True)
class _Connection:
    name: str
    socket: socket.socket
    session: Session
    framer: Framer = field(default_factory=Framer)
    is_ready: bool = True  # False: TLS is still being agreed on
    heard_at_s: float = field(default_factory=time.monotonic)


class Listener:
    """Collects from any number of exporters; `handle` gets every message, `tell` what went wrong, in sentences."""

    def __init__(
        self,
        uris: Iterable[str],
        handle: Handle,
        tell: Callable[[str], None],
        *,
        tls: ServerTls | None = None,
        limits: CollectorLimits | None = None,
    ) -> None:
        """Binds all of `uris`. ConfigError, MissingInputError or InputOutputError names the one that cannot be."""
        self.handle = handle
        self.tell = tell
        self.limits = limits or CollectorLimits()
        self.totals = Totals()
        self.addresses: list[str] = []  # where it listens, with the ports that port 0 became
        self._selector = selectors.DefaultSelector()
        self._datagram_sessions: OrderedDict[str, Session] = OrderedDict()
        self._connections: dict[int, _Connection] = {}
        self._swept_at_s = time.monotonic()
        try:
            for uri in uris:
                self._listen(uri, tls)
        except BaseException:
            self.close()
            raise

    def run(self, stop: Callable[[], bool]) -> None:
        """Until `stop()` is true; it is asked at least every second, and after each message."""
        while not stop():
            for key, _ in self._selector.select(IDLE_S):
                key.data(key.fileobj)
                if stop():
                    return
            self._sweep()

    def drain(self, deadline_s: float) -> None:
        """What has arrived already, until `deadline_s` (CLOCK_MONOTONIC)."""
        while time.monotonic() < deadline_s and (ready := self._selector.select(0)):
            for key, _ in ready:
                key.data(key.fileobj)

    def close(self) -> None:
        for connection in list(self._connections.values()):
            self._end(connection, "")
        for session in self._datagram_sessions.values():
            self.totals.add(session.counts)
        self._datagram_sessions.clear()
        for key in list(self._selector.get_map().values()):
            self._selector.unregister(key.fileobj)
            key.fileobj.close()  # type: ignore[union-attr]
        self._selector.close()

    def _listen(self, uri: str, tls: ServerTls | None) -> None:
        endpoint = parse_uri(uri)
        if endpoint.scheme not in ("udp", "tcp", "tls"):
            raise ConfigError(
                f"{uri}: not a place to listen; use udp://ADDRESS:PORT, tcp://ADDRESS:PORT or tls://ADDRESS:PORT"
            )
        context = None
        if endpoint.scheme == "tls":
            if tls is None:
                raise ConfigError(f"{uri}: TLS needs a certificate and its key (--certificate, --key)")
            context = server_context(tls)
        bound = bind(uri, endpoint)
        host, port = bound.getsockname()[:2]
        self.addresses.append(f"{endpoint.scheme}://{address_text(host, port)}")
        if endpoint.scheme == "udp":
            self._selector.register(bound, selectors.EVENT_READ, self._datagrams)
        else:
            accept = _Accept(self, endpoint.scheme, context)
            self._selector.register(bound, selectors.EVENT_READ, accept)

    # UDP

    def _datagrams(self, bound: socket.socket) -> None:
        for _ in range(DATAGRAMS_AT_ONCE):
            try:
                data, address = bound.recvfrom(RECEIVE_BYTES)
            except BlockingIOError:
                return
            except OSError as error:
                self.tell(f"udp: {error.strerror}")
                return
            name = f"udp {address_text(*address[:2])}"
            self._take(name, self._datagram_session(name), data)

    def _datagram_session(self, name: str) -> Session:
        session = self._datagram_sessions.get(name)
        if session is None:
            self.totals.sessions += 1
            session = self._datagram_sessions[name] = Session(datagrams=True, limits=self.limits.session)
            while len(self._datagram_sessions) > self.limits.sessions:
                _, forgotten = self._datagram_sessions.popitem(last=False)
                self.totals.add(forgotten.counts)
        self._datagram_sessions.move_to_end(name)
        return session

    def _take(self, name: str, session: Session, data: bytes) -> bool:
        """One message to the decoder; False: it was none."""
        try:
            message = session.message(data)
        except MalformedMessageError as error:
            self.tell(f"{name}: a message of {len(data)} octets is discarded: {error}")
            return False
        for note in message.notes:
            self.tell(f"{name}: {note}")
        self.handle(name, message)
        return True

    # TCP and TLS

    def accept(self, bound: socket.socket, scheme: str, context: ssl.SSLContext | None) -> None:
        try:
            new, address = bound.accept()
        except OSError as error:
            if not isinstance(error, BlockingIOError):
                self.tell(f"{scheme}: a connection could not be taken ({error.strerror})")
            return
        name = f"{scheme} {address_text(*address[:2])}"
        if len(self._connections) >= self.limits.connections:
            self.totals.refused_connections += 1
            self.tell(f"{name}: refused, there are {len(self._connections)} connections already")
            new.close()
            return
        new.setblocking(False)
        if context is not None:
            new = context.wrap_socket(new, server_side=True, do_handshake_on_connect=False)
        self.totals.sessions += 1
        connection = _Connection(name, new, Session(limits=self.limits.session), is_ready=context is None)
        self._connections[new.fileno()] = connection
        self._selector.register(new, selectors.EVENT_READ, self._readable)

    def _readable(self, ready: socket.socket) -> None:
        connection = self._connections[ready.fileno()]
        try:
            if not connection.is_ready and isinstance(ready, ssl.SSLSocket):
                ready.do_handshake()
                connection.is_ready = True
                self._selector.modify(ready, selectors.EVENT_READ, self._readable)
            self._receive(connection)
        except (BlockingIOError, ssl.SSLWantReadError):
            return
        except ssl.SSLWantWriteError:
            self._selector.modify(ready, selectors.EVENT_READ | selectors.EVENT_WRITE, self._readable)
        except ssl.SSLEOFError:
            self._end(connection, "the exporter closed without saying so")
        except OSError as error:
            self._end(connection, f"ended ({reason_of(error)})")

    def _receive(self, connection: _Connection) -> None:
        # TLS may hold more than one record back, of which the selector knows nothing: until there is no more.
        while data := connection.socket.recv(RECEIVE_BYTES):
            connection.heard_at_s = time.monotonic()
            try:
                for message in connection.framer.feed(data):
                    if not self._take(connection.name, connection.session, message):
                        # RFC 7011, 9: over TCP whoever sends this cannot be followed any more.
                        self._end(connection, "closed")
                        return
            except MalformedMessageError as error:
                connection.session.counts.malformed_messages += 1
                self._end(connection, f"closed: {error}")
                return
            if not isinstance(connection.socket, ssl.SSLSocket) or not connection.socket.pending():
                return
        waiting = connection.framer.waiting
        self._end(connection, f"ended in the middle of a message ({waiting} octets)" if waiting else "")

    def _end(self, connection: _Connection, why: str) -> None:
        if why:
            self.tell(f"{connection.name}: {why}")
        self.totals.add(connection.session.counts)
        fileno = connection.socket.fileno()
        self._selector.unregister(connection.socket)
        del self._connections[fileno]
        with contextlib.suppress(OSError):
            connection.socket.close()

    def _sweep(self) -> None:
        """Ends what has been silent for too long."""
        now_s = time.monotonic()
        if now_s - self._swept_at_s < IDLE_S:
            return
        self._swept_at_s = now_s
        for connection in list(self._connections.values()):
            limit_s = self.limits.silence_s if connection.is_ready else self.limits.handshake_s
            if now_s - connection.heard_at_s > limit_s:
                self._end(connection, f"closed, it was silent for {limit_s:g} s")


@dataclass(frozen=True, slots=True)
class _Accept:
    """A listening socket's callback."""

    listener: Listener
    scheme: str
    context: ssl.SSLContext | None

    def __call__(self, bound: socket.socket) -> None:
        self.listener.accept(bound, self.scheme, self.context)


def bind(uri: str, endpoint: Endpoint) -> socket.socket:
    kind = socket.SOCK_DGRAM if endpoint.scheme == "udp" else socket.SOCK_STREAM
    try:
        family, _, _, _, address = socket.getaddrinfo(endpoint.host, endpoint.port, type=kind, flags=socket.AI_PASSIVE)[
            0
        ]
    except OSError as error:
        raise MissingInputError(f"{uri}: {endpoint.host} cannot be resolved ({error.strerror or error})") from None
    bound = socket.socket(family, kind | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC)
    try:
        if endpoint.scheme == "udp":
            bound.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, SOCKET_BUFFER_BYTES)
        else:
            bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind(address)
        if endpoint.scheme != "udp":
            bound.listen(64)
    except PermissionError:
        bound.close()
        raise MissingPermissionError(f"{uri}: ports below 1024 are root's; use another one") from None
    except OSError as error:
        bound.close()
        raise InputOutputError(f"{uri}: cannot listen there ({error.strerror})") from None
    return bound


def address_text(host: str, port: int) -> str:
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
