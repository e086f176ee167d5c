# cython: language_level=3, boundscheck=False, wraparound=False
"""The one place where the packets of an output are counted, from the rings into a file or a drop."""
from libc.stdint cimport uint32_t, uint64_t
from libc.stdlib cimport calloc, free

from appliance.merge.order cimport Merge, merge_source


cdef uint64_t *slot(page, str name) except NULL:
    cdef uint64_t address = page.address
    return <uint64_t *>address + <uint64_t>page.index(name)


cdef class Books:
    """See books.pyi."""

    def __cinit__(self, Merge merge not None, page, source_pages):
        cdef uint32_t i
        self.merge = merge
        self.pages = (page, *source_pages)  # keeps their memory
        if len(self.pages) != merge.source_count + 1:
            raise ValueError("one page is needed for each source")
        self.sources = <source_slots *>calloc(max(1, merge.source_count), sizeof(source_slots))
        if self.sources == NULL:
            raise MemoryError
        for i in range(merge.source_count):
            self.find_slots(&self.sources[i], source_pages[i])
        self.heartbeat_ns = slot(page, "heartbeat_ns")
        self.merged_packets = slot(page, "merged_packets")
        self.written_packets = slot(page, "written_packets")
        self.written_bytes = slot(page, "written_bytes")
        self.direct_bytes = slot(page, "direct_bytes")
        self.open_packets = slot(page, "open_packets")
        self.late_packets = slot(page, "late_packets")
        self.late_max_ns = slot(page, "late_max_ns")
        self.forced_packets = slot(page, "forced_packets")
        self.last_packet_ns = slot(page, "last_packet_ns")
        self.watermark_ns = slot(page, "watermark_ns")
        self.late_before = self.late_packets[0]
        self.forced_before = self.forced_packets[0]

    cdef int find_slots(self, source_slots *source, page) except -1:
        source.consumed_packets = slot(page, "consumed_packets")
        source.dropped_merge_packets = slot(page, "dropped_merge_packets")
        source.dropped_writer_packets = slot(page, "dropped_writer_packets")
        source.late_packets = slot(page, "late_packets")
        source.held_packets = slot(page, "held_packets")
        source.written_packets = slot(page, "written_packets")
        source.ever_written_packets = slot(page, "ever_written_packets")
        source.taken_back_packets = slot(page, "taken_back_packets")
        source.written_bytes = slot(page, "written_bytes")
        return 0

    def __dealloc__(self):
        free(self.sources)

    def set_unsettled(self, packets):
        cdef uint32_t i
        for i in range(self.merge.source_count):
            self.sources[i].unsettled = packets[i]

    # ---- what happened to the packets ----

    def note_consumed(self):
        self.consumed()

    cdef void consumed(self) noexcept nogil:
        cdef uint32_t i
        cdef merge_source *source
        for i in range(self.merge.source_count):
            source = &self.merge.sources[i]
            self.sources[i].consumed_packets[0] = source.consumed
            self.sources[i].dropped_merge_packets[0] = source.dropped
            self.sources[i].late_packets[0] = source.late
        self.watermark_ns[0] = self.merge.watermark_or_last()

    def note_batch(self):
        self.batch_consumed()

    cdef void batch_consumed(self) noexcept nogil:
        """A batch is in the merge's buffer: its packets are consumed, and held."""
        cdef uint32_t i
        self.consumed()
        for i in range(self.merge.source_count):
            self.sources[i].held_packets[0] = self.merge.sources[i].pending_packets + self.sources[i].unsettled
        self.late_packets[0] = self.late_before + self.merge.late
        self.late_max_ns[0] = max(self.late_max_ns[0], self.merge.late_max_ns)
        self.forced_packets[0] = self.forced_before + self.merge.forced
        self.last_packet_ns[0] = self.merge.batch_last_ns

    def count_written(self):
        self.batch_written(0)

    cdef void batch_written(self, uint64_t bytes_by_pump) noexcept nogil:
        """The batch is in the open segment, whole."""
        cdef uint32_t i
        cdef merge_source *source
        cdef uint64_t packets = 0
        for i in range(self.merge.source_count):
            source = &self.merge.sources[i]
            if source.pending_packets == 0:
                continue
            packets += source.pending_packets
            self.sources[i].written_packets[0] += source.pending_packets
            self.sources[i].ever_written_packets[0] += source.pending_packets
            self.sources[i].written_bytes[0] += source.pending_bytes
            self.sources[i].taken += source.pending_packets
            self.take_off(i)
        self.written_packets[0] += packets
        self.merged_packets[0] += packets
        self.open_packets[0] += packets
        self.written_bytes[0] += bytes_by_pump
        self.taken_bytes += bytes_by_pump
        if packets:
            self.add_to_taken(packets)

    cdef void went_directly(self, uint64_t octets) noexcept nogil:
        """The disk has them, whatever becomes of their batch."""
        self.direct_bytes[0] += octets

    cdef void take_off(self, uint32_t index) noexcept nogil:
        """What a source had in the batch is counted as something else than held now."""
        self.sources[index].held_packets[0] = self.sources[index].unsettled
        self.merge.sources[index].pending_packets = self.merge.sources[index].pending_bytes = 0

    cdef void add_to_taken(self, uint64_t packets) noexcept nogil:
        if self.taken_packets == 0 or self.merge.batch_first_ns < self.first_ns:
            self.first_ns = self.merge.batch_first_ns
        self.taken_packets += packets
        self.last_ns = max(self.last_ns, self.merge.batch_last_ns)
        self.late += self.merge.batch_late
        self.late_max_of_taken_ns = max(self.late_max_of_taken_ns, self.merge.batch_late_max_ns)

    def count_dropped(self):
        return self.batch_dropped()

    cdef uint64_t batch_dropped(self) noexcept nogil:
        """No segment could take the batch. Returns its packets."""
        cdef uint32_t i
        cdef merge_source *source
        cdef uint64_t packets = 0
        for i in range(self.merge.source_count):
            source = &self.merge.sources[i]
            if source.pending_packets == 0:
                continue
            packets += source.pending_packets
            self.sources[i].dropped_writer_packets[0] += source.pending_packets
            self.take_off(i)
        self.merged_packets[0] += packets
        return packets

    def take_back(self, uint32_t index, uint64_t packets):
        if index >= self.merge.source_count:
            raise IndexError(index)
        self.sources[index].written_packets[0] -= packets
        self.sources[index].taken_back_packets[0] += packets
        self.sources[index].dropped_writer_packets[0] += packets
        self.written_packets[0] -= packets

    # ---- for the open segment ----

    def take(self):
        cdef uint32_t i
        if self.taken_packets == 0 and self.taken_bytes == 0:
            return None
        packets = [self.sources[i].taken for i in range(self.merge.source_count)]
        result = packets, self.taken_bytes, self.first_ns, self.last_ns, self.late, self.late_max_of_taken_ns
        for i in range(self.merge.source_count):
            self.sources[i].taken = 0
        self.taken_packets = self.taken_bytes = self.first_ns = self.last_ns = 0
        self.late = self.late_max_of_taken_ns = 0
        return result
