# cython: language_level=3, boundscheck=False, wraparound=False, cdivision=True
"""The unpublished tail of a live source: what was copied into its rings and is not visible yet.

Several receive CPUs hand packets over slightly out of order. The tail is held for `reorder_us`, put in order, and
published up to a cut: a place where everything that arrived before it is also older than everything behind it. Only
then is "this much has arrived" the same as "this much is published", and a successor can go on exactly there.
"""
from libc.stdint cimport UINT64_MAX, uint8_t, uint32_t, uint64_t
from libc.stdlib cimport free, malloc, qsort, realloc
from libc.string cimport memcpy, memmove

from appliance.ring.layout cimport *
from appliance.ring.ring cimport Producer


cdef int by_time_then_arrival(const void *left, const void *right) noexcept nogil:
    cdef const sort_key *a = <const sort_key *>left
    cdef const sort_key *b = <const sort_key *>right
    if a.timestamp_ns != b.timestamp_ns:
        return -1 if a.timestamp_ns < b.timestamp_ns else 1
    return -1 if a.arrival < b.arrival else 1


cdef class ReorderTail:
    """At most `capacity` entries, in order of arrival; whoever adds to a full tail must publish all of it first."""

    def __cinit__(self, uint32_t capacity=131072):
        self.capacity = capacity
        self.room = self.entries = <tail_entry *>malloc(2 * capacity * sizeof(tail_entry))
        self.sorted_entries = <tail_entry *>malloc(capacity * sizeof(tail_entry))
        if self.room == NULL or self.sorted_entries == NULL:
            raise MemoryError

    def __dealloc__(self):
        free(self.room)
        free(self.sorted_entries)
        free(self.scratch)

    cdef uint32_t cut(self, uint64_t boundary_ns, uint64_t *watermark_ns) noexcept nogil:
        """How many entries may be published so that nothing left is older; the promise that can be made then."""
        cdef uint32_t i, low, high
        cdef uint64_t oldest_left, newest_taken
        cdef uint32_t best = 0
        if not self.disordered:
            low = 0
            high = self.count
            while low < high:
                i = (low + high) >> 1
                if self.entries[i].timestamp_ns <= boundary_ns:
                    low = i + 1
                else:
                    high = i
            watermark_ns[0] = boundary_ns
            return low
        # sorted_entries[i].timestamp_ns: the oldest of entries[i:], for one pass from the front.
        oldest_left = UINT64_MAX
        for i in range(self.count, 0, -1):
            if self.entries[i - 1].timestamp_ns < oldest_left:
                oldest_left = self.entries[i - 1].timestamp_ns
            self.sorted_entries[i - 1].timestamp_ns = oldest_left
        newest_taken = 0
        for i in range(self.count):
            if self.entries[i].timestamp_ns > newest_taken:
                newest_taken = self.entries[i].timestamp_ns
            if newest_taken > boundary_ns:
                break
            if i + 1 == self.count or newest_taken <= self.sorted_entries[i + 1].timestamp_ns:
                best = i + 1
        watermark_ns[0] = boundary_ns
        if best < self.count and self.sorted_entries[best].timestamp_ns < boundary_ns:
            watermark_ns[0] = self.sorted_entries[best].timestamp_ns
        return best

    cdef int sort(self, uint32_t cut, ring_view *records, ring_view *digests) noexcept nogil:
        """Puts the first `cut` entries, and their unpublished bytes in both rings, into the order of time."""
        cdef uint32_t i
        cdef uint64_t record_bytes = 0, digest_bytes = 0
        cdef sort_key *keys
        cdef bint needed = False
        if not self.disordered:
            return 0
        for i in range(1, cut):
            if self.entries[i].timestamp_ns < self.entries[i - 1].timestamp_ns:
                needed = True
                self.reordered += 1
        if not needed:
            return 0
        keys = <sort_key *>malloc(cut * sizeof(sort_key))
        if keys == NULL:
            return -1
        for i in range(cut):
            keys[i].timestamp_ns = self.entries[i].timestamp_ns
            keys[i].arrival = i
            keys[i].record_offset = record_bytes
            keys[i].digest_offset = digest_bytes
            record_bytes += self.entries[i].record_bytes
            digest_bytes += self.entries[i].digest_bytes
        qsort(keys, cut, sizeof(sort_key), by_time_then_arrival)
        if self.room_for(record_bytes if record_bytes > digest_bytes else digest_bytes) != 0:
            free(keys)
            return -1
        self.permute(cut, keys, records, record_bytes, False)
        if digests != NULL:
            self.permute(cut, keys, digests, digest_bytes, True)
        for i in range(cut):
            self.sorted_entries[i] = self.entries[keys[i].arrival]
        memcpy(self.entries, self.sorted_entries, cut * sizeof(tail_entry))
        free(keys)
        return 0

    cdef int room_for(self, uint64_t wanted) noexcept nogil:
        cdef uint8_t *larger
        if wanted <= self.scratch_bytes:
            return 0
        larger = <uint8_t *>realloc(self.scratch, wanted)
        if larger == NULL:
            return -1
        self.scratch = larger
        self.scratch_bytes = wanted
        return 0

    cdef void permute(self, uint32_t cut, const sort_key *keys, ring_view *ring, uint64_t total,
                      bint digests) noexcept nogil:
        cdef uint8_t *unpublished = ring.data + (ring.published & (ring.capacity - 1))
        cdef uint64_t at = 0
        cdef uint64_t offset, length
        cdef uint32_t i
        for i in range(cut):
            if digests:
                offset = keys[i].digest_offset
                length = self.entries[keys[i].arrival].digest_bytes
            else:
                offset = keys[i].record_offset
                length = self.entries[keys[i].arrival].record_bytes
            memcpy(self.scratch + at, unpublished + offset, length)
            at += length
        memcpy(unpublished, self.scratch, total)

    cdef void drop(self, uint32_t cut) noexcept nogil:
        """The first `cut` entries are published."""
        cdef uint32_t i
        for i in range(0 if self.disordered or cut == 0 else cut - 1, cut):
            if self.entries[i].timestamp_ns > self.published_ns:
                self.published_ns = self.entries[i].timestamp_ns
        self.count -= cut
        self.entries += cut
        if self.entries - self.room >= min(2 * self.count, self.capacity):  # at most one move for each that was dropped
            memmove(self.room, self.entries, self.count * sizeof(tail_entry))
            self.entries = self.room
        if self.disordered:
            self.disordered = False
            for i in range(1, self.count):
                if self.entries[i].timestamp_ns < self.entries[i - 1].timestamp_ns:
                    self.disordered = True
                    break
            if self.count and self.entries[0].timestamp_ns < self.published_ns:
                self.disordered = True

    cdef void forget_time(self) noexcept nogil:
        """A new epoch: what was published before says nothing about the order of what comes."""
        self.newest_ns = 0
        self.published_ns = 0
        self.disordered = False

    # ---- the same from Python, a record at a time ----

    def push(self, Producer records not None, Producer digests, const uint8_t[::1] record not None,
             const uint8_t[::1] digest not None, uint64_t timestamp_ns):
        cdef tail_entry *entry
        if self.count == self.capacity:
            return False
        if not records.push(record):
            return False
        entry = tail_add(self, timestamp_ns)
        entry.record_bytes = record.shape[0]
        if digests is not None and digest.shape[0] and digests.push(digest):
            entry.digest_bytes = digest.shape[0]
        return True

    def publish(self, Producer records not None, Producer digests, uint64_t boundary_ns):
        cdef uint64_t watermark = 0
        cdef uint64_t record_bytes = 0, digest_bytes = 0
        cdef uint32_t i, late = 0
        cdef uint32_t count = self.cut(boundary_ns, &watermark)
        if self.sort(count, &records.view, &digests.view if digests is not None else NULL) != 0:
            raise MemoryError
        for i in range(count):
            record_bytes += self.entries[i].record_bytes
            digest_bytes += self.entries[i].digest_bytes
            late += self.entries[i].flags & ENTRY_LATE != 0
        # Rings take promises as signed numbers; everything may be published by the largest boundary.
        watermark = min(watermark, UINT64_MAX >> 1)
        ring_publish(&records.view, records.view.published + record_bytes, watermark, records.words, records.word_count)
        if digests is not None:
            ring_publish(&digests.view, digests.view.published + digest_bytes, watermark, NULL, 0)
        self.drop(count)
        return count, watermark, late

    def new_epoch(self):
        self.forget_time()

    @property
    def waiting(self):
        return self.count
