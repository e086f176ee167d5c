"""From the flow table's rows to IPFIX messages (RFC 7011, section 3), in compiled code, by plans made of templates."""

from collections.abc import Sequence
from typing import TypeAlias

Step: TypeAlias = tuple[int, int, int, int]
"""(one of KINDS, offset in the row, octets in the row, octets on the wire); `constant`: the offset in the constants"""

Plan: TypeAlias = tuple[int, int, int, Sequence[Step]]
"""(template ID, row class, one of SHAPES, steps in template order); at most 192 steps and 492 octets a record.

Row class: 0 other, 1 TCP, 2 ICMP over IPv4; 3, 4, 5 over IPv6. Shape `forward` and `reverse`: one direction (the plan
of `reverse` has source and destination exchanged); `biflow`: both.
`sequence`: the flow's first packets, four basicLists (RFC 6313) behind the fields of the steps: times, lengths,
directions (1 forward, -1 reverse) and TCP flags, one value for each packet."""

KINDS: dict[str, int]
SHAPES: dict[str, int]
ROW_FIELDS: dict[str, tuple[int, int]]
"""Name of a row's field: (offset, octets); directions are `forward.NAME` and `reverse.NAME`,
what TCP analysis says of them `forward.tcp.NAME` and `reverse.tcp.NAME`."""

class Message:
    """One IPFIX message, whole but for its export time and sequence number."""

    data: bytearray
    records: int
    """Data Records, options data included."""
    flows: int
    """Flow records among them, and what those say: `packets`, `octets`."""
    packets: int
    octets: int

    def __init__(self, data: bytearray, records: int, flows: int = 0, packets: int = 0, octets: int = 0) -> None: ...
    def stamp(self, export_time_s: int, sequence: int) -> None:
        """Writes both header fields, modulo 2^32. Done when the message leaves, not when it is made."""

TEXT_FIELDS: dict[str, int]
"""Name of a text of FlowRow: its offset. For steps of the kind `text`, whose other sizes are 0 and 1."""

class Packer:
    """Packs rows of `FlowTable`. With `biflow` a row is one record; without, one for each direction that has packets.

    `message_bytes`: longest message, 512 to 65535. ValueError for plans that do not fit.
    """

    def __init__(
        self,
        plans: Sequence[Plan],
        *,
        biflow: bool,
        observation_domain: int,
        message_bytes: int,
        constants: bytes = b"",
    ) -> None: ...
    def pack(self, rows_address: int, row_count: int) -> list[Message]:
        """All records of the rows, grouped by template. The rows must stay in place during the call."""
