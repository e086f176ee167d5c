cimport cython
from libc.stdint cimport uint8_t, uint16_t, uint32_t, uint64_t
from libc.string cimport memset

from appliance.ring.layout cimport ring_view

cdef enum:
    ENTRY_FOREIGN = 1         # not ours: counted, in no ring
    ENTRY_RING_DROPPED = 2    # the packet ring was full
    ENTRY_DIGEST_DROPPED = 4  # the digest ring was full
    ENTRY_LATE = 8            # older than what is published already
    ENTRY_CONTROL = 16        # a record of ours, not a packet
    ENTRY_FILTERED = 32       # rejected by a filter in user space
    ENTRY_GATED = 64          # the gate of the recording was closed to it
    ENTRY_GATE_MOVED = 128    # this packet opened the gate, or closed it

cdef struct tail_entry:
    uint64_t timestamp_ns
    uint32_t record_bytes
    uint32_t captured_length
    uint32_t original_length
    uint16_t digest_bytes
    uint16_t flags

cdef struct sort_key:  # an entry, and where its bytes lie in the two rings' unpublished parts
    uint64_t timestamp_ns
    uint64_t record_offset
    uint64_t digest_offset
    uint32_t arrival


@cython.final
cdef class ReorderTail:
    cdef tail_entry *room     # for twice the capacity
    cdef tail_entry *entries  # somewhere in its first half
    cdef tail_entry *sorted_entries
    cdef uint8_t *scratch
    cdef uint64_t scratch_bytes
    cdef uint32_t count
    cdef uint32_t capacity
    cdef bint disordered
    cdef uint64_t newest_ns
    cdef uint64_t published_ns
    cdef readonly uint64_t reordered
    cdef uint32_t cut(self, uint64_t boundary_ns, uint64_t *watermark_ns) noexcept nogil
    cdef int sort(self, uint32_t cut, ring_view *records, ring_view *digests) noexcept nogil
    cdef int room_for(self, uint64_t wanted) noexcept nogil
    cdef void permute(self, uint32_t cut, const sort_key *keys, ring_view *ring, uint64_t total,
                      bint digests) noexcept nogil
    cdef void drop(self, uint32_t cut) noexcept nogil
    cdef void forget_time(self) noexcept nogil


cdef inline tail_entry *tail_add(ReorderTail tail, uint64_t timestamp_ns) noexcept nogil:
    """The next entry, its lengths and flags zero; NULL when the tail is full."""
    cdef tail_entry *entry
    if tail.count == tail.capacity:
        return NULL
    entry = &tail.entries[tail.count]
    tail.count += 1
    memset(entry, 0, sizeof(tail_entry))
    entry.timestamp_ns = timestamp_ns
    if timestamp_ns >= tail.newest_ns:
        tail.newest_ns = timestamp_ns
    else:
        tail.disordered = True
        if timestamp_ns < tail.published_ns:
            entry.flags = ENTRY_LATE
    return entry
