# cython: language_level=3, boundscheck=False, wraparound=False, cdivision=True
"""ERF files (Endace's Extensible Record Format: "ERF Types Reference", EDM11-01) to records."""

from libc.stdint cimport int16_t, int64_t, uint8_t, uint16_t, uint32_t, uint64_t
from libc.string cimport memcpy

from appliance.formats.decoder cimport (
    DAMAGED, END, GO_ON, HEADER, NEED_INPUT, NOT_YET, OUTPUT_FULL, Decoder, Span, Step, Tally, tally_packet,
)
from appliance.formats.erf cimport (
    ERF_ETHERNET_PAD_BYTES, ERF_FCS_BYTES, ERF_HEADER_BYTES, ERF_RECORD_MAX_BYTES, LINKTYPE_CISCO_HDLC,
    LINKTYPE_ERF, LINKTYPE_ETHERNET, LINKTYPE_PPP_HDLC, LINKTYPE_RAW, erf_time, erf_u16,
)
from appliance.formats.record cimport PacketReference, packet_record, padded
from appliance.ring.layout cimport RECORD_PACKET_DATA, RECORD_PACKET_MIN, record_set_u32

from appliance.formats.encode import InterfaceDescription

RECORD_HEADER_BYTES = ERF_HEADER_BYTES
RECORD_MAX_BYTES = ERF_RECORD_MAX_BYTES
SNAPLEN_MAX = ERF_RECORD_MAX_BYTES - ERF_HEADER_BYTES - ERF_ETHERNET_PAD_BYTES
PORTS = 4
LINKTYPES = (LINKTYPE_ETHERNET, LINKTYPE_PPP_HDLC, LINKTYPE_CISCO_HDLC, LINKTYPE_RAW, LINKTYPE_ERF, 228, 229)

cdef enum:
    TYPE_MASK = 0x7F
    HAS_EXTENSIONS = 0x80  # in the type; in an extension header's first byte: another one follows
    EXTENSION_BYTES = 8
    TYPE_PAD = 48  # fills up a memory block of the card: no packet
    TYPE_MAX = 48
    DROP_OPTION_BYTES = 16  # epb_dropcount, and the end of the options
    TSRESOL_ERF = 0x80 | 32  # 2^-32 s

cdef enum Kind:  # of the records that have a link type, and how many kinds there are
    ETHERNET
    PPP_HDLC
    CISCO_HDLC
    RAW
    WHOLE
    KINDS

cdef enum Damage:
    BAD_LENGTH
    BAD_TYPE
    BAD_EXTENSIONS

cdef dict REASONS = {
    BAD_LENGTH: "a record claims the impossible length {}",
    BAD_TYPE: "a record is of the unknown type {}",
    BAD_EXTENSIONS: "the extension headers of a record of {} bytes do not end in it",
}

# The number of our interface for each port and kind; -1: not announced yet.
cdef struct Numbers:
    int16_t[20] of

# One record, its packet still in the file.
cdef struct Record:
    uint32_t length
    uint32_t kind
    uint32_t port
    uint32_t lost  # since the record before
    const uint8_t *data
    uint32_t captured
    uint32_t original
    int64_t timestamp_ns


