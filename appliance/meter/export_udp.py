"""IPFIX over UDP (RFC 7011, 10.3): templates that come again, datagrams that fit the path, at a bounded rate."""

from __future__ import annotations

import errno
import logging
import math
import socket
import time

from appliance.meter.export_socket import DRAIN_MESSAGES, SocketExporter
from appliance.meter.exporter import Counts, ExporterParts
from appliance.meter.pack import Message
from appliance.meter.settings import MIN_MESSAGE_BYTES

logger = logging.getLogger(__name__)

UDP_MESSAGE_BYTES = 1400
REFUSED_TEMPLATES_S = 1.0  # a collector that was not there gets the templates again soon
# linux/in.h and linux/in6.h, which Python does not name: (option level, MTU_DISCOVER, MTU, headers of IP and UDP).
PATH_MTU = {
    socket.AF_INET: (socket.IPPROTO_IP, 10, 14, 28),
    socket.AF_INET6: (socket.IPPROTO_IPV6, 23, 24, 48),
}
PMTUDISC_DONT, PMTUDISC_DO = 0, 2
BURST_DATAGRAMS = 64  # without a pause: 90 KB, well below a socket's usual buffer


class UdpExporter(SocketExporter):
    """One connected socket. Templates go out several times before the first record, then by time and by messages."""

    kind = socket.SOCK_DGRAM

    @property
    def default_message_bytes(self) -> int:
        return UDP_MESSAGE_BYTES

    def __init__(self, parts: ExporterParts) -> None:
        super().__init__(parts)
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
        self.reset_retry()
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
