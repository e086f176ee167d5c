from libc.stdint cimport uint32_t, uint64_t

from appliance.merge.order cimport Merge

cdef struct source_slots:  # of one source's page
    uint64_t *consumed_packets
    uint64_t *dropped_merge_packets
    uint64_t *dropped_writer_packets
    uint64_t *late_packets
    uint64_t *held_packets
    uint64_t *written_packets
    uint64_t *ever_written_packets
    uint64_t *taken_back_packets
    uint64_t *written_bytes
    uint64_t unsettled
    uint64_t taken  # packets written since `take`

cdef class Books:
    cdef Merge merge
    cdef tuple pages
    cdef source_slots *sources
    cdef uint64_t *heartbeat_ns
    cdef uint64_t *merged_packets
    cdef uint64_t *written_packets
    cdef uint64_t *written_bytes
    cdef uint64_t *direct_bytes
    cdef uint64_t *open_packets
    cdef uint64_t *late_packets
    cdef uint64_t *late_max_ns
    cdef uint64_t *forced_packets
    cdef uint64_t *last_packet_ns
    cdef uint64_t *watermark_ns
    cdef uint64_t late_before
    cdef uint64_t forced_before
    # Of what was written since `take`.
    cdef uint64_t taken_packets
    cdef uint64_t taken_bytes
    cdef uint64_t first_ns
    cdef uint64_t last_ns
    cdef uint64_t late
    cdef uint64_t late_max_of_taken_ns

    cdef int find_slots(self, source_slots *source, page) except -1
    cdef void consumed(self) noexcept nogil
    cdef void batch_consumed(self) noexcept nogil
    cdef void batch_written(self, uint64_t bytes_by_pump) noexcept nogil
    cdef void went_directly(self, uint64_t octets) noexcept nogil
    cdef void take_off(self, uint32_t index) noexcept nogil
    cdef void add_to_taken(self, uint64_t packets) noexcept nogil
    cdef uint64_t batch_dropped(self) noexcept nogil
