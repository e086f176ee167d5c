"""Counters in shared memory: one page per worker, one writer per page, any number of readers.

The supervisor creates all pages in one memfd before it forks and keeps them, so a counter outlives the worker that
writes it. A page is an array of u64 slots; a field's name is its place in one of the tuples below. Aligned 8-byte
stores do not tear on the machines that we run on, so a reader needs no lock; two slots read together may be apart by
one batch.

Compiled code writes the slots directly (`CounterPage.address`), by the same order of names.
"""

from __future__ import annotations

import mmap
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence

PAGE_BYTES = 4096
SLOT_BYTES = 8
_U64 = (1 << 64) - 1

# Every page begins with these, whatever its worker does.
COMMON_FIELDS = (
    "heartbeat_ns",  # CLOCK_MONOTONIC of the last turn of the worker's loop
    "pid",
    "started_ns",  # CLOCK_MONOTONIC
    "state",  # one of STATES
)
STATES = ("starting", "running", "draining", "ended")

# Reasons why a packet is not metered (appliance/capture/headers.pyx counts them in the capture worker).
IGNORED_REASONS = ("not_ip", "truncated", "malformed", "too_many_layers", "link_type")
IGNORED_FIELDS = (*(f"ignored_{reason}_packets" for reason in IGNORED_REASONS), "ignored_octets")  # on the wire

# The kernel's counts of a live source, exact through every death of its worker (appliance/capture/kernel_counters.pxd).
# They are for a successor; readers find their sums in the fields of the same meaning.
KERNEL_ACCOUNT_FIELDS = (
    "kernel_account_half",
    *(
        f"kernel_account_{half}_{name}"
        for half in (0, 1)
        for name in ("received", "dropped", "freezes", "answer", "answer_end")
    ),
)

CAPTURE_FIELDS = COMMON_FIELDS + (
    "received_packets",  # tp_packets (the kernel's drops included), or packets read from a file
    "dropped_kernel_packets",  # tp_drops
    "dropped_filter_packets",  # rejected by a filter in user space
    "dropped_ring_packets",  # our ring was full
    "gated_packets",  # not recorded: the triggers or keep rules of the recording left them out
    "gate_state",  # of the recording: 0 closed, 1 open, 2 closed for good
    "foreign_packets",  # of another interface, or outgoing copies that were not asked for
    "read_packets",  # taken out of the kernel's ring or the file
    "read_bytes",  # original lengths of those
    "published_packets",  # written into our ring
    "published_bytes",  # captured lengths of those
    "kernel_queued_packets",  # waiting in the kernel's ring at the last look
    "kernel_freezes",  # times the kernel's ring was full
    "reordered_packets",  # put right within reorder_us
    "late_packets",  # came later than reorder_us
    "truncated_packets",  # captured length below original length
    "clock_steps",
    "last_packet_ns",  # timestamp of the newest packet
    "interface_up",  # 1 or 0
    "reopened",  # sockets opened again after the interface came back
    "digests_published",
    "digests_dropped",  # the digest ring was full
    *IGNORED_FIELDS,
    "input_errors",  # damaged input files
    "unpublished_packets",  # walked, and held for reorder_us
    *KERNEL_ACCOUNT_FIELDS,
)

# Upper bounds of the histogram of the time from a segment's close to its publication.
PUBLISH_BUCKETS_MS = (10, 50, 250, 1000, 5000, 30000)

# What the publisher counts with the rename of a file, so that a death between the two costs neither.
SETTLED_FIELDS = (
    "segments_published",
    "published_packets",
    "segments_recovered",
    "recovered_packets",
    "segments_quarantined",
    "quarantined_packets",
)

# One page per output.
MERGE_FIELDS = COMMON_FIELDS + (
    "merged_packets",
    "written_packets",
    "written_bytes",  # before compression, file and record headers included
    "direct_bytes",  # that went past the page cache (merge/direct.pxd)
    "late_packets",  # emitted after a packet with a later timestamp
    "late_max_ns",
    "forced_packets",  # released because max_wait_ms was over
    "watermark_ns",  # smallest watermark of the sources
    "last_packet_ns",
    "segments_opened",
    "segments_published",
    "segments_quarantined",
    "segments_recovered",
    "segments_skipped",  # empty, and empty_segments = "skip"
    "published_bytes",  # on disk, after compression
    "published_packets",
    "quarantined_packets",
    "recovered_packets",
    "write_errors",
    "compressor_failures",
    "hook_failures",
    "open_packets",  # in the segment that is being written
    "segment_opened_ns",  # CLOCK_REALTIME; 0 when none is open
    "last_published_ns",  # CLOCK_REALTIME
    "queued_segments",  # closed, not yet published
    "settling_inode",  # of the staging file that is being published or quarantined; 0: none (merge/ledger.py)
    *(f"settling_{name}" for name in SETTLED_FIELDS),  # what they become with that file
    "expired_files",
    "expired_bytes",
    "clock_steps",
    "publish_ns",  # sum of the times from a segment's close to its publication
    *(f"publish_{bound_ms}_ms" for bound_ms in PUBLISH_BUCKETS_MS),  # how many of them fell below this bound only
    "publish_slower",  # and above the last one; see publish_bucket
    "tapped_packets",  # handed on to the flow traces
    "tap_dropped_packets",  # that the flow traces missed: their ring was full
)

