# cython: language_level=3, boundscheck=False, wraparound=False, cdivision=True
"""What the decoders of pcap and pcapng share: counts, interfaces, and the turn between compiled and Python code.

`run` walks packets without the GIL and stops at whatever is there once per file or interface; `header` reads that in
Python and lets `run` go on.
"""

from libc.stdint cimport INT64_MAX, INT64_MIN, int64_t, uint8_t, uint32_t
from libc.stdlib cimport free, realloc
from libc.string cimport memcpy

from appliance.formats.encode import interface_record

STATUS_NEED_INPUT = NEED_INPUT
STATUS_OUTPUT_FULL = OUTPUT_FULL
STATUS_NOT_YET = NOT_YET
STATUS_END = END
STATUS_DAMAGED = DAMAGED
NEVER_NS = INT64_MAX
INTERFACES_MAX = 65536  # per file, all its sections together: what keeps the table of a hostile file small


cdef class Decoder:

    def __cinit__(self, bint by_reference=False):
        self.by_reference = by_reference
        self.interfaces = []
        self.damage = ""
        self.tally.oldest_ns = INT64_MAX
        self.tally.newest_ns = INT64_MIN

    def __dealloc__(self):
        free(self.table)

    def decode(self, size_t source, size_t source_bytes, size_t destination, size_t room, bint last=False,
               int64_t until_ns=INT64_MAX):
        cdef Span span = Span(until_ns=until_ns)
        cdef Step step = DAMAGED if self.damage else GO_ON
        span.source = <const uint8_t *> source
        span.source_end = span.source + source_bytes
        span.out = <uint8_t *> destination
        span.out_end = span.out + room
        while step == GO_ON:
            with nogil:
                step = self.run(&span)
            if step == HEADER:
                step = self.header(&span)
        cdef size_t consumed = <size_t> (span.source - <const uint8_t *> source)
        self.offset += consumed
        self.needed_room = span.needed_room
        self.next_ns = span.next_ns
        if step == DAMAGED and not self.damage:
            self.damage = self.explain(&span)
        if step == NEED_INPUT and last:
            step = self.ended(source_bytes - consumed)
        return <int> step, consumed, <size_t> (span.out - <uint8_t *> destination)

    cdef Step ended(self, size_t left) except *:
        if self.interface_count == 0 and self.offset == 0:
            return self.damaged("it ends inside its header" if left else "it is empty")
        if left or self.unfinished_bytes:
            return self.damaged(f"it ends {left + self.unfinished_bytes} bytes after the beginning of a record")
        return END

    cdef Step run(self, Span *span) noexcept nogil:
        return END

    cdef Step header(self, Span *span) except *:
        raise NotImplementedError

    cdef str explain(self, const Span *span):
        raise NotImplementedError

    cdef Step damaged(self, reason) except *:
        self.damage = reason
        return DAMAGED

    cdef Step announce(self, Span *span, interface) except *:
        """Writes the next interface's record and enters it into the table."""
        cdef bytes record = interface_record(interface)
        cdef size_t record_bytes = len(record)
        cdef SourceInterface *entry
        if self.interface_count >= INTERFACES_MAX:
            return self.damaged(f"it describes more than {INTERFACES_MAX} interfaces")
        if self.by_reference:
            record_bytes = 0
        if <size_t> (span.out_end - span.out) < record_bytes:
            span.needed_room = record_bytes
            return OUTPUT_FULL
        self.grow()
        memcpy(span.out, <const uint8_t *> record, record_bytes)
        span.out += record_bytes
        entry = &self.table[self.interface_count]
        tick_scale_set(&entry.scale, interface.source_tsresol, interface.source_tsoffset_s)
        entry.packets = 0
        entry.snaplen = interface.snaplen
        self.interface_count += 1
        self.interfaces.append(interface)
        return GO_ON

    cdef int grow(self) except -1:
        cdef uint32_t capacity = max(4, 2 * self.table_capacity)
        cdef void *table
        if self.interface_count < self.table_capacity:
            return 0
        table = realloc(self.table, capacity * sizeof(SourceInterface))
        if table == NULL:
            raise MemoryError
        self.table = <SourceInterface *> table
        self.table_capacity = capacity
        return 0

    @property
    def packets(self):
        return self.tally.packets

    @property
    def bytes(self):
        return self.tally.bytes

    @property
    def captured_bytes(self):
        return self.tally.captured_bytes

    @property
    def late_packets(self):
        return self.tally.late_packets

    @property
    def in_order(self):
        return self.tally.late_packets == 0

    @property
    def first_ns(self):
        return self.tally.oldest_ns if self.tally.newest_ns >= 0 else None

    @property
    def last_ns(self):
        return self.tally.newest_ns if self.tally.newest_ns >= 0 else None

    @property
    def whole_offset(self):
        return self.offset - self.unfinished_bytes

    @property
    def interface_packets(self):
        return [self.table[i].packets for i in range(self.interface_count)]
