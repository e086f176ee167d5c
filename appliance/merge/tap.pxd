"""What the merge emits, once more for a consumer that may miss packets. See tap.pyi."""
cimport cython
from libc.stdint cimport int64_t, uint8_t, uint32_t, uint64_t

from appliance.ring.ring cimport Producer


@cython.final
cdef class Tap:
    cdef Producer producer
    cdef object page  # keeps the memory of the two slots
    cdef uint64_t *packets_slot
    cdef uint64_t *dropped_slot
    cdef bint changed
    cdef bint epoch_due
    cdef int64_t epoch_offset
    cdef int64_t promised_ns

    cdef void put(self, const uint8_t *record, uint32_t length, uint32_t captured, uint32_t linktype) noexcept nogil
    cdef bint put_epoch(self) noexcept nogil
    cdef void next_epoch(self, int64_t offset_ns) noexcept nogil
    cdef void publish(self, int64_t watermark_ns) noexcept nogil
