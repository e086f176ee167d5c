"""A bounded table of bidirectional flows, in compiled code without the GIL, driven by stream time alone.

Memory: 256 octets a flow, as much again for TCP analysis, 24 to 48 for its index, and the row buffer; mapped at once,
taken when first used.

A flow ends when it was silent for the idle time-out (flowEndReason 1), when FIN came from both sides or RST from one
and then nothing for the linger time (3), when the table is flushed (4), or when a new flow needs its place (5). At the
active time-out (2) its record leaves and the flow stays, with its direction and its flowId. A SYN on an ended
connection begins a new flow.

Stream time is the newest time stamp seen, or what `advance` says. Late packets (older than stream time) count, and
keep their flow alive. Time stamps are taken as they are; beyond the year 2116 they are taken for that.
"""

from typing import Any

from appliance.meter.fragments import FragmentTable

FLOW_BYTES: int
ROW_BYTES: int

class FlowTable:
    """All time-outs in nanoseconds. ValueError for sizes and times out of range.

    Sampling takes one of so many: packets in turn, flows by their hash; the rest is counted as unsampled.

    `packet_sequence`: of so many first packets (at most 20) a flow's first row says time, length, direction and TCP
    flags; 16 octets more for each packet of each flow.

    With a VLAN or the interface in the key, the same conversation in two of them is two flows. `fragments` gives later
    fragments the ports of the first; without it they have none, and are a flow of their own. `frame_octets`: a packet
    whose IP length field is 0 counts with the octets of its frame instead of 0 (IPv6: 40).

    `entropy` and `name_bytes` above 0: extensions of digests are heeded (ring/digest.h). `name_bytes` is the memory for
    names, in blocks of 64 octets, of which a flow takes as many as its names need; when none is left the flow has its
    application and no names, and `dropped_names` counts it. Names and entropy stay with a flow over active time-outs.
    """

    def __init__(
        self,
        *,
        max_flows: int,
        idle_timeout_ns: int,
        active_timeout_ns: int,
        tcp_linger_ns: int,
        vlan_in_key: bool = True,
        interface_in_key: bool = False,
        tcp_analysis: bool = False,
        packet_sampling: int = 1,
        flow_sampling: int = 1,
        packet_sequence: int = 0,
        row_capacity: int = 4096,
        fragments: FragmentTable | None = None,
        frame_octets: bool = False,
        entropy: bool = False,
        name_bytes: int = 0,
    ) -> None: ...
    def update(self, address: int, length: int) -> int:
        """Meters the digests among `length` octets of records at `address` (aligned to 4), in time order.

        Returns the octets consumed: fewer than `length` when the row buffer is full; empty it and go on from there.
        ValueError names the offset of a damaged record; all before it is metered.
        """
    def advance(self, stream_time_ns: int) -> bool:
        """Moves stream time and expires what is due. False: the row buffer is full, call again after emptying it."""
    def step(self, delta_ns: int) -> None:
        """The clock that stamps the packets was set forward by `delta_ns`, or back if negative."""
    def flush(self) -> bool:
        """Ends every flow. False: the row buffer is full, call again after emptying it."""

    rows_address: int
    """Where the expired flows stand, `row_count` rows of ROW_BYTES (FlowRow in table.pxd)."""
    row_count: int
    def count_delays(self, now_ns: int) -> None:
        """Notes how long ago each row was due, by the clock that stamps the packets. Rows of flows that were ended
        before their time-out do not count."""
    def clear_rows(self) -> None: ...
    def rows(self) -> list[dict[str, Any]]:
        """The rows as dictionaries with the names of FlowRow, for tests and tools."""
    active_flows: int
    stream_time_ns: int
    memory_bytes: int
    """The bound: no more than this is ever used."""
    tick_ns: int
    """An expired flow leaves at most this much stream time late."""
    def index_probes(self) -> tuple[int, int]:
        """(flows, slots that are looked at until each of them is found once)"""
    def hash_of(self, address: int) -> int:
        """The hash of a digest's flow, under this table's secrets: for tests."""
    def counters(self) -> dict[str, int]:
        """The counters of METER_FIELDS, from the beginning of this table."""
    def tcp_events(self) -> dict[str, int]:
        """Segments by what TCP analysis took them for (tcp.pxd), from the beginning of this table; a segment may be
        several. All 0 without that analysis."""
    def gauges(self) -> dict[str, int]:
        """The gauges of METER_FIELDS."""
