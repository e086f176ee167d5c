"""A capture file as a packet source: at full speed, or at the speed at which it was recorded."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

from appliance.capture.uri import file_of
from appliance.errors import UsageError
from appliance.formats.decoder import NEVER_NS
from appliance.formats.encode import SNAPLEN_MAX, InterfaceDescription
from appliance.formats.reader import CaptureReader
from appliance.formats.record import clamp_snaplen, count_packets

# Keeps of a batch what it wants, in place: (address, bytes of the batch) -> bytes of the batch afterwards. Records
# that are no packets stay.
BatchFilter = Callable[[int, int], int]


@dataclass(frozen=True, slots=True)
class ReplayStatus:
    """What one `fill` did. Without `end`, `wait_ns` and `needed_room` the next call goes on, produced or not."""

    produced_bytes: int
    end: bool = False
    wait_ns: int = 0  # recorded speed: how long until the next packet is due
    needed_room: int = 0  # the next record needs so many bytes


class FileSource:
    """One file, as a capture worker drives it: `fill` writes whole records straight into the ring's free memory.

    `uri` is a scheme of files and a PATH, or a path alone; PATH "-" is standard input. What the file is, and how it
    is compressed, its first bytes tell, whatever the scheme says, but for formats that cannot be told by them.
    `speed` 0 is as fast as it goes, 1 is the recorded speed, 2 twice that. `packet_filter` sees packets as they are in
    the file; `snaplen` cuts them afterwards.
    """

    def __init__(
        self,
        uri: str,
        *,
        speed: float = 0.0,
        snaplen: int = SNAPLEN_MAX,
        packet_filter: BatchFilter | None = None,
        clock_ns: Callable[[], int] = time.monotonic_ns,
    ) -> None:
        """Raises what CaptureReader raises for a file that cannot be opened or is nothing that is read here."""
        if speed < 0:
            raise UsageError(f"{uri}: the replay speed is {speed}; it is 0 (as fast as possible) or more")
        path, told_format = file_of(uri)
        self.reader = CaptureReader(path, format=told_format)
        self.filtered_packets = 0
        self.truncated_packets = 0
        self._filter = packet_filter
        self._snaplen = snaplen
        self._pace = _Pace(speed, clock_ns) if speed else None

    @property
    def read_packets(self) -> int:
        """Packets read from the file so far, the filtered ones included."""
        return self.reader.counts.packets

    @property
    def read_bytes(self) -> int:
        """Sum of their original lengths."""
        return self.reader.counts.bytes

    @property
    def newest_ns(self) -> int | None:
        """The newest time stamp read: later packets of an ordered file are not older."""
        return self.reader.counts.last_ns

    @property
    def interfaces(self) -> list[InterfaceDescription]:
        return self.reader.interfaces

    def fill(self, address: int, room: int) -> ReplayStatus:
        """Decodes at most `room` bytes of records to memory at `address`; nothing blocks but the file itself.

        A damaged file gives its whole records first; the call after them raises FormatError.
        """
        until_ns = self._pace.until_ns() if self._pace else NEVER_NS
        filled = self.reader.fill(address, room, until_ns)
        if self._pace and filled.next_ns is not None:
            if self._pace.begin(filled.next_ns):  # the first packet is due at once
                return ReplayStatus(self._select(address, filled.produced_bytes))
            wait_ns = self._pace.wait_ns(filled.next_ns)
            return ReplayStatus(self._select(address, filled.produced_bytes), wait_ns=wait_ns)
        produced = self._select(address, filled.produced_bytes)
        return ReplayStatus(produced, end=filled.end, needed_room=filled.needed_room)

    def close(self) -> None:
        self.reader.close()

    def _select(self, address: int, batch_bytes: int) -> int:
        """The filter, then the snaplen, in place; returns what is left of the batch."""
        if self._filter and batch_bytes:
            packets = count_packets(address, batch_bytes)
            batch_bytes = self._filter(address, batch_bytes)
            self.filtered_packets += packets - count_packets(address, batch_bytes)
        if self._snaplen < SNAPLEN_MAX:
            batch_bytes, shortened = clamp_snaplen(address, batch_bytes, self._snaplen)
            self.truncated_packets += shortened
        return batch_bytes


class _Pace:
    """Maps the file's time onto the clock, from the moment of its first packet."""

    def __init__(self, speed: float, clock_ns: Callable[[], int]) -> None:
        self._speed = speed
        self._clock_ns = clock_ns
        self._first_ns: int | None = None
        self._started_ns = 0

    def until_ns(self) -> int:
        """The file's time that is due now; before the first packet nothing is, not even time 0."""
        if self._first_ns is None:
            return -1
        due_ns = self._first_ns + int((self._clock_ns() - self._started_ns) * self._speed)
        return min(due_ns, NEVER_NS)

    def begin(self, first_ns: int) -> bool:
        if self._first_ns is not None:
            return False
        self._first_ns, self._started_ns = first_ns, self._clock_ns()
        return True

    def wait_ns(self, next_ns: int) -> int:
        return max(1, int((next_ns - self.until_ns()) / self._speed))
