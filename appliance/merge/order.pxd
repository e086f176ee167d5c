"""The merge's state, for the compiled modules that drive it. See order.pyi."""
cimport cython
from libc.stdint cimport int64_t, uint8_t, uint32_t, uint64_t

from appliance.merge.fronts cimport fronts
from appliance.merge.lending cimport output_room
from appliance.merge.tap cimport Tap
from appliance.ring.layout cimport ring_view

cdef enum:
    S_IDLE = 0
    S_FULL
    S_BOUNDARY
    S_LIMIT
    S_CONTROL
    S_EPOCH
    S_ENDED

cdef enum:
    TO_PCAPNG = 0
    TO_PCAP_NS
    TO_PCAP_US
    TO_DIGESTS
    TO_ERF
    TO_RECORDS

cdef enum:
    HAS_RECORD = 0
    IS_EMPTY
    IS_PARKED
    IS_ENDED
    IS_CONTROL

cdef extern from *:
    """
    #define UNMAPPED 0xFFFFFFFFu
    """
    const uint32_t UNMAPPED  # no enum: a constant beyond INT_MAX makes all of its enum unsigned, with some compilers

cdef enum:
    MARKS = 64

cdef struct mark:  # everything before `position` had arrived here by `arrived_ns` (CLOCK_MONOTONIC)
    uint64_t position
    uint64_t arrived_ns

cdef struct merge_source:
    ring_view *view
    bint live
    int state
    uint64_t next_ns
    int64_t watermark_ns
    int64_t epoch_offset         # of the EPOCH record that it is parked at
    uint64_t asked_ns            # CLOCK_MONOTONIC of the last request for a watermark
    uint32_t *interface_map
    uint32_t interface_count
    uint32_t *tap_linktypes      # by interface; UNMAPPED: not tapped
    uint32_t tap_count
    mark marks[MARKS]
    uint32_t first_mark
    uint32_t mark_count
    uint64_t counters[8]         # of the last RECORD_COUNTERS
    uint64_t pending_packets     # in the output buffer
    uint64_t pending_bytes
    uint64_t dropped
    uint64_t late
    uint64_t consumed
    int wake_fd                  # the producer's eventfd

cdef struct cursor:  # where the copying is in a source, and what it did there; written back when it is over
    uint64_t next_ns
    const uint8_t *record  # the next one
    uint32_t length        # of it, checked; 0: the source has to be looked at
    uint32_t source
    uint64_t left          # octets from it on
    uint32_t interface_count
    uint32_t packets
    const uint32_t *interface_map
    uint64_t bytes
    uint32_t dropped


cdef uint64_t monotonic_ns() noexcept nogil


@cython.final
cdef class Merge:
    cdef merge_source *sources
    cdef fronts fronts
    cdef cursor *cursors  # by leaf of `fronts`
    cdef readonly uint32_t source_count
    cdef list consumers
    cdef output_room room
    cdef uint8_t *out  # the output buffer, somewhere in the first page of a region of the room
    cdef uint64_t out_capacity
    cdef readonly uint64_t out_bytes
    cdef readonly uint64_t out_packets
    cdef public int sink
    cdef uint64_t max_wait_ns
    cdef uint64_t last_ns
    cdef Tap tap
    cdef bint has_tap
    cdef int64_t epoch_offset
    cdef bint epoch_known
    cdef readonly uint32_t control_source
    cdef uint32_t control_length
    cdef readonly uint64_t late
    cdef readonly uint64_t late_max_ns
    cdef readonly uint64_t forced
    cdef readonly bint crowded
    # Of the packets in the output buffer.
    cdef readonly uint64_t batch_first_ns
    cdef readonly uint64_t batch_last_ns
    cdef readonly uint64_t batch_late
    cdef readonly uint64_t batch_late_max_ns
    cdef readonly uint64_t segment_packets
    # Limits of the segment that is being written.
    cdef public uint64_t boundary_ns
    cdef public uint64_t packets_left
    cdef public uint64_t bytes_left
    cdef public bint count_captured_bytes
    cdef bint held       # no segment is open: stop at the first record that may go
    cdef bint forced_end
    cdef bint final      # nobody is waited for any longer
    cdef uint32_t parked
    cdef uint64_t promised_ns  # what is younger is forced
    cdef public uint64_t horizon_ns
    cdef public int64_t clock_offset_ns
    cdef uint64_t looked_ns  # CLOCK_MONOTONIC at the last look at the clock
    cdef uint64_t rest_ns         # so long a rest was meant to be since then
    cdef uint64_t stood_still_ns  # left out of the holding times
    cdef uint64_t begun_ns
    cdef uint64_t start_grace_ns

    cdef uint64_t clock_ns(self) noexcept nogil
    cdef uint64_t now_ns(self) noexcept nogil
    cdef void refresh_all(self) noexcept nogil
    cdef bint refresh(self, merge_source *source, uint64_t now) noexcept nogil
    cdef int run(self) noexcept nogil
    cdef int look(self) noexcept nogil
    cdef int classify(self, uint32_t index) noexcept nogil
    cdef bint same_epoch(self, int64_t offset) noexcept nogil
    cdef bint pick(self, uint32_t *best) noexcept nogil
    cdef int nothing_to_pick(self) noexcept nogil
    cdef bint epoch_is_due(self) noexcept nogil
    cdef bint is_over(self) noexcept nogil
    cdef bint bound(self, uint32_t best, uint64_t *limit_ns, uint64_t *limit_position) noexcept nogil
    cdef bint must_go(self, merge_source *source, uint64_t *limit_position) noexcept nogil
    cdef bint is_beginning(self) noexcept nogil
    cdef bint one_of_a_full_ring(self, merge_source *source, uint64_t *limit_position) noexcept nogil
    cdef bint is_half_full(self, merge_source *source) noexcept nogil
    cdef uint64_t waiting_bytes(self, merge_source *source) noexcept nogil
    cdef uint64_t promise(self, merge_source *source) noexcept nogil
    cdef bint is_overdue(self, merge_source *source) noexcept nogil
    cdef uint64_t arrival_ns(self, merge_source *source) noexcept nogil
    cdef void forget_marks(self, merge_source *source) noexcept nogil
    cdef void note_arrival(self, merge_source *source, uint64_t now) noexcept nogil
    cdef uint64_t merged_watermark(self) noexcept nogil
    cdef void give_up(self, merge_source *source) noexcept nogil
    cdef void collect_fronts(self) noexcept nogil
    cdef void only_front(self, uint32_t source) noexcept nogil
    cdef int copy_fronts(self, uint64_t limit_ns, uint64_t limit_position) noexcept nogil
    cdef void feed_tap(self, merge_source *source, const uint8_t *record, uint32_t length, uint32_t interface,
                       uint32_t captured) noexcept nogil
    cdef void publish_tap(self) noexcept nogil
    cdef void note_late(self, merge_source *source, uint64_t late_ns) noexcept nogil
    cdef void forget_batch(self) noexcept nogil
    cdef void begin_batch_at(self, uint64_t offset) noexcept nogil
    cdef void give_back(self) noexcept nogil
    cdef uint32_t ask_who_holds(self) noexcept nogil
    cdef int64_t hold_left_ms(self) noexcept nogil
    cdef void ask_all(self) noexcept nogil
    cdef void ask(self, uint32_t index, uint64_t now) noexcept nogil
    cdef void announce_sleep(self, uint32_t how) noexcept nogil
    cdef bint moved(self) noexcept nogil
    cdef uint64_t watermark_or_last(self) noexcept nogil
