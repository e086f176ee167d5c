"""Exporters: one for each collector or file, each with its own templates, session, sequence numbers and counters.

    rows of the flow table -> Packer -> messages -> bounded queue -> socket or file

A message gets its sequence number and export time when it leaves, so that the numbers count what was sent (RFC 7011,
3.1), whatever the queue had to drop. Nothing blocks but `close`, which has a deadline, and a file's writes. Whatever
is not sent is counted, in flows, packets and octets.
"""

from __future__ import annotations

import errno
import logging
import math
import select
import socket
import threading
import time
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Mapping
from pathlib import Path

from appliance.counters import EXPORT_FIELDS, PAGE_BYTES, CounterPage
from appliance.errors import ConfigError, MissingInputError
from appliance.meter.files import FlowFiles
from appliance.meter.pack import Message, Packer
from appliance.meter.settings import MIN_MESSAGE_BYTES, Endpoint, ExportSettings, MeterSettings, parse_uri
from appliance.meter.templates import TemplateSet

logger = logging.getLogger(__name__)

UDP_MESSAGE_BYTES = 1400
STREAM_MESSAGE_BYTES = 16384
FILE_MESSAGE_BYTES = 65535  # nobody waits for a message of a file, and each has its price
RETRY_FIRST_S = 1.0
RETRY_LONGEST_S = 60.0  # RFC 7011, 10.4.4: at most one attempt a minute, once a collector stays away
CONNECT_TIMEOUT_S = 10.0
REFUSED_TEMPLATES_S = 1.0  # a collector that was not there gets the templates again soon
DRAIN_MESSAGES = 256  # sent in one go, so that a slow system call cannot hold the meter for long
# linux/in.h and linux/in6.h, which Python does not name: (option level, MTU_DISCOVER, MTU, headers of IP and UDP).
PATH_MTU = {
    socket.AF_INET: (socket.IPPROTO_IP, 10, 14, 28),
    socket.AF_INET6: (socket.IPPROTO_IPV6, 23, 24, 48),
}
PMTUDISC_DONT, PMTUDISC_DO = 0, 2
BURST_DATAGRAMS = 64  # without a pause: 90 KB, well below a socket's usual buffer
LOG_PAUSE_S = 30.0  # between two lines about one collector

Counts = Mapping[str, int]


def private_page() -> CounterPage:
    """A counter page of this process alone, for exporters that nobody watches."""
    return CounterPage(memoryview(bytearray(PAGE_BYTES)), EXPORT_FIELDS, 0)


