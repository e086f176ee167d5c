"""The common shape of the pcap and pcapng decoders: bytes of a file in, records of a ring out.

A decoder is fed any pieces of a file and writes whole records, each packet copied once, from the input straight to
the destination, without the GIL. It keeps no bytes: what it did not consume is handed in again, with more behind it.
Interfaces are announced by a RECORD_INTERFACE before their first packet and numbered upwards from 0 over the whole
file, over all its sections.
"""

from appliance.formats.encode import InterfaceDescription

STATUS_NEED_INPUT: int
"""Hand in the rest again with more bytes; a buffer of RECORD_MAX_BYTES (1 MiB) is always long enough."""
STATUS_OUTPUT_FULL: int
"""The next record needs `needed_room` bytes of room."""
STATUS_NOT_YET: int
"""The next packet's time, `next_ns`, is later than `until_ns`."""
STATUS_END: int
"""`last` was said, and the file ends with a whole record."""
STATUS_DAMAGED: int
"""`damage` says why; `whole_offset` and the counts say what was whole before. Every later call says the same."""
NEVER_NS: int
INTERFACES_MAX: int

class Decoder:
    def __init__(self, by_reference: bool = False) -> None:
        """`by_reference`: the destination gets a PacketReference (record.pxd) for each packet, which points into the
        source, and nothing else: neither packets nor interfaces."""

    by_reference: bool
    packets: int
    bytes: int
    """Sum of the original lengths."""
    captured_bytes: int
    first_ns: int | None
    """The oldest time stamp, in nanoseconds since 1970; None: no packet had one."""
    last_ns: int | None
    """The newest."""
    in_order: bool
    late_packets: int
    """Packets that come after a packet with a later time."""
    untimed_packets: int
    """Simple Packet Blocks, which have no time: their records say 0, and they count in no order and no first_ns."""
    clamped_timestamps: int
    """Times before 1970 or after 2262, which records cannot hold: they became 0 or the last possible nanosecond."""
    dropped_options: int
    """Packets whose options were left out: a broken list of options, or more than 64 KiB of them."""
    interfaces: list[InterfaceDescription]
    interface_count: int
    interface_packets: list[int]
    offset: int
    """Bytes consumed so far."""
    whole_offset: int
    """Where the last whole record (or pcapng block of any type) ends."""
    needed_room: int
    next_ns: int
    damage: str

    def decode(
        self,
        source: int,
        source_bytes: int,
        destination: int,
        room: int,
        last: bool = False,
        until_ns: int = ...,
    ) -> tuple[int, int, int]:
        """Decodes `source_bytes` at address `source` into at most `room` bytes at address `destination`.

        `last`: nothing follows these bytes. Returns (status, consumed bytes, produced bytes).
        """
