from libc.stdint cimport int64_t, uint8_t, uint32_t, uint64_t

from appliance.ring.layout cimport ring_header, ring_view


cdef void signal_eventfd(int fd) noexcept nogil


cdef class Mapping:
    cdef ring_header *header
    cdef uint8_t *data
    cdef readonly uint64_t capacity
    cdef uint64_t mapped_bytes


cdef class Producer:
    cdef ring_view view
    cdef readonly Mapping mapping
    cdef uint64_t words[30]
    cdef uint32_t word_count
    cdef readonly bint resumed
    cdef int wake_fd
    cdef void wake(self) noexcept nogil


cdef class Consumer:
    cdef ring_view view
    cdef readonly Mapping mapping
    cdef readonly int64_t watermark_ns
    cdef readonly bint ended
    cdef readonly bint corrupt
    cdef int wake_fd
    cdef int look(self) noexcept nogil