class Exporter(ABC):
    """The queue, the numbers and the counters that all transports share."""

    def __init__(
        self,
        meter: MeterSettings,
        settings: ExportSettings,
        page: CounterPage | None = None,
        clock: Callable[[], float] = time.time,
        first_sequence: int = 0,
    ) -> None:
        """`clock`: seconds since 1970, for export times and rotation. `first_sequence`: of the first session."""
        self.settings = settings
        self.page = page or private_page()
        self.clock = clock
        self.sequence = first_sequence
        self.templates = TemplateSet(meter, settings)
        self.message_bytes = settings.message_bytes or self.default_message_bytes
        self.packer = self.make_packer()
        self.queue: deque[Message] = deque()
        self.queued_bytes = self.queued_packets = 0
        self.show_queue()
        self.started_ms = int(clock() * 1000)
        self.statistics_due_s: float | None = None
        self.logged_at_s = -math.inf

    def make_packer(self) -> Packer:
        return Packer(
            self.templates.plans,
            biflow=self.settings.biflow,
            observation_domain=self.settings.domain,
            message_bytes=self.message_bytes,
            constants=self.templates.constants,
        )

    @property
    @abstractmethod
    def default_message_bytes(self) -> int: ...

    @abstractmethod
    def drain(self) -> None:
        """Sends from the queue what can be sent without waiting."""

    @abstractmethod
    def close(self, deadline_s: float) -> None:
        """Sends what can be sent until `deadline_s` (CLOCK_MONOTONIC), counts the rest as not sent, and ends."""

    def service(self, now_s: float, counts: Counts) -> None:
        """Timers and the queue. `now_s`: CLOCK_MONOTONIC; `counts`: see `statistics`."""
        interval = self.settings.statistics_interval_s
        if interval:
            if self.statistics_due_s is None:
                self.statistics_due_s = now_s + interval
            elif now_s >= self.statistics_due_s:
                self.statistics_due_s = now_s + interval
                self.statistics(counts)
        self.drain()

    def next_deadline_s(self) -> float:
        """When `service` is wanted again at the latest (CLOCK_MONOTONIC)."""
        return self.statistics_due_s if self.statistics_due_s is not None else 0.0

    def poll_events(self) -> list[tuple[int, int]]:
        """(file descriptor, poll events) that should lead to `service`."""
        return []

    def export(self, rows_address: int, row_count: int) -> None:
        """Takes rows of the flow table; they may be overwritten when this returns."""
        for message in self.packer.pack(rows_address, row_count):
            self.submit(message)
        self.drain()

    def statistics(self, counts: Counts) -> None:
        """Options data: what was exported, ignored, and not sent, so far. `counts` must have `ignored_packets` and
        `ignored_octets`."""
        page = self.page
        figures = {name: page[name] for name in ("messages", "flow_records", "bytes")}
        figures |= {name: page[name] for name in ("not_sent_flows", "not_sent_packets", "not_sent_octets")}
        figures |= {name: counts[name] for name in ("ignored_packets", "ignored_octets")}
        figures |= {"first_ms": self.started_ms, "last_ms": int(self.clock() * 1000)}
        for message in self.templates.statistics(figures, self.message_bytes):
            self.submit(message)

    def submit(self, message: Message) -> None:
        """The queue drops the newest: a gap in the records is then one gap."""
        if self.queued_bytes + len(message.data) > self.settings.queue_bytes:
            self.drain()
        if self.queued_bytes + len(message.data) > self.settings.queue_bytes:
            self.count_not_sent(message)
            return
        self.queue.append(message)
        self.queued_bytes += len(message.data)
        self.queued_packets += message.packets
        self.show_queue()

    def taken(self) -> Message:
        """Removes the first message of the queue."""
        message = self.queue.popleft()
        self.queued_bytes -= len(message.data)
        self.queued_packets -= message.packets
        self.show_queue()
        return message

    def show_queue(self) -> None:
        self.page["queued_bytes"] = self.queued_bytes
        self.page["queued_packets"] = self.queued_packets

    def stamp(self, message: Message) -> None:
        message.stamp(int(self.clock()), self.sequence)

    def count_sent(self, message: Message) -> None:
        self.sequence = (self.sequence + message.records) & 0xFFFFFFFF
        self.page.add("messages")
        self.page.add("records", message.records)
        self.page.add("flow_records", message.flows)
        self.page.add("sent_packets", message.packets)
        self.page.add("bytes", len(message.data))

    def count_not_sent(self, message: Message) -> None:
        self.page.add("not_sent_flows", message.flows)
        self.page.add("not_sent_packets", message.packets)
        self.page.add("not_sent_octets", message.octets)

    def abandon_queue(self) -> None:
        while self.queue:
            self.count_not_sent(self.taken())

    def set_up(self, up: bool, why: str = "") -> None:
        """The gauge, and a log line for a change, unless it changes all the time."""
        now_s = time.monotonic()
        if bool(self.page["up"]) != up and now_s - self.logged_at_s >= LOG_PAUSE_S:
            self.logged_at_s = now_s
            if up:
                logger.info("collector %s: connected", self.settings.uri)
            else:
                logger.warning("collector %s: %s", self.settings.uri, why)
        self.page["up"] = int(up)


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

    def __init__(
        self,
        meter: MeterSettings,
        settings: ExportSettings,
        page: CounterPage | None = None,
        clock: Callable[[], float] = time.time,
        first_sequence: int = 0,
    ) -> None:
        super().__init__(meter, settings, page, clock, first_sequence)
        endpoint = parse_uri(settings.uri)
        self.addresses = resolve(settings.uri, endpoint, self.kind)
        self.lookup = Lookup(settings.uri, endpoint, self.kind)
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


