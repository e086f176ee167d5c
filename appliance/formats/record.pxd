# cython: language_level=3
"""Packet records (ring/layout.h) to and from the bytes of files: inline, without the GIL, nothing but arithmetic."""

from libc.stdint cimport int64_t, uint8_t, uint32_t, uint64_t

from appliance.ring.layout cimport RECORD_PACKET, RECORD_PACKET_DATA, RECORD_PACKET_MIN
from appliance.ring.layout cimport record_copy, record_set_prefix, record_set_u32, record_timestamp_ns, record_u32

cdef enum:
    NS_PER_S = 1000000000
    PCAP_PACKET_HEADER_BYTES = 16


# A packet where it lies in its reader's buffer, for who only looks at packets. Gone with the next piece of the file.
cdef struct PacketReference:
    const uint8_t *data
    int64_t timestamp_ns
    uint32_t interface
    uint32_t captured
    uint32_t original
    uint32_t flags  # epb_flags; 0 when the packet has none


cdef inline uint32_t padded(uint32_t length) noexcept nogil:
    return (length + 3) & ~<uint32_t> 3


cdef inline void packet_record_frame(uint8_t *out, uint32_t interface, int64_t timestamp_ns, uint32_t captured,
                                     uint32_t original, uint32_t options_bytes) noexcept nogil:
    """Write a RECORD_PACKET but for the packet's octets and for its options, which go to `out + RECORD_PACKET_DATA` and
    behind them, padded; there is room for both and RECORD_PACKET_MIN around. The octets are copied after this."""
    cdef uint32_t data_bytes = padded(captured)
    # The last word of the data is cleared here and then copied over: that is the padding, without a branch. Of no data
    # it is the original length.
    record_set_u32(out + RECORD_PACKET_DATA + data_bytes - 4, 0)
    record_set_prefix(out, RECORD_PACKET, RECORD_PACKET_MIN + data_bytes + options_bytes, interface,
                      <uint64_t> timestamp_ns)
    record_set_u32(out + 20, captured)
    record_set_u32(out + 24, original)


cdef inline void packet_record(uint8_t *out, uint32_t interface, int64_t timestamp_ns, uint32_t captured,
                               uint32_t original, const uint8_t *packet, uint32_t options_bytes) noexcept nogil:
    """Write a RECORD_PACKET: the prefix and one copy of the packet. The caller has written `options_bytes` of options
    at `out + RECORD_PACKET_DATA + padded(captured)`, and there is room for them and RECORD_PACKET_MIN around."""
    packet_record_frame(out, interface, timestamp_ns, captured, original, options_bytes)
    record_copy(out + RECORD_PACKET_DATA, packet, captured)


cdef inline size_t pcap_packet_at(uint8_t *out, uint64_t timestamp_ns, uint32_t captured, uint32_t original,
                                  const uint8_t *packet, bint nanoseconds) noexcept nogil:
    """Write a classic pcap packet: 16 bytes of header, then `captured` bytes of data; returns its length.

    Seconds beyond 2106 do not fit into the format and become 2^32 - 1.
    """
    cdef uint64_t seconds = timestamp_ns // NS_PER_S
    cdef uint32_t fraction = <uint32_t> (timestamp_ns - seconds * NS_PER_S)
    record_set_u32(out, <uint32_t> seconds if seconds <= 0xFFFFFFFFU else 0xFFFFFFFFU)
    record_set_u32(out + 4, fraction if nanoseconds else fraction // 1000)
    record_set_u32(out + 8, captured)
    record_set_u32(out + 12, original)
    record_copy(out + PCAP_PACKET_HEADER_BYTES, packet, captured)
    return PCAP_PACKET_HEADER_BYTES + captured


cdef inline size_t epb_to_pcap(const uint8_t *record, uint8_t *out, bint nanoseconds) noexcept nogil:
    """Write a packet record of our own memory as a classic pcap packet; returns its length.

    `record`: a whole RECORD_PACKET; `out` has room for 16 bytes and the record's captured length, which is less than
    the record itself. 0 and nothing written: the captured length points outside of the record, which is corrupt.
    """
    cdef uint32_t length = record_u32(record + 4)
    cdef uint32_t captured = record_u32(record + 20)
    if length < RECORD_PACKET_MIN or captured > length - RECORD_PACKET_MIN:
        return 0
    return pcap_packet_at(out, record_timestamp_ns(record), captured, record_u32(record + 24),
                          record + RECORD_PACKET_DATA, nanoseconds)
