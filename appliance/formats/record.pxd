# cython: language_level=3
"""Packet records (ring/layout.h) to and from the bytes of files: inline, without the GIL, nothing but arithmetic."""

from libc.stdint cimport int64_t, uint8_t, uint32_t, uint64_t
from libc.string cimport memcpy

cdef extern from "layout.h" nogil:
    const uint32_t RECORD_PACKET
    const uint32_t RECORD_INTERFACE
    const uint32_t RECORD_PREFIX_BYTES
    const uint32_t RECORD_PACKET_DATA
    const uint32_t RECORD_PACKET_MIN
    const uint32_t RECORD_MAX_BYTES

cdef enum:
    NS_PER_S = 1000000000
    PCAP_PACKET_HEADER_BYTES = 16


cdef inline uint32_t word_at(const uint8_t *at) noexcept nogil:
    """A u32 in host order, aligned or not."""
    cdef uint32_t word
    memcpy(&word, at, sizeof(word))
    return word


cdef inline int64_t record_timestamp_ns(const uint8_t *record) noexcept nogil:
    return <int64_t> ((<uint64_t> word_at(record + 12)) << 32 | word_at(record + 16))


cdef inline size_t epb_to_pcap(const uint8_t *record, uint8_t *out, bint nanoseconds) noexcept nogil:
    """Write a packet record as a classic pcap packet (16 bytes of header, then the data); returns its length.

    `record`: a whole RECORD_PACKET; `out` has room for 16 bytes and the record's captured length, which is less than
    the record itself. 0 and nothing written: the captured length points outside of the record, which is corrupt.
    Seconds beyond 2106 do not fit into the format and become 2^32 - 1.
    """
    cdef uint32_t length = word_at(record + 4)
    cdef uint32_t captured = word_at(record + 20)
    cdef uint64_t timestamp_ns = <uint64_t> record_timestamp_ns(record)
    cdef uint64_t seconds = timestamp_ns // NS_PER_S
    cdef uint32_t header[4]
    if length < RECORD_PACKET_MIN or captured > length - RECORD_PACKET_MIN:
        return 0
    header[1] = <uint32_t> (timestamp_ns - seconds * NS_PER_S)
    if not nanoseconds:
        header[1] //= 1000
    header[0] = <uint32_t> seconds if seconds <= 0xFFFFFFFFU else 0xFFFFFFFFU
    header[2] = captured
    header[3] = word_at(record + 24)
    memcpy(out, header, PCAP_PACKET_HEADER_BYTES)
    memcpy(out + PCAP_PACKET_HEADER_BYTES, record + RECORD_PACKET_DATA, captured)
    return PCAP_PACKET_HEADER_BYTES + captured