class UdpExporter(SocketExporter):
    """One connected socket. Templates go out several times before the first record, then by time and by messages."""

    kind = socket.SOCK_DGRAM

    @property
    def default_message_bytes(self) -> int:
        return UDP_MESSAGE_BYTES

    def __init__(
        self,
        meter: MeterSettings,
        settings: ExportSettings,
        page: CounterPage | None = None,
        clock: Callable[[], float] = time.time,
        first_sequence: int = 0,
    ) -> None:
        super().__init__(meter, settings, page, clock, first_sequence)
        self.first_sequence = first_sequence
        self.templates_due_s = 0.0
        self.messages_to_templates: float = 0
        self.allowed = float(BURST_DATAGRAMS)  # datagrams that may go out now
        self.allowed_at_s = time.monotonic()

    def service(self, now_s: float, counts: Counts) -> None:
        self.connect()
        if self.socket is not None and now_s >= self.templates_due_s:
            self.send_templates(1)
            self.lookup.begin()  # over UDP nothing else would tell that the collector has moved
        super().service(now_s, counts)

    def next_deadline_s(self) -> float:
        deadlines = [super().next_deadline_s()]
        if self.socket is not None:
            deadlines.append(self.templates_due_s)
            if self.queue and self.allowed < 1:
                deadlines.append(self.allowed_at_s + BURST_DATAGRAMS / 2 / self.settings.datagrams_per_s)
        return min(deadline for deadline in deadlines if deadline)

    def poll_events(self) -> list[tuple[int, int]]:
        return super().poll_events() if self.queue and self.allowed >= 1 else []

    def export(self, rows_address: int, row_count: int) -> None:
        self.connect()  # how long a message may be is the path's matter
        super().export(rows_address, row_count)

    def refill(self) -> None:
        now_s = time.monotonic()
        if self.settings.datagrams_per_s:
            earned = (now_s - self.allowed_at_s) * self.settings.datagrams_per_s
            self.allowed = min(self.allowed + earned, BURST_DATAGRAMS)
        else:
            self.allowed = DRAIN_MESSAGES
        self.allowed_at_s = now_s

    def follow_name(self) -> None:
        """To where the collector's name leads by now."""
        found = self.lookup.take()
        if found and set(found) != set(self.addresses):  # the order changes all the time
            self.addresses, self.attempt = found, 0
            if self.socket is not None:
                self.socket.close()
                self.socket = None

    def connect(self) -> None:
        self.follow_name()
        if self.socket is not None or time.monotonic() < self.retry_at_s:
            return
        new, address = self.open_socket()
        self.socket = new
        try:
            new.connect(address)
        except OSError as error:
            self.give_up_socket(f"cannot be reached ({error.strerror})")
            return
        self.fit_path()
        self.page.add("connects")
        self.retry_s = RETRY_FIRST_S
        self.sequence = self.first_sequence  # another port of ours: to the collector a new session
        self.set_up(True)
        self.send_templates(self.settings.template_copies)

    def fit_path(self) -> None:
        """Makes messages as long as the path takes, and no longer than configured (RFC 7011, 10.3.3)."""
        if self.socket is None:
            return
        level, discover, mtu, header_bytes = PATH_MTU[self.socket.family]
        try:
            self.socket.setsockopt(level, discover, PMTUDISC_DO)
            path_bytes = self.socket.getsockopt(level, mtu) - header_bytes
        except OSError:
            path_bytes = MIN_MESSAGE_BYTES  # what is safe where the path is unknown
        wanted = min(self.settings.message_bytes or self.default_message_bytes, path_bytes)
        wanted = max(wanted, MIN_MESSAGE_BYTES)
        if wanted != self.message_bytes:
            self.message_bytes = wanted
            self.packer = self.make_packer()

    def send_in_fragments(self, message: Message) -> None:
        """For a message that was packed when the path was thought to take more. OSError: it cannot be sent at all."""
        assert self.socket is not None
        level, discover, _, _ = PATH_MTU[self.socket.family]
        self.socket.setsockopt(level, discover, PMTUDISC_DONT)
        try:
            self.socket.send(message.data)
        finally:
            self.socket.setsockopt(level, discover, PMTUDISC_DO)

    def send_templates(self, copies: int) -> None:
        self.fit_path()
        self.templates_due_s = time.monotonic() + self.settings.template_refresh_s
        self.messages_to_templates = self.settings.template_refresh_messages or math.inf
        for _ in range(copies):
            for message in self.templates.announcement(self.message_bytes):
                if not self.send(message):
                    self.templates_due_s = time.monotonic() + REFUSED_TEMPLATES_S

    def drain(self) -> None:
        self.connect()
        self.refill()
        while self.socket is not None and self.queue and self.allowed >= 1:
            if self.messages_to_templates <= 0:
                self.send_templates(1)
            if not self.send(self.queue[0]):
                return
            self.taken()
            self.allowed -= 1
            self.messages_to_templates -= 1

    def wait_writable(self, deadline_s: float) -> None:
        if self.socket is not None and self.allowed < 1:
            time.sleep(BURST_DATAGRAMS / 2 / self.settings.datagrams_per_s)
        else:
            super().wait_writable(deadline_s)

    def send(self, message: Message) -> bool:
        """False: the socket's buffer is full, nothing happened. Otherwise the message was sent or counted."""
        if self.socket is None:
            return False
        self.stamp(message)
        try:
            self.send_datagram(message)
        except OSError as error:
            if error.errno in (errno.EAGAIN, errno.ENOBUFS):
                return False
            self.page.add("send_errors")
            logger.debug("collector %s: %s", self.settings.uri, error.strerror)
            self.set_up(False, f"sending failed ({error.strerror})")
            self.count_not_sent(message)
            return True
        self.count_sent(message)
        return True

    def send_datagram(self, message: Message) -> None:
        """OSError: it was not sent."""
        assert self.socket is not None
        try:
            self.socket.send(message.data)
            if not self.page["up"]:
                self.set_up(True)
            return
        except OSError as error:
            if error.errno not in (errno.ECONNREFUSED, errno.EMSGSIZE):
                raise
            was_refused = error.errno == errno.ECONNREFUSED
        # Both errors may belong to an earlier datagram, and have eaten this one: once more.
        if was_refused:
            self.page.add("send_errors")
            self.refused()
            self.socket.send(message.data)
        else:
            self.fit_path()
            self.send_in_fragments(message)

    def refused(self) -> None:
        self.set_up(False, "nobody listens there")
        self.lookup.begin()
        self.templates_due_s = min(self.templates_due_s, time.monotonic() + REFUSED_TEMPLATES_S)


