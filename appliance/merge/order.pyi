"""Many rings into one stream in the order of time: packets in the merge worker, digests in the meter worker."""

from collections.abc import Iterable, Sequence

from appliance.merge.tap import Tap
from appliance.ring.ring import Consumer

IDLE: int
"""Nothing may go now. Write what there is, then sleep."""
FULL: int
"""The output buffer is full: write it."""
BOUNDARY: int
"""Everything older than `boundary_ns` has gone, and nothing older can come (but late packets)."""
LIMIT: int
"""The segment's packets or bytes are used up; the next record does not fit."""
CONTROL: int
"""Source `control_source` has a record for Python: `control_record()`, then `control_done()`."""
EPOCH: int
"""All sources saw the clock step, or had max_wait to report it: `next_epoch()` goes on behind it."""
ENDED: int
"""All sources have ended, and everything has gone."""

SINK_PCAPNG: int
SINK_PCAP_NS: int
SINK_PCAP_US: int
SINK_DIGESTS: int
SINK_ERF: int
SINK_RECORDS: int

class Merge:
    """Merges the rings of `consumers`. `live` says which are live (bounded by watermarks) and which are files.

    `sink`: what is written into the output buffer: Enhanced Packet Blocks with the output's interface numbers, pcap
    packets, ERF records, digests with the number of their source, or packets as they came. For ERF the output's
    interface number is the port and, from bit 8 on, the link type. The buffer holds `out_bytes` and one record more.
    For `start_grace_ms` after the start, max_wait does not count while a live source has made no promise yet: its
    worker is only starting. `lends`: what batches are written to is a pipe whose reader only reads, and may get the
    buffer's own pages; batches then take turns in several places.
    """

    def __init__(
        self,
        consumers: Iterable[Consumer],
        live: Sequence[bool],
        *,
        sink: int,
        max_wait_ms: int,
        out_bytes: int,
        start_grace_ms: int = 0,
        lends: bool = False,
    ) -> None: ...
    source_count: int
    sink: int
    out_bytes: int
    """Bytes in the output buffer."""
    out_packets: int
    control_source: int
    late: int
    """Packets emitted after one with a later time, ever; `late_max_ns` is the worst lateness."""
    late_max_ns: int
    forced: int
    """Records that went because of max_wait or a half full ring, before every source had promised nothing older."""
    crowded: bool
    """When `fill` began, more than a quarter of some ring was waiting: there is no time for a rest."""
    batch_first_ns: int
    """Times and lateness of the packets in the output buffer; 0 when there is none."""
    batch_last_ns: int
    batch_late: int
    batch_late_max_ns: int
    segment_packets: int
    """Packets since `begin_segment`, those in the output buffer included."""
    boundary_ns: int
    packets_left: int
    bytes_left: int
    horizon_ns: int
    """No honest time is beyond it: a packet that claims to be ends no segment and makes nobody late, and a promise
    counts up to it. Recorded files may hold any time; for live sources their owner moves it with the clock."""
    count_captured_bytes: bool
    """`bytes_left` counts packet bytes alone, not the output's."""
    next_ns: int
    """The time of the oldest waiting record, else the merged watermark; 0 when neither is known."""
    watermark: int
    has_news: bool
    hold_ms: int | None
    """Until max_wait is over for the first record that waits; None: none waits for that."""
    output_address: int
    clock_offset_ns: int
    """Added to CLOCK_MONOTONIC wherever holding times are measured: lets a test make time pass."""
    def fill(self) -> int:
        """Moves records into the output buffer until there is something to do; returns what. GIL released."""
    def output(self) -> memoryview:
        """The output buffer's content; valid until `emptied`."""
    def emptied(self) -> None: ...
    def shorten_batches(self, out_bytes: int) -> None:
        """From now on the buffer is full at `out_bytes` at the latest."""
    def release(self) -> None:
        """Gives everything consumed back to the producers: before the write, so that nothing is ever written twice."""
    def control_record(self) -> bytes: ...
    def control_done(self) -> None: ...
    def map_interface(self, index: int, local: int, interface: int) -> None:
        """Packets of source `index`, interface `local`, go out with the number `interface`. Unmapped ones are dropped
        and counted."""
    def use_tap(self, tap: Tap) -> None:
        """What is emitted from interfaces that `tap_interface` names goes there too, as far as there is room."""
    def tap_interface(self, index: int, local: int, linktype: int) -> None: ...
    def next_epoch(self) -> None: ...
    def begin_segment(self, boundary_ns: int, packets: int, length: int) -> None:
        """Limits of the next segment. What is in the output buffer already counts as part of it."""
    def want_watermarks(self) -> int:
        """Asks the empty live sources that hold others up, each at most once per max_wait / 2. Returns how many."""
    def want_all_watermarks(self) -> None:
        """Asks every empty live source."""
    def sleeps(self, sleeping: bool, *, resting: bool = False) -> None:
        """True before a sleep, then look at `has_news`; False after it. With `resting` no news ends it, but a ring that
        fills up."""
    def force(self) -> None:
        """The boundary counts as passed, whatever a silent source's watermark says."""
    def hold(self) -> None:
        """No segment is open: `fill` stops with BOUNDARY at the first record that may go, until `begin_segment`."""
    def set_max_wait(self, max_wait_ms: int) -> None: ...
    def finish(self) -> None:
        """Nobody is waited for any longer: what is in the rings goes, in order; then `fill` returns ENDED."""
    def resume(self, index: int, consumed: int, dropped: int, late: int) -> None:
        """A successor goes on where its predecessor's counts of a source ended."""
    def source_totals(self, index: int) -> tuple[int, int, int]:
        """(consumed, dropped, late) of a source, ever."""
    def source_counters(self, index: int) -> tuple[int, int, int, int, int]:
        """(received, dropped_kernel, dropped_filter, dropped_ring, published): its own, as of its last batch."""
