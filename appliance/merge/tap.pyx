# cython: language_level=3, boundscheck=False, wraparound=False, cdivision=True
"""The packets of an output into one more ring, in the output's order, for who may miss some: a full ring never waits.

A packet's record has its link type where other rings have the interface's number, so that it needs nothing beside it:
neither ring nor consumer has to remember what interfaces there were.
"""
cimport cython
from libc.stdint cimport int64_t, uint8_t, uint32_t, uint64_t
from libc.string cimport memcpy

from appliance.ring.layout cimport (
    COMMIT_WORD_PUBLISHED, RECORD_EPOCH, RECORD_PACKET, RECORD_PREFIX_BYTES, record_set_prefix, record_set_u32,
    ring_advance, ring_promise, ring_publish, ring_reserve,
)
from appliance.ring.ring cimport Producer

cdef enum:
    COMMIT_WORD_DROPPED = 1
    EPOCH_BYTES = RECORD_PREFIX_BYTES + 12


@cython.final
cdef class Tap:
    """See tap.pyi."""

    def __cinit__(self, int fd, uint64_t generation, int consumer_eventfd, page not None):
        cdef uint64_t address = page.address
        self.producer = Producer(fd, generation, consumer_eventfd)
        self.page = page
        self.packets_slot = <uint64_t *>address + <uint64_t>page.index("tapped_packets")
        self.dropped_slot = <uint64_t *>address + <uint64_t>page.index("tap_dropped_packets")
        self.changed = True  # a predecessor may have published more than it told its page

    cdef void put(self, const uint8_t *record, uint32_t length, uint32_t captured, uint32_t linktype) noexcept nogil:
        """Type, lengths and link type are written, not copied: they are what was checked."""
        cdef uint64_t *words = self.producer.words
        cdef uint8_t *room = NULL
        self.changed = True
        if not self.epoch_due or self.put_epoch():
            room = ring_reserve(&self.producer.view, length)
        if room == NULL:
            words[COMMIT_WORD_DROPPED] += 1
            return
        memcpy(room, record, length)
        record_set_u32(room, RECORD_PACKET)
        record_set_u32(room + 4, length)
        record_set_u32(room + 8, linktype)
        record_set_u32(room + 20, captured)
        record_set_u32(room + length - 4, length)
        ring_advance(&self.producer.view, length)
        words[COMMIT_WORD_PUBLISHED] += 1

    cdef bint put_epoch(self) noexcept nogil:
        """False: no room; until there is, no packet may go either, for it would be of the wrong time."""
        cdef uint8_t *room = ring_reserve(&self.producer.view, EPOCH_BYTES)
        if room == NULL:
            return False
        record_set_prefix(room, RECORD_EPOCH, EPOCH_BYTES, 0, 0)
        memcpy(room + RECORD_PREFIX_BYTES, &self.epoch_offset, 8)
        ring_advance(&self.producer.view, EPOCH_BYTES)
        self.epoch_due = False
        return True

    cdef void next_epoch(self, int64_t offset_ns) noexcept nogil:
        """The clock was set: what follows is of another time."""
        self.epoch_offset = offset_ns
        self.epoch_due = True

    cdef void publish(self, int64_t watermark_ns) noexcept nogil:
        """Once a batch. The counts go with the ring's head, so that no death parts them."""
        if self.changed:
            self.changed = False
            ring_publish(&self.producer.view, self.producer.view.position, watermark_ns, self.producer.words,
                         self.producer.word_count)
            self.packets_slot[0] = self.producer.words[COMMIT_WORD_PUBLISHED]
            self.dropped_slot[0] = self.producer.words[COMMIT_WORD_DROPPED]
            self.producer.wake()
        elif watermark_ns != self.promised_ns:
            ring_promise(&self.producer.view, watermark_ns)  # the consumer looks by itself, about twice a second
        self.promised_ns = watermark_ns

    def end(self):
        self.publish(self.promised_ns)
        self.producer.end()
