# cython: language_level=3, boundscheck=False, wraparound=False, cdivision=True
"""The two ends of a ring. The inline functions of ring.h do the work; here they get memory and a Python face."""
from libc.errno cimport errno
from libc.stdint cimport int64_t, uint8_t, uint32_t, uint64_t
from libc.string cimport memcpy, strerror
from posix.mman cimport MAP_ANONYMOUS, MAP_FAILED, MAP_FIXED, MAP_PRIVATE, MAP_SHARED, PROT_NONE, PROT_READ, PROT_WRITE
from posix.mman cimport mmap, munmap
from posix.unistd cimport write

from appliance.ring.layout cimport *

import os


def initialise(int fd, uint64_t capacity, uint64_t generation):
    """Writes the header of a new, zeroed ring. Done once, by the creator, before anybody else maps it."""
    cdef ring_header header
    os.pwrite(fd, b"\0" * sizeof(ring_header), 0)
    header.magic = RING_MAGIC
    header.version = RING_VERSION
    header.header_bytes = RING_HEADER_BYTES
    header.capacity = capacity
    header.generation = generation
    os.pwrite(fd, (<uint8_t *>&header)[:32], 0)


cdef void signal_eventfd(int fd) noexcept nogil:
    cdef uint64_t one = 1
    if fd >= 0:
        write(fd, &one, sizeof(one))  # EAGAIN: the counter is full, so the other side has a wake to read already


cdef class Mapping:
    """A ring's memory in this process: header, then the data twice in a row."""

    def __cinit__(self, int fd, uint64_t expected_generation):
        cdef uint64_t file_bytes = os.fstat(fd).st_size
        cdef uint8_t *base
        if file_bytes < RING_HEADER_BYTES + 65536:
            raise ValueError("a ring's memory is too small to be one")
        self.capacity = file_bytes - RING_HEADER_BYTES
        if self.capacity & (self.capacity - 1):
            raise ValueError("a ring's capacity is not a power of two")
        self.mapped_bytes = RING_HEADER_BYTES + 2 * self.capacity
        base = <uint8_t *>mmap(NULL, self.mapped_bytes, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0)
        if base == <uint8_t *>MAP_FAILED:
            self.mapped_bytes = 0
            raise OSError(errno, "ring: address space cannot be had: " + strerror(errno).decode())
        self.header = <ring_header *>base
        if (
            mmap(base, file_bytes, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_FIXED, fd, 0) == MAP_FAILED
            or mmap(base + file_bytes, self.capacity, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_FIXED, fd,
                    RING_HEADER_BYTES) == MAP_FAILED
        ):
            raise OSError(errno, "ring: its memory cannot be mapped: " + strerror(errno).decode())
        self.data = base + RING_HEADER_BYTES
        if (
            self.header.magic != RING_MAGIC or self.header.version != RING_VERSION
            or self.header.capacity != self.capacity or self.header.generation != expected_generation
        ):
            raise ValueError("a ring's header does not match: another version, another run, or not a ring")

    def __dealloc__(self):
        if self.mapped_bytes:
            munmap(self.header, self.mapped_bytes)

    @property
    def head(self):
        return self.header.head

    @property
    def tail(self):
        return self.header.tail

    @property
    def used_bytes(self):
        cdef uint64_t tail = self.header.tail
        cdef uint64_t head = self.header.head
        tail = max(tail, ring_rewound(self.header, head))
        return min(head - tail, self.capacity) if head >= tail else 0

    @property
    def watermark_ns(self):
        return self.header.watermark_ns

    @property
    def ended(self):
        return self.header.ended != 0

    def published_packets(self):
        """Packets published, ever, as committed with the head; 0 before the first."""
        cdef int slot
        cdef uint64_t head
        while True:  # the producer may be publishing: take a slot and a head that belong together
            head = self.header.head
            slot = ring_commit_slot(self.header, head)
            if slot >= 0:
                return self.header.commit[slot].words[COMMIT_WORD_PUBLISHED]
            if head == 0:
                return 0

    def occupancy(self):
        """(packets or digests published ever, those between tail and head): read while the consumer rests."""
        cdef uint64_t published, head, at
        cdef uint64_t waiting = 0
        cdef uint32_t length
        cdef uint8_t *record
        while True:
            head = self.header.head
            published = self.published_packets()
            if self.header.head == head:
                break
        at = max(self.header.tail, ring_rewound(self.header, head))
        while at < head and head - at <= self.capacity:
            record = self.data + (at & (self.capacity - 1))
            length = record_check(record, head - at)
            if length == 0:
                break
            if record_u32(record) in (RECORD_PACKET, RECORD_DIGEST):  # a ring has one kind of them
                waiting += 1
            at += length
        return published, waiting


