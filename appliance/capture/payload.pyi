"""Checks of what a frame carries: its check sequence, its checksums, and the trailer of test traffic.

The trailer lies at the very end of a frame (before the check sequence), 36 bytes, big-endian:

     0  magic      u32  0x54504c31, "TPL1"
     4  stream     u32  chosen by the sender
     8  sequence   u64  counts the frames of the stream
    16  timestamp  s64  nanoseconds since 1970 by the sender's clock, when the frame was handed to its kernel
    24  covered    u32  bytes in front of the trailer under the payload's checksum
    28  payload    u32  CRC-32 (IEEE 802.3) of those bytes
    32  trailer    u32  CRC-32 of the trailer's first 32 bytes

The covered bytes are those behind the UDP header, so that a router's work (time to live, addresses) is no error.
appliance/generator.py sends it. It has nothing to do with any vendor's trailer.
"""

from typing_extensions import Buffer

def has_wrong_fcs(frame: Buffer) -> bool:
    """Whether the last 4 bytes are not the CRC-32 of the others (IEEE 802.3, 3.2.9). Runts are wrong, too."""

def has_wrong_checksum(frame: Buffer, linktype: int = 1) -> bool:
    """Whether the IPv4 header's, the TCP or the UDP checksum of a whole frame (without check sequence) is wrong.

    Fragments, routing headers, lengths that do not fit and UDP without checksum are not judged. Link types 1
    (Ethernet, up to 16 VLAN tags), 101 (raw IP) and 276 (Linux cooked v2)."""

def parse_test_payload(frame: Buffer) -> tuple[int, int, int, bool, bool] | None:
    """(stream, sequence, timestamp in ns, trailer is sound, payload is intact) of a frame without check sequence; None:
    it does not end with a trailer. What stands in an unsound trailer means nothing."""
