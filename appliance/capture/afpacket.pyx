# cython: language_level=3, boundscheck=False, wraparound=False, cdivision=True
"""A live interface through the kernel's memory-mapped ring (TPACKET_V3, Documentation/networking/packet_mmap.rst).

One turn (`pump`), without the GIL: for every block that the kernel has handed over, each packet is copied once into
the packet ring as an Enhanced Packet Block, its headers are parsed into the digest ring while they are in the cache,
and the block goes back to the kernel as soon as all of its packets are published.

What must survive our death is in the ring's commit slot: the block and the packet that come next, where the digest
ring ended, and every counter. A successor takes the socket, maps the same kernel ring, and goes on exactly there.
"""
cimport cython
from libc.errno cimport errno
from libc.stdint cimport UINT64_MAX, int64_t, uint8_t, uint16_t, uint32_t, uint64_t
from libc.stdlib cimport calloc, free
from libc.string cimport memcpy, memset, strerror
from posix.mman cimport MAP_FAILED, MAP_SHARED, PROT_READ, PROT_WRITE, mmap, munmap
from posix.time cimport CLOCK_MONOTONIC, CLOCK_REALTIME, clock_gettime, timespec
from posix.unistd cimport read

from appliance.capture.application cimport Inspection, Inspector, inspection_of
from appliance.capture.headers cimport IGNORED_COUNTS, IGNORED_OCTETS, digest_packet
from appliance.capture.kernel_block cimport *
from appliance.capture.kernel_counters cimport kernel_account, kernel_collect, kernel_half, kernel_total
from appliance.capture.plain cimport may_be_left
from appliance.capture.reorder cimport *
from appliance.capture.trigger cimport Gate, PortTap, packet_view
from appliance.ring.digest cimport *
from appliance.ring.layout cimport *
from appliance.ring.plain cimport put_plain
from appliance.ring.prefetch cimport WRITE_AHEAD_BYTES, prefetch, prefetch_for_write, prefetch_lines
from appliance.ring.ring cimport Producer

from appliance.counters import IGNORED_FIELDS, IGNORED_REASONS, KERNEL_ACCOUNT_FIELDS

cdef extern from "poll.h" nogil:
    struct pollfd:
        int fd
        short events
        short revents
    int ppoll(pollfd *fds, unsigned long count, const timespec *timeout, const void *signals)
    enum:
        POLLIN
        POLLERR
        POLLHUP
        POLLNVAL

cdef enum:
    REASON_SHIFT = 8  # ENTRY flags: 1 + index of the reason why it is not metered
    REASONS = 5
    BLOCKS_PER_TURN = 32
    PACKETS_PER_PUBLISH = 1024  # what is published together is still in the cache then
    BLOCKS_AHEAD = 4
    ENTRIES_AHEAD_BYTES = 16384
    KERNEL_AHEAD_BYTES = 3072  # fetched ahead of a packet: another CPU has just written it, and that takes longer
    # A part of the kernel's ring: who does not hear of full blocks has taken no more before, and no more is walked
    # without being published and given back.
    ROOM_FOR_BURSTS = 8
    TIMER_DELAY_MS = 1   # the kernel may hand a block over so much later than it should
    TURN_GRID_NS = 1000000  # what the workers of a turn publish ends at a multiple of this
    HEARTBEAT_NS = 1000000000

# Words of the commit slot, behind COMMIT_WORD_PUBLISHED. From WORD_COUNTERS on they are in the order of
# COMMITTED_FIELDS.
cdef enum:
    WORD_SOCKET = 1  # which opening of the interface; 0: nothing was ever published
    WORD_BLOCK       # the block that holds the first packet that is not published
    WORD_BLOCK_SEQUENCE
    WORD_BLOCK_PACKETS  # packets of it that are published
    WORD_DIGEST_HEAD
    WORD_CLOCK_OFFSET
    WORD_COUNTERS

cdef enum:
    READ_PACKETS = 0
    READ_BYTES
    FOREIGN
    DROPPED_FILTER
    DROPPED_RING
    GATED
    GATE_STATE
    PUBLISHED_PACKETS
    PUBLISHED_BYTES
    REORDERED
    LATE
    TRUNCATED
    CLOCK_STEPS
    LAST_PACKET
    DIGESTS_PUBLISHED
    DIGESTS_DROPPED
    IGNORED  # REASONS of them, then their octets
    COMMITTED = IGNORED + REASONS + 1

COMMITTED_FIELDS = (
    "read_packets", "read_bytes", "foreign_packets", "dropped_filter_packets", "dropped_ring_packets",
    "gated_packets", "gate_state", "published_packets", "published_bytes", "reordered_packets", "late_packets",
    "truncated_packets", "clock_steps", "last_packet_ns", "digests_published", "digests_dropped",
    *IGNORED_FIELDS,
)
assert len(KERNEL_ACCOUNT_FIELDS) * sizeof(uint64_t) == sizeof(kernel_account)
assert len(COMMITTED_FIELDS) == COMMITTED and len(IGNORED_REASONS) == REASONS


cdef uint64_t now_ns(int clock) noexcept nogil:
    cdef timespec t
    clock_gettime(clock, &t)
    return <uint64_t>t.tv_sec * 1000000000 + <uint64_t>t.tv_nsec


