"""Packets as objects, for whoever handles them in Python; and lists of them, made and written in one compiled call."""

from collections.abc import Mapping, Sequence

PCAPNG: int
PCAP_NS: int
PCAP_US: int
ERF: int
"""Layouts for `encode`: Enhanced Packet Blocks, pcap packets with nanoseconds or microseconds, ERF records."""

class Packet:
    """One packet. It cannot be changed; two are equal when all four fields are.

    `timestamp_ns` counts nanoseconds since 1970, `wire_length` octets on the wire (by default as many as there are
    data), `link_type` is a LINKTYPE_ number (1: Ethernet). ValueError: out of range; TypeError: a time that is a float.

    >>> Packet(1_700_000_000_123_456_789, bytes(60))
    Packet(timestamp_ns=1700000000123456789, data=<60 bytes>, wire_length=60, link_type=1)
    """

    def __init__(self, timestamp_ns: int, data: bytes, wire_length: int | None = None, link_type: int = 1) -> None: ...
    @property
    def timestamp_ns(self) -> int: ...
    @property
    def wire_length(self) -> int: ...
    @property
    def link_type(self) -> int: ...
    @property
    def data(self) -> bytes: ...

def unpack(address: int, batch_bytes: int, linktypes: Sequence[int]) -> list[Packet]:
    """The packets of a batch of records (ring/layout.h) at `address`. `linktypes[i]`: of interface i.

    FormatError: a corrupt record, or an interface without a link type.
    """

def link_types(packets: list[Packet]) -> list[int]:
    """The distinct link types, in the order of their first packets. TypeError: not all of them are packets."""

def encode(packets: list[Packet], layout: int, numbers: Mapping[int, int]) -> bytearray:
    """The packets as bytes of a file. `numbers`: of the interface in the file (the port, for ERF) by link type.

    KeyError: a link type without a number. ValueError: ERF has no type for a link type.
    """

def encode_records(
    address: int, batch_bytes: int, layout: int, linktypes: Sequence[int], numbers: Sequence[int]
) -> tuple[bytearray, int]:
    """The same for a batch of records at `address`; returns the bytes and how many packets they are.

    `linktypes[i]` and `numbers[i]`: of the source's interface i. In pcapng the packets keep their options.
    """

def send(fd: int, packets: list[Packet]) -> tuple[int, str]:
    """Sends the packets' data on the bound packet socket `fd`, and waits while its queue is full.

    Returns how many were sent, and "" or why the next one was not; 10 s without progress are a reason.
    """
