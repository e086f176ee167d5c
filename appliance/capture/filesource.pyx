# cython: language_level=3, boundscheck=False, wraparound=False, cdivision=True
"""A capture file into a packet ring and a digest ring: decoded in place, digested while it is hot, then published."""
from libc.stdint cimport uint8_t, uint32_t, uint64_t
from libc.string cimport memcpy, memmove, memset

from appliance.capture.application cimport Inspection, Inspector, inspection_of
from appliance.capture.headers cimport IGNORED_COUNTS, DigestBatch, LinkTypes, digest_records
from appliance.ring.layout cimport *
from appliance.ring.ring cimport Producer

from appliance.capture import bpf
from appliance.capture.replay import FileSource
from appliance.counters import IGNORED_FIELDS
from appliance.errors import InputOutputError

cdef enum:
    BATCH_BYTES = 262144  # stays in the cache between decoding and digesting
    WAIT_MS = 1000


cdef class FileCapture:
    """See filesource.pyi."""
    cdef Producer records
    cdef Producer digests
    cdef object source
    cdef object page
    cdef object interface
    cdef uint64_t batch_bytes       # decoded at the ring's write position, not digested to the end
    cdef uint64_t digested_bytes
    cdef uint64_t needed_room
    cdef uint64_t skip              # packets that a predecessor published
    cdef uint64_t ignored[IGNORED_COUNTS]
    cdef LinkTypes linktypes
    cdef bint inner
    cdef Inspector inspector        # None: payloads are not looked at
    cdef bint source_ended
    cdef uint64_t wait_ms
    cdef readonly bint ended

    def __cinit__(self, interface, Producer records not None, Producer digests, page, *, bint inner=False,
                  Inspector inspector=None):
        self.records = records
        self.digests = digests
        self.page = page
        self.interface = interface
        self.inner = inner
        self.inspector = inspector
        self.linktypes = LinkTypes()
        self.source = FileSource(
            interface.uri,
            speed=1.0 if interface.speed == "recorded" else 0.0,
            snaplen=interface.snaplen,
            packet_filter=LateFilter(self, interface.filter) if interface.filter else None,
        )
        self.needed_room = BATCH_BYTES
        self.skip = records.words[COMMIT_WORD_PUBLISHED] if records.resumed else 0
        page["interface_up"] = 1

    def step(self):
        """One batch further, as far as there is room. Returns 0, or for how many ms there may be nothing to do."""
        if self.batch_bytes == 0 and not self.decode():
            return self.wait_ms
        if not self.digest():
            return WAIT_MS
        self.publish()
        if self.source_ended:
            self.ended = True
        return 0

    @property
    def must_wait(self):
        """There is (still) no room for what comes next: look here between announcing a sleep and sleeping."""
        if self.batch_bytes:
            return ring_free_bytes(&self.digests.view) < self.digest_room()
        if not self.waits_for_room:
            return True  # for the recorded time
        return ring_free_bytes(&self.records.view) < self.needed_room + RECORD_COUNTERS_BYTES

    @property
    def waits_for_room(self):
        return self.batch_bytes != 0 or self.wait_ms == WAIT_MS

    cdef uint64_t digest_room(self):
        return min(<uint64_t>65536, self.digests.view.capacity // 2)

    cdef bint decode(self):
        """Fills the free part of the ring. False: no room, or the recorded time has not come."""
        cdef uint64_t room = ring_free_bytes(&self.records.view)
        cdef uint8_t *target
        if room < self.needed_room + RECORD_COUNTERS_BYTES:
            self.wait_ms = WAIT_MS
            return False
        room = max(<uint64_t>BATCH_BYTES, self.needed_room)
        target = ring_reserve(&self.records.view, room)
        if target == NULL:
            self.wait_ms = WAIT_MS
            return False
        status = self.source.fill(<uint64_t>target, room)
        self.batch_bytes = status.produced_bytes
        self.needed_room = max(<uint64_t>BATCH_BYTES, <uint64_t>status.needed_room)
        self.source_ended = status.end
        if self.skip:
            self.skip_published(target)
        if self.batch_bytes or self.source_ended:
            return True
        self.wait_ms = status.wait_ns // 1000000 + 1 if status.wait_ns else 0
        return False

    cdef void skip_published(self, uint8_t *target):
        """After a predecessor's death: what it published is not published again."""
        cdef uint64_t at = 0
        cdef uint32_t length
        while at < self.batch_bytes and self.skip:
            length = record_check(target + at, self.batch_bytes - at)
            if length == 0:
                break
            if record_u32(target + at) == RECORD_PACKET:
                self.skip -= 1
            at += length
        self.batch_bytes -= at
        memmove(target, target + at, self.batch_bytes)

    cdef bint digest(self):
        """Digests of the batch into the digest ring. False: it is full, the rest comes later."""
        cdef DigestBatch done
        cdef uint8_t *room
        cdef const uint8_t *batch = self.records.view.data + (self.records.view.position
                                                              & (self.records.view.capacity - 1))
        cdef uint64_t free_bytes, published
        cdef Inspection *inspection = inspection_of(self.inspector)
        if self.digests is None:
            return True
        self.linktypes.learn(self.source.interfaces)
        while self.digested_bytes < self.batch_bytes:
            free_bytes = ring_free_bytes(&self.digests.view)
            if free_bytes < self.digest_room():
                return False
            room = ring_reserve(&self.digests.view, free_bytes)
            memset(&done, 0, sizeof(done))
            with nogil:
                if not digest_records(batch + self.digested_bytes, self.batch_bytes - self.digested_bytes,
                                      self.linktypes.types, self.linktypes.count, self.inner, inspection, room,
                                      free_bytes, self.ignored, &done):
                    with gil:
                        raise InputOutputError(f"{self.interface.uri}: a decoded record is corrupt")
            self.digested_bytes += done.consumed_bytes
            ring_advance(&self.digests.view, done.written_bytes)
            self.page.add("digests_published", done.digests)
            published = self.page["digests_published"]
            ring_publish(&self.digests.view, self.digests.view.position, 0, &published, 1)
            self.digests.wake()
            for i in range(IGNORED_COUNTS):
                self.page[IGNORED_FIELDS[i]] = self.ignored[i]
        return True

    cdef publish(self):
        cdef uint64_t packets = self.source.read_packets
        cdef uint64_t filtered = self.source.filtered_packets
        cdef uint64_t newest = self.source.newest_ns or 0
        ring_advance(&self.records.view, self.batch_bytes)
        self.batch_bytes = self.digested_bytes = 0
        self.add_counters_record(packets, filtered, newest)
        self.records.words[COMMIT_WORD_PUBLISHED] = packets - filtered
        ring_publish(&self.records.view, self.records.view.position, 0, self.records.words, 1)
        self.records.wake()
        page = self.page
        page["received_packets"] = page["read_packets"] = packets
        page["read_bytes"] = self.source.read_bytes
        page["dropped_filter_packets"] = filtered
        page["published_packets"] = packets - filtered
        page["truncated_packets"] = self.source.truncated_packets
        page["last_packet_ns"] = newest

    cdef void add_counters_record(self, uint64_t packets, uint64_t filtered, uint64_t newest):
        cdef uint64_t words[RECORD_COUNTERS_WORDS]
        cdef uint8_t *room = ring_reserve(&self.records.view, RECORD_COUNTERS_BYTES)
        if room == NULL:
            return
        words[0] = packets
        words[1] = 0
        words[2] = filtered
        words[3] = 0
        words[4] = packets - filtered
        memcpy(room + RECORD_PREFIX_BYTES, words, sizeof(words))
        record_set_prefix(room, RECORD_COUNTERS, RECORD_COUNTERS_BYTES, 0, newest)
        ring_advance(&self.records.view, RECORD_COUNTERS_BYTES)

    def linktype(self):
        """The link type of the first interface; Ethernet as long as the file named none."""
        interfaces = self.source.interfaces
        return interfaces[0].linktype if interfaces else 1

    def close(self):
        self.source.close()


class LateFilter:
    """A filter in user space, compiled when the file has named its link type."""

    def __init__(self, capture, text):
        self.capture = capture
        self.text = text
        self.filter = None

    def __call__(self, address, length):
        if self.filter is None:
            self.filter = bpf.compile_offline(self.capture.linktype(), self.text)
        kept, _rejected = self.filter.keep_matching(address, length)
        return kept
