# cython: language_level=3, boundscheck=False, wraparound=False, cdivision=True
"""pcapng files (draft-ietf-opsawg-pcapng) to records."""

from libc.stdint cimport int64_t, uint8_t, uint16_t, uint32_t, uint64_t
from libc.string cimport memcpy

from appliance.formats.decoder cimport (
    DAMAGED, GO_ON, HEADER, NEED_INPUT, NOT_YET, OUTPUT_FULL, PACKET_MAX_BYTES, Decoder, SourceInterface, Span, Step,
    Tally, tally_packet, ticks_to_ns,
)
from appliance.formats.record cimport PacketReference, packet_record, padded
from appliance.ring.layout cimport RECORD_MAX_BYTES, RECORD_PACKET_DATA, RECORD_PACKET_MIN, record_set_u32, record_u32

import struct

from appliance.errors import FormatError
from appliance.formats.encode import SECTION_MAGIC, InterfaceDescription, options

cdef extern from *:
    uint16_t swap16 "__builtin_bswap16"(uint16_t value) nogil
    uint32_t swap32 "__builtin_bswap32"(uint32_t value) nogil
    uint64_t swap64 "__builtin_bswap64"(uint64_t value) nogil

cdef enum:
    BLOCK_SECTION = 0x0A0D0D0A  # the same in both byte orders
    BLOCK_INTERFACE = 1
    BLOCK_PACKET = 2  # obsolete
    BLOCK_SIMPLE = 3
    BLOCK_ENHANCED = 6
    BLOCK_FRAME_BYTES = 12  # type, length, length
    BLOCK_HEADER_BYTES = 8
    PACKET_BODY_BYTES = 20  # of the enhanced and of the obsolete packet block: what is fixed before the data
    OPTIONS_MAX_BYTES = 65536
    OPT_END = 0
    OPT_FLAGS = 2
    OPT_DROPCOUNT = 4
    OPT_PACKETID = 5
    OPT_QUEUE = 6
    OPT_CUSTOM_STRING = 2988  # custom options begin with an enterprise number
    OPT_CUSTOM_BYTES = 2989
    OPT_CUSTOM_STRING_NO_COPY = 19372  # who rewrites a file must leave these out
    OPT_CUSTOM_BYTES_NO_COPY = 19373

cdef enum Damage:
    BAD_LENGTH
    BAD_TRAILER
    BAD_CAPTURED
    NO_INTERFACE
    NO_SECTION

cdef dict REASONS = {
    BAD_LENGTH: "a block claims the impossible length {}",
    BAD_TRAILER: "a block's two lengths differ: {} at its end",
    BAD_CAPTURED: "a packet claims to have {} captured bytes, more than its block or any packet has",
    NO_INTERFACE: "a packet is of interface {}, which was not described",
    NO_SECTION: "it does not begin with a section header",
}

# A packet block, its fields in host order, its data and options still in the file.
cdef struct Packet:
    uint32_t interface  # the section's own number
    uint64_t ticks
    uint32_t captured
    uint32_t original
    const uint8_t *data
    const uint8_t *options
    uint32_t options_bytes
    bint timed


