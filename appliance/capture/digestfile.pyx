# cython: language_level=3, boundscheck=False, wraparound=False, cdivision=True
"""A capture file as digests, for who wants nothing else of it: the packets are looked at where the reader has them."""

from libc.stdint cimport uint8_t, uint32_t, uint64_t
from libc.stdlib cimport free, malloc

from appliance.capture.application cimport Inspection, Inspector, inspection_of
from appliance.capture.headers cimport IGNORED_COUNTS, DigestBatch, LinkTypes, digest_references
from appliance.formats.record cimport PacketReference

import os

from appliance.capture.uri import file_of
from appliance.errors import FormatError
from appliance.formats.reader import CaptureReader

cdef enum:
    REFERENCES = 4096  # decoded at once: they stay in the cache until they are digested


cdef class DigestFile:
    """See digestfile.pyi."""
    cdef object reader
    cdef object failure
    cdef uint32_t source
    cdef bint inner
    cdef Inspector inspector  # or None
    cdef PacketReference *packets
    cdef uint64_t count
    cdef uint64_t taken
    cdef uint64_t ignored_counts[IGNORED_COUNTS]
    cdef LinkTypes linktypes
    cdef readonly bint ended

    def __cinit__(self, path, uint32_t source=0, *, bint inner=False, Inspector inspector=None):
        path, told_format = file_of(os.fspath(path))
        self.reader = CaptureReader(path, by_reference=True, format=told_format)
        self.source = source
        self.inner = inner
        self.inspector = inspector
        self.linktypes = LinkTypes()
        self.packets = <PacketReference *>malloc(REFERENCES * sizeof(PacketReference))
        if self.packets == NULL:
            raise MemoryError

    def __dealloc__(self):
        free(self.packets)

    def fill(self, size_t address, uint64_t room):
        cdef uint8_t *out = <uint8_t *>address
        cdef uint64_t written = 0
        cdef DigestBatch batch
        cdef Inspection *inspection = inspection_of(self.inspector)
        while not self.ended:
            if self.taken == self.count and not self.decode(written != 0):
                break
            with nogil:
                self.taken += digest_references(
                    self.packets + self.taken, self.count - self.taken, self.linktypes.types, self.linktypes.count,
                    self.source, self.inner, inspection, out + written, room - written, self.ignored_counts, &batch,
                )
            written += batch.written_bytes
            if self.taken < self.count:
                break
        return written

    cdef bint decode(self, bint has_digests) except *:
        """The next references. False: the file is over, or damaged, which is told when all digests have been given."""
        if self.failure is not None:
            raise self.failure
        self.taken = self.count = 0
        try:
            filled = self.reader.fill(<size_t>self.packets, REFERENCES * sizeof(PacketReference))
        except FormatError as error:
            if not has_digests:
                raise
            self.failure = error
            return False
        self.count = filled.produced_bytes // sizeof(PacketReference)
        self.ended = filled.end
        self.linktypes.learn(self.reader.interfaces)
        return not self.ended

    @property
    def read_packets(self):
        return self.reader.counts.packets

    @property
    def ignored(self):
        return [self.ignored_counts[i] for i in range(IGNORED_COUNTS)]

    def close(self):
        self.reader.close()
