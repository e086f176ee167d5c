"""Old trace files whose records all have one length and no file header, to records. Nothing in such a file tells what
it is: its name in the URI does.

| name | record | before the packet | link type |
|---|---|---|---|
| legacyeth | 64 | ERF time, wire length (little-endian, 16 bits) | Ethernet |
| legacypos | 64 | ERF time, stored length, wire length (big-endian, 32 bits) | PPP, PPP in HDLC framing or Cisco HDLC |
| legacyatm | 64 | ERF time, CRC-32 of the AAL5 frame | 147 (LINKTYPE_USER0): an ATM cell without its HEC octet |
| tsh, fr+ | 44 | seconds, interface (8 bits), microseconds (24 bits) | raw IPv4: its header and 16 octets behind it |

The interface number of a tsh record is not kept.
"""

from appliance.formats.decoder import Decoder

LAYOUTS: dict[str, tuple[int, int, int]]
"""By name: the layout, the octets of a record, and those of them before the packet."""

class FixedDecoder(Decoder):
    def use(self, name: str) -> None:
        """Before the first `decode`: the records are those of `name`; without it, those of tsh."""
