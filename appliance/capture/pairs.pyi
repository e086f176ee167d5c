"""Digests (ring/digest.h) beside the records that they were made of, for who needs both a packet and its headers."""

from appliance.formats.encode import InterfaceDescription

DIGEST_BYTES: int
"""From one digest to the next."""

class DigestPairs:
    """Digests of at most 4096 packets at a time, and where each comes from."""

    def __init__(self, packets_before: int = 0, *, inner: bool = False, by_linktype: bool = False) -> None:
        """`packets_before`: where the numbers of the packets go on. `inner`: the digests are of the innermost IP packet
        of a tunnel. `by_linktype`: the records have their link types in the place of interfaces' numbers."""

    count: int
    """Pairs of the last call."""
    consumed_bytes: int
    """Of the records of the last call."""
    packets: int
    """Seen so far, with and without a digest."""
    ignored: list[int]
    """Packets that gave no digest, by the order of `counters.IGNORED_REASONS`."""
    digests_address: int
    """The digests, DIGEST_BYTES apart."""
    origins_address: int
    """Four words of 32 bits for each digest: the offset of its record in the batch, its link type, and the running
    number of its packet, from 1, the high word first."""

    def pair(self, address: int, record_bytes: int, interfaces: list[InterfaceDescription]) -> bool:
        """The digests of the packets in `record_bytes` of records at `address`. True: not of all, call again with the
        rest.

        FormatError: damaged framing, or a packet of an interface that is not among `interfaces`.
        """
