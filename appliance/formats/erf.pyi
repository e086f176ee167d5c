"""ERF files (Endace's Extensible Record Format) to records. `erf.pxd` has `erf_packet_at`, the other way round.

Ethernet, HDLC (PPP and Cisco) and IP records, plain, coloured, steered or hashed, become packets of their link type,
one interface for each of the four ports and each link type. Of every other type (ATM, Infiniband, the card's own
metadata) the whole record is the packet, link type 197 (LINKTYPE_ERF), which Wireshark dissects: nothing is left out
but padding.

An Ethernet record's wire length counts the frame check sequence; here it is left out of both lengths, as libtrace's
conversion does. What a record says was lost before it becomes the packet's drop count. Times are cut to nanoseconds.
"""

from appliance.formats.decoder import Decoder

RECORD_HEADER_BYTES: int
RECORD_MAX_BYTES: int
SNAPLEN_MAX: int
"""The most of a packet that fits into a record."""
PORTS: int
"""How many interfaces a record's number tells apart."""
LINKTYPES: tuple[int, ...]
"""What an ERF file can hold."""

class ErfDecoder(Decoder): ...
