"""A port's memory (port.h): where the capture worker of one interface and the monitor meet for port capture."""

from typing import Any

COMMAND_START: int
COMMAND_STOP: int
FILTERS: int
"""Filters of a port; their indices count from 0."""
FILTER_INSTRUCTIONS: int
"""The longest BPF program."""
FILTER_TEXT_BYTES: int
"""The longest expression."""
MIN_CAPACITY_BYTES: int
STATES: tuple[str, ...]
STOPPED_BECAUSE: tuple[str, ...]
PACKET_HEADER_BYTES: int
"""struct port_packet in front of each captured packet."""
NO_LATENCY: int
"""latency_ns of a packet without test payload."""

def allocate(capacity: int, generation: int, name: str) -> int:
    """A sealed memfd for a port with a buffer of `capacity` bytes, a power of two of at least 64 KiB.

    Its pages do not exist before `PortMemory.provide`. OSError when it cannot be had."""

class PortMemory:
    """A port's memory in this process. ValueError: not that of a port of this run. OSError: it cannot be mapped."""

    capacity: int
    """Bytes for captured packets."""
    settings: tuple[int, ...]
    """As given to `configure`."""

    def __init__(self, fd: int, expected_generation: int) -> None: ...
    @staticmethod
    def provide(fd: int) -> None:
        """Makes all pages exist. OSError: the machine has no such memory to give."""
    def command(self, number: int, now_ns: int) -> int:
        """COMMAND_START or COMMAND_STOP, as of `now_ns` (CLOCK_REALTIME). Returns the request's number."""
    def is_answered(self, request: int) -> bool: ...
    def configure(
        self,
        start_criterion: int,
        start_filter: int,
        stop_criterion: int,
        stop_filter: int,
        keep: int,
        keep_index: int,
        byte_count: int,
        pretrigger_packets: int,
        fcs_bytes: int,
    ) -> None:
        """What the next start goes by; only while nothing is captured. `byte_count` 0 or 2**32 - 1: whole packets.
        ValueError: a number is out of range."""
    def set_filter(self, index: int, text: bytes, program: bytes) -> None:
        """The filter with this index: its expression, and its program (8 bytes an instruction). Only while nothing is
        captured. ValueError: the index is too high, or one of them too long."""
    def filters(self) -> dict[int, bytes]:
        """{index: expression}"""
    def figures(self) -> dict[str, Any]:
        """The worker's own figures: state, stopped_because, linktype, captures, start_ns, packets, seen_packets,
        overwritten_packets, unknown_stream_packets, head, tail, buffer_bytes."""
    def streams_seen(self) -> list[dict[str, int]]:
        """Counts per stream of test payloads since the start, by stream."""
    def read(self, position: int, limit: int) -> tuple[int, bytes]:
        """At most `limit` bytes from `position` on, or from the tail if that is past it; and where they begin.

        The tail is the beginning of a packet. Whatever was overwritten while it was copied is not returned.
        ValueError: the worker's positions make no sense."""
