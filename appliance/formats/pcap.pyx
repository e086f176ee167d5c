# cython: language_level=3, boundscheck=False, wraparound=False, cdivision=True
"""pcap files (draft-ietf-opsawg-pcap, and its older relatives) to records."""

from libc.stdint cimport int64_t, uint8_t, uint32_t

from appliance.formats.decoder cimport (
    DAMAGED, GO_ON, HEADER, NEED_INPUT, NOT_YET, OUTPUT_FULL, PACKET_MAX_BYTES, Decoder, Span, Step, Tally,
    tally_packet,
)
from appliance.formats.record cimport NS_PER_S, PacketReference, packet_record, padded
from appliance.ring.layout cimport RECORD_PACKET_MIN, record_u32

import struct

from appliance.formats.encode import TSRESOL_MICROSECONDS, TSRESOL_NANOSECONDS, InterfaceDescription

cdef extern from *:
    uint32_t swap32 "__builtin_bswap32"(uint32_t value) nogil

cdef enum:
    FILE_HEADER_BYTES = 24

# Upper bits of the link type field: length of the frame check sequence in units of 16 bits, and whether it is valid.
FCS_PRESENT = 0x04000000
LINKTYPE_RESERVED = 0x03FF0000

# magic: (if_tsresol, bytes of a packet's header). 0xa1b2cd34 is Kuznetzov's, with 8 more bytes behind the lengths.
VARIANTS = {
    0xA1B2C3D4: (TSRESOL_MICROSECONDS, 16),
    0xA1B23C4D: (TSRESOL_NANOSECONDS, 16),
    0xA1B2CD34: (TSRESOL_MICROSECONDS, 24),
}


cdef enum Lengths:
    CAPTURED_FIRST
    ORIGINAL_FIRST  # versions before 2.3
    SMALLER_IS_CAPTURED  # version 2.3, of which both exist


cdef class PcapDecoder(Decoder):
    cdef bint begun
    cdef bint swapped
    cdef uint32_t packet_header_bytes
    cdef uint32_t ns_per_tick
    cdef Lengths lengths
    cdef public bint zeros_are_damage

    cdef Step run(self, Span *span) noexcept nogil:
        cdef Tally tally = self.tally
        cdef bint swapped = self.swapped
        cdef bint by_reference = self.by_reference
        cdef Lengths lengths = self.lengths
        cdef bint zeros_are_damage = self.zeros_are_damage
        cdef const uint8_t *source = span.source
        cdef uint8_t *out = span.out
        cdef uint32_t header_bytes = self.packet_header_bytes
        cdef uint32_t ns_per_tick = self.ns_per_tick
        cdef uint32_t seconds, ticks, captured, original, record_bytes
        cdef int64_t timestamp_ns
        cdef Step step
        if not self.begun:
            return HEADER
        while True:
            if span.source_end - source < header_bytes:
                step = NEED_INPUT
                break
            seconds = load(source, swapped)
            ticks = load(source + 4, swapped)
            captured = load(source + 8, swapped)
            original = load(source + 12, swapped)
            if lengths == ORIGINAL_FIRST or (lengths == SMALLER_IS_CAPTURED and captured > original):
                captured, original = original, captured
            if captured > PACKET_MAX_BYTES or (zeros_are_damage and (seconds | ticks | captured | original) == 0):
                span.evidence = captured
                step = DAMAGED
                break
            if span.source_end - source < header_bytes + captured:
                step = NEED_INPUT
                break
            record_bytes = sizeof(PacketReference) if by_reference else RECORD_PACKET_MIN + padded(captured)
            if span.out_end - out < record_bytes:
                span.needed_room = record_bytes
                step = OUTPUT_FULL
                break
            timestamp_ns = <int64_t> seconds * NS_PER_S + <int64_t> ticks * ns_per_tick
            if timestamp_ns > span.until_ns:
                span.next_ns = timestamp_ns
                step = NOT_YET
                break
            if by_reference:
                (<PacketReference *> out)[0] = PacketReference(
                    source + header_bytes, timestamp_ns, 0, captured, original, 0,
                )
            else:
                packet_record(out, 0, timestamp_ns, captured, original, source + header_bytes, 0)
            tally_packet(&tally, timestamp_ns, captured, original)
            source += header_bytes + captured
            out += record_bytes
        span.source = source
        span.out = out
        self.table[0].packets = tally.packets
        self.tally = tally
        return step

    cdef Step header(self, Span *span) except *:
        cdef Step step
        if span.source_end - span.source < FILE_HEADER_BYTES:
            return NEED_INPUT
        field = <bytes> span.source[:FILE_HEADER_BYTES]
        byte_order = next((order for order in "<>" if struct.unpack_from(order + "I", field)[0] in VARIANTS), None)
        if byte_order is None:
            return self.damaged("it does not begin with a pcap header")
        magic, major, minor, _, _, snaplen, network = struct.unpack(byte_order + "IHHiIII", field)
        if major != 2 or minor > 4:
            return self.damaged(f"its pcap version is {major}.{minor}; 2.0 to 2.4 are read")
        if network & LINKTYPE_RESERVED:
            return self.damaged(f"the reserved bits of its link type 0x{network:08x} are not zero")
        tsresol, self.packet_header_bytes = VARIANTS[magic]
        self.ns_per_tick = 1 if tsresol == TSRESOL_NANOSECONDS else 1000
        self.swapped = struct.unpack_from("=I", field)[0] != magic
        self.lengths = ORIGINAL_FIRST if minor < 3 else SMALLER_IS_CAPTURED if minor == 3 else CAPTURED_FIRST
        step = self.announce(span, InterfaceDescription(
            linktype=network & 0xFFFF,
            snaplen=snaplen,
            fcs_bits=(network >> 28) * 16 if network & FCS_PRESENT else None,
            source_tsresol=tsresol,
        ))
        if step == GO_ON:
            span.source += FILE_HEADER_BYTES
            self.begun = True
        return step

    cdef str explain(self, const Span *span):
        if span.evidence == 0:
            return "there are zeros where a packet should begin; it was not written to its end"
        return f"a packet claims to have {span.evidence} captured bytes, the most is {PACKET_MAX_BYTES}"


cdef inline uint32_t load(const uint8_t *at, bint swapped) noexcept nogil:
    cdef uint32_t word = record_u32(at)
    return swap32(word) if swapped else word
