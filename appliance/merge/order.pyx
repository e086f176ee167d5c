# cython: language_level=3, boundscheck=False, wraparound=False, cdivision=True
"""Many rings into one stream in the order of time. Used for packets (merge worker) and for digests (meter worker).

The rule: a record may go when no source can still bring an older one. A source that has a record waiting bounds the
others by that record; an empty live source bounds them by its watermark; an empty file source stops everything until it
has more. What waits longer than `max_wait` since it arrived here goes nevertheless, with everything older, and so does
the oldest record while a ring is more than half full; what then comes too late is still emitted, and counted.

Order is (epoch, timestamp): a source that reports a step of the clock is parked until all have reported it, or have had
`max_wait` to do so.

The rings' memory is hostile: positions are checked when they are loaded (ring.h), a record's length is loaded once, and
what a check allowed is what is written, whatever the producer makes of its record meanwhile.
"""
cimport cython
from libc.stdint cimport UINT32_MAX, UINT64_MAX, int64_t, uint8_t, uint16_t, uint32_t, uint64_t
from libc.stdlib cimport calloc, free, realloc
from libc.string cimport memcpy
from posix.time cimport CLOCK_MONOTONIC, clock_gettime, timespec

from appliance.merge.copying cimport *
from appliance.merge.direct cimport DIRECT_PAGE_BYTES
from appliance.merge.fronts cimport *
from appliance.merge.lending cimport allocate_room, forget_pipe, free_room, next_region, region_of
from appliance.merge.tap cimport Tap
from appliance.ring.layout cimport *
from appliance.ring.ring cimport Consumer, signal_eventfd

IDLE, FULL, BOUNDARY, LIMIT, CONTROL, EPOCH, ENDED = range(7)
SINK_PCAPNG, SINK_PCAP_NS, SINK_PCAP_US, SINK_DIGESTS, SINK_ERF, SINK_RECORDS = range(6)

cdef enum:
    COMMIT_TRIES = 1000  # a producer that publishes all the time may hide its commit from us that often
    SHORTEST_STANDSTILL_NS = 2000000  # a sleep of a ms may take that long

# Not in an enum: a constant beyond INT_MAX makes all constants of its enum unsigned, with some compilers.
cdef int64_t SAME_EPOCH_NS = 25000000


cdef uint32_t *with_room(uint32_t *numbers, uint32_t *count, uint32_t index) except NULL:
    """The array, with room for `index`; new places are UNMAPPED."""
    cdef uint32_t *larger
    cdef uint32_t i
    if index >= 1 << 20:
        raise ValueError(f"interface number {index} is too large")
    if index < count[0]:
        return numbers
    larger = <uint32_t *>realloc(numbers, (index + 1) * sizeof(uint32_t))
    if larger == NULL:
        raise MemoryError
    for i in range(count[0], index + 1):
        larger[i] = UNMAPPED
    count[0] = index + 1
    return larger


cdef uint64_t monotonic_ns() noexcept nogil:
    cdef timespec t
    clock_gettime(CLOCK_MONOTONIC, &t)
    return <uint64_t>t.tv_sec * 1000000000 + <uint64_t>t.tv_nsec


