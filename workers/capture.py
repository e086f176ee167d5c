"""The capture worker: one source into its packet ring and its digest ring. One of three kinds, decided at the start.

ring:       kernel ring -> rings, in compiled code (appliance.capture.afpacket)
pcap: int:  libpcap, through pypcap or our own binding (appliance.capture.pcap_live)
files       decoded straight into the ring (appliance.capture.replay)
"""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
import select
import socket
import struct
import time
from collections.abc import Iterator
from dataclasses import dataclass

from appliance.capture import opener
from appliance.capture.afpacket import LiveCapture
from appliance.capture.application import Inspector
from appliance.capture.filesource import FileCapture
from appliance.capture.gate import make_gate
from appliance.capture.opener import OpenedInterface
from appliance.capture.pcap_live import BLOCK_TIMEOUT_MS, PcapCapture
from appliance.capture.trigger import PortTap
from appliance.config import Interface
from appliance.errors import FormatError, InputOutputError
from appliance.process import DRAIN, RELOAD, WorkerContext, set_capabilities, takes_log_level
from appliance.ring.ring import Producer

log = logging.getLogger(__name__)

HEARTBEAT_MS = 1000
REOPEN = b"reopen"  # worker to supervisor: the interface is another one now, or gone
CHECK_EVERY_S = 10.0  # whether the interface is still up; the kernel tells when it goes down
CHECK_DOWN_EVERY_S = 1.0  # whether it is up again, or gone for good
REOPEN_EVERY_S = 0.25  # whether it is back, while it is gone
DRAIN_BLOCK_TIMEOUTS = 2
DRAIN_SLEEP_S = 0.002
DRAIN_STALLED_S = 1.0  # the kernel says that packets wait, and hands none over
LIBPCAP_DRAIN_S = 2.0
SIOCGIFFLAGS = 0x8913
IFF_UP = 1


@dataclass(frozen=True)
class CaptureParts:
    """What a capture worker needs besides its context. `opened` and `socket_serial`: for `ring:` sources."""

    interface: Interface
    label: str
    generation: int
    ring_fd: int
    digest_fd: int  # -1: not metered
    wake_fd: int  # our own eventfd
    merge_wake_fd: int
    meter_wake_fd: int
    opened: OpenedInterface | None
    socket_serial: int
    inner: bool  # tunnels are metered by their innermost IP header
    applications: bool = False  # payloads are looked at for names
    entropy: bool = False  # and for their entropy
    port_fd: int = -1  # -1: no port capture
    turn_ms: int = 0  # at the start; see LiveCapture.serve

    @property
    def descriptors(self) -> tuple[int, ...]:
        fds = (self.ring_fd, self.digest_fd, self.wake_fd, self.merge_wake_fd, self.meter_wake_fd, self.port_fd)
        return tuple(fd for fd in fds if fd >= 0) + ((self.opened.fd,) if self.opened else ())


def main(context: WorkerContext) -> int:
    parts: CaptureParts = context.parts
    records = Producer(parts.ring_fd, parts.generation, parts.merge_wake_fd)
    digests = Producer(parts.digest_fd, parts.generation, parts.meter_wake_fd) if parts.digest_fd >= 0 else None
    source = parts.interface.source
    if source.scheme == "ring":
        LiveWorker(context, parts, records, digests).run()
        return 0
    if source.is_live:
        LibpcapWorker(context, parts, records, digests).run()
        return 0
    return FileWorker(context, parts, records, digests).run()


def make_inspector(parts: CaptureParts) -> Inspector | None:
    if parts.digest_fd < 0 or not (parts.applications or parts.entropy):
        return None
    return Inspector(applications=parts.applications, entropy=parts.entropy)


class SourceWorker:
    """What the kinds of workers have in common: the producing ends of the source's rings."""

    def __init__(
        self, context: WorkerContext, parts: CaptureParts, records: Producer, digests: Producer | None
    ) -> None:
        self.context = context
        self.parts = parts
        self.records = records
        self.digests = digests

    @contextlib.contextmanager
    def asleep(self, *, for_room: bool = False) -> Iterator[None]:
        """Meanwhile consumers wake us, for a watermark or when there is room; look for that once more before the
        sleep."""
        rings = [self.records] if self.digests is None else [self.records, self.digests]
        for ring in rings:
            ring.sleeps(True, for_room=for_room)
        yield
        for ring in rings:
            ring.sleeps(False)
        with contextlib.suppress(BlockingIOError):
            os.eventfd_read(self.parts.wake_fd)

    def end_rings(self) -> None:
        """No packet comes any more."""
        self.records.end()
        if self.digests is not None:
            self.digests.end()


