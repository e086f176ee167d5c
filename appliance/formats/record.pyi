"""Passes over batches of records (ring/layout.h) that lie in memory one behind the other, without the GIL.

`record.pxd` has the inline functions for compiled code, among them `epb_to_pcap`.
"""

def count_packets(address: int, batch_bytes: int) -> int:
    """How many of the records are packets. FormatError: one of the records is corrupt."""

def pcap_packet(record: bytes, nanoseconds: bool) -> bytes:
    """One packet record as a packet of a pcap file (`epb_to_pcap` for Python). FormatError: it is not one."""

def clamp_snaplen(address: int, batch_bytes: int, snaplen: int) -> tuple[int, int]:
    """Cuts the packets down to `snaplen` captured bytes, in place; their original lengths and options stay.

    Returns (bytes of the batch now, packets cut). FormatError: one of the records is corrupt.
    """