@cython.final
cdef class Merge:
    """See order.pyi."""

    def __cinit__(self, consumers, live, *, int sink, uint64_t max_wait_ms, uint64_t out_bytes,
                  uint64_t start_grace_ms=0, bint lends=False):
        cdef uint32_t i
        cdef Consumer consumer
        self.consumers = list(consumers)
        self.source_count = len(self.consumers)
        self.sink = sink
        self.max_wait_ns = max_wait_ms * 1000000
        self.out_capacity = out_bytes
        self.begun_ns = self.looked_ns = monotonic_ns()
        self.start_grace_ns = start_grace_ms * 1000000
        self.boundary_ns = self.packets_left = self.bytes_left = self.horizon_ns = UINT64_MAX
        self.sources = <merge_source *>calloc(max(1, self.source_count), sizeof(merge_source))
        self.cursors = <cursor *>calloc(max(1, self.source_count), sizeof(cursor))
        if (not allocate_fronts(&self.fronts, self.source_count) or not allocate_room(&self.room, out_bytes, lends)
                or self.sources == NULL or self.cursors == NULL):
            raise MemoryError
        self.out = region_of(&self.room)
        for i in range(self.source_count):
            consumer = self.consumers[i]
            self.sources[i].view = &consumer.view
            self.sources[i].wake_fd = consumer.wake_fd
            self.sources[i].live = live[i]

    def __dealloc__(self):
        cdef uint32_t i
        if self.sources != NULL:
            for i in range(self.source_count):
                free(self.sources[i].interface_map)
                free(self.sources[i].tap_linktypes)
        free(self.sources)
        free(self.cursors)
        free_fronts(&self.fronts)
        free_room(&self.room)

    # ---- the stream ----

    def fill(self):
        """Moves records into the output buffer until something is to be done; returns what (see order.pyi)."""
        cdef int status
        with nogil:
            self.refresh_all()
            status = self.run()
        return status

    cdef uint64_t clock_ns(self) noexcept nogil:
        return monotonic_ns() + <uint64_t>self.clock_offset_ns

    cdef uint64_t now_ns(self) noexcept nogil:
        """The clock of the holding times. A time in which nothing was done here counts as max_wait / 4 at most:
        where we could not run, neither could the sources' workers, perhaps, and none of them was silent. While records
        are held, looks at this clock are that far apart at most, but for a rest that was meant to be longer. A host
        takes a CPU away between any two of them."""
        cdef uint64_t now = monotonic_ns()
        cdef uint64_t counted_ns = max(self.max_wait_ns / 4, SHORTEST_STANDSTILL_NS)
        if now - self.looked_ns > self.rest_ns + counted_ns:
            self.stood_still_ns += now - self.looked_ns - counted_ns
        self.looked_ns = now
        self.rest_ns = 0
        return now - self.stood_still_ns + <uint64_t>self.clock_offset_ns

    cdef void refresh_all(self) noexcept nogil:
        """Notes what arrived everywhere, so that holding times and fill levels are right."""
        cdef uint32_t i
        cdef uint64_t now = self.now_ns()
        self.crowded = False
        for i in range(self.source_count):
            if self.sources[i].state != IS_ENDED:
                self.refresh(&self.sources[i], now)
                if self.waiting_bytes(&self.sources[i]) > self.sources[i].view.capacity / 4:
                    self.crowded = True

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
        cdef uint32_t best = 0
        cdef int status
        cdef uint64_t limit_ns = 0, limit_position = 0
        while True:
            status = self.look()
            if status != S_IDLE:
                return status
            if self.parked and self.epoch_is_due():
                return S_EPOCH
            if not self.pick(&best):
                return self.nothing_to_pick()
            if not self.bound(best, &limit_ns, &limit_position):
                return S_BOUNDARY if self.is_over() else S_IDLE
            if self.held:
                return S_BOUNDARY
            if self.sources[best].next_ns <= self.promised_ns:
                self.collect_fronts()
                limit_ns = self.promised_ns
                limit_position = UINT64_MAX
            else:
                self.only_front(best)
            status = self.copy_fronts(limit_ns, limit_position)
            if status != S_IDLE:
                return status

    cdef int look(self) noexcept nogil:
        """What every source has now. Handles the records that are for us; stops at those that Python handles."""
        cdef uint32_t i
        cdef int state
        cdef merge_source *source
        self.parked = 0
        for i in range(self.source_count):
            source = &self.sources[i]
            if source.state == IS_ENDED:
                continue
            if source.view.position == source.view.other:
                if self.refresh(source, self.now_ns()) and source.view.position == source.view.other:
                    source.state = IS_ENDED
                    continue
            state = self.classify(i)
            if state == IS_CONTROL:
                self.control_source = i
                return S_CONTROL
            if state == IS_PARKED:
                self.parked += 1
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
            if is_wanted(self.sink, type, length):
                source.next_ns = record_timestamp_ns(record)
                source.state = HAS_RECORD
                return source.state
            if note_counters(source, record, length):
                pass
            elif type == RECORD_EPOCH and length >= RECORD_PREFIX_BYTES + 12:
                memcpy(&source.epoch_offset, record + RECORD_PREFIX_BYTES, 8)
                if not self.epoch_known or not self.same_epoch(source.epoch_offset):
                    source.state = IS_PARKED
                    return source.state
            elif type == RECORD_INTERFACE:
                self.control_length = length
                source.state = IS_CONTROL
                return source.state
            elif type == RECORD_PACKET and self.sink != TO_DIGESTS:
                source.consumed += 1  # too short for a packet, but its producer counted it as one
                source.dropped += 1
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
        cdef bint empty = False
        for i in range(self.source_count):
            if self.sources[i].state == IS_EMPTY:
                empty = True
        if self.parked:
            return S_IDLE
        if not empty or self.final:
            return S_ENDED
        return S_BOUNDARY if self.is_over() else S_IDLE

    cdef bint epoch_is_due(self) noexcept nogil:
        """Whether every source has reported the clock's step, or has had max_wait to do so since the first report."""
        cdef uint32_t i
        cdef merge_source *source
        cdef uint64_t since = UINT64_MAX
        cdef bint others = False
        for i in range(self.source_count):
            source = &self.sources[i]
            if source.state == IS_PARKED:
                if self.arrival_ns(source) < since:
                    since = self.arrival_ns(source)
                if self.is_half_full(source):
                    return True
            elif source.state == HAS_RECORD or (source.state == IS_EMPTY and not self.final):
                others = True
        if not others:
            return True
        if since > self.now_ns() or self.now_ns() - since < self.max_wait_ns:
            return False
        for i in range(self.source_count):
            source = &self.sources[i]
            if source.state == HAS_RECORD and self.arrival_ns(source) <= since + self.max_wait_ns:
                return False  # still of the time in which it could report
        return True

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
                elif self.promise(other) < promises:
                    promises = self.promise(other)
        if self.final:
            promises = UINT64_MAX
        self.promised_ns = promises
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
        """Whether the oldest record, of `source`, goes although an older one may come: because a record waits too long,
        itself or one behind it, or because a ring is more than half full. Files wait as long as it takes."""
        cdef uint32_t i
        cdef merge_source *other
        for i in range(self.source_count):
            if self.sources[i].state == IS_EMPTY and not self.sources[i].live:
                return False
        if self.is_beginning():
            return self.one_of_a_full_ring(source, limit_position)
        if self.is_overdue(source):
            limit_position[0] = source.marks[source.first_mark].position
            return True
        for i in range(self.source_count):
            other = &self.sources[i]
            if other.state == HAS_RECORD and self.is_overdue(other):
                return True  # the run ends at the overdue record's time
        return self.one_of_a_full_ring(source, limit_position)

    cdef bint is_beginning(self) noexcept nogil:
        """Whether some live source has not come to its first promise yet: its worker is only starting, while the kernel
        collects its packets already. Those of the others wait for it, for a while."""
        cdef uint32_t i
        for i in range(self.source_count):
            if self.sources[i].state == IS_EMPTY and self.sources[i].watermark_ns == 0:
                return self.now_ns() - self.begun_ns < self.start_grace_ns
        return False

    cdef bint one_of_a_full_ring(self, merge_source *source, uint64_t *limit_position) noexcept nogil:
        cdef uint32_t i
        for i in range(self.source_count):
            if self.is_half_full(&self.sources[i]):
                limit_position[0] = source.view.position + 1  # one record, then look again
                return True
        return False

    cdef bint is_half_full(self, merge_source *source) noexcept nogil:
        """By what waits in it: what is read already is given back before anybody sleeps."""
        return self.waiting_bytes(source) > source.view.capacity / 2

    cdef uint64_t waiting_bytes(self, merge_source *source) noexcept nogil:
        return source.view.other - source.view.position

    cdef uint64_t promise(self, merge_source *source) noexcept nogil:
        if source.watermark_ns < 0:
            return 0
        return min(<uint64_t>source.watermark_ns, self.horizon_ns)

    cdef bint is_overdue(self, merge_source *source) noexcept nogil:
        cdef uint64_t arrived = self.arrival_ns(source)
        cdef uint64_t now = self.now_ns()
        return arrived <= now and now - arrived >= self.max_wait_ns

    cdef uint64_t arrival_ns(self, merge_source *source) noexcept nogil:
        """When the oldest unread record arrived here, never later than it did; UINT64_MAX: there is none."""
        self.forget_marks(source)
        return source.marks[source.first_mark].arrived_ns if source.mark_count else UINT64_MAX

    cdef void forget_marks(self, merge_source *source) noexcept nogil:
        """Those of records that are read."""
        while source.mark_count and source.marks[source.first_mark].position <= source.view.position:
            source.first_mark = (source.first_mark + 1) % MARKS
            source.mark_count -= 1

    cdef void note_arrival(self, merge_source *source, uint64_t now) noexcept nogil:
        cdef mark *newest
        self.forget_marks(source)
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
                if self.promise(source) < lowest:
                    lowest = self.promise(source)
        return lowest

    cdef void give_up(self, merge_source *source) noexcept nogil:
        """A damaged ring: everything published in it is lost, and counted by the packets that its producer counted."""
        cdef int slot = -1
        cdef int tries = 0
        cdef uint64_t head = 0
        cdef uint64_t published
        while slot < 0 and tries < COMMIT_TRIES:  # it may be publishing: head and commit must belong together
            head = source.view.header.head
            slot = ring_commit_slot(source.view.header, head)
            tries += 1
        if slot >= 0:
            published = source.view.header.commit[slot].words[COMMIT_WORD_PUBLISHED]
            if published > source.consumed:
                source.dropped += published - source.consumed
                source.consumed = published
        source.view.position = head
        source.view.other = head
        source.mark_count = 0

    # ---- copying ----

    cdef void collect_fronts(self) noexcept nogil:
        cdef uint32_t i
        cdef uint32_t count = 0
        for i in range(self.source_count):
            count += self.sources[i].state == HAS_RECORD
        begin_fronts(&self.fronts, count)
        for i in range(self.source_count):
            if self.sources[i].state == HAS_RECORD:
                self.cursors[add_front(&self.fronts, self.sources[i].next_ns)].source = i
        settle_fronts(&self.fronts)

    cdef void only_front(self, uint32_t source) noexcept nogil:
        begin_fronts(&self.fronts, 1)
        self.cursors[add_front(&self.fronts, self.sources[source].next_ns)].source = source

    cdef int copy_fronts(self, uint64_t limit_ns, uint64_t limit_position) noexcept nogil:
        """What their sources have, up to a time and a position in the ring, in order, run by run, without a look at the
        rings: until one of them has to be looked at."""
        cdef copying now
        cdef const front *first
        cdef cursor *at
        cdef uint32_t last = UINT32_MAX
        cdef uint64_t after_one
        cdef bint may_run = False
        cdef int status = S_IDLE
        begin_copying(&now, self)
        begin_cursors(&now, self, limit_position)
        while True:
            first = first_front(&self.fronts)
            if first.next_ns > limit_ns:
                break
            # Where many take turns, a record is often a run of its own: the end of a source's run is looked for only if
            # the run before had more than one, or this source was the first already.
            may_run = may_run or first.leaf == last
            last = first.leaf
            at = &self.cursors[last]
            after_one = at.left - at.length
            status = copy_run(&now, self, at, first_until(&self.fronts, limit_ns) if may_run else first.next_ns)
            may_run = at.left < after_one
            if status != S_IDLE:
                break
            if at.length:
                move_first(&self.fronts, at.next_ns)
            elif at.left == 0 and self.sources[at.source].live and not self.final:
                limit_ns = min(limit_ns, self.promise(&self.sources[at.source]))  # the others may go on so far
                move_first(&self.fronts, UINT64_MAX)
            else:
                break
        end_cursors(self)
        end_copying(&now, self)
        return status

    cdef void feed_tap(self, merge_source *source, const uint8_t *record, uint32_t length, uint32_t interface,
                       uint32_t captured) noexcept nogil:
        if interface < source.tap_count and source.tap_linktypes[interface] != UNMAPPED:
            self.tap.put(record, length, captured, source.tap_linktypes[interface])

    cdef void publish_tap(self) noexcept nogil:
        if self.has_tap:
            self.tap.publish(<int64_t>self.watermark_or_last())

    cdef void note_late(self, merge_source *source, uint64_t late_ns) noexcept nogil:
        source.late += 1
        self.late += 1
        self.batch_late += 1
        self.late_max_ns = max(self.late_max_ns, late_ns)
        self.batch_late_max_ns = max(self.batch_late_max_ns, late_ns)

    # ---- what Python does between the calls ----

    def output(self):
        """The bytes to write, as a memoryview that is valid until `emptied`."""
        return (<uint8_t[:self.out_bytes]>self.out) if self.out_bytes else memoryview(b"")

    @property
    def output_address(self):
        return <uint64_t>self.out

    def emptied(self):
        self.forget_batch()

    cdef void forget_batch(self) noexcept nogil:
        """The output was taken: there is room for the next."""
        next_region(&self.room)
        self.out = region_of(&self.room)
        self.out_bytes = 0
        self.out_packets = 0
        self.batch_first_ns = self.batch_last_ns = self.batch_late = self.batch_late_max_ns = 0

    def shorten_batches(self, uint64_t out_bytes):
        self.out_capacity = min(self.out_capacity, out_bytes)

    def release(self):
        self.give_back()

    cdef void begin_batch_at(self, uint64_t offset) noexcept nogil:
        """The next batch lies so many octets behind the begin of a page."""
        self.out = region_of(&self.room) + offset % DIRECT_PAGE_BYTES

    cdef void give_back(self) noexcept nogil:
        """Gives everything consumed back to the producers. Before the write, not after: at most once."""
        cdef uint32_t i
        cdef merge_source *source
        for i in range(self.source_count):
            source = &self.sources[i]
            if source.view.position != source.view.published and ring_release(source.view, source.view.position):
                signal_eventfd(source.wake_fd)

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
        source.interface_map = with_room(source.interface_map, &source.interface_count, local)
        source.interface_map[local] = interface

    def use_tap(self, Tap tap not None):
        """What is emitted from interfaces that `tap_interface` names goes there too."""
        self.tap = tap
        self.has_tap = True

    def tap_interface(self, uint32_t index, uint32_t local, uint16_t linktype):
        cdef merge_source *source = &self.sources[index]
        source.tap_linktypes = with_room(source.tap_linktypes, &source.tap_count, local)
        source.tap_linktypes[local] = linktype

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
                    if self.has_tap:
                        self.tap.next_epoch(self.epoch_offset)
                if self.same_epoch(self.sources[i].epoch_offset):
                    self.sources[i].state = IS_EMPTY
        self.last_ns = 0

    def begin_segment(self, uint64_t boundary_ns, uint64_t packets, uint64_t length):
        """Limits of the next segment. What is in the output buffer already goes into it."""
        forget_pipe(&self.room)
        self.held = self.forced_end = False
        self.boundary_ns = boundary_ns
        self.packets_left = packets - self.out_packets if packets > self.out_packets else 0
        self.bytes_left = length - self.out_bytes if length > self.out_bytes else 0
        self.segment_packets = self.out_packets

    def want_watermarks(self):
        return self.ask_who_holds()

    cdef uint32_t ask_who_holds(self) noexcept nogil:
        """Asks the empty live sources that hold others up, each at most once per half of max_wait.

        Returns how many sources hold records up.
        """
        cdef uint32_t i, best = 0
        cdef uint64_t now = self.clock_ns()
        cdef uint32_t holding = 0
        cdef merge_source *source
        cdef bint waiting = self.pick(&best)
        for i in range(self.source_count):
            source = &self.sources[i]
            if not source.live or source.state != IS_EMPTY:
                continue
            if self.parked or (waiting and self.promise(source) < self.sources[best].next_ns):
                holding += 1
                self.ask(i, now)
        return holding

    @property
    def hold_ms(self):
        cdef int64_t left_ms = self.hold_left_ms()
        return None if left_ms < 0 else left_ms

    cdef int64_t hold_left_ms(self) noexcept nogil:
        """Milliseconds until max_wait is over for the first record that waits; -1: none waits for that."""
        cdef uint32_t i
        cdef uint64_t arrived, waited
        cdef uint64_t first = UINT64_MAX
        cdef uint64_t now = self.now_ns()
        for i in range(self.source_count):
            if self.sources[i].state == IS_EMPTY and not self.sources[i].live:
                return -1
            if self.sources[i].state == HAS_RECORD or self.sources[i].state == IS_PARKED:
                arrived = self.arrival_ns(&self.sources[i])
                if arrived < first:
                    first = arrived
        if first == UINT64_MAX:
            return -1
        waited = now - first if now > first else 0
        return <int64_t>((self.max_wait_ns - waited + 999999) // 1000000) if waited < self.max_wait_ns else 0

    def want_all_watermarks(self):
        self.ask_all()

    cdef void ask_all(self) noexcept nogil:
        """Asks every empty live source: the stream's time must move although no packet comes."""
        cdef uint32_t i
        cdef uint64_t now = self.clock_ns()
        for i in range(self.source_count):
            if self.sources[i].live and self.sources[i].state == IS_EMPTY:
                self.ask(i, now)

    cdef void ask(self, uint32_t index, uint64_t now) noexcept nogil:
        cdef merge_source *source = &self.sources[index]
        if now - source.asked_ns >= self.max_wait_ns / 2:
            source.asked_ns = now
            if ring_want_watermark(source.view):
                signal_eventfd(source.wake_fd)

    def sleeps(self, bint sleeping, *, bint resting=False):
        self.announce_sleep((RING_RESTS if resting else RING_SLEEPS) if sleeping else RING_AWAKE)

    cdef void announce_sleep(self, uint32_t how) noexcept nogil:
        """RING_SLEEPS before a sleep; then `moved` must be looked at once more. RING_RESTS before a rest. RING_AWAKE
        after both."""
        cdef uint32_t i
        for i in range(self.source_count):
            ring_consumer_sleeps(self.sources[i].view, how)

    @property
    def has_news(self):
        return self.moved()

    cdef bint moved(self) noexcept nogil:
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

    def finish(self):
        """Nobody is waited for any longer: what is in the rings goes, in order; then `fill` returns ENDED."""
        self.final = True

    def resume(self, uint32_t index, uint64_t consumed, uint64_t dropped, uint64_t late):
        """A successor goes on where its predecessor's counts of a source ended."""
        cdef merge_source *source = &self.sources[index]
        source.consumed = consumed
        source.dropped = dropped
        source.late = late

    def source_totals(self, uint32_t index):
        """(consumed, dropped, late) of a source, ever."""
        cdef merge_source *source = &self.sources[index]
        return source.consumed, source.dropped, source.late

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
    def watermark(self):
        return self.watermark_or_last()

    cdef uint64_t watermark_or_last(self) noexcept nogil:
        cdef uint64_t lowest = self.merged_watermark()
        return lowest if lowest != UINT64_MAX else self.last_ns
