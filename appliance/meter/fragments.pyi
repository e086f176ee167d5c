"""The datagrams that are arriving in fragments: their ports, which only the first fragment has (RFC 791, RFC 8200).

The flow table asks it about every fragment: a later one whose first one came before is metered in that one's flow. A
later fragment that comes before its first, or without it, has no ports.

Memory: 64 octets a datagram, taken at once. Who floods it with first fragments displaces the datagrams that are silent
for longest, which is counted, and costs their later fragments their ports; they are metered all the same.
"""

class FragmentTable:
    """For at most `max_datagrams` (1 to 2^24; rounded down to a power of two, at least 8) that are arriving together,
    each remembered for `timeout_ns` after its newest fragment. ValueError for what is out of range."""

    def __init__(self, *, max_datagrams: int, timeout_ns: int) -> None: ...

    memory_bytes: int
    def counters(self) -> dict[str, int]:
        """By the names of METER_FIELDS: later fragments that got their ports; that did not, though their protocol has
        some; fragments that begin where others have been (overlaps, repeats, disorder); datagrams that were forgotten
        before their last fragment came or their time was over."""