# One page per source of an output, written by the merge.
MERGE_SOURCE_FIELDS = COMMON_FIELDS + (
    "consumed_packets",  # taken out of the ring
    "written_packets",  # and still: ever_written_packets - taken_back_packets
    "ever_written_packets",
    "taken_back_packets",  # were written, and then lost with their file: counted as dropped, or as lost_unclean
    "written_bytes",  # captured lengths
    "dropped_merge_packets",  # damaged records, or a file's packets that the output's format cannot hold
    "dropped_writer_packets",  # the output failed
    "lost_unclean_packets",  # gone with a killed merge: consumed, but in no file
    "held_packets",  # consumed, neither written nor dropped yet
    "late_packets",
    "closed_packets",  # written, in files that have left work/ for ready/ or quarantine/
    "settling_packets",  # what closed_packets becomes with the file of settling_inode
)

# What the publisher of flow traces counts with the rename of a file.
TRACE_SETTLED_FIELDS = ("published_files", "published_packets", "published_bytes")

TRACE_END_REASONS = ("idle", "closed", "reused", "evicted", "end")  # in the order of meter/traceflow_table.pyi

# Upper bounds of the histogram of the time from a flow's end, by its time-out, to its record.
EXPORT_DELAY_BUCKETS_MS = (10, 50, 250, 1000, 5000, 30000)

# What inspection of payloads tells apart (ring/digest.h).
APPLICATIONS = ("tls", "quic", "dns", "http", "ssh")

METER_FIELDS = COMMON_FIELDS + (
    "observed_packets",  # digests consumed
    "metered_packets",
    "metered_octets",
    "ignored_packets",
    "unsampled_packets",  # passed over by packet or flow sampling
    "active_flows",
    "active_flow_packets",
    "peak_flows",
    "table_bytes",
    "flows_created",
    "flows_idle_timeout",  # flowEndReason 1
    "flows_active_timeout",  # 2
    "flows_end_of_flow",  # 3
    "flows_forced_end",  # 4
    "flows_lack_of_resources",  # 5; these by what they were:
    "evicted_single_packet_flows",
    "evicted_half_open_flows",  # TCP that nobody answered
    "evicted_other_flows",
    "exported_flows",
    "exported_packets",
    "exported_octets",
    "lost_unclean_flows",  # gone with a killed meter, as all lost_unclean: in its table, or on the way there
    "lost_unclean_packets",
    "lost_unclean_octets",
    "stream_time_ns",
    "late_packets",
    "tcp_retransmitted_packets",  # what TCP analysis found
    "tcp_out_of_order_packets",
    "tcp_lost_segments",
    "tcp_duplicate_acks",
    "tcp_zero_windows",
    "export_delay_ns",  # sum of the times from a flow's end to its record
    *(f"export_delay_{bound_ms}_ms" for bound_ms in EXPORT_DELAY_BUCKETS_MS),  # how many fell below this bound only
    "export_delay_longer",  # and above the last one
    "fragments_keyed",  # later fragments that got the ports of their first
    "fragments_unmatched",  # that did not, though their protocol has ports
    "fragments_overlapping",  # that begin where others have been
    *(f"flows_{name}" for name in APPLICATIONS),  # by what their payload says
    "partial_names",  # flows whose first message was not seen to its end
    "dropped_names",  # of flows for which name_bytes had no room
    "fragment_evictions",  # datagrams forgotten before their end for want of room
)

# One page per collector or file of the meter.
EXPORT_FIELDS = COMMON_FIELDS + (
    "records",  # data records sent, options data included
    "flow_records",
    "messages",
    "bytes",
    "sent_packets",  # of those flow records
    "send_errors",
    "tls_failures",  # handshakes that failed, and sessions that TLS ended
    "connects",
    "not_sent_flows",
    "not_sent_packets",
    "not_sent_octets",
    "queued_bytes",
    "queued_packets",  # of the flow records in them
    "lost_unclean_packets",  # of flow records that were gone with a killed meter's queue
    "before_packets",  # of flow records from before there was this collector
    "begun",  # 1: before_packets is known
    "up",
)

