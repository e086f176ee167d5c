"""Which flow a TCP packet belongs to, and the bytes of each flow's file until they are written.

- A flow is its addresses and ports in one direction, or in both with `bidirectional`; packets of different link types
  are different flows, because one file could not hold both.
- FIN (of both sides, where a flow has both) or RST closes it. A closed flow lingers: retransmissions and the last ACK
  are still its own. It is over when `linger_ns` has passed, or when its ports are used again.
- A SYN with another sequence number than the flow's first one begins the next flow. A repeated SYN does not.
- A flow without a packet for `idle_timeout_ns` is over. Of both times, 0 means never. Time is the packets'.
- When there are `max_flows`, the one longest without a packet is over, a closed one first.
- The flows' buffers hold `buffer_bytes` together; beyond that they are written, longest without a packet first.
"""

from collections.abc import Callable

from appliance.meter.traceflow_formats import Description

NONE: int
PCAP_NS: int
PCAP_US: int
TEXT: int
"""What a flow's bytes are: nothing is kept, packets of a pcap file, or what `encode` makes of a packet."""

IDLE: int
CLOSED: int
REUSED: int
EVICTED: int
END: int
"""Why a flow is over."""

class FlowFiles:
    """`write(slot, description, data, packets)` appends the entries of so many packets to a flow's file; the
    description is there the first time, else None.
    `ended(slot, description, reason)` comes after the last write; the slot may then be another flow's."""

    def __init__(
        self,
        *,
        write: Callable[[int, Description | None, bytes, int], None],
        ended: Callable[[int, Description, int], None],
        content: int,
        encode: Callable[..., bytes] | None = None,
        bidirectional: bool = False,
        idle_timeout_ns: int = 0,
        linger_ns: int = 0,
        max_flows: int = 1_000_000,
        buffer_bytes: int = ...,
        flow_bytes: int = 0,
        keep_frames: bool = False,
    ) -> None:
        """`encode` gets number, time, link type, wire length, data, source, destination, ports, TCP flags, sequence,
        acknowledgement and window of a packet. `flow_bytes`: entries of a flow beyond so many bytes are left out, and
        counted (`cut_packets` of its description); 0 = none are."""

    flow_count: int
    """In the table, closed ones included."""
    total_flows: int
    buffered_bytes: int
    """The memory of all flows' buffers."""
    tcp_packets: int
    evicted_flows: int
    """Open flows that had to go because of `max_flows`."""
    held_packets: int
    """Of the flows in the table."""
    last_slot: int

    def feed(self, records: int, digests: int, digest_bytes: int, origins: int, count: int) -> None:
        """Takes all TCP packets of a batch, see capture/pairs.pyi; other packets are passed over."""

    def observe(
        self,
        source: bytes,
        destination: bytes,
        source_port: int,
        destination_port: int,
        timestamp_ns: int,
        tcp_flags: int,
        sequence: int | None,
        number: int,
        original: int,
        linktype: int,
    ) -> bool:
        """Takes one packet by its fields; True: it begins a flow. Without a sequence number, a SYN begins the next flow
        only when the last one was closed. ValueError: the addresses are of no or of different versions."""

    def describe(self, slot: int) -> Description: ...
    def advance(self, time_ns: int) -> None:
        """Ends what is due, where no packet comes that would: no later packet is older than `time_ns`."""
    def begin_anew(self) -> None:
        """The clock was set: every flow ends, and the next packet may be of any time."""
    def finish_all(self) -> None:
        """Ends every flow, in the order of their first packets."""

    def flush_all(self) -> None:
        """Writes what waits in the buffers."""