cdef class ErfDecoder(Decoder):
    cdef Numbers numbers
    cdef uint32_t wanted_port
    cdef uint32_t wanted_kind

    def __cinit__(self, bint by_reference=False):
        cdef int i
        for i in range(sizeof(self.numbers.of) // sizeof(int16_t)):
            self.numbers.of[i] = -1

    cdef Step run(self, Span *span) noexcept nogil:
        cdef Tally tally = self.tally
        cdef Record record
        cdef Step step = GO_ON
        while step == GO_ON:
            step = dissect(&record, span)
            if step == GO_ON and record.kind != KINDS:
                step = self.put(span, &record, &tally)
            if step == GO_ON:
                span.source += record.length
        self.tally = tally
        return step

    cdef inline Step put(self, Span *span, const Record *record, Tally *tally) noexcept nogil:
        cdef int number = self.numbers.of[record.port * KINDS + record.kind]
        cdef uint32_t options_bytes = DROP_OPTION_BYTES if record.lost else 0
        cdef uint32_t room = RECORD_PACKET_MIN + padded(record.captured) + options_bytes
        if number < 0:
            self.wanted_port = record.port
            self.wanted_kind = record.kind
            return HEADER
        if self.by_reference:
            room = sizeof(PacketReference)
        if <size_t> (span.out_end - span.out) < room:
            span.needed_room = room
            return OUTPUT_FULL
        if record.timestamp_ns > span.until_ns:
            span.next_ns = record.timestamp_ns
            return NOT_YET
        if self.by_reference:
            (<PacketReference *> span.out)[0] = PacketReference(
                record.data, record.timestamp_ns, <uint32_t> number, record.captured, record.original, 0,
            )
        else:
            if options_bytes:
                drop_option(span.out + RECORD_PACKET_DATA + padded(record.captured), record.lost)
            packet_record(span.out, <uint32_t> number, record.timestamp_ns, record.captured, record.original,
                          record.data, options_bytes)
        span.out += room
        self.table[number].packets += 1
        tally_packet(tally, record.timestamp_ns, record.captured, record.original)
        return GO_ON

    cdef Step header(self, Span *span) except *:
        """The first packet of a port and a link type: that is an interface of ours."""
        cdef Step step = self.announce(span, InterfaceDescription(
            linktype=LINKTYPES[self.wanted_kind],
            name=f"port{self.wanted_port}",
            source_tsresol=TSRESOL_ERF,
        ))
        if step == GO_ON:
            self.numbers.of[self.wanted_port * KINDS + self.wanted_kind] = <int16_t> (self.interface_count - 1)
        return step

    cdef Step ended(self, size_t left) except *:
        """A file without any record is a whole one: ERF has no file header."""
        if left:
            return self.damaged(f"it ends {left} bytes after the beginning of a record")
        return END

    cdef str explain(self, const Span *span):
        return REASONS[span.reason].format(span.evidence)


cdef inline Step dissect(Record *record, Span *span) noexcept nogil:
    """The next record. GO_ON with kind KINDS: it is to be passed over."""
    cdef const uint8_t *at = span.source
    cdef size_t available = span.source_end - at
    cdef uint32_t type, framing = ERF_HEADER_BYTES
    cdef uint32_t wire
    cdef bint more
    if available < ERF_HEADER_BYTES:
        return NEED_INPUT
    record.length = erf_u16(at + 10)
    type = at[8] & TYPE_MASK
    if record.length < ERF_HEADER_BYTES:
        return refuse(span, BAD_LENGTH, record.length)
    if type > TYPE_MAX:
        return refuse(span, BAD_TYPE, type)
    if available < record.length:
        return NEED_INPUT
    record.kind = KINDS
    if type == TYPE_PAD:
        return GO_ON
    more = at[8] & HAS_EXTENSIONS
    while more:
        if record.length - framing < EXTENSION_BYTES:
            return refuse(span, BAD_EXTENSIONS, record.length)
        more = at[framing] & HAS_EXTENSIONS
        framing += EXTENSION_BYTES
    record.timestamp_ns = erf_time(at)
    record.port = at[9] & 3
    # Coloured records have their colour where others have the count of what was lost.
    record.lost = erf_u16(at + 12) if type in (1, 2, 22, 23) else 0
    record.kind = kind_of(type, at + framing, record.length - framing)
    if record.kind == WHOLE:
        framing = 0
        wire = record.length
    else:
        wire = erf_u16(at + 14)
    if record.kind == ETHERNET:
        if record.length - framing < ERF_ETHERNET_PAD_BYTES:
            return refuse(span, BAD_LENGTH, record.length)
        framing += ERF_ETHERNET_PAD_BYTES
        wire -= ERF_FCS_BYTES if wire >= ERF_FCS_BYTES else wire
    record.data = at + framing
    record.original = wire
    record.captured = min(record.length - framing, wire)
    return GO_ON


cdef inline uint32_t kind_of(uint32_t type, const uint8_t *data, uint32_t data_bytes) noexcept nogil:
    """Plain, coloured, steered and hashed Ethernet and HDLC, IPv4 and IPv6; of all others the whole record is kept."""
    if type in (2, 11, 16, 20):
        return ETHERNET
    if type in (1, 10, 15, 19):
        # RFC 1662, section 3.1: all stations, unnumbered information.
        return PPP_HDLC if data_bytes >= 2 and data[0] == 0xFF and data[1] == 0x03 else CISCO_HDLC
    return RAW if type in (22, 23) else WHOLE


cdef inline void drop_option(uint8_t *out, uint32_t lost) noexcept nogil:
    """epb_dropcount (draft-ietf-opsawg-pcapng, section 4.3) and the end of the options, in host order."""
    cdef uint16_t[2] head
    cdef uint64_t count = lost
    head[0] = 4
    head[1] = sizeof(count)
    memcpy(out, head, sizeof(head))
    memcpy(out + sizeof(head), &count, sizeof(count))
    record_set_u32(out + sizeof(head) + sizeof(count), 0)


cdef inline Step refuse(Span *span, Damage reason, uint32_t evidence) noexcept nogil:
    span.reason = reason
    span.evidence = evidence
    return DAMAGED
