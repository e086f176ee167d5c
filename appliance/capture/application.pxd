"""What a packet's payload says of its flow's application, for compiled callers. See application.pyi."""

from libc.stdint cimport uint8_t, uint32_t

from appliance.ring.digest cimport digest

cdef struct Inspection  # of one source of packets

cdef class Inspector:
    cdef Inspection* inspection

# Looks at the payload of a packet whose digest was written to `d`, DIGEST_EXTENDED_MAX_BYTES of room. What is found is
# added to the digest. Returns the digest's length.
cdef uint32_t inspect(Inspection* s, const uint8_t* packet, digest* d) noexcept nogil

# NULL: nothing is to be inspected.
cdef Inspection* inspection_of(Inspector inspector) noexcept
