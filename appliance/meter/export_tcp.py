"""IPFIX over TCP (RFC 7011, 10.4): each connection is a session of its own, and nothing waits for the collector."""

from __future__ import annotations

import errno
import select
import socket
import time
from collections import deque

from appliance.meter.export_socket import DRAIN_MESSAGES, SocketExporter
from appliance.meter.exporter import ExporterParts
from appliance.meter.pack import Message

STREAM_MESSAGE_BYTES = 16384
CONNECT_TIMEOUT_S = 10.0


class TcpExporter(SocketExporter):
    """One connection at a time. Every connection is a new session: all templates first, sequence numbers from 0."""

    kind = socket.SOCK_STREAM
    not_yet: tuple[type[OSError], ...] = (BlockingIOError,)  # what a socket raises that cannot go on now

    @property
    def default_message_bytes(self) -> int:
        return STREAM_MESSAGE_BYTES

    def __init__(self, parts: ExporterParts) -> None:
        super().__init__(parts)
        self.connecting_since_s: float | None = None
        self.connecting_events = select.POLLOUT
        self.has_peer = False  # TCP's part of connecting is done
        self.announced: deque[Message] = deque()  # templates of this session that are still to be sent
        self.sent_bytes = 0  # of the message at the front

    def drain(self) -> None:
        if not self.connected():
            return
        try:
            self.look_for_the_end()
            for _ in range(DRAIN_MESSAGES):
                if not self.send_front():
                    return
        except self.not_yet:
            return
        except OSError as error:
            self.lost(error)

    def lost(self, error: OSError) -> None:
        self.disconnect(f"connection lost ({error.strerror or error})")

    def connected(self) -> bool:
        """True when the session is up; otherwise moves it on without waiting."""
        if self.socket is None:
            if time.monotonic() < self.retry_at_s:
                return False
            self.begin_connecting()
        if self.connecting_since_s is not None:
            self.finish_connecting()
        return self.socket is not None and self.connecting_since_s is None

    def begin_connecting(self) -> None:
        new, address = self.open_socket()
        self.socket = new
        self.has_peer = False
        self.connecting_events = select.POLLOUT
        self.connecting_since_s = time.monotonic()
        code = new.connect_ex(address)
        if code not in (0, errno.EINPROGRESS):
            self.disconnect(f"connection failed ({errno.errorcode.get(code, code)})")

    def finish_connecting(self) -> None:
        if self.socket is None or self.connecting_since_s is None:
            return
        if time.monotonic() - self.connecting_since_s > CONNECT_TIMEOUT_S:
            self.disconnect("connecting took too long")
        elif (self.has_peer or self.find_peer(self.socket)) and self.handshake():
            self.begin_session()

    def find_peer(self, connecting: socket.socket) -> bool:
        poller = select.poll()
        poller.register(connecting, select.POLLOUT)
        if not poller.poll(0):
            return False
        code = connecting.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
        if code:
            self.disconnect(f"connection failed ({errno.errorcode.get(code, code)})")
            return False
        connecting.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.socket = self.wrap(connecting)
        self.has_peer = True
        return True

    def wrap(self, connected: socket.socket) -> socket.socket:
        """The socket that messages go to."""
        return connected

    def handshake(self) -> bool:
        """True when messages may be sent; else `connecting_events` says what is waited for, or the session is over."""
        return True

    def begin_session(self) -> None:
        self.connecting_since_s = None
        self.page.add("connects")
        self.sequence = self.first_sequence
        self.sent_bytes = 0
        self.announced = deque(self.templates.announcement(self.message_bytes))
        self.set_up(True)

    def disconnect(self, why: str) -> None:
        """The message that was under way stays in the queue: the collector has no whole one of it."""
        self.connecting_since_s = None
        self.announced.clear()
        self.sent_bytes = 0
        self.give_up_socket(why)

    def look_for_the_end(self) -> None:
        """A collector has nothing to say, but it may close."""
        if self.socket is None:
            return
        try:
            if not self.socket.recv(4096):
                raise ConnectionResetError(errno.ECONNRESET, "closed by the collector")
        except self.not_yet:
            pass

    def send_front(self) -> bool:
        """One step with the message at the front; False when there is none. BlockingIOError: the socket is full."""
        source = self.announced or self.queue
        if not source or self.socket is None:
            return False
        message = source[0]
        if self.sent_bytes == 0:
            self.stamp(message)
        self.sent_bytes += self.socket.send(memoryview(message.data)[self.sent_bytes :])
        if self.sent_bytes == len(message.data):
            self.sent_bytes = 0
            self.count_sent(message)
            self.reset_retry()
            if source is self.announced:
                self.announced.popleft()
            else:
                self.taken()
        return True

    def poll_events(self) -> list[tuple[int, int]]:
        if self.socket is None:
            return []
        if self.connecting_since_s is not None:
            return [(self.socket.fileno(), self.connecting_events)]
        waiting = self.queue or self.announced
        return [(self.socket.fileno(), select.POLLIN | (select.POLLOUT if waiting else 0))]
