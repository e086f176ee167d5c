# cython: language_level=3, boundscheck=False, wraparound=False, cdivision=True
"""Digests beside the records that they were made of, for who needs both a packet and what its headers say."""

from libc.stdint cimport uint8_t, uint16_t, uint32_t, uint64_t, uintptr_t
from libc.stdlib cimport free, malloc

from appliance.capture.headers cimport IGNORED_COUNTS, IGNORED_REASON_COUNT, LinkTypes, digest_packet
from appliance.ring.digest cimport DIGEST_MAX_BYTES
from appliance.ring.layout cimport (
    RECORD_PACKET, RECORD_PACKET_DATA, RECORD_PACKET_MIN, record_check, record_timestamp_ns, record_u32,
)

from appliance.errors import FormatError

DIGEST_BYTES = DIGEST_MAX_BYTES

cdef enum:
    AT_ONCE = 4096
    WORDS = 4


cdef class DigestPairs:
    """See pairs.pyi."""
    cdef uint8_t *digests
    cdef uint32_t *origins
    cdef LinkTypes linktypes
    cdef uint64_t[IGNORED_COUNTS] ignored_counts
    cdef bint inner
    cdef bint by_linktype
    cdef readonly uint64_t packets
    cdef readonly uint64_t consumed_bytes
    cdef readonly uint32_t count

    def __cinit__(self, uint64_t packets_before=0, *, bint inner=False, bint by_linktype=False):
        self.inner = inner
        self.by_linktype = by_linktype
        self.packets = packets_before
        self.linktypes = LinkTypes()
        self.digests = <uint8_t *> malloc(<size_t> AT_ONCE * DIGEST_MAX_BYTES)
        self.origins = <uint32_t *> malloc(AT_ONCE * WORDS * sizeof(uint32_t))
        if self.digests == NULL or self.origins == NULL:
            raise MemoryError

    def __dealloc__(self):
        free(self.digests)
        free(self.origins)

    @property
    def digests_address(self):
        return <uintptr_t> self.digests

    @property
    def origins_address(self):
        return <uintptr_t> self.origins

    @property
    def ignored(self):
        return [self.ignored_counts[i] for i in range(IGNORED_REASON_COUNT)]

    def pair(self, size_t address, uint64_t record_bytes, list interfaces):
        cdef bint whole
        self.linktypes.learn(interfaces)
        with nogil:
            whole = self.walk(<const uint8_t *> address, record_bytes)
        if not whole:
            raise FormatError(f"a corrupt record at byte {self.consumed_bytes} of a batch")
        return self.consumed_bytes < record_bytes

    cdef bint walk(self, const uint8_t *records, uint64_t record_bytes) noexcept nogil:
        """False: damaged framing at consumed_bytes."""
        cdef uint64_t at = 0
        cdef uint32_t length, captured, interface, linktype, digest_bytes
        cdef uint32_t *origin
        self.count = 0
        while at < record_bytes and self.count < AT_ONCE:
            self.consumed_bytes = at
            length = record_check(records + at, record_bytes - at)
            if length == 0:
                return False
            if record_u32(records + at) == RECORD_PACKET:
                captured = record_u32(records + at + 20)
                interface = record_u32(records + at + 8)
                if captured > length - RECORD_PACKET_MIN:
                    return False
                if self.by_linktype:
                    linktype = interface
                elif interface < self.linktypes.count:
                    linktype = self.linktypes.types[interface]
                else:
                    return False
                self.packets += 1
                digest_bytes = digest_packet(
                    records + at + RECORD_PACKET_DATA, captured, record_u32(records + at + 24),
                    <uint16_t> linktype, interface, record_timestamp_ns(records + at), 0,
                    self.inner, NULL,
                    self.digests + <size_t> self.count * DIGEST_MAX_BYTES, self.ignored_counts,
                )
                if digest_bytes:
                    origin = self.origins + self.count * WORDS
                    origin[0] = <uint32_t> at
                    origin[1] = linktype
                    origin[2] = <uint32_t> (self.packets >> 32)
                    origin[3] = <uint32_t> self.packets
                    self.count += 1
            at += length
        self.consumed_bytes = at
        return True
