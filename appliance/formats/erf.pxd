# cython: language_level=3
"""ERF records (Endace's Extensible Record Format) from packets: inline, without the GIL."""

from libc.stdint cimport int64_t, uint8_t, uint32_t, uint64_t
from libc.string cimport memcpy

from appliance.formats.record cimport NS_PER_S

cdef enum:
    ERF_HEADER_BYTES = 16
    ERF_RECORD_MAX_BYTES = 65535  # the record's length field has 16 bits
    ERF_TYPE_HDLC = 1
    ERF_TYPE_ETHERNET = 2
    ERF_TYPE_IPV4 = 22
    ERF_TYPE_IPV6 = 23
    ERF_VARYING_LENGTH = 4  # flag: records are as long as their packets
    ERF_FCS_BYTES = 4  # an Ethernet record's wire length counts it
    ERF_ETHERNET_PAD_BYTES = 2
    LINKTYPE_ETHERNET = 1
    LINKTYPE_PPP_HDLC = 50
    LINKTYPE_RAW = 101
    LINKTYPE_CISCO_HDLC = 104
    LINKTYPE_ERF = 197  # the record itself: kinds that have no link type of their own
    LINKTYPE_IPV4 = 228
    LINKTYPE_IPV6 = 229


cdef inline bint erf_holds(uint32_t linktype) noexcept nogil:
    return linktype in (LINKTYPE_ETHERNET, LINKTYPE_PPP_HDLC, LINKTYPE_CISCO_HDLC, LINKTYPE_RAW, LINKTYPE_ERF,
                        LINKTYPE_IPV4, LINKTYPE_IPV6)


cdef inline void erf_set_u16(uint8_t *at, uint32_t value) noexcept nogil:
    at[0] = <uint8_t> (value >> 8)
    at[1] = <uint8_t> value


cdef inline uint32_t erf_u16(const uint8_t *at) noexcept nogil:
    return <uint32_t> at[0] << 8 | at[1]


cdef inline int64_t erf_time(const uint8_t *at) noexcept nogil:
    cdef uint64_t seconds = 0, fraction = 0
    cdef int i
    for i in range(3, -1, -1):
        fraction = fraction << 8 | at[i]
        seconds = seconds << 8 | at[4 + i]
    return <int64_t> (seconds * NS_PER_S + (fraction * NS_PER_S >> 32))


cdef inline void erf_set_time(uint8_t *out, uint64_t timestamp_ns) noexcept nogil:
    """32.32 bits of seconds, little-endian. Rounded up: whoever cuts or rounds to nanoseconds gets ours again.

    Seconds beyond 2106 do not fit into the format and become 2^32 - 1.
    """
    cdef uint64_t seconds = timestamp_ns // NS_PER_S
    cdef uint64_t fraction = (((timestamp_ns - seconds * NS_PER_S) << 32) + NS_PER_S - 1) // NS_PER_S
    cdef int i
    if seconds > 0xFFFFFFFFU:
        seconds = 0xFFFFFFFFU
    for i in range(4):
        out[i] = <uint8_t> (fraction >> 8 * i)
        out[4 + i] = <uint8_t> (seconds >> 8 * i)


cdef inline size_t erf_packet_at(uint8_t *out, uint32_t port, uint32_t linktype, uint64_t timestamp_ns,
                                 uint32_t captured, uint32_t original, const uint8_t *packet) noexcept nogil:
    """Write one ERF record: at most 18 bytes and `captured` bytes of data; returns its length.

    0 and nothing written: ERF has no type for this link type, or the data of LINKTYPE_ERF are no whole record. A packet
    that is longer than a record can be is cut, and a wire length above 65535 becomes 65535.
    """
    cdef uint32_t type, length, framing = ERF_HEADER_BYTES
    cdef uint64_t wire = original
    if linktype == LINKTYPE_ERF:
        if captured < ERF_HEADER_BYTES or erf_u16(packet + 10) != captured:
            return 0
        memcpy(out, packet, captured)
        return captured
    if linktype == LINKTYPE_ETHERNET:
        type = ERF_TYPE_ETHERNET
        framing += ERF_ETHERNET_PAD_BYTES
        wire += ERF_FCS_BYTES
    elif linktype == LINKTYPE_PPP_HDLC or linktype == LINKTYPE_CISCO_HDLC:
        type = ERF_TYPE_HDLC
    elif linktype == LINKTYPE_RAW or linktype == LINKTYPE_IPV4 or linktype == LINKTYPE_IPV6:
        type = ERF_TYPE_IPV6 if captured and packet[0] >> 4 == 6 else ERF_TYPE_IPV4
    else:
        return 0
    if captured > ERF_RECORD_MAX_BYTES - framing:
        captured = ERF_RECORD_MAX_BYTES - framing
    length = framing + captured
    erf_set_time(out, timestamp_ns)
    out[8] = <uint8_t> type
    out[9] = <uint8_t> (ERF_VARYING_LENGTH | (port & 3))
    erf_set_u16(out + 10, length)
    erf_set_u16(out + 12, 0)
    erf_set_u16(out + 14, <uint32_t> wire if wire < 65535 else 65535)
    if linktype == LINKTYPE_ETHERNET:
        erf_set_u16(out + 16, 0)
    memcpy(out + framing, packet, captured)
    return length
