# cython: language_level=3
from libc.stdint cimport int64_t, uint8_t, uint32_t, uint64_t

cdef extern from "ticks.h" nogil:
    const int64_t TIMESTAMP_MAX_NS
    struct tick_scale:
        uint64_t multiplier
    void tick_scale_set(tick_scale *scale, uint8_t tsresol, int64_t offset_s)
    int64_t ticks_to_ns(uint64_t ticks, const tick_scale *scale, uint64_t *clamped)

cdef enum:
    PACKET_MAX_BYTES = 262144  # longer is damage: libpcap's and Wireshark's limit too

cdef enum Step:
    NEED_INPUT
    OUTPUT_FULL
    NOT_YET
    END
    DAMAGED
    # Between `run` and `decode` only:
    HEADER  # something that is there once per file or interface comes next
    GO_ON

cdef struct SourceInterface:
    tick_scale scale
    uint64_t packets
    uint32_t snaplen  # 0 = no limit

# What a call of `decode` works on: `run` and `header` move the two starts, and say below why they stopped.
cdef struct Span:
    const uint8_t *source
    const uint8_t *source_end
    uint8_t *out
    uint8_t *out_end
    int64_t until_ns
    int64_t next_ns  # with NOT_YET
    uint64_t needed_room  # with OUTPUT_FULL
    uint32_t evidence  # with DAMAGED, for `explain`
    uint32_t reason

# The sums of one run, in registers; `Decoder.add` takes them over.
cdef struct Tally:
    uint64_t packets
    uint64_t bytes
    uint64_t captured_bytes
    uint64_t late_packets
    int64_t oldest_ns
    int64_t newest_ns


cdef inline void tally_packet(Tally *tally, int64_t timestamp_ns, uint32_t captured, uint32_t original) noexcept nogil:
    tally.packets += 1
    tally.bytes += original
    tally.captured_bytes += captured
    tally.late_packets += timestamp_ns < tally.newest_ns
    tally.newest_ns = max(tally.newest_ns, timestamp_ns)
    tally.oldest_ns = min(tally.oldest_ns, timestamp_ns)


cdef class Decoder:
    cdef readonly bint by_reference  # packets go out as PacketReference, without a copy; interfaces do not go out
    cdef SourceInterface *table
    cdef uint32_t table_capacity
    cdef readonly uint32_t interface_count
    cdef readonly list interfaces
    cdef Tally tally
    cdef readonly uint64_t untimed_packets
    cdef readonly uint64_t clamped_timestamps
    cdef readonly uint64_t dropped_options
    cdef readonly uint64_t offset
    cdef uint64_t unfinished_bytes
    cdef readonly uint64_t needed_room
    cdef readonly int64_t next_ns
    cdef readonly str damage

    cdef Step run(self, Span *span) noexcept nogil
    cdef Step header(self, Span *span) except *
    cdef Step announce(self, Span *span, interface) except *
    cdef Step damaged(self, reason) except *
    cdef str explain(self, const Span *span)
    cdef Step ended(self, size_t left) except *
    cdef int grow(self) except -1