cdef inline void sleep_on(pollfd *fds, unsigned long count, uint64_t longest_ns) noexcept nogil:
    cdef timespec longest = timespec(longest_ns // 1000000000, longest_ns % 1000000000)
    ppoll(fds, count, &longest, NULL)


cdef inline uint64_t older_by(uint64_t timestamp_ns, uint64_t difference_ns) noexcept nogil:
    return timestamp_ns - difference_ns if timestamp_ns > difference_ns else 0


cdef inline uint32_t digest_status(uint32_t tp_status, bint outbound) noexcept nogil:
    cdef uint32_t status = DIGEST_OUTGOING if outbound else DIGEST_INCOMING
    if tp_status & TP_STATUS_CSUMNOTREADY:
        status |= DIGEST_CHECKSUM_NOT_READY
    return status


@cython.final
cdef class LiveCapture:
    """See afpacket.pyi."""
    cdef int fd
    cdef uint8_t *blocks
    cdef uint64_t mapped_bytes
    cdef uint64_t block_bytes
    cdef uint32_t block_count
    cdef uint32_t block_index       # next block to walk
    cdef uint32_t oldest_held       # first block that is walked and not given back
    cdef uint32_t held              # number of those
    cdef uint32_t skip              # packets of the next block that a predecessor had published
    cdef uint64_t *start_arrival    # per block: arrivals before its first packet
    cdef uint64_t *end_arrival      # per block: arrivals when it was walked to its end
    cdef uint64_t arrivals          # packets walked
    cdef uint64_t published_arrivals
    cdef Producer records
    cdef Producer digests
    cdef ReorderTail tail
    cdef uint64_t counters[32]
    cdef object counter_page        # keeps the memory of `page`
    cdef uint64_t *page
    cdef uint32_t page_index[32]
    cdef kernel_account *kernel     # in the page
    cdef uint32_t heartbeat_index, received_index, dropped_index, freezes_index, queued_index, unpublished_index
    cdef uint16_t linktype
    cdef bint cooked
    cdef uint32_t interface
    cdef uint32_t snaplen
    cdef int ifindex
    cdef uint64_t reorder_ns
    cdef uint64_t held_ns           # how long a sleep may be while a block is held
    cdef uint64_t turn_ns           # 0: the kernel alone wakes us
    cdef uint64_t turn_lag_ns       # what is older than this at a turn, the kernel has handed over
    cdef bint turns_together        # the next turn is at a multiple of turn_ns
    cdef uint64_t youngest_ns       # nothing younger is published in this turn
    cdef uint64_t step_ns
    cdef int64_t clock_offset       # REALTIME - MONOTONIC of this epoch
    cdef bint owes_watermark        # a consumer asked, and the open kernel block was not empty
    cdef uint64_t socket_serial
    cdef bint inner                 # tunnels are metered by their innermost IP header
    cdef Inspector inspector        # None: payloads are not looked at
    cdef Inspection *inspection
    cdef uint32_t digest_room       # the longest digest
    cdef bint leaves_plain          # the meter makes the digests of plain packets
    cdef uint32_t publish_at        # so long a tail is looked through for what may be published
    cdef bint kernel_is_counted     # since the last block was handed over
    cdef bint owes_wake             # something was published since the consumers were woken
    cdef uint64_t ignored[IGNORED_COUNTS]  # by the parser, of the packet at hand; else zero
    cdef PortTap port               # None: the interface has no port capture
    cdef Gate gate                  # None: everything is recorded
    cdef bint only_records          # neither meter nor gate look at the packets

    def __cinit__(self, int fd, uint64_t block_bytes, uint32_t block_count, Producer records not None,
                  Producer digests, page, *, uint64_t socket_serial, int linktype, bint cooked,
                  uint32_t snaplen, int ifindex, uint64_t reorder_us, uint64_t block_timeout_ms=1,
                  uint64_t turn_ms=0, uint64_t step_ms=50, bint inner=False, Inspector inspector=None,
                  PortTap port=None, Gate gate=None):
        self.fd = fd
        self.socket_serial = socket_serial
        self.block_bytes = block_bytes
        self.block_count = block_count
        self.records = records
        self.digests = digests
        self.linktype = linktype
        self.cooked = cooked
        self.inner = inner
        self.inspector = inspector
        self.inspection = inspection_of(inspector)
        self.digest_room = DIGEST_MAX_BYTES if inspector is None else DIGEST_EXTENDED_MAX_BYTES
        self.leaves_plain = linktype == LINKTYPE_ETHERNET and inspector is None
        self.snaplen = snaplen
        self.ifindex = ifindex
        self.reorder_ns = reorder_us * 1000
        self.publish_at = PACKETS_PER_PUBLISH
        self.held_ns = max(reorder_us // 1000 + 1, block_timeout_ms) * 1000000
        self.turn_ns = turn_ms * 1000000
        self.turn_lag_ns = (block_timeout_ms + TIMER_DELAY_MS) * 1000000 + self.reorder_ns
        self.youngest_ns = UINT64_MAX
        self.step_ns = step_ms * 1000000
        self.tail = ReorderTail()
        self.counter_page = page
        self.page = <uint64_t *><uint64_t>page.address
        for i, name in enumerate(COMMITTED_FIELDS):
            self.page_index[i] = page.index(name)
        self.heartbeat_index = page.index("heartbeat_ns")
        self.received_index = page.index("received_packets")
        self.dropped_index = page.index("dropped_kernel_packets")
        self.freezes_index = page.index("kernel_freezes")
        self.queued_index = page.index("kernel_queued_packets")
        self.unpublished_index = page.index("unpublished_packets")
        self.kernel = <kernel_account *>&self.page[<uint32_t>page.index(KERNEL_ACCOUNT_FIELDS[0])]
        self.store_kernel_counters(kernel_total(self.kernel))  # a predecessor may have died before it did
        self.start_arrival = <uint64_t *>calloc(block_count, sizeof(uint64_t))
        self.end_arrival = <uint64_t *>calloc(block_count, sizeof(uint64_t))
        if self.start_arrival == NULL or self.end_arrival == NULL:
            raise MemoryError
        self.gate = gate
        self.only_records = digests is None and gate is None
        self.port = port
        if port is not None:
            port.attach(socket_serial, linktype)
        if gate is not None:
            self.counters[GATE_STATE] = gate.state
        self.map_kernel_ring()
        self.resume()
        if gate is not None:
            gate.state = <uint32_t>self.counters[GATE_STATE]

    def map_kernel_ring(self):
        self.mapped_bytes = self.block_bytes * self.block_count
        self.blocks = <uint8_t *>mmap(NULL, self.mapped_bytes, PROT_READ | PROT_WRITE, MAP_SHARED, self.fd, 0)
        if self.blocks == <uint8_t *>MAP_FAILED:
            self.mapped_bytes = 0
            raise OSError(errno, "the kernel's packet ring cannot be mapped: " + strerror(errno).decode())

    def __dealloc__(self):
        if self.mapped_bytes:
            munmap(self.blocks, self.mapped_bytes)
        free(self.start_arrival)
        free(self.end_arrival)

    # ---- where a predecessor stopped ----

    def resume(self):
        """Takes up what was committed with the ring's head: counters, digests, block and packet."""
        cdef uint64_t *words = self.records.words
        self.clock_offset = <int64_t>(now_ns(CLOCK_REALTIME) - now_ns(CLOCK_MONOTONIC))
        if words[WORD_SOCKET] == 0:
            return
        self.clock_offset = <int64_t>words[WORD_CLOCK_OFFSET]
        memcpy(self.counters, &words[WORD_COUNTERS], COMMITTED * sizeof(uint64_t))
        self.store_counters()
        if self.digests is not None:
            self.resume_digests(words[WORD_DIGEST_HEAD])
        if words[WORD_SOCKET] == self.socket_serial:
            self.resume_blocks(<uint32_t>words[WORD_BLOCK], words[WORD_BLOCK_SEQUENCE],
                               <uint32_t>words[WORD_BLOCK_PACKETS])

    cdef void resume_digests(self, uint64_t committed_head) noexcept:
        """The packets were published and their digests not yet: the bytes are there, only the head is missing."""
        cdef uint64_t rewound = ring_rewound(self.digests.view.header, committed_head)
        cdef uint64_t start = max(rewound, self.digests.view.published)
        if 0 < committed_head - start <= self.digests.view.capacity:
            self.digests.view.rewound = rewound
            self.digests.view.position = committed_head
            ring_publish(&self.digests.view, committed_head, self.digests.view.header.watermark_ns,
                         &self.counters[DIGESTS_PUBLISHED], 1)

    cdef void resume_blocks(self, uint32_t block, uint64_t sequence, uint32_t packets) noexcept:
        """Blocks before `sequence` are published in full; of that one, the first `packets` are. The kernel numbers its
        blocks upwards, and hands them over in that order."""
        cdef uint32_t i
        cdef uint32_t newest = 0
        cdef bint found = False
        cdef uint64_t number, oldest_number = 0
        for i in range(self.block_count):
            number = self.block(i).hdr.bh1.seq_num
            if number > self.block(newest).hdr.bh1.seq_num:
                newest = i
            if LOAD_STATUS(self.block(i)) & TP_STATUS_USER == 0:
                continue
            if number < sequence:
                GIVE_BACK(self.block(i))
            elif not found or number < oldest_number:
                found = True
                oldest_number = number
                self.block_index = i
        if not found:
            self.block_index = newest  # the one that the kernel fills
        if self.block(self.block_index).hdr.bh1.seq_num == sequence:
            self.skip = packets
        self.oldest_held = self.block_index

    cdef inline tpacket_block_desc *block(self, uint32_t index) noexcept nogil:
        return <tpacket_block_desc *>(self.blocks + index * self.block_bytes)

    # ---- a turn ----

    def pump(self):
        """Takes what the kernel has, publishes what is in order. Returns the packets walked in this turn."""
        cdef uint64_t walked
        with nogil:
            walked = self.turn()
        return walked

    def serve(self, int wake_fd, int channel_fd, uint64_t limit_ms):
        """Turns and sleeps, with a heartbeat each. See afpacket.pyi."""
        cdef bint called
        with nogil:
            called = self.serve_until(wake_fd, channel_fd, now_ns(CLOCK_MONOTONIC) + limit_ms * 1000000)
        return called

    cdef bint serve_until(self, int wake_fd, int channel_fd, uint64_t until_ns) noexcept nogil:
        cdef bint called = False
        cdef uint64_t now
        while not called:
            now = now_ns(CLOCK_MONOTONIC)
            self.page[self.heartbeat_index] = now
            if now >= until_ns:
                return False
            self.fetch_ahead()
            self.turn()
            if self.turns_together:
                called = self.sleep_until_turn(channel_fd, until_ns - now)
            else:
                called = self.sleep_until_woken(channel_fd, wake_fd, until_ns - now)
        return True

    cdef bint sleep_until_turn(self, int channel_fd, uint64_t longest_ns) noexcept nogil:
        """Hears the supervisor alone. Whatever the others want, they get at the turn of all."""
        cdef pollfd channel = pollfd(channel_fd, POLLIN, 0)
        sleep_on(&channel, 1, min(self.turn_ns - now_ns(CLOCK_MONOTONIC) % self.turn_ns, longest_ns))
        return channel.revents != 0

    cdef bint sleep_until_woken(self, int channel_fd, int wake_fd, uint64_t longest_ns) noexcept nogil:
        cdef pollfd[3] fds
        cdef uint64_t woken
        fds[0] = pollfd(channel_fd, POLLIN, 0)
        fds[1] = pollfd(wake_fd, POLLIN, 0)
        # The kernel calls the socket readable as long as we hold a block, so then time alone ends a sleep.
        fds[2] = pollfd(self.fd, 0 if self.held else POLLIN, 0)
        self.announce_sleep(RING_SLEEPS)
        sleep_on(fds, 3, 0 if self.ready() else min(self.longest_sleep_ns(), longest_ns))
        self.announce_sleep(RING_AWAKE)
        if fds[1].revents:
            read(wake_fd, &woken, sizeof(woken))
        return fds[0].revents != 0 or fds[2].revents & (POLLERR | POLLHUP | POLLNVAL) != 0

    cdef void fetch_ahead(self) noexcept nogil:
        """After a sleep, nothing that a turn looks at is near, not even the addresses of its pages. All are asked for
        at once here, so that they come together instead of one after the other."""
        cdef uint32_t i
        cdef const uint8_t *block
        for i in range(BLOCKS_AHEAD):
            block = <uint8_t *>self.block((self.block_index + i) % self.block_count)
            prefetch_lines(block)
            prefetch_lines(block + 2 * CACHE_LINE_BYTES)
            prefetch(block + PAGE_BYTES)
            prefetch(block + 2 * PAGE_BYTES)
        for i in range(ENTRIES_AHEAD_BYTES // PAGE_BYTES):
            prefetch_for_write(<uint8_t *>&self.tail.entries[self.tail.count] + i * PAGE_BYTES)
        prefetch(&self.end_arrival[self.block_index])
        prefetch_for_write(&self.start_arrival[self.block_index])
        prefetch_for_write(&self.page[self.page_index[0]])
        prefetch_for_write(&self.page[self.page_index[COMMITTED - 1]])
        prefetch_for_write(self.kernel)
        ring_fetch_ahead(&self.records.view)
        if self.digests is not None:
            ring_fetch_ahead(&self.digests.view)

    cdef void announce_sleep(self, uint32_t how) noexcept nogil:
        ring_producer_sleeps(&self.records.view, how)
        if self.digests is not None:
            ring_producer_sleeps(&self.digests.view, how)

    cdef bint ready(self) noexcept nogil:
        """A block can be walked, or a consumer waits for a watermark: no reason to sleep."""
        return (
            LOAD_STATUS(self.block(self.block_index)) & TP_STATUS_USER != 0
            or self.records.view.header.watermark_wanted != 0
            or (self.digests is not None and self.digests.view.header.watermark_wanted != 0)
        )

    cdef uint64_t longest_sleep_ns(self) noexcept nogil:
        """Short while a tail waits for its time. A watermark that is owed comes with the block that the kernel fills:
        it hands that over in time, and wakes us."""
        return self.held_ns if self.held or self.tail.count or self.owes_watermark else HEARTBEAT_NS

    cdef uint64_t turn(self) noexcept nogil:
        cdef uint64_t before = self.arrivals
        # The clock is read before the kernel's ring is looked at: whatever comes later is younger than `now`.
        cdef uint64_t now = now_ns(CLOCK_REALTIME)
        cdef int64_t offset = <int64_t>(now - now_ns(CLOCK_MONOTONIC))
        cdef bint stepped = self.differs(offset)
        cdef uint32_t taken
        if self.port is not None:
            self.port.look(now)
        if self.watermark_is_wanted():
            self.owes_watermark = True
        self.youngest_ns = UINT64_MAX if stepped else self.youngest_of_turn(now)
        ring_rewind(&self.records.view)
        if self.digests is not None:
            ring_rewind(&self.digests.view)
        taken = self.walk_blocks(stepped, now, offset)
        if self.kernel_is_empty():
            if stepped and self.differs(offset):
                self.begin_epoch(offset)
            self.publish(older_by(now, self.reorder_ns))
            self.owes_watermark = False
            if self.port is not None:
                self.port.kernel_was_empty()
        elif self.tail.count and self.tail.newest_ns <= older_by(now, self.reorder_ns):
            self.publish(self.tail.newest_ns)
        if taken == 0:
            self.collect_kernel_counters()
        else:
            self.owes_watermark = False  # it has moved
        self.turns_together = self.turn_ns and 0 < taken <= self.block_count // ROOM_FOR_BURSTS
        self.measure_queue()
        return self.arrivals - before

    cdef uint32_t walk_blocks(self, bint stepped, uint64_t now, int64_t offset) noexcept nogil:
        """Returns how many. Small ones are published together: each publication has its price, and one record of
        counters costs the merge as much as a packet."""
        cdef uint32_t taken = 0
        cdef uint64_t told = self.arrivals
        cdef bint is_told = True
        while taken < BLOCKS_PER_TURN and self.has_block():
            self.walk(self.block(self.block_index), stepped, now, offset)
            taken += 1
            is_told = self.arrivals - told >= PACKETS_PER_PUBLISH or self.held > self.block_count // ROOM_FOR_BURSTS
            if is_told:
                self.publish_walked()
                told = self.arrivals
        if not is_told:
            self.publish_walked()
        return taken

    cdef bint has_block(self) noexcept nogil:
        """The kernel has handed over the next block."""
        if self.held == self.block_count:
            self.publish(UINT64_MAX)  # its whole ring is in the tail: the next block is one that must go back first
        return LOAD_STATUS(self.block(self.block_index)) & TP_STATUS_USER != 0

    cdef uint64_t youngest_of_turn(self, uint64_t now) noexcept nogil:
        """Workers that turn together publish up to one and the same time. So the merge can take all of it, and each
        finds its ring empty, to be rewound, at its next turn. Each reads the two clocks a moment apart, and that is
        never as long as in another worker: the grid makes their results equal."""
        cdef uint64_t youngest
        if not self.turns_together:
            return UINT64_MAX
        youngest = older_by(now, now_ns(CLOCK_MONOTONIC) % self.turn_ns + self.turn_lag_ns)
        return youngest - youngest % TURN_GRID_NS

    cdef bint watermark_is_wanted(self) noexcept nogil:
        cdef bint wanted = ring_watermark_wanted(&self.records.view) != 0
        if self.digests is not None and ring_watermark_wanted(&self.digests.view):
            wanted = True
        return wanted

    cdef void measure_queue(self) noexcept nogil:
        """What the kernel holds and we have not walked, by its own numbers."""
        cdef uint64_t queued = 0
        cdef uint32_t _
        cdef uint32_t index = self.block_index
        for _ in range(self.block_count - self.held):
            queued += LOAD_PACKETS(self.block(index))
            if LOAD_STATUS(self.block(index)) & TP_STATUS_USER == 0:
                break  # the one that the kernel fills: behind it are only old ones
            index = (index + 1) % self.block_count
        self.page[self.queued_index] = queued - self.skip if queued > self.skip else 0
        self.page[self.unpublished_index] = self.arrivals - self.published_arrivals

    def finish(self):
        """Publishes the whole tail: before the socket is given up, and at the end of a drain."""
        with nogil:
            self.publish(UINT64_MAX)
            self.collect_kernel_counters()
            self.add_counters_record()  # with all that was counted now: the last file's own account
            self.publish(UINT64_MAX)
            self.measure_queue()

    @property
    def turn_ms(self):
        return self.turn_ns // 1000000

    @turn_ms.setter
    def turn_ms(self, uint64_t turn_ms):
        self.turn_ns = turn_ms * 1000000
        self.turns_together = False  # what we publish next is not bound to the old turn's time

    @property
    def is_drained(self):
        """Nothing waits in the kernel's ring, nothing is unpublished."""
        return self.kernel_is_empty() and self.tail.count == 0

    cdef bint differs(self, int64_t offset) noexcept nogil:
        cdef int64_t change = offset - self.clock_offset
        return change > <int64_t>self.step_ns or -change > <int64_t>self.step_ns

    cdef bint kernel_is_empty(self) noexcept nogil:
        """Nothing waits, neither in a block that is ours nor in the one that the kernel fills. Only if this was so
        after the clock was read may the watermark follow the clock."""
        cdef tpacket_block_desc *at = self.block(self.block_index)
        return LOAD_STATUS(at) & TP_STATUS_USER == 0 and LOAD_PACKETS(at) == 0

    cdef void walk(self, tpacket_block_desc *block, bint stepped, uint64_t now, int64_t offset) noexcept nogil:
        cdef uint32_t packets = block.hdr.bh1.num_pkts
        cdef uint64_t at = block.hdr.bh1.offset_to_first_pkt
        cdef uint32_t i = 0
        cdef uint32_t run
        cdef tpacket3_hdr *packet
        self.kernel_is_counted = False
        self.start_arrival[self.block_index] = self.arrivals
        self.end_arrival[self.block_index] = UINT64_MAX  # held, and not to be given back before its end is known
        self.held += 1
        while i < packets and at + sizeof(tpacket3_hdr) <= self.block_bytes:
            run = 0 if stepped or i < self.skip else self.take_what_is_simple(block, &at, packets - i)
            i += run
            if run == 0:
                packet = <tpacket3_hdr *>(<uint8_t *>block + at)
                if i < self.skip:
                    self.arrivals += 1  # a predecessor published it
                    self.published_arrivals += 1
                else:
                    if stepped and self.differs(offset) and self.is_of_new_epoch(packet, now, offset):
                        self.begin_epoch(offset)
                    self.take(packet)
                at += packet.tp_next_offset
                i += 1
            if self.tail.count >= self.publish_at:
                self.publish_quietly(older_by(self.tail.newest_ns, self.reorder_ns))
        if self.port is not None and self.port.is_on:
            self.show_port(block)
        self.skip = 0
        self.end_arrival[self.block_index] = self.arrivals
        self.block_index = (self.block_index + 1) % self.block_count

    cdef bint is_of_new_epoch(self, tpacket3_hdr *packet, uint64_t now, int64_t offset) noexcept nogil:
        """Stamped by the new clock or by the old one: whichever reading it is nearer to."""
        cdef int64_t stamp = <int64_t>packet_stamp_ns(packet)
        cdef int64_t old_now = <int64_t>now - (offset - self.clock_offset)
        cdef int64_t to_new = stamp - <int64_t>now
        cdef int64_t to_old = stamp - old_now
        return (to_new if to_new > 0 else -to_new) < (to_old if to_old > 0 else -to_old)

    cdef void begin_epoch(self, int64_t offset) noexcept nogil:
        """The clock was set. Everything stamped by the old clock is published, then the mark, then the new order."""
        self.publish(UINT64_MAX)
        self.tail.forget_time()
        self.clock_offset = offset
        self.counters[CLOCK_STEPS] += 1
        self.mark_epoch(self.records, offset, True)
        if self.digests is not None:
            self.mark_epoch(self.digests, offset, False)

    cdef void mark_epoch(self, Producer ring, int64_t offset, bint commit) noexcept nogil:
        cdef uint32_t length = RECORD_PREFIX_BYTES + 8 + 4
        cdef uint8_t *room = ring_reserve(&ring.view, length)
        if room == NULL:
            return  # the ring is full: the merge sees the jump as lateness, which is counted
        record_set_prefix(room, RECORD_EPOCH, length, self.interface, 0)
        memcpy(room + RECORD_PREFIX_BYTES, &offset, 8)
        ring_advance(&ring.view, length)
        if commit:
            self.fill_words(self.digests.view.position if self.digests is not None else 0)
            ring_publish(&ring.view, ring.view.position, 0, ring.words, WORD_COUNTERS + COMMITTED)
        else:
            ring_publish(&ring.view, ring.view.position, 0, &self.counters[DIGESTS_PUBLISHED], 1)
        ring.wake()

    # ---- a packet ----

    cdef inline uint32_t take_run(self, const tpacket_block_desc *block, uint64_t *at, uint32_t most,
                                  bint metered) noexcept nogil:
        """What `take` does, for the packets from `at` on that nothing is to be decided about: they are recorded as they
        are, in order, there is room, and the meter makes their digests. Returns how many those are; `at` is behind them
        then. `metered`: whether there is a meter, said at compile time.

        All that it reads and counts can stay in registers: a store of a packet's octets could change any member, for
        all that the compiler knows.
        """
        cdef ring_view records = self.records.view
        cdef ring_view digests
        cdef tail_entry *first = &self.tail.entries[self.tail.count]
        cdef tail_entry *entry = first
        cdef const tail_entry *end = first + min(most, self.publish_at - self.tail.count)
        cdef uint64_t newest_ns = max(self.tail.newest_ns, self.tail.published_ns)
        cdef uint64_t last_offset = self.block_bytes - sizeof(tpacket3_hdr)
        cdef uint64_t offset = at[0]
        cdef uint64_t stamp
        cdef uint32_t length, digest_bytes
        cdef tpacket3_hdr *packet
        cdef uint8_t *room
        if metered:
            digests = self.digests.view
        while entry < end and offset <= last_offset:
            packet = <tpacket3_hdr *>(<uint8_t *>block + offset)
            prefetch_lines(<uint8_t *>packet + KERNEL_AHEAD_BYTES)
            stamp = packet_stamp_ns(packet)
            if stamp < newest_ns or not goes_as_it_is(packet, self.ifindex, self.snaplen):
                break
            length = packet_record_bytes(packet.tp_snaplen, False)
            room = ring_reserve(&records, length)
            if room == NULL:
                break
            digest_bytes = self.leave_digest(&digests, packet, stamp) if metered else 0
            if metered and digest_bytes == 0:
                break
            put_packet_record(room, packet, packet.tp_snaplen, 0, False, self.interface, stamp)
            ring_advance(&records, length)
            entry[0] = tail_entry(stamp, length, packet.tp_snaplen, packet.tp_len, <uint16_t>digest_bytes, 0)
            newest_ns = stamp
            offset += packet.tp_next_offset
            entry += 1
        if entry > first:
            self.records.view = records
            if metered:
                self.digests.view = digests
            self.arrivals += entry - first
            self.tail.count += entry - first
            self.tail.newest_ns = newest_ns
            at[0] = offset
        return entry - first

    cdef inline uint32_t leave_digest(self, ring_view *digests, tpacket3_hdr *packet, uint64_t stamp) noexcept nogil:
        """The headers of a plain packet, for the meter. 0: it is none, or there is no room."""
        cdef const uint8_t *data = packet_data(packet)
        cdef uint8_t *room
        if not may_be_left(data, packet.tp_snaplen, self.inner):
            return 0
        room = ring_reserve(digests, self.digest_room)
        if room == NULL:
            return 0
        prefetch_for_write(room + WRITE_AHEAD_BYTES)
        put_plain(data, packet.tp_snaplen, packet.tp_len, self.interface, stamp,
                  digest_status(packet.tp_status, False), room)
        ring_advance(digests, PLAIN_DIGEST_BYTES)
        return PLAIN_DIGEST_BYTES

    cdef uint32_t take_what_is_simple(self, const tpacket_block_desc *block, uint64_t *at,
                                      uint32_t most) noexcept nogil:
        """A run, if packets can be taken in runs at all."""
        if self.gate is not None or self.cooked or self.publish_at > self.tail.capacity:
            return 0
        if self.digests is None:
            return self.take_run(block, at, most, False)
        return self.take_run(block, at, most, True) if self.leaves_plain else 0

    cdef inline void take(self, tpacket3_hdr *packet) noexcept nogil:
        cdef sockaddr_ll *link = packet_link(packet)
        cdef uint64_t stamp = packet_stamp_ns(packet)
        cdef bint outbound = link.sll_pkttype == PACKET_OUTGOING
        cdef uint32_t inserted
        cdef uint8_t *room
        cdef tail_entry *entry = tail_add(self.tail, stamp)
        if entry == NULL:
            self.publish(UINT64_MAX)
            entry = tail_add(self.tail, stamp)
        self.arrivals += 1
        if link.sll_ifindex != self.ifindex:
            entry.flags |= ENTRY_FOREIGN
            return
        inserted = inserted_bytes(packet, self.cooked, self.linktype)
        entry.original_length = packet.tp_len + inserted
        entry.captured_length = min(packet.tp_snaplen + inserted, self.snaplen)
        room = self.copy(packet, inserted, outbound, entry)
        if self.only_records or self.digest_and_gate(packet, room, inserted, outbound, entry):
            ring_advance(&self.records.view, entry.record_bytes)

    cdef inline uint8_t *copy(self, tpacket3_hdr *packet, uint32_t inserted, bint outbound,
                              tail_entry *entry) noexcept nogil:
        """The packet's record, not advanced over yet. NULL: the ring is full."""
        cdef uint32_t length = packet_record_bytes(entry.captured_length, outbound)
        cdef uint8_t *room = ring_reserve(&self.records.view, length)
        if room == NULL:
            entry.flags |= ENTRY_RING_DROPPED
            return NULL
        put_packet_record(room, packet, entry.captured_length, inserted, outbound, self.interface, entry.timestamp_ns)
        entry.record_bytes = length
        return room

    cdef bint digest_and_gate(self, tpacket3_hdr *packet, uint8_t *room, uint32_t inserted, bint outbound,
                              tail_entry *entry) noexcept nogil:
        """What looks into the packet. `room`: its record; NULL: our ring is full. The meter, whose ring is not, counts
        it all the same, from the kernel's own bytes. Returns whether the record stays."""
        cdef const uint8_t *data = packet_data(packet)
        if inserted and room != NULL:
            data = room + RECORD_PACKET_DATA
        if self.digests is not None and inserted and room == NULL:
            entry.flags |= ENTRY_DIGEST_DROPPED
        elif self.digests is not None:
            self.digest_at(data, packet.tp_status, outbound, entry)
        if room == NULL or self.gate is None:
            return room != NULL
        return self.may_pass(room + RECORD_PACKET_DATA, packet, entry, outbound)

    cdef void digest_at(self, const uint8_t *data, uint32_t status, bint outbound, tail_entry *entry) noexcept nogil:
        cdef uint32_t captured = entry.captured_length
        cdef uint32_t original = entry.original_length
        cdef uint64_t stamp = entry.timestamp_ns
        cdef uint32_t length, i
        cdef uint8_t *room = ring_reserve(&self.digests.view, self.digest_room)
        if room == NULL:
            entry.flags |= ENTRY_DIGEST_DROPPED
            return
        prefetch_for_write(room + WRITE_AHEAD_BYTES)
        if self.leaves_plain and may_be_left(data, captured, self.inner):
            put_plain(data, captured, original, self.interface, stamp, digest_status(status, outbound), room)
            length = PLAIN_DIGEST_BYTES
        else:
            length = digest_packet(data, captured, original, self.linktype, self.interface, stamp,
                                   digest_status(status, outbound), self.inner, self.inspection, room, self.ignored)
        if length == 0:
            for i in range(<uint32_t>REASONS):
                if self.ignored[i]:
                    entry.flags |= (i + 1) << REASON_SHIFT
            memset(self.ignored, 0, sizeof(self.ignored))
            return
        entry.digest_bytes = length
        ring_advance(&self.digests.view, length)

    # ---- port capture ----

    cdef void show_port(self, tpacket_block_desc *block) noexcept nogil:
        """A walked block once more, packet by packet, to the port's triggers. Only while a capture is on."""
        cdef uint64_t at = block.hdr.bh1.offset_to_first_pkt
        cdef uint32_t shown = self.port.begin_block(block.hdr.bh1.seq_num)
        cdef uint32_t i
        cdef tpacket3_hdr *packet
        for i in range(block.hdr.bh1.num_pkts):
            if at + sizeof(tpacket3_hdr) > self.block_bytes:
                break
            packet = <tpacket3_hdr *>(<uint8_t *>block + at)
            if i >= shown and packet_link(packet).sll_ifindex == self.ifindex:
                self.show_packet(packet)
            at += packet.tp_next_offset

    cdef bint may_pass(self, const uint8_t *data, tpacket3_hdr *packet, tail_entry *entry,
                       bint outbound) noexcept nogil:
        """False: the gate is closed to it. It was metered, and is not recorded: its bytes are overwritten."""
        cdef packet_view view
        cdef uint32_t before = self.gate.state
        cdef bint passes
        view.data = data
        view.captured_length = entry.captured_length
        view.original_length = entry.original_length
        view.timestamp_ns = entry.timestamp_ns
        view.checksum_not_ready = packet.tp_status & TP_STATUS_CSUMNOTREADY != 0
        view.outgoing = outbound
        passes = self.gate.passes(&view)
        if self.gate.state != before:
            entry.flags |= ENTRY_GATE_MOVED
        if passes:
            return True
        entry.record_bytes = 0
        entry.flags |= ENTRY_GATED
        return False

    cdef void show_packet(self, tpacket3_hdr *packet) noexcept nogil:
        """As `copy` would write it: with its tag or cooked header, cut to the snaplen."""
        cdef packet_view view
        cdef uint32_t inserted = inserted_bytes(packet, self.cooked, self.linktype)
        view.data = packet_data(packet)
        view.captured_length = min(packet.tp_snaplen + inserted, self.snaplen)
        view.original_length = packet.tp_len + inserted
        view.timestamp_ns = packet_stamp_ns(packet)
        view.checksum_not_ready = packet.tp_status & TP_STATUS_CSUMNOTREADY != 0
        view.outgoing = packet_link(packet).sll_pkttype == PACKET_OUTGOING
        if inserted:
            copy_inserting(self.port.scratch, packet, view.captured_length, inserted)
            view.data = self.port.scratch
        self.port.offer(&view)

    # ---- publishing ----

    cdef void publish_walked(self) noexcept nogil:
        """What was walked, with the counters behind it, and the consumers are woken."""
        if not self.kernel_is_counted:
            self.collect_kernel_counters()
        self.add_counters_record()
        self.publish(older_by(self.tail.newest_ns, self.reorder_ns))

    cdef void publish(self, uint64_t boundary_ns) noexcept nogil:
        """Everything up to `boundary_ns` becomes visible, as far as a clean cut allows, and is promised."""
        self.publish_quietly(boundary_ns)
        if self.owes_wake:
            self.owes_wake = False
            self.records.wake()
            if self.digests is not None:
                self.digests.wake()

    cdef void publish_quietly(self, uint64_t boundary_ns) noexcept nogil:
        """The same, and the consumers are woken with the next `publish`: once for a block."""
        cdef uint64_t watermark
        cdef uint32_t cut
        if boundary_ns != UINT64_MAX:
            boundary_ns = min(boundary_ns, self.youngest_ns)
        watermark = boundary_ns
        cut = self.tail.cut(boundary_ns, &watermark)
        if boundary_ns == UINT64_MAX:
            watermark = older_by(self.tail.newest_ns, self.reorder_ns)
        if cut == 0:
            self.promise(watermark)
        else:
            self.publish_entries(cut, watermark)
            self.owes_wake = True
        self.publish_at = self.tail.count + PACKETS_PER_PUBLISH
        self.give_back_blocks()  # also when nothing was published now: a predecessor may have published all of one

    cdef void publish_entries(self, uint32_t cut, uint64_t watermark) noexcept nogil:
        """The first `cut` of the tail, with the promise that goes with them."""
        cdef uint64_t record_bytes = 0, digest_bytes = 0
        cdef uint64_t digest_head = 0
        if not self.kernel_is_counted:
            self.collect_kernel_counters()  # first: never more is published than was received
        self.tail.sort(cut, &self.records.view, &self.digests.view if self.digests is not None else NULL)
        self.count(cut, &record_bytes, &digest_bytes)
        if self.digests is not None:
            digest_head = self.digests.view.published + digest_bytes
        if <int64_t>watermark < self.records.view.header.watermark_ns:
            watermark = self.records.view.header.watermark_ns
        self.fill_words(digest_head)
        ring_publish(&self.records.view, self.records.view.published + record_bytes, watermark,
                     self.records.words, WORD_COUNTERS + COMMITTED)
        if self.digests is not None:
            ring_publish(&self.digests.view, digest_head, watermark, &self.counters[DIGESTS_PUBLISHED], 1)
        self.tail.drop(cut)
        self.store_counters()

    cdef void promise(self, uint64_t watermark) noexcept nogil:
        if <int64_t>watermark <= self.records.view.header.watermark_ns:
            return
        ring_promise(&self.records.view, watermark)
        if self.digests is not None:
            ring_promise(&self.digests.view, watermark)
        if self.owes_watermark:
            self.records.wake()
            if self.digests is not None:
                self.digests.wake()

    cdef void count(self, uint32_t cut, uint64_t *record_bytes, uint64_t *digest_bytes) noexcept nogil:
        """Adds the first `cut` entries, which are in order, to the counters: what is counted here is what is published
        with them. The sums take all for packets that are published whole, which is mostly so; what is not is taken off
        where it is met."""
        cdef const tail_entry *entry = self.tail.entries
        cdef const tail_entry *end = entry + cut
        cdef uint64_t in_records = 0, in_digests = 0, digests = 0, original_bytes = 0, captured_bytes = 0
        while entry < end:
            in_records += entry.record_bytes
            in_digests += entry.digest_bytes
            digests += entry.digest_bytes != 0
            original_bytes += entry.original_length
            captured_bytes += entry.captured_length
            if entry.flags or entry.captured_length != entry.original_length:
                self.count_exception(entry)
            entry += 1
        record_bytes[0] = in_records
        digest_bytes[0] = in_digests
        self.published_arrivals += cut
        self.counters[READ_PACKETS] += cut
        self.counters[READ_BYTES] += original_bytes
        self.counters[PUBLISHED_PACKETS] += cut
        self.counters[PUBLISHED_BYTES] += captured_bytes
        self.counters[DIGESTS_PUBLISHED] += digests
        self.counters[LAST_PACKET] = max(self.counters[LAST_PACKET], self.tail.entries[cut - 1].timestamp_ns)
        self.counters[REORDERED] += self.tail.reordered
        self.tail.reordered = 0

    cdef inline void count_exception(self, const tail_entry *entry) noexcept nogil:
        if entry.flags & ENTRY_CONTROL:
            self.published_arrivals -= 1
            self.counters[READ_PACKETS] -= 1
            self.counters[PUBLISHED_PACKETS] -= 1
        elif entry.record_bytes == 0:
            self.counters[PUBLISHED_PACKETS] -= 1
            self.counters[PUBLISHED_BYTES] -= entry.captured_length
        elif entry.captured_length < entry.original_length:
            self.counters[TRUNCATED] += 1
        if entry.flags:
            self.count_flags(entry.flags, entry.original_length)

    cdef void count_flags(self, uint32_t flags, uint32_t original_length) noexcept nogil:
        cdef uint32_t reason = flags >> REASON_SHIFT
        if flags & ENTRY_FOREIGN:
            self.counters[FOREIGN] += 1
        if flags & ENTRY_RING_DROPPED:
            self.counters[DROPPED_RING] += 1
        if flags & ENTRY_GATED:
            self.counters[GATED] += 1
        if flags & ENTRY_GATE_MOVED:
            self.counters[GATE_STATE] = self.gate.next_state(<uint32_t>self.counters[GATE_STATE])
        if flags & ENTRY_DIGEST_DROPPED:
            self.counters[DIGESTS_DROPPED] += 1
        if flags & ENTRY_LATE:
            self.counters[LATE] += 1
        if 0 < reason <= REASONS:
            self.counters[IGNORED + reason - 1] += 1
            self.counters[IGNORED + IGNORED_OCTETS] += original_length

    cdef void fill_words(self, uint64_t digest_head) noexcept nogil:
        """The first block that is not published to its end, and how far into it we are."""
        cdef uint64_t *words = self.records.words
        cdef uint32_t block = self.oldest_held
        cdef uint32_t left = self.held
        while left > 1 and self.end_arrival[block] <= self.published_arrivals:
            block = (block + 1) % self.block_count
            left -= 1
        words[COMMIT_WORD_PUBLISHED] = self.counters[PUBLISHED_PACKETS]
        words[WORD_SOCKET] = self.socket_serial
        words[WORD_BLOCK] = block
        words[WORD_BLOCK_SEQUENCE] = self.block(block).hdr.bh1.seq_num
        words[WORD_BLOCK_PACKETS] = self.published_arrivals - self.start_arrival[block] if left else 0
        words[WORD_DIGEST_HEAD] = digest_head
        words[WORD_CLOCK_OFFSET] = <uint64_t>self.clock_offset
        memcpy(&words[WORD_COUNTERS], self.counters, COMMITTED * sizeof(uint64_t))

    cdef void give_back_blocks(self) noexcept nogil:
        while self.held and self.end_arrival[self.oldest_held] <= self.published_arrivals:
            GIVE_BACK(self.block(self.oldest_held))
            self.oldest_held = (self.oldest_held + 1) % self.block_count
            self.held -= 1

    # ---- counters ----

    cdef void store_counters(self) noexcept nogil:
        cdef int i
        for i in range(COMMITTED):
            self.page[self.page_index[i]] = self.counters[i]

    cdef void collect_kernel_counters(self) noexcept nogil:
        self.store_kernel_counters(kernel_collect(self.kernel, self.fd))
        self.kernel_is_counted = True

    cdef void store_kernel_counters(self, kernel_half total) noexcept nogil:
        self.page[self.received_index] = total.received
        self.page[self.dropped_index] = total.dropped
        self.page[self.freezes_index] = total.freezes

    cdef void add_counters_record(self) noexcept nogil:
        """The cumulative counters travel with the packets, so that each file can state its own losses."""
        cdef uint64_t words[RECORD_COUNTERS_WORDS]
        cdef tail_entry *entry
        cdef uint8_t *room = ring_reserve(&self.records.view, RECORD_COUNTERS_BYTES)
        if room == NULL:
            return
        entry = tail_add(self.tail, self.tail.newest_ns)
        if entry == NULL:
            return
        words[0] = self.page[self.received_index]
        words[1] = self.page[self.dropped_index]
        words[2] = self.counters[DROPPED_FILTER] + self.counters[GATED]
        words[3] = self.counters[DROPPED_RING]
        words[4] = self.counters[PUBLISHED_PACKETS]
        memcpy(room + RECORD_PREFIX_BYTES, words, sizeof(words))
        record_set_prefix(room, RECORD_COUNTERS, RECORD_COUNTERS_BYTES, self.interface, self.tail.newest_ns)
        entry.flags = ENTRY_CONTROL
        entry.record_bytes = RECORD_COUNTERS_BYTES
        ring_advance(&self.records.view, RECORD_COUNTERS_BYTES)