class TcpExporter(SocketExporter):
    """One connection at a time. Every connection is a new session: all templates first, sequence numbers from 0."""

    kind = socket.SOCK_STREAM
    not_yet: tuple[type[OSError], ...] = (BlockingIOError,)  # what a socket raises that cannot go on now

    @property
    def default_message_bytes(self) -> int:
        return STREAM_MESSAGE_BYTES

    def __init__(
        self,
        meter: MeterSettings,
        settings: ExportSettings,
        page: CounterPage | None = None,
        clock: Callable[[], float] = time.time,
        first_sequence: int = 0,
    ) -> None:
        super().__init__(meter, settings, page, clock, first_sequence)
        self.first_sequence = first_sequence
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
            self.retry_s = RETRY_FIRST_S
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


class FileExporter(Exporter):
    """RFC 5655 files: each begins with its templates, and is a session of its own."""

    @property
    def default_message_bytes(self) -> int:
        return FILE_MESSAGE_BYTES

    def __init__(
        self,
        meter: MeterSettings,
        settings: ExportSettings,
        page: CounterPage | None = None,
        clock: Callable[[], float] = time.time,
        first_sequence: int = 0,
    ) -> None:
        super().__init__(meter, settings, page, clock, first_sequence)
        self.first_sequence = first_sequence
        path = parse_uri(settings.uri).path
        if settings.single_file:
            self.files = FlowFiles(Path(path), 0, clock, single=True)
        elif path or settings.directory:
            self.files = FlowFiles(Path(path) if path else settings.directory or Path(), settings.rotate_seconds, clock)
        else:
            raise ConfigError(f"{settings.uri} names no directory, and none is configured; use file:DIRECTORY")
        self.page["up"] = 1

    def service(self, now_s: float, counts: Counts) -> None:
        super().service(now_s, counts)
        if self.files.due():
            self.files.publish()

    def next_deadline_s(self) -> float:
        deadline = super().next_deadline_s()
        rotation_s = self.files.seconds_to_rotation()
        if rotation_s is None:
            return deadline
        rotation_at_s = time.monotonic() + rotation_s
        return min(deadline, rotation_at_s) if deadline else rotation_at_s

    def statistics(self, counts: Counts) -> None:
        """Only beside records: a file of nothing but statistics every minute would help nobody."""
        if self.files.is_open:
            super().statistics(counts)

    def drain(self) -> None:
        while self.queue:
            if self.files.due():
                self.files.publish()
            message = self.taken()
            try:
                if not self.files.is_open:
                    self.begin_file()
                self.write(message)
            except OSError as error:
                self.page.add("send_errors")
                self.count_not_sent(message)
                self.set_up(False, f"{error.strerror or error}: {error.filename or self.files.place}")
            else:
                self.set_up(True)

    def begin_file(self) -> None:
        self.files.open()
        self.page.add("connects")
        self.sequence = self.first_sequence
        try:
            for message in self.templates.announcement(self.message_bytes):
                self.write(message)
        except OSError:
            self.files.discard()  # without its templates a file cannot be read
            raise

    def write(self, message: Message) -> None:
        self.stamp(message)
        self.files.write(message.data)
        self.count_sent(message)

    def close(self, deadline_s: float) -> None:
        self.drain()
        if self.files.single and not self.files.is_open:
            try:
                self.begin_file()  # a file that was asked for exists, even without a flow
            except OSError as error:
                self.page.add("send_errors")
                self.set_up(False, f"{error.strerror}: {error.filename}")
        self.files.close()
        self.page["up"] = 0


def make_exporter(
    meter: MeterSettings,
    settings: ExportSettings,
    page: CounterPage | None = None,
    clock: Callable[[], float] = time.time,
) -> Exporter:
    """The exporter for `settings.uri`. Raises ConfigError, MissingInputError or CannotCreateError, which name it."""
    if settings.file_format != "ipfix":
        from appliance.meter.records import RecordExporter

        return RecordExporter(meter, settings, page, clock)
    scheme = parse_uri(settings.uri).scheme
    if scheme == "tls":
        from appliance.meter.tls import TlsExporter

        return TlsExporter(meter, settings, page, clock)
    kinds: dict[str, type[Exporter]] = {"udp": UdpExporter, "tcp": TcpExporter, "file": FileExporter}
    return kinds[scheme](meter, settings, page, clock)
