"""An interface as an input trace: through libpcap and a ring of its own, in one process.

For programs that look at some traffic. What must not be lost is recorded by `appliance run` or `mtracecap`, whose
processes do not wait for anybody's Python.
"""

from __future__ import annotations

import ctypes
import os
import select

from appliance.capture.pcap_live import PcapCapture
from appliance.config import Interface
from appliance.counters import CAPTURE_FIELDS, CounterPages
from appliance.formats.encode import InterfaceDescription
from appliance.formats.reader import Filled
from appliance.ring.memory import allocate
from appliance.ring.ring import Consumer, Producer, initialise

RING_BYTES = 16 << 20
POLL_MS = 200


class LiveReader:
    """One interface, with the face of CaptureReader as far as an input trace needs it."""

    def __init__(self, interface: str) -> None:
        """Raises MissingInputError, MissingPermissionError or InputOutputError."""
        generation = int.from_bytes(os.urandom(7))
        fd = allocate(RING_BYTES, interface)
        try:
            initialise(fd, RING_BYTES, generation)
            producer = Producer(fd, generation)
            self._consumer = Consumer(fd, generation)
        finally:
            os.close(fd)
        self._page = CounterPages([("capture", CAPTURE_FIELDS)])["capture"]
        self._capture = PcapCapture(Interface(uri=f"pcap:{interface}"), producer, None, self._page)
        self._poller = select.poll()
        self._poller.register(self._capture.fileno(), select.POLLIN)
        self._held: bytes | None = None  # read from the ring, and too long for the last batch
        self.interfaces = [InterfaceDescription(self._capture.handle.linktype, name=interface)]

    @property
    def dropped_packets(self) -> int:
        """By the kernel or because the ring was full: nobody read fast enough."""
        return self._page["dropped_kernel_packets"] + self._page["dropped_ring_packets"]

    def fill(self, address: int, room: int) -> Filled:
        """Records of whatever has come, at least one, into `room` bytes at `address`; waits for it."""
        while True:
            taken = self._capture.step()
            produced = self._move(address, room)
            if produced:
                return Filled(produced)
            if not taken:
                self._poller.poll(POLL_MS)

    def close(self) -> None:
        """The handle goes with this object."""

    def _move(self, address: int, room: int) -> int:
        self._consumer.refresh()
        produced = 0
        while record := self._held or self._consumer.pop():
            if len(record) > room - produced:
                self._held = record
                return produced
            self._held = None
            ctypes.memmove(address + produced, record, len(record))
            produced += len(record)
        self._consumer.release()
        return produced
