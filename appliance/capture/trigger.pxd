"""Triggers for compiled callers. See trigger.pyi."""
from libc.stdint cimport int64_t, uint8_t, uint16_t, uint32_t, uint64_t

from appliance.capture.payload cimport test_payload
from appliance.ring.port cimport PortMemory, port_packet, port_rules, port_stream

# What a criterion looks at: one packet, its tag in its place.
cdef struct packet_view:
    const uint8_t *data
    uint32_t captured_length
    uint32_t original_length
    uint64_t timestamp_ns
    bint checksum_not_ready  # the sender's card would have filled it in
    bint outgoing


cdef class Criteria:
    cdef port_rules rules
    cdef uint16_t linktype
    cdef bint looks_at_fcs
    cdef bint looks_at_payload
    cdef test_payload found  # of the packet that was judged last, if it has PORT_FLAG_TPLD
    cdef bint prepare(self, const port_rules *rules) noexcept nogil
    cdef uint32_t judge(self, const packet_view *packet) noexcept nogil
    cdef bint matches(self, uint32_t index, const packet_view *packet) noexcept nogil
    cdef bint meets_start(self, uint32_t flags, const packet_view *packet) noexcept nogil
    cdef bint meets_stop(self, uint32_t flags, const packet_view *packet) noexcept nogil
    cdef bint keeps(self, uint32_t flags, const packet_view *packet) noexcept nogil


cdef class PortTap:
    cdef bint is_on  # offer packets
    cdef uint8_t *scratch  # where a caller puts a packet together whose bytes do not lie in a row
    cdef PortMemory memory
    cdef Criteria criteria
    cdef uint64_t seen_request
    cdef uint64_t stop_request  # 0: nobody asked to stop
    cdef void look(self, uint64_t now_ns) noexcept nogil
    cdef void kernel_was_empty(self) noexcept nogil
    cdef uint32_t begin_block(self, uint64_t sequence) noexcept nogil
    cdef void offer(self, const packet_view *packet) noexcept nogil
    cdef void start(self, uint64_t now_ns) noexcept nogil
    cdef void stop(self, uint32_t because) noexcept nogil
    cdef void decide(self, const packet_view *packet) noexcept nogil
    cdef bint store(self, const packet_view *packet, uint32_t flags, uint64_t gap_ns) noexcept nogil
    cdef void put(self, uint64_t position, const void *source, uint64_t length) noexcept nogil
    cdef void drop_oldest(self) noexcept nogil
    cdef void count_stream(self, const packet_view *packet, uint32_t flags) noexcept nogil


cdef class Gate:
    cdef Criteria criteria
    cdef bint repeats
    cdef readonly uint32_t state
    cdef uint32_t next_state(self, uint32_t state) noexcept nogil
    cdef bint passes(self, const packet_view *packet) noexcept nogil
