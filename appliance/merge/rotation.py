"""When a segment ends: the one place where this is decided."""

from __future__ import annotations

from dataclasses import dataclass

NANOSECONDS = 1_000_000_000
NEVER = (1 << 64) - 1

# Why a segment was closed, as the sidecar and the metrics say it.
TIME, SIZE, PACKETS, REQUEST, CLOCK_STEP, END, WRITE_ERROR = (
    "time",
    "size",
    "packets",
    "request",
    "clock_step",
    "end",
    "write_error",
)


@dataclass(frozen=True)
class RotationPolicy:
    """A segment closes at the next multiple of `rotate_seconds` (UTC), or before it would pass `rotate_bytes` (before
    compression) or `rotate_packets`; 0 = never."""

    rotate_seconds: int = 0
    rotate_bytes: int = 0
    rotate_packets: int = 0

    def boundary_after(self, timestamp_ns: int) -> int:
        """The first boundary behind `timestamp_ns`."""
        if not self.rotate_seconds:
            return NEVER
        period = self.rotate_seconds * NANOSECONDS
        return min((timestamp_ns // period + 1) * period, NEVER)

    @property
    def max_packets(self) -> int:
        return self.rotate_packets or NEVER

    @property
    def max_bytes(self) -> int:
        return self.rotate_bytes or NEVER

    def limit_reason(self, packets_left: int) -> str:
        """Which limit it was that the merge stopped at."""
        return PACKETS if packets_left == 0 else SIZE
