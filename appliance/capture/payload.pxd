"""Checks of what a frame carries, for compiled callers. See payload.pyi."""
from libc.stdint cimport int64_t, uint8_t, uint16_t, uint32_t, uint64_t

cdef enum:
    TRAILER_BYTES = 36

cdef struct test_payload:
    uint64_t sequence
    int64_t timestamp_ns
    uint32_t stream
    bint sound   # the trailer itself is as it was sent
    bint intact  # and so is what it covers

cdef uint32_t crc32(uint32_t crc, const uint8_t *data, uint64_t length) noexcept nogil

# The Ethernet frame's last 4 bytes are not the CRC-32 of the others.
cdef bint fcs_is_wrong(const uint8_t *frame, uint32_t length) noexcept nogil

# A whole frame, without check sequence: an IPv4, TCP or UDP checksum in it is wrong.
cdef bint checksum_is_wrong(const uint8_t *frame, uint32_t length, uint16_t linktype) noexcept nogil

# Whether the frame ends with a trailer of ours; `found` is filled then.
cdef bint find_test_payload(const uint8_t *frame, uint32_t length, test_payload *found) noexcept nogil
