# cython: language_level=3, boundscheck=False, wraparound=False, cdivision=True
"""Many rings into one stream in the order of time. Used for packets (merge worker) and for digests (meter worker).

The rule: a record may go when no source can still bring an older one. A source that has a record waiting bounds the
others by that record; an empty live source bounds them by its watermark; an empty file source stops everything until it
has more. What waits longer than `max_wait` since it arrived here goes nevertheless, and so does everything while a
ring is more than half full; what then comes too late is still emitted, and counted.

Order is (epoch, timestamp): a source that reports a step of the clock is parked until all have reported it.
"""
from libc.stdint cimport UINT64_MAX, int64_t, uint8_t, uint32_t, uint64_t
from libc.stdlib cimport calloc, free, malloc, realloc
from libc.string cimport memcpy
from posix.time cimport CLOCK_MONOTONIC, clock_gettime, timespec

from appliance.formats.record cimport epb_to_pcap
from appliance.ring.layout cimport *
from appliance.ring.ring cimport Consumer

IDLE, FULL, BOUNDARY, LIMIT, CONTROL, EPOCH, ENDED = range(7)
SINK_PCAPNG, SINK_PCAP_NS, SINK_PCAP_US, SINK_DIGESTS = range(4)

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

cdef enum:
    HAS_RECORD = 0
    IS_EMPTY
    IS_PARKED
    IS_ENDED
    IS_CONTROL

cdef enum:
    MARKS = 64
    UNMAPPED = 0xFFFFFFFF
    SAME_EPOCH_NS = 25000000

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
    mark marks[MARKS]
    uint32_t first_mark
    uint32_t mark_count
    uint64_t counters[8]         # of the last RECORD_COUNTERS
    uint64_t pending_packets     # in the output buffer
    uint64_t pending_bytes
    uint64_t dropped
    uint64_t late
    uint64_t consumed
    uint64_t segment_packets


cdef uint64_t monotonic_ns() noexcept nogil:
    cdef timespec t
    clock_gettime(CLOCK_MONOTONIC, &t)
    return <uint64_t>t.tv_sec * 1000000000 + <uint64_t>t.tv_nsec