cdef class PcapngDecoder(Decoder):
    cdef bint in_section
    cdef bint swapped
    cdef uint32_t section_first  # running number of the section's interface 0
    cdef uint64_t skip_bytes  # left of the body of a block that is passed over
    cdef uint32_t skipped_length  # its length field, which must stand behind it again; 0 = no such block

    cdef Step run(self, Span *span) noexcept nogil:
        cdef Tally tally = self.tally
        cdef Step step = GO_ON
        cdef size_t available
        cdef uint32_t block_type, length
        while step == GO_ON:
            if self.skipped_length:
                step = self.skip(span)
                continue
            available = span.source_end - span.source
            if available < BLOCK_FRAME_BYTES:
                step = NEED_INPUT
                break
            block_type = record_u32(span.source)
            if block_type == BLOCK_SECTION:
                step = HEADER
                break
            if not self.in_section:
                step = refuse(span, NO_SECTION, 0)
                break
            block_type = load32(span.source, self.swapped)
            length = load32(span.source + 4, self.swapped)
            if length < BLOCK_FRAME_BYTES or length & 3:
                step = refuse(span, BAD_LENGTH, length)
            elif block_type > BLOCK_ENHANCED or block_type == 4 or block_type == 5:
                self.skipped_length = length
                self.skip_bytes = length - BLOCK_FRAME_BYTES
                self.unfinished_bytes = BLOCK_HEADER_BYTES
                span.source += BLOCK_HEADER_BYTES
            elif length > RECORD_MAX_BYTES:
                step = refuse(span, BAD_LENGTH, length)
            elif available < length:
                step = NEED_INPUT
            elif load32(span.source + length - 4, self.swapped) != length:
                step = refuse(span, BAD_TRAILER, load32(span.source + length - 4, self.swapped))
            elif block_type == BLOCK_INTERFACE:
                step = HEADER
            else:
                step = self.packet(span, &tally, block_type, length)
        self.tally = tally
        return step

    cdef inline Step packet(self, Span *span, Tally *tally, uint32_t block_type, uint32_t length) noexcept nogil:
        cdef Packet packet
        cdef SourceInterface *interface
        cdef uint32_t number, room, options_bytes = 0
        cdef int64_t timestamp_ns = 0
        if not self.dissect(&packet, span.source, block_type, length):
            return refuse(span, BAD_CAPTURED, packet.captured)
        number = packet.interface + self.section_first
        if packet.interface >= self.interface_count - self.section_first:
            return refuse(span, NO_INTERFACE, packet.interface)
        interface = &self.table[number]
        if packet.options_bytes > OPTIONS_MAX_BYTES:
            self.dropped_options += 1
            packet.options_bytes = 0
        room = RECORD_PACKET_MIN + padded(packet.captured)
        if packet.options_bytes:
            room += packet.options_bytes + 4
        if self.by_reference:
            room = sizeof(PacketReference)
        if <size_t> (span.out_end - span.out) < room:
            span.needed_room = room
            return OUTPUT_FULL
        if packet.timed:
            timestamp_ns = ticks_to_ns(packet.ticks, &interface.scale, &self.clamped_timestamps)
            if timestamp_ns > span.until_ns:
                span.next_ns = timestamp_ns
                return NOT_YET
            tally_packet(tally, timestamp_ns, packet.captured, packet.original)
        else:
            self.untimed_packets += 1
            tally.packets += 1
            tally.bytes += packet.original
            tally.captured_bytes += packet.captured
        interface.packets += 1
        span.source += length
        if self.by_reference:
            (<PacketReference *> span.out)[0] = PacketReference(
                packet.data, timestamp_ns, number, packet.captured, packet.original, self.flags(&packet, block_type),
            )
            span.out += sizeof(PacketReference)
            return GO_ON
        if packet.options_bytes:
            options_bytes = copy_options(span.out + RECORD_PACKET_DATA + padded(packet.captured), packet.options,
                                         packet.options_bytes, block_type, self.swapped)
            self.dropped_options += options_bytes == 0
        packet_record(span.out, number, timestamp_ns, packet.captured, packet.original, packet.data, options_bytes)
        span.out += RECORD_PACKET_MIN + padded(packet.captured) + options_bytes
        return GO_ON

    cdef uint32_t flags(self, const Packet *packet, uint32_t block_type) noexcept nogil:
        """A packet's epb_flags, 0 without them or in a broken list: of the options that a record would have."""
        cdef uint8_t[OPTIONS_MAX_BYTES + 4] listed
        cdef uint32_t offset = 0, options_bytes
        cdef uint16_t code, length
        if packet.options_bytes == 0:
            return 0
        options_bytes = copy_options(listed, packet.options, packet.options_bytes, block_type, self.swapped)
        self.dropped_options += options_bytes == 0
        while offset < options_bytes:
            code = load16(listed + offset, False)
            length = load16(listed + offset + 2, False)
            if code == OPT_FLAGS:
                return record_u32(listed + offset + 4)
            offset += 4 + padded(length)
        return 0

    cdef inline bint dissect(self, Packet *packet, const uint8_t *block, uint32_t block_type,
                             uint32_t length) noexcept nogil:
        """Reads a packet block of any of the three types; False: its captured length cannot be."""
        cdef const uint8_t *body = block + BLOCK_HEADER_BYTES
        cdef uint32_t body_bytes = length - BLOCK_FRAME_BYTES
        cdef bint swapped = self.swapped
        if block_type == BLOCK_SIMPLE:
            return self.dissect_simple(packet, body, body_bytes)
        packet.captured = 0
        if body_bytes < PACKET_BODY_BYTES:
            return False
        packet.interface = load32(body, swapped)
        if block_type == BLOCK_PACKET:  # the number is the first half of that word, the second is a drop count
            packet.interface = load16(body, swapped)
        packet.ticks = <uint64_t> load32(body + 4, swapped) << 32 | load32(body + 8, swapped)
        packet.captured = load32(body + 12, swapped)
        packet.original = load32(body + 16, swapped)
        if packet.captured > PACKET_MAX_BYTES or padded(packet.captured) > body_bytes - PACKET_BODY_BYTES:
            return False
        packet.data = body + PACKET_BODY_BYTES
        packet.options = packet.data + padded(packet.captured)
        packet.options_bytes = body_bytes - PACKET_BODY_BYTES - padded(packet.captured)
        packet.timed = True
        return True

    cdef bint dissect_simple(self, Packet *packet, const uint8_t *body, uint32_t body_bytes) noexcept nogil:
        """A Simple Packet Block: interface 0, no time, the captured length is what snaplen and block leave."""
        cdef uint32_t snaplen
        packet.captured = 0
        if body_bytes < 4:
            return False
        packet.interface = 0
        packet.original = load32(body, self.swapped)
        packet.captured = packet.original
        if self.interface_count > self.section_first:
            snaplen = self.table[self.section_first].snaplen
            if snaplen and packet.captured > snaplen:
                packet.captured = snaplen
        if packet.captured > PACKET_MAX_BYTES or padded(packet.captured) > body_bytes - 4:
            return False
        packet.data = body + 4
        packet.options_bytes = 0
        packet.timed = False
        return True

    cdef Step skip(self, Span *span) noexcept nogil:
        """Passes over a block that is not a packet, however long it is, and checks the length at its end."""
        cdef uint64_t available = span.source_end - span.source
        cdef uint64_t step_bytes = min(available, self.skip_bytes)
        span.source += step_bytes
        self.skip_bytes -= step_bytes
        self.unfinished_bytes += step_bytes
        if self.skip_bytes or available - step_bytes < 4:
            return NEED_INPUT
        if load32(span.source, self.swapped) != self.skipped_length:
            return refuse(span, BAD_TRAILER, load32(span.source, self.swapped))
        span.source += 4
        self.skipped_length = 0
        self.unfinished_bytes = 0
        return GO_ON

    cdef Step header(self, Span *span) except *:
        """A section header or an interface description: once per section and interface, so in Python."""
        cdef size_t available = span.source_end - span.source
        cdef uint32_t block_type = record_u32(span.source)
        if block_type == BLOCK_SECTION:
            magic = <bytes> span.source[8:12]
            byte_order = next((order for order in "<>" if struct.unpack(order + "I", magic)[0] == SECTION_MAGIC), None)
            if byte_order is None:
                return self.damaged(f"a section's byte-order magic is 0x{magic.hex()}")
            swapped = struct.unpack("=I", magic)[0] != SECTION_MAGIC
        else:
            swapped = self.swapped
            byte_order = "<" if (struct.pack("=H", 1) == b"\1\0") != swapped else ">"
        (length,) = struct.unpack(byte_order + "I", <bytes> span.source[4:8])
        if length > RECORD_MAX_BYTES or length & 3 or length < (28 if block_type == BLOCK_SECTION else 20):
            return self.damaged(REASONS[BAD_LENGTH].format(length))
        if available < length:
            return NEED_INPUT
        block = <bytes> span.source[:length]
        (trailer,) = struct.unpack(byte_order + "I", block[-4:])
        if trailer != length:
            return self.damaged(REASONS[BAD_TRAILER].format(trailer))
        try:
            step = self.section(block, byte_order, swapped) if block_type == BLOCK_SECTION else self.announce(
                span, InterfaceDescription.parse(block, byte_order)
            )
        except FormatError as error:
            return self.damaged(str(error))
        if step == GO_ON:
            span.source += <size_t> length
        return step

    cdef Step section(self, bytes block, str byte_order, bint swapped) except *:
        major, minor = struct.unpack_from(byte_order + "HH", block, 12)
        if major != 1 or minor not in (0, 2):
            return self.damaged(f"its pcapng version is {major}.{minor}; 1.0 and 1.2 are read")
        for _ in options(memoryview(block)[24:-4], byte_order):
            pass  # nothing in them is for us, but a list that leaves its block is damage
        self.swapped = swapped
        self.in_section = True
        self.section_first = self.interface_count
        return GO_ON

    cdef str explain(self, const Span *span):
        return REASONS[span.reason].format(span.evidence)