class LiveWorker(SourceWorker):
    """A `ring:` source: sleeps until the kernel hands over a block or a consumer wants a watermark."""

    def __init__(
        self, context: WorkerContext, parts: CaptureParts, records: Producer, digests: Producer | None
    ) -> None:
        super().__init__(context, parts, records, digests)
        self.serial = parts.socket_serial
        self.is_gone = False
        self.next_check = 0.0
        self.progress_at = 0.0  # when packets came last
        self.drain_until: float | None = None
        self.turn_ms = parts.turn_ms
        self.inspector = make_inspector(parts)
        self.port = PortTap(parts.port_fd, parts.generation) if parts.port_fd >= 0 else None
        assert parts.opened is not None
        self.use(parts.opened)

    def use(self, opened: OpenedInterface) -> None:
        """Takes up a bound packet socket."""
        self.opened = opened
        self.capture = LiveCapture(
            opened.fd,
            opened.block_bytes,
            opened.block_count,
            self.records,
            self.digests,
            self.context.page,
            socket_serial=self.serial,
            linktype=opened.linktype,
            cooked=opened.cooked,
            snaplen=self.parts.interface.snaplen,
            ifindex=opened.ifindex,
            reorder_us=self.parts.interface.reorder_us,
            block_timeout_ms=self.parts.interface.block_timeout_ms,
            turn_ms=self.turn_ms,
            inner=self.parts.inner,
            inspector=self.inspector,
            port=self.port,
            gate=make_gate(self.parts.interface, opened.linktype),
        )
        self.poller = select.poll()
        self.poller.register(opened.fd, 0)  # for its errors
        self.poller.register(self.context.channel, select.POLLIN)
        self.context.page["interface_up"] = int(is_up(opened.ifindex))

    def run(self) -> None:
        while not self.is_done():
            self.context.beat()
            now = time.monotonic()
            if now >= self.next_check:
                self.check_interface()
            if self.drain_until is None:
                self.serve(max(0.0, self.next_check - now))
            elif self.capture.pump():
                self.progress_at = now
            else:
                time.sleep(DRAIN_SLEEP_S)
        self.capture.finish()
        self.end_rings()

    def serve(self, limit_s: float) -> None:
        """Captures until somebody calls, or for so long."""
        limit_ms = int(limit_s * 1000) + 1
        if self.capture.serve(self.parts.wake_fd, self.context.channel.fileno(), limit_ms):
            for fd, event in self.poller.poll(0):
                self.handle(fd, event)

    def handle(self, fd: int, event: int) -> None:
        if fd == self.opened.fd and event & select.POLLERR:
            # ENETDOWN, told once: down or gone. Reading it away; check_interface finds out which.
            self.take_socket_error()
            self.check_interface()
        elif fd == self.context.channel.fileno():
            self.listen()

    def take_socket_error(self) -> None:
        duplicate = socket.socket(fileno=os.dup(self.opened.fd))
        with duplicate:
            number = duplicate.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
        log.warning("%s: %s", self.opened.interface, os.strerror(number) if number else "the socket reports an error")

    def listen(self) -> None:
        """Words of the supervisor: drain, another turn, or a new socket."""
        try:
            message, fd = opener.receive(self.context.channel, socket.MSG_DONTWAIT)
        except BlockingIOError:
            return
        except ConnectionError:
            message, fd = b"", -1
        if takes_log_level(message):
            return
        if not message or message == DRAIN:
            self.begin_drain()
        elif message.startswith(RELOAD):
            self.capture.turn_ms = self.turn_ms = int(message.removeprefix(RELOAD))
        elif fd >= 0 and self.drain_until is not None:
            os.close(fd)  # too late
        elif fd >= 0:
            self.take_over(opener.parse_opened(message, fd))

    # ---- the interface goes and comes ----

    def check_interface(self) -> None:
        """The interface may be down (the same socket goes on when it is up again), or another one of the same name (a
        new socket is needed; the old one is silent for ever)."""
        exists = opener.interface_exists(self.opened.ifindex)
        up = exists and is_up(self.opened.ifindex)
        self.context.page["interface_up"] = int(up)
        interval_s = CHECK_EVERY_S if up else CHECK_DOWN_EVERY_S if exists else REOPEN_EVERY_S
        self.next_check = time.monotonic() + interval_s
        if exists or self.drain_until is not None:
            return
        if not self.is_gone:
            self.is_gone = True
            log.warning("%s is gone; waiting for it to come back", self.opened.interface)
        if name_exists(self.opened.interface):
            with contextlib.suppress(OSError):  # the supervisor does not listen: the next look asks again
                self.context.channel.send(REOPEN, socket.MSG_DONTWAIT)

    def take_over(self, opened: OpenedInterface) -> None:
        """The interface is back. What its old socket held is walked; that socket goes."""
        while self.capture.pump():
            self.context.beat()
        self.capture.finish()
        old = self.opened.fd
        self.serial += 1
        self.use(opened)
        os.close(old)
        self.is_gone = False
        self.context.page.add("reopened")
        log.warning("%s is back (interface index %d)", opened.interface, opened.ifindex)

    # ---- the end ----

    def begin_drain(self) -> None:
        """Nothing new is accepted; what the kernel holds is handed over within two block time-outs."""
        if self.drain_until is None:
            self.context.set_state("draining")
            opener.stop_accepting(self.opened.fd)
            timeout_s = DRAIN_BLOCK_TIMEOUTS * self.parts.interface.block_timeout_ms / 1000
            self.drain_until = time.monotonic() + timeout_s + 0.005
            with contextlib.suppress(KeyError):
                self.poller.unregister(self.context.channel)  # it may be at its end, and would wake us for ever

    def is_done(self) -> bool:
        now = time.monotonic()
        if self.drain_until is None or now < self.drain_until:
            return False
        return self.capture.is_drained or now > max(self.drain_until, self.progress_at) + DRAIN_STALLED_S


