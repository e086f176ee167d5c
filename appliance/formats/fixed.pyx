# cython: language_level=3, boundscheck=False, wraparound=False, cdivision=True
"""Old trace files whose records all have one length and no file header to records."""

from libc.stdint cimport int64_t, uint8_t, uint32_t, uint64_t

from appliance.formats.decoder cimport (
    END, GO_ON, HEADER, NEED_INPUT, NOT_YET, OUTPUT_FULL, Decoder, Span, Step, Tally, tally_packet,
)
from appliance.formats.erf cimport erf_time, erf_u16
from appliance.formats.record cimport NS_PER_S, PacketReference, packet_record, padded
from appliance.ring.layout cimport RECORD_PACKET_MIN

from appliance.formats.encode import InterfaceDescription

cdef enum Layout:
    ETHERNET
    PACKET_OVER_SONET
    ATM
    HEADERS  # time, interface, IPv4 header and 16 bytes behind it

cdef enum:
    LINKTYPE_ETHERNET = 1
    LINKTYPE_PPP = 9
    LINKTYPE_PPP_HDLC = 50
    LINKTYPE_ATM_CELL = 147  # LINKTYPE_USER0: cells without HEC have no number of their own
    LINKTYPE_RAW = 101
    LINKTYPE_CISCO_HDLC = 104
    CELL_BYTES = 53
    LINKTYPES_MAX = 3  # of one file

# libtrace's name: layout, record, bytes before the packet.
LAYOUTS = {
    "legacyeth": (ETHERNET, 64, 10),
    "legacypos": (PACKET_OVER_SONET, 64, 16),
    "legacyatm": (ATM, 64, 12),
    "tsh": (HEADERS, 44, 8),
    "fr+": (HEADERS, 44, 8),
}
TSRESOL_ERF = 0x80 | 32
TSRESOL_MICROSECONDS = 6


cdef class FixedDecoder(Decoder):
    cdef Layout layout
    cdef uint32_t record_bytes
    cdef uint32_t framing_bytes
    cdef uint32_t[LINKTYPES_MAX] linktypes
    cdef uint32_t wanted_linktype

    def __cinit__(self, bint by_reference=False):
        self.use("tsh")

    def use(self, name):
        self.layout, self.record_bytes, self.framing_bytes = LAYOUTS[name]

    cdef Step run(self, Span *span) noexcept nogil:
        cdef Tally tally = self.tally
        cdef Step step = GO_ON
        while step == GO_ON:
            if span.source_end - span.source < self.record_bytes:
                step = NEED_INPUT
            else:
                step = self.put(span, &tally)
        self.tally = tally
        return step

    cdef Step put(self, Span *span, Tally *tally) noexcept nogil:
        cdef const uint8_t *at = span.source
        cdef const uint8_t *packet = at + self.framing_bytes
        cdef uint32_t original = self.wire_length(at)
        cdef uint32_t captured = min(self.record_bytes - self.framing_bytes, original)
        cdef uint32_t linktype = self.link_type(packet)
        cdef uint32_t room = sizeof(PacketReference) if self.by_reference else RECORD_PACKET_MIN + padded(captured)
        cdef int64_t timestamp_ns = micro_time(at) if self.layout == HEADERS else erf_time(at)
        cdef uint32_t number = 0
        while number < self.interface_count and self.linktypes[number] != linktype:
            number += 1
        if number == self.interface_count:
            self.wanted_linktype = linktype
            return HEADER
        if <size_t> (span.out_end - span.out) < room:
            span.needed_room = room
            return OUTPUT_FULL
        if timestamp_ns > span.until_ns:
            span.next_ns = timestamp_ns
            return NOT_YET
        if self.by_reference:
            (<PacketReference *> span.out)[0] = PacketReference(packet, timestamp_ns, number, captured, original, 0)
        else:
            packet_record(span.out, number, timestamp_ns, captured, original, packet, 0)
        span.out += room
        span.source += self.record_bytes
        self.table[number].packets += 1
        tally_packet(tally, timestamp_ns, captured, original)
        return GO_ON

    cdef inline uint32_t wire_length(self, const uint8_t *at) noexcept nogil:
        if self.layout == ETHERNET:
            return at[8] | <uint32_t> at[9] << 8  # little-endian, without the frame check sequence
        if self.layout == PACKET_OVER_SONET:
            return erf_u16(at + 12) << 16 | erf_u16(at + 14)
        if self.layout == ATM:
            return CELL_BYTES
        return erf_u16(at + self.framing_bytes + 2)  # IPv4: total length

    cdef inline uint32_t link_type(self, const uint8_t *packet) noexcept nogil:
        if self.layout == ETHERNET:
            return LINKTYPE_ETHERNET
        if self.layout == ATM:
            return LINKTYPE_ATM_CELL
        if self.layout == HEADERS:
            return LINKTYPE_RAW
        if packet[0] == 0xFF and packet[1] == 0x03:  # RFC 1662, section 3.1
            return LINKTYPE_PPP_HDLC
        if (packet[0] == 0x0F or packet[0] == 0x8F) and packet[1] == 0:  # Cisco: unicast, broadcast
            return LINKTYPE_CISCO_HDLC
        return LINKTYPE_PPP

    cdef Step header(self, Span *span) except *:
        """The first packet of a link type."""
        cdef uint32_t number = self.interface_count
        cdef Step step = self.announce(span, InterfaceDescription(
            linktype=self.wanted_linktype,
            source_tsresol=TSRESOL_MICROSECONDS if self.layout == HEADERS else TSRESOL_ERF,
        ))
        if step == GO_ON:
            self.linktypes[number] = self.wanted_linktype
        return step

    cdef Step ended(self, size_t left) except *:
        """A file without any record is a whole one: there is no file header."""
        if left:
            return self.damaged(f"it ends {left} bytes after the beginning of a record of {self.record_bytes}")
        return END


cdef inline int64_t micro_time(const uint8_t *at) noexcept nogil:
    """Seconds, and microseconds behind the number of the interface; both big-endian."""
    cdef uint64_t seconds = <uint64_t> erf_u16(at) << 16 | erf_u16(at + 2)
    return <int64_t> (seconds * NS_PER_S + ((<uint64_t> at[5] << 16 | erf_u16(at + 6)) * 1000))