# Flow traces. Packets: observed = other + published + cut + refused + failed + unpublished + unclean + held + queued.
TRACEFLOW_FIELDS = COMMON_FIELDS + (
    "observed_packets",  # taken out of the taps' rings
    "other_packets",  # no TCP
    "late_packets",
    "active_flows",
    "held_packets",  # of flows in the table
    "buffered_bytes",  # memory of what waits to be written
    "staged_bytes",  # in files of flows that are not over
    "flows_created",
    *(f"flows_{reason}" for reason in TRACE_END_REASONS),  # ended, by why
    "queued_flows",  # over, not yet published
    "queued_packets",
    "published_files",
    "published_packets",
    "published_bytes",
    "cut_packets",  # beyond max_flow_bytes of a flow
    "refused_packets",  # no room: retain_bytes, min_free_bytes
    "failed_packets",  # could not be written
    "unpublished_packets",  # in a file that could not be published
    "write_errors",
    "lost_unclean_packets",  # gone with a killed worker
    "leftover_files",  # unfinished ones of a killed worker, removed at the next start
    "stored_files",  # published, and still there as far as is known
    "stored_bytes",
    "expired_files",
    "expired_bytes",
    "settling_inode",  # of the file that is being published; 0: none
    *(f"settling_{name}" for name in TRACE_SETTLED_FIELDS),  # what they become with that file
    "stream_time_ns",
)

OPENER_FIELDS = COMMON_FIELDS + ("opened", "failed")
MONITOR_FIELDS = COMMON_FIELDS + ("scrapes", "control_requests", "rejected_connections")
SUPERVISOR_FIELDS = COMMON_FIELDS + (
    "restarts",
    "planned_restarts",  # for new settings
    "reloads",
    "reload_failures",
    "last_reload_ok",
)


def supervisor_fields(workers: Iterable[str]) -> tuple[str, ...]:
    """The supervisor's fields, with one `restarts/<worker>` for each of `workers` (names of their pages)."""
    return SUPERVISOR_FIELDS + tuple(restarts_field(worker) for worker in workers)


def restarts_field(worker: str) -> str:
    """The supervisor's field that counts the restarts of the worker with this page."""
    return f"restarts/{worker}"


def publish_bucket(duration_ns: int) -> str:
    """The field of MERGE_FIELDS that counts a segment whose publication took so long."""
    for bound_ms in PUBLISH_BUCKETS_MS:
        if duration_ns <= bound_ms * 1_000_000:
            return f"publish_{bound_ms}_ms"
    return "publish_slower"


class CounterPage:
    """One page: `page["name"]` reads, `page["name"] = n` and `page.add("name", n)` write (its one writer only)."""

    def __init__(self, memory: memoryview, fields: Sequence[str], address: int) -> None:
        if len(fields) * SLOT_BYTES > PAGE_BYTES:
            raise ValueError(f"{len(fields)} fields do not fit into a page of {PAGE_BYTES} bytes")
        self._slots = memory.cast("Q")
        self._index = {name: i for i, name in enumerate(fields)}
        self.fields = tuple(fields)
        self.address = address

    def __getitem__(self, name: str) -> int:
        return int(self._slots[self._index[name]])

    def __setitem__(self, name: str, value: int) -> None:
        self._slots[self._index[name]] = value & _U64

    def add(self, name: str, count: int = 1) -> None:
        i = self._index[name]
        self._slots[i] = (self._slots[i] + count) & _U64

    def add_all(self, counts: Mapping[str, int]) -> None:
        for name, count in counts.items():
            self.add(name, count)

    def index(self, name: str) -> int:
        return self._index[name]

    def clear(self) -> None:
        """For another owner."""
        for name in self.snapshot():
            self[name] = 0

    def snapshot(self) -> dict[str, int]:
        """All fields at once, as `{name: value}`."""
        return {name: int(self._slots[i]) for name, i in self._index.items()}

    def release(self) -> None:
        self._slots.release()


class CounterPages:
    """All pages of one run, in one anonymous memfd (mode 0600 by nature, gone with its last holder)."""

    def __init__(self, layout: Sequence[tuple[str, Sequence[str]]]) -> None:
        """`layout`: (page's name, its fields) for every page; names are unique."""
        import ctypes

        size = max(1, len(layout)) * PAGE_BYTES
        fd = os.memfd_create("appliance-counters", os.MFD_CLOEXEC)
        try:
            os.ftruncate(fd, size)
            self._map = mmap.mmap(fd, size)
        finally:
            os.close(fd)
        view = memoryview(self._map)
        anchor = ctypes.c_char.from_buffer(self._map)
        base = ctypes.addressof(anchor)
        del anchor
        self._pages: dict[str, CounterPage] = {}
        for i, (name, fields) in enumerate(layout):
            if name in self._pages:
                raise ValueError(f"two counter pages are named {name}")
            start = i * PAGE_BYTES
            self._pages[name] = CounterPage(view[start : start + PAGE_BYTES], fields, base + start)

    def __getitem__(self, name: str) -> CounterPage:
        return self._pages[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._pages)

    def __contains__(self, name: str) -> bool:
        return name in self._pages


def page_name(role: str, *parts: str) -> str:
    """The name of a page: `capture/uplink`, `merge/main`, `merge/main/uplink`, `meter`, `export/0`, ..."""
    return "/".join((role, *parts))