cdef Step refuse(Span *span, Damage reason, uint32_t evidence) noexcept nogil:
    span.reason = reason
    span.evidence = evidence
    return DAMAGED


cdef inline uint16_t load16(const uint8_t *at, bint swapped) noexcept nogil:
    cdef uint16_t half
    memcpy(&half, at, sizeof(half))
    return swap16(half) if swapped else half


cdef inline uint32_t load32(const uint8_t *at, bint swapped) noexcept nogil:
    cdef uint32_t word = record_u32(at)
    return swap32(word) if swapped else word


cdef uint32_t copy_options(uint8_t *out, const uint8_t *listed, uint32_t options_bytes, uint32_t block_type,
                           bint swapped) noexcept nogil:
    """Writes a packet's options in host byte order and closes them; `out` has room for `options_bytes + 4`.

    Returns the bytes written, 0 when the list is broken. What must not be copied is left out, and so are the numbers
    above 3 of an obsolete packet block, which mean nothing there.
    """
    cdef uint32_t offset = 0, written = 0
    cdef uint16_t code, length
    while options_bytes - offset >= 4:
        code = load16(listed + offset, swapped)
        length = load16(listed + offset + 2, swapped)
        offset += 4
        if code == OPT_END:
            break
        if padded(length) > options_bytes - offset:
            return 0
        if code != OPT_CUSTOM_STRING_NO_COPY and code != OPT_CUSTOM_BYTES_NO_COPY and not (
            block_type == BLOCK_PACKET and code in (OPT_DROPCOUNT, OPT_PACKETID, OPT_QUEUE)
        ):
            memcpy(out + written, &code, sizeof(code))
            memcpy(out + written + 2, &length, sizeof(length))
            if not copy_value(out + written + 4, listed + offset, code, length, swapped):
                return 0
            written += 4 + padded(length)
        offset += padded(length)
    record_set_u32(out + written, OPT_END)
    return written + 4


cdef bint copy_value(uint8_t *out, const uint8_t *value, uint16_t code, uint16_t length, bint swapped) noexcept nogil:
    """One option's value and its padding; numbers change their byte order. False: a number of the wrong length."""
    cdef uint64_t number
    cdef uint32_t expected = 0
    if code == OPT_FLAGS or code == OPT_QUEUE:
        expected = 4
    elif code == OPT_DROPCOUNT or code == OPT_PACKETID:
        expected = 8
    if expected and length != expected:
        return False
    if length:
        record_set_u32(out + padded(length) - 4, 0)
    memcpy(out, value, length)
    if not swapped:
        return True
    if expected == 8:
        memcpy(&number, value, sizeof(number))
        number = swap64(number)
        memcpy(out, &number, sizeof(number))
    elif expected == 4 or ((code == OPT_CUSTOM_STRING or code == OPT_CUSTOM_BYTES) and length >= 4):
        record_set_u32(out, load32(value, True))
    return True