cdef class Merge:
    """See order.pyi."""
    cdef merge_source *sources
    cdef readonly uint32_t source_count
    cdef list consumers
    cdef uint8_t *out
    cdef uint64_t out_capacity
    cdef readonly uint64_t out_bytes
    cdef readonly uint64_t out_packets
    cdef public int sink
    cdef uint64_t max_wait_ns
    cdef uint64_t last_ns
    cdef int64_t epoch_offset
    cdef bint epoch_known
    cdef readonly uint32_t control_source
    cdef uint32_t control_length
    cdef readonly uint64_t late
    cdef readonly uint64_t late_max_ns
    cdef readonly uint64_t segment_late_max_ns
    cdef readonly uint64_t forced
    cdef readonly uint64_t segment_first_ns
    cdef readonly uint64_t segment_last_ns
    cdef readonly uint64_t segment_late
    cdef readonly uint64_t segment_packets
    # Limits of the segment that is being written.
    cdef public uint64_t boundary_ns
    cdef public uint64_t packets_left
    cdef public uint64_t bytes_left
    cdef public bint count_captured_bytes
    cdef bint held       # no segment is open: stop at the first record that may go
    cdef bint forced_end

    def __cinit__(self, consumers, live, *, int sink, uint64_t max_wait_ms, uint64_t out_bytes):
        cdef uint32_t i
        cdef Consumer consumer
        self.consumers = list(consumers)
        self.source_count = len(self.consumers)
        self.sink = sink
        self.max_wait_ns = max_wait_ms * 1000000
        self.out_capacity = out_bytes
        self.boundary_ns = self.packets_left = self.bytes_left = UINT64_MAX
        self.out = <uint8_t *>malloc(out_bytes + RECORD_MAX_BYTES)
        self.sources = <merge_source *>calloc(max(1, self.source_count), sizeof(merge_source))
        if self.out == NULL or self.sources == NULL:
            raise MemoryError
        for i in range(self.source_count):
            consumer = self.consumers[i]
            self.sources[i].view = &consumer.view
            self.sources[i].live = live[i]

    def __dealloc__(self):
        cdef uint32_t i
        if self.sources != NULL:
            for i in range(self.source_count):
                free(self.sources[i].interface_map)
        free(self.sources)
        free(self.out)

    # ---- the stream ----

    def fill(self):
        """Moves records into the output buffer until something is to be done; returns what (see order.pyi)."""
        cdef int status
        with nogil:
            self.refresh_all()
            status = self.run()
        return status

    cdef void refresh_all(self) noexcept nogil:
        """Notes what arrived everywhere, so that holding times and fill levels are right."""
        cdef uint32_t i
        cdef uint64_t now = monotonic_ns()
        for i in range(self.source_count):
            if self.sources[i].state != IS_ENDED:
                self.refresh(&self.sources[i], now)

    cdef bint refresh(self, merge_source *source, uint64_t now) noexcept nogil:
        """Returns whether the source has ended. The end is loaded before the head: an empty ring then stays empty."""
        cdef uint64_t before = source.view.other
        cdef uint32_t ended = 0
        if ring_look(source.view, &source.watermark_ns, &ended) != RING_OK:
            self.give_up(source)
            return False
        if source.view.other != before:
            self.note_arrival(source, now)
        return ended != 0

    cdef int run(self) noexcept nogil:
        cdef uint32_t best
        cdef int status
        cdef uint64_t limit_ns, limit_position
        while True:
            status = self.look()
            if status != S_IDLE:
                return status
            if not self.pick(&best):
                return self.nothing_to_pick()
            if not self.bound(best, &limit_ns, &limit_position):
                return S_BOUNDARY if self.is_over() else S_IDLE
            if self.held:
                return S_BOUNDARY
            status = self.copy_run(best, limit_ns, limit_position)
            if status != S_IDLE:
                return status

    cdef int look(self) noexcept nogil:
        """What every source has now. Handles the records that are for us; stops at those that Python handles."""
        cdef uint32_t i
        cdef merge_source *source
        for i in range(self.source_count):
            source = &self.sources[i]
            if source.state == IS_ENDED:
                continue
            if source.view.position == source.view.other:
                if self.refresh(source, monotonic_ns()) and source.view.position == source.view.other:
                    source.state = IS_ENDED
                    continue
            if self.classify(i) == IS_CONTROL:
                self.control_source = i
                return S_CONTROL
        return S_IDLE

    cdef int classify(self, uint32_t index) noexcept nogil:
        cdef merge_source *source = &self.sources[index]
        cdef const uint8_t *record
        cdef uint32_t length, type
        while source.view.position != source.view.other:
            record = ring_at(source.view, source.view.position)
            length = record_check(record, source.view.other - source.view.position)
            if length == 0:
                self.give_up(source)
                break
            type = record_u32(record)
            if (type == RECORD_PACKET and length >= RECORD_PACKET_MIN) or type == RECORD_DIGEST:
                source.next_ns = record_timestamp_ns(record)
                source.state = HAS_RECORD
                return source.state
            if type == RECORD_COUNTERS and length == RECORD_COUNTERS_BYTES:
                memcpy(source.counters, record + RECORD_PREFIX_BYTES, 8 * RECORD_COUNTERS_WORDS)
            elif type == RECORD_EPOCH and length >= RECORD_PREFIX_BYTES + 12:
                memcpy(&source.epoch_offset, record + RECORD_PREFIX_BYTES, 8)
                if not self.epoch_known or not self.same_epoch(source.epoch_offset):
                    source.state = IS_PARKED
                    return source.state
            elif type == RECORD_INTERFACE:
                self.control_length = length
                source.state = IS_CONTROL
                return source.state
            source.view.position += length
        source.state = IS_EMPTY
        return source.state

    cdef bint same_epoch(self, int64_t offset) noexcept nogil:
        cdef int64_t difference = offset - self.epoch_offset
        return -SAME_EPOCH_NS < difference < SAME_EPOCH_NS

    cdef bint pick(self, uint32_t *best) noexcept nogil:
        """The oldest waiting record; of equal ones, the first source's."""
        cdef uint32_t i
        cdef bint found = False
        for i in range(self.source_count):
            if self.sources[i].state == HAS_RECORD and (
                    not found or self.sources[i].next_ns < self.sources[best[0]].next_ns):
                best[0] = i
                found = True
        return found

    cdef int nothing_to_pick(self) noexcept nogil:
        cdef uint32_t i
        cdef bint parked = False
        cdef bint empty = False
        cdef bint overdue = False
        cdef uint64_t unused = 0
        for i in range(self.source_count):
            if self.sources[i].state == IS_PARKED:
                parked = True
                if self.is_overdue(&self.sources[i], &unused):
                    overdue = True
            elif self.sources[i].state == IS_EMPTY:
                empty = True
        if parked and (not empty or overdue):
            return S_EPOCH
        if not parked and not empty:
            return S_ENDED
        return S_BOUNDARY if not parked and self.is_over() else S_IDLE

    cdef bint is_over(self) noexcept nogil:
        """Whether the segment's time is over although no record says so."""
        return not self.held and (self.forced_end or self.merged_watermark() >= self.boundary_ns)

    cdef bint bound(self, uint32_t best, uint64_t *limit_ns, uint64_t *limit_position) noexcept nogil:
        """How far the run of `best` may go: up to a time, and up to a position in its ring. False: not even one."""
        cdef uint32_t i
        cdef merge_source *source = &self.sources[best]
        cdef merge_source *other
        cdef uint64_t records = UINT64_MAX   # by the records that wait elsewhere
        cdef uint64_t promises = UINT64_MAX  # by the watermarks of empty sources
        for i in range(self.source_count):
            other = &self.sources[i]
            if i == best:
                continue
            if other.state == HAS_RECORD:
                if i < best and other.next_ns - 1 < records:
                    records = other.next_ns - 1
                elif i > best and other.next_ns < records:
                    records = other.next_ns
            elif other.state == IS_EMPTY:
                if not other.live:
                    promises = 0
                elif <uint64_t>other.watermark_ns < promises:
                    promises = other.watermark_ns
        if records < source.next_ns:
            records = source.next_ns  # next_ns of 0: nothing is below it
        limit_position[0] = source.view.other
        if source.next_ns <= promises:
            limit_ns[0] = records if records < promises else promises
            return True
        if not self.must_go(source, limit_position):
            return False
        limit_ns[0] = records
        return True

    cdef bint must_go(self, merge_source *source, uint64_t *limit_position) noexcept nogil:
        """Whether the record waits too long, or any ring is more than half full. Files wait as long as it takes."""
        cdef uint32_t i
        cdef ring_view *view
        for i in range(self.source_count):
            if self.sources[i].state == IS_EMPTY and not self.sources[i].live:
                return False
        if self.is_overdue(source, limit_position):
            return True
        for i in range(self.source_count):
            view = self.sources[i].view
            if view.other - view.published > view.capacity / 2:
                limit_position[0] = source.view.position + 1  # one record, then look again
                return True
        return False

    cdef bint is_overdue(self, merge_source *source, uint64_t *limit_position) noexcept nogil:
        cdef mark *oldest
        while source.mark_count:
            oldest = &source.marks[source.first_mark]
            if oldest.position > source.view.position:
                if monotonic_ns() - oldest.arrived_ns < self.max_wait_ns:
                    return False
                limit_position[0] = oldest.position
                return True
            source.first_mark = (source.first_mark + 1) % MARKS
            source.mark_count -= 1
        return False

    cdef void note_arrival(self, merge_source *source, uint64_t now) noexcept nogil:
        cdef mark *newest
        if source.mark_count:
            newest = &source.marks[(source.first_mark + source.mark_count - 1) % MARKS]
            if source.mark_count == MARKS or now - newest.arrived_ns < self.max_wait_ns / (MARKS / 2):
                newest.position = source.view.other  # at most that much too early
                return
        newest = &source.marks[(source.first_mark + source.mark_count) % MARKS]
        newest.position = source.view.other
        newest.arrived_ns = now
        source.mark_count += 1

    cdef uint64_t merged_watermark(self) noexcept nogil:
        """No record that is still to come is older than this."""
        cdef uint32_t i
        cdef uint64_t lowest = UINT64_MAX
        cdef merge_source *source
        for i in range(self.source_count):
            source = &self.sources[i]
            if source.state == HAS_RECORD and source.next_ns < lowest:
                lowest = source.next_ns
            elif source.state == IS_EMPTY:
                if not source.live:
                    return self.last_ns
                if <uint64_t>source.watermark_ns < lowest:
                    lowest = source.watermark_ns
        return lowest

    cdef void give_up(self, merge_source *source) noexcept nogil:
        """A damaged ring: everything published in it is lost, and counted by the packets that its producer counted."""
        cdef int slot
        cdef uint64_t head = source.view.header.head
        slot = ring_commit_slot(source.view.header, head)
        if slot >= 0 and source.view.header.commit[slot].words[COMMIT_WORD_PUBLISHED] > source.consumed:
            source.dropped += source.view.header.commit[slot].words[COMMIT_WORD_PUBLISHED] - source.consumed
            source.consumed = source.view.header.commit[slot].words[COMMIT_WORD_PUBLISHED]
        source.view.position = head
        source.view.other = head
        source.mark_count = 0

    # ---- copying ----

    cdef int copy_run(self, uint32_t index, uint64_t limit_ns, uint64_t limit_position) noexcept nogil:
        cdef merge_source *source = &self.sources[index]
        cdef ring_view *view = source.view
        cdef const uint8_t *record
        cdef uint32_t length, type, cost
        cdef uint64_t stamp
        while view.position < limit_position:
            record = ring_at(view, view.position)
            length = record_check(record, view.other - view.position)
            if length == 0:
                return S_IDLE  # look() gives the ring up
            type = record_u32(record)
            if type != RECORD_PACKET and type != RECORD_DIGEST:
                return S_IDLE
            stamp = record_timestamp_ns(record)
            source.next_ns = stamp
            if stamp > limit_ns:
                return S_IDLE
            if stamp >= self.boundary_ns:
                return S_BOUNDARY
            if self.packets_left == 0 and self.segment_packets:
                return S_LIMIT
            cost = record_u32(record + 20) if self.count_captured_bytes else length
            if self.bytes_left < cost and self.segment_packets:
                return S_LIMIT
            if self.out_bytes >= self.out_capacity:
                return S_FULL
            self.emit(source, index, record, length, stamp)
            self.packets_left -= 1 if self.packets_left else 0
            self.bytes_left -= cost if cost < self.bytes_left else self.bytes_left
            view.position += length
        return S_IDLE

    cdef void emit(self, merge_source *source, uint32_t index, const uint8_t *record, uint32_t length,
                   uint64_t stamp) noexcept nogil:
        cdef uint8_t *target = self.out + self.out_bytes
        cdef uint32_t interface = record_u32(record + 8)
        source.consumed += 1
        if self.sink == TO_DIGESTS:
            memcpy(target, record, length)
            record_set_u32(target + 8, index)
            self.out_bytes += length
        else:
            if (interface >= source.interface_count or source.interface_map[interface] == UNMAPPED
                    or record_u32(record + 20) > length - RECORD_PACKET_MIN):
                source.dropped += 1
                return
            if self.sink == TO_PCAPNG:
                memcpy(target, record, length)
                record_set_u32(target + 8, source.interface_map[interface])
                self.out_bytes += length
            else:
                self.out_bytes += epb_to_pcap(record, target, self.sink == TO_PCAP_NS)
            source.pending_bytes += record_u32(record + 20)
        self.out_packets += 1
        self.segment_packets += 1
        source.pending_packets += 1
        source.segment_packets += 1
        self.note_time(source, stamp)

    cdef inline void note_time(self, merge_source *source, uint64_t stamp) noexcept nogil:
        if self.segment_first_ns == 0 or stamp < self.segment_first_ns:
            self.segment_first_ns = stamp
        if stamp > self.segment_last_ns:
            self.segment_last_ns = stamp
        if stamp >= self.last_ns:
            self.last_ns = stamp
            return
        source.late += 1
        self.late += 1
        self.segment_late += 1
        if self.last_ns - stamp > self.late_max_ns:
            self.late_max_ns = self.last_ns - stamp
        if self.last_ns - stamp > self.segment_late_max_ns:
            self.segment_late_max_ns = self.last_ns - stamp

    # ---- what Python does between the calls ----

    def output(self):
        """The bytes to write, as a memoryview that is valid until `emptied`."""
        return (<uint8_t[:self.out_bytes]>self.out) if self.out_bytes else memoryview(b"")

    @property
    def output_address(self):
        return <uint64_t>self.out

    def emptied(self):
        """The output was taken: the buffer is free again."""
        self.out_bytes = 0
        self.out_packets = 0

    def release(self):
        """Gives everything consumed back to the producers. Before the write, not after: at most once."""
        cdef uint32_t i
        cdef Consumer consumer
        for i in range(self.source_count):
            if self.sources[i].view.position != self.sources[i].view.published:
                consumer = self.consumers[i]
                consumer.release_to(self.sources[i].view.position)

    def take_pending(self, uint32_t index):
        """(packets, captured bytes) of a source that are in the output buffer; asking takes them off."""
        cdef merge_source *source = &self.sources[index]
        result = source.pending_packets, source.pending_bytes
        source.pending_packets = source.pending_bytes = 0
        return result

    def control_record(self):
        """The record that `fill` stopped at with CONTROL, from source `control_source`."""
        cdef merge_source *source = &self.sources[self.control_source]
        return <bytes>(<const uint8_t *>ring_at(source.view, source.view.position))[: self.control_length]

    def control_done(self):
        cdef merge_source *source = &self.sources[self.control_source]
        source.view.position += self.control_length
        source.state = IS_EMPTY

    def map_interface(self, uint32_t index, uint32_t local, uint32_t interface):
        """Packets of a source's interface `local` go out under the number `interface`."""
        cdef merge_source *source = &self.sources[index]
        cdef uint32_t *larger
        cdef uint32_t i
        if local >= 1 << 20:
            raise ValueError(f"interface number {local} is too large")
        if local >= source.interface_count:
            larger = <uint32_t *>realloc(source.interface_map, (local + 1) * sizeof(uint32_t))
            if larger == NULL:
                raise MemoryError
            for i in range(source.interface_count, local + 1):
                larger[i] = UNMAPPED
            source.interface_map = larger
            source.interface_count = local + 1
        source.interface_map[local] = interface

    def next_epoch(self):
        """All sources (or all that answered in time) saw the clock step: their records of the new epoch may come."""
        cdef uint32_t i
        cdef bint chosen = False
        for i in range(self.source_count):
            if self.sources[i].state == IS_PARKED:
                if not chosen:
                    self.epoch_offset = self.sources[i].epoch_offset
                    self.epoch_known = True
                    chosen = True
                if self.same_epoch(self.sources[i].epoch_offset):
                    self.sources[i].state = IS_EMPTY
        self.last_ns = 0

    def begin_segment(self, uint64_t boundary_ns, uint64_t packets, uint64_t length):
        """Limits of the next segment; its times and counts start anew."""
        cdef uint32_t i
        self.held = self.forced_end = False
        self.boundary_ns = boundary_ns
        self.packets_left = packets
        self.bytes_left = length
        self.segment_first_ns = self.segment_last_ns = 0
        self.segment_late = self.segment_late_max_ns = self.segment_packets = 0
        for i in range(self.source_count):
            self.sources[i].segment_packets = 0

    def want_watermarks(self):
        """Asks the empty live sources that hold others up, each at most once per half of max_wait.

        Returns how many sources hold records up.
        """
        cdef uint32_t i, best = 0
        cdef uint64_t now = monotonic_ns()
        cdef uint32_t holding = 0
        cdef merge_source *source
        cdef bint waiting = self.pick(&best)
        cdef bint parked = False
        for i in range(self.source_count):
            parked = parked or self.sources[i].state == IS_PARKED
        for i in range(self.source_count):
            source = &self.sources[i]
            if not source.live or source.state != IS_EMPTY:
                continue
            if parked or (waiting and <uint64_t>source.watermark_ns < self.sources[best].next_ns):
                holding += 1
                self.ask(i, now)
        return holding

    def want_all_watermarks(self):
        """Asks every empty live source: the stream's time must move although no packet comes."""
        cdef uint32_t i
        cdef uint64_t now = monotonic_ns()
        for i in range(self.source_count):
            if self.sources[i].live and self.sources[i].state == IS_EMPTY:
                self.ask(i, now)

    cdef void ask(self, uint32_t index, uint64_t now):
        cdef merge_source *source = &self.sources[index]
        cdef Consumer consumer
        if now - source.asked_ns >= self.max_wait_ns / 2:
            source.asked_ns = now
            consumer = self.consumers[index]
            consumer.want_watermark_now()

    def sleeps(self, bint sleeping):
        """True before a sleep; then `has_news` must be looked at once more. False after it."""
        cdef uint32_t i
        for i in range(self.source_count):
            ring_consumer_sleeps(self.sources[i].view, sleeping)

    @property
    def has_news(self):
        """Whether a ring's head, watermark or end moved since the last look."""
        cdef uint32_t i
        cdef merge_source *source
        for i in range(self.source_count):
            source = &self.sources[i]
            if source.state == IS_ENDED:
                continue
            if source.view.header.head != source.view.other:
                return True
            if source.state == IS_EMPTY and (
                    source.view.header.watermark_ns != source.watermark_ns or source.view.header.ended):
                return True
        return False

    def force(self):
        """Rotation must not wait for a source that does not answer: its watermark is taken as moved."""
        self.forced_end = True

    def hold(self):
        """No segment is open: `fill` stops with BOUNDARY at the first record that may go, until `begin_segment`."""
        self.held = True

    def set_max_wait(self, uint64_t max_wait_ms):
        self.max_wait_ns = max_wait_ms * 1000000

    def set_consumed(self, uint32_t index, uint64_t packets):
        """A successor takes up its predecessor's count."""
        self.sources[index].consumed = packets

    def source_totals(self, uint32_t index):
        """(consumed, dropped, late, packets in this segment) of a source."""
        cdef merge_source *source = &self.sources[index]
        return source.consumed, source.dropped, source.late, source.segment_packets

    def source_counters(self, uint32_t index):
        """The source's own cumulative counters, as of its last batch: (received, dropped by the kernel, by a filter in
        user space, by the full ring, published)."""
        return tuple(self.sources[index].counters[i] for i in range(RECORD_COUNTERS_WORDS))

    @property
    def next_ns(self):
        """The time of the oldest waiting record, else the merged watermark; 0 when neither is known."""
        cdef uint32_t best = 0
        if self.pick(&best):
            return self.sources[best].next_ns
        return self.watermark

    @property
    def half_full(self):
        """Whether any ring is: no time for sleeping."""
        return any(
            self.sources[i].view.other - self.sources[i].view.published > self.sources[i].view.capacity / 2
            for i in range(self.source_count)
        )

    @property
    def watermark(self):
        cdef uint64_t lowest = self.merged_watermark()
        return lowest if lowest != UINT64_MAX else self.last_ns