def name_exists(name: str) -> bool:
    try:
        socket.if_nametoindex(name)
    except OSError:
        return False
    return True


def is_up(ifindex: int) -> bool:
    """By the kernel's word (netdevice(7)): /sys may show another network namespace than ours."""
    try:
        name = socket.if_indextoname(ifindex)
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
            answer = fcntl.ioctl(sock, SIOCGIFFLAGS, struct.pack("16sH22x", name.encode(), 0))
    except OSError:
        return False
    return bool(struct.unpack_from("H", answer, 16)[0] & IFF_UP)


class LibpcapWorker(SourceWorker):
    """A `pcap:` or `int:` source. The handle is opened here, with the capability that this kind of worker is left; then
    it is dropped like everybody's."""

    def __init__(
        self, context: WorkerContext, parts: CaptureParts, records: Producer, digests: Producer | None
    ) -> None:
        super().__init__(context, parts, records, digests)
        self.capture = PcapCapture(
            parts.interface, records, digests, context.page, inner=parts.inner, inspector=make_inspector(parts)
        )
        set_capabilities(())
        self.poller = select.poll()
        self.poller.register(self.capture.fileno(), select.POLLIN)
        self.poller.register(parts.wake_fd, select.POLLIN)
        self.poller.register(context.channel, select.POLLIN)

    def run(self) -> None:
        while DRAIN not in self.context.messages():
            self.context.beat()
            if self.capture.step() == 0:
                self.sleep()
        self.context.set_state("draining")
        # libpcap cannot be told to accept nothing more: the end is the first pause of two block time-outs.
        deadline = time.monotonic() + LIBPCAP_DRAIN_S
        poller = select.poll()
        poller.register(self.capture.fileno(), select.POLLIN)
        while (self.capture.step() or poller.poll(DRAIN_BLOCK_TIMEOUTS * BLOCK_TIMEOUT_MS)) and (
            time.monotonic() < deadline
        ):
            self.context.beat()
        self.end_rings()

    def sleep(self) -> None:
        with self.asleep():
            if not self.capture.sink.watermark_wanted:
                self.poller.poll(HEARTBEAT_MS)


class FileWorker(SourceWorker):
    """A file source: waits for room, never drops. Ends with the file."""

    def __init__(
        self, context: WorkerContext, parts: CaptureParts, records: Producer, digests: Producer | None
    ) -> None:
        super().__init__(context, parts, records, digests)
        self.poller = select.poll()
        self.poller.register(parts.wake_fd, select.POLLIN)
        self.poller.register(context.channel, select.POLLIN)

    def run(self) -> int:
        status = 0
        try:
            capture = FileCapture(
                self.parts.interface,
                self.records,
                self.digests,
                self.context.page,
                inner=self.parts.inner,
                inspector=make_inspector(self.parts),
            )
            while not capture.ended:
                self.context.beat()
                wait_ms = capture.step()
                if wait_ms:
                    self.sleep(capture, wait_ms)
                if DRAIN in self.context.messages():
                    break
        except (FormatError, InputOutputError) as error:
            # What was whole before the damage is in the ring already; the run goes on without this file.
            log.error("%s: %s", self.parts.interface.uri, error)
            self.context.page.add("input_errors")
            status = error.exit_code
        self.end_rings()
        return status

    def sleep(self, capture: FileCapture, wait_ms: int) -> None:
        with self.asleep(for_room=capture.waits_for_room):
            if capture.must_wait:
                self.poller.poll(min(wait_ms, HEARTBEAT_MS))
