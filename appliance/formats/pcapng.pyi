"""pcapng files to records.

Read are versions 1.0 and 1.2, any number of sections in either byte order, Enhanced, Simple and obsolete Packet
Blocks; all other blocks are passed over, however long. Times of every if_tsresol and if_tsoffset become nanoseconds
since 1970. A Simple Packet Block has no time: its record says 0, as mergecap writes it. A packet's options travel
with it in host byte order, but for those that must not be copied.
"""

from appliance.formats.decoder import Decoder

class PcapngDecoder(Decoder): ...