cdef class Producer:
    """The writing end. Maps the ring and takes up its published head; see ring.pyi."""

    def __cinit__(self, int fd, uint64_t generation, int consumer_eventfd=-1):
        cdef const ring_commit *commit
        self.mapping = Mapping(fd, generation)
        self.view.header = self.mapping.header
        self.view.data = self.mapping.data
        self.view.capacity = self.mapping.capacity
        self.wake_fd = consumer_eventfd
        commit = ring_resume_producer(&self.view)
        self.resumed = commit != NULL
        self.word_count = RING_COMMIT_WORDS
        if commit != NULL:
            memcpy(self.words, commit.words, sizeof(self.words))

    cdef void wake(self) noexcept nogil:
        if ring_wake_consumer(&self.view):
            signal_eventfd(self.wake_fd)

    def push(self, const uint8_t[::1] record not None):
        cdef uint64_t length = record.shape[0]
        cdef uint8_t *room
        if length == 0:
            return True
        room = ring_reserve(&self.view, length)
        if room == NULL:
            return False
        memcpy(room, &record[0], length)
        ring_advance(&self.view, length)
        return True

    def reserve(self, uint64_t length):
        return <uint64_t>ring_reserve(&self.view, length)

    def advance(self, uint64_t length):
        if length > self.view.capacity - (self.view.position - self.view.other):
            raise ValueError("more bytes than were reserved")
        ring_advance(&self.view, length)

    def publish(self, int64_t watermark_ns):
        ring_publish(&self.view, self.view.position, watermark_ns, self.words, self.word_count)
        self.wake()

    def rewind(self):
        ring_rewind(&self.view)

    def promise(self, int64_t watermark_ns):
        ring_promise(&self.view, watermark_ns)
        self.wake()

    def end(self):
        ring_end(&self.view)
        self.wake()

    def watermark_wanted(self):
        return bool(ring_watermark_wanted(&self.view))

    def sleeps(self, bint sleeping, *, bint for_room=False):
        cdef uint32_t how = RING_SLEEPS_FOR_ROOM if for_room else RING_SLEEPS
        ring_producer_sleeps(&self.view, how if sleeping else RING_AWAKE)

    @property
    def free_bytes(self):
        return ring_free_bytes(&self.view)

    @property
    def unpublished_bytes(self):
        return self.view.position - self.view.published

    @property
    def commit_words(self):
        return [self.words[i] for i in range(self.word_count)]

    def set_commit_word(self, uint32_t index, uint64_t value):
        if index >= RING_COMMIT_WORDS:
            raise IndexError(index)
        self.words[index] = value


cdef class Consumer:
    """The reading end. Takes up the tail that was last released; see ring.pyi."""

    def __cinit__(self, int fd, uint64_t generation, int producer_eventfd=-1):
        self.mapping = Mapping(fd, generation)
        self.view.header = self.mapping.header
        self.view.data = self.mapping.data
        self.view.capacity = self.mapping.capacity
        self.wake_fd = producer_eventfd
        self.watermark_ns = 0
        ring_resume_consumer(&self.view)

    cdef int look(self) noexcept nogil:
        cdef uint32_t ended = 0
        if ring_look(&self.view, &self.watermark_ns, &ended) != RING_OK:
            self.corrupt = True
            return RING_CORRUPT
        self.ended = ended != 0
        return RING_OK

    def refresh(self):
        if self.look() != RING_OK:
            raise ValueError("ring: the producer's position is impossible")
        return self.view.other - self.view.position

    def pop(self):
        cdef uint64_t available = self.view.other - self.view.position
        cdef uint32_t length
        cdef const uint8_t *record
        if available == 0 and self.refresh() == 0:
            return None
        available = self.view.other - self.view.position
        record = ring_at(&self.view, self.view.position)
        length = record_check(record, available)
        if length == 0:
            self.corrupt = True
            raise ValueError("ring: a record is corrupt")
        result = <bytes>record[:length]
        self.view.position += length
        return result

    def release(self):
        if ring_release(&self.view, self.view.position):
            signal_eventfd(self.wake_fd)

    def skip_to_head(self):
        """Gives up everything that is published: the way on after a corrupt record. Returns the bytes given up."""
        cdef uint64_t lost
        cdef uint64_t head = self.view.header.head
        if head - self.view.position > self.view.capacity:
            head = self.view.position
        lost = head - self.view.position
        self.view.position = head
        self.view.other = head
        self.corrupt = False
        self.release()
        return lost

    def want_watermark(self):
        if ring_want_watermark(&self.view):
            signal_eventfd(self.wake_fd)

    def sleeps(self, bint sleeping, *, bint resting=False):
        ring_consumer_sleeps(&self.view, (RING_RESTS if resting else RING_SLEEPS) if sleeping else RING_AWAKE)

    @property
    def unread_bytes(self):
        return self.view.other - self.view.position
