# cython: language_level=3, boundscheck=False, wraparound=False, cdivision=True
"""Which flow a TCP packet belongs to, and the bytes of each flow's file until they are written.

A pool of flows, an index by hashed key, and two lists in the order of the last packet: open flows, and closed ones that
linger for what comes late. Time is the packets' own. Memory is bounded by the flows in the pool and by the bytes that
wait in their buffers; whoever is reached by a bound was the longest without a packet.
"""

import os

from libc.stdint cimport int32_t, int64_t, uint8_t, uint16_t, uint32_t, uint64_t
from libc.stdlib cimport free, malloc, realloc
from libc.string cimport memcmp, memcpy, memset

from appliance.formats.record cimport PCAP_PACKET_HEADER_BYTES, pcap_packet_at
from appliance.ring.digest cimport DIGEST_TCP, digest
from appliance.ring.layout cimport RECORD_PACKET_DATA, record_timestamp_ns, record_u32

from appliance.meter.traceflow_formats import Description

NONE, PCAP_NS, PCAP_US, TEXT = range(4)
IDLE, CLOSED, REUSED, EVICTED, END = range(5)

cdef enum Content:
    WITHOUT
    WITH_PCAP_NS
    WITH_PCAP_US
    WITH_TEXT

cdef enum Reason:
    BY_TIMEOUT
    BY_CLOSE
    BY_REUSE
    BY_EVICTION
    BY_THE_END

cdef enum:
    TCP_FIN = 0x01
    TCP_SYN = 0x02
    TCP_RST = 0x04
    TCP_ACK = 0x10
    KEY_BYTES = 40
    KEY_WORDS = 5
    ORIGIN_WORDS = 4
    NOTHING = -1
    LIST_OPEN = 0
    LIST_CLOSED = 1
    FIRST_FLOWS = 1024
    FIRST_BUFFER_BYTES = 512
    FLOW_BUFFER_BYTES = 1 << 20  # of one flow: more is written at once

cdef struct flow_key:  # no padding: compared and hashed as bytes
    uint8_t[16] low_address
    uint8_t[16] high_address
    uint16_t low_port
    uint16_t high_port
    uint16_t ip_version
    uint16_t linktype

cdef struct flow:
    flow_key key
    uint64_t hash
    int64_t first_ns
    int64_t last_ns
    uint64_t serial
    uint64_t packets
    uint64_t octets  # on the wire
    uint8_t *data
    uint32_t data_bytes
    uint32_t data_capacity
    uint32_t waiting_packets  # in `data`
    uint64_t content_bytes  # in `data` and in its file
    uint64_t cut_packets  # beyond flow_bytes
    uint64_t *frames
    uint32_t frame_count
    uint32_t frame_capacity
    uint32_t[2] first_sequence  # of each direction: of its SYN, or one before its first octet seen
    uint8_t[2] is_sequenced
    uint8_t[2] has_fin
    uint8_t swapped  # the first packet went from the high address to the low one
    uint8_t list
    uint8_t is_used
    uint8_t is_begun  # it has a file
    int32_t next_of_hash
    int32_t newer
    int32_t older

cdef struct seen:  # one packet
    flow_key key
    uint8_t swapped
    int64_t timestamp_ns
    uint32_t sequence
    bint has_sequence
    uint32_t acknowledgement  # with has_acknowledgement
    bint has_acknowledgement
    uint32_t tcp_flags
    uint64_t number
    uint32_t original


cdef class FlowFiles:
    """See traceflow_table.pyi."""
    cdef flow *flows
    cdef int32_t capacity
    cdef int32_t free_flow
    cdef int32_t *slots
    cdef uint64_t slot_mask
    cdef int32_t[2] newest
    cdef int32_t[2] oldest
    cdef uint64_t[6] secrets
    cdef bint bidirectional
    cdef bint keeps_frames
    cdef Content content
    cdef int64_t idle_ns
    cdef int64_t linger_ns
    cdef int64_t now_ns
    cdef uint64_t max_flows
    cdef uint64_t buffer_bytes
    cdef uint64_t flow_bytes
    cdef object write
    cdef object ended
    cdef object encode
    cdef readonly uint64_t flow_count
    cdef readonly uint64_t buffered_bytes
    cdef readonly uint64_t total_flows
    cdef readonly uint64_t tcp_packets
    cdef readonly uint64_t evicted_flows
    cdef readonly uint64_t held_packets
    cdef readonly int32_t last_slot

    def __cinit__(self, *, write, ended, int content, encode=None, bint bidirectional=False,
                  int64_t idle_timeout_ns=0, int64_t linger_ns=0, uint64_t max_flows=1000000,
                  uint64_t buffer_bytes=64 << 20, uint64_t flow_bytes=0, bint keep_frames=False):
        self.write = write
        self.ended = ended
        self.encode = encode
        self.content = <Content> content
        self.bidirectional = bidirectional
        self.idle_ns = idle_timeout_ns
        self.linger_ns = linger_ns
        self.max_flows = max(<uint64_t> 1, min(max_flows, <uint64_t> 1 << 30))
        self.buffer_bytes = buffer_bytes
        self.flow_bytes = flow_bytes
        self.keeps_frames = keep_frames
        self.free_flow = NOTHING
        self.newest[0] = self.newest[1] = self.oldest[0] = self.oldest[1] = NOTHING
        secret = os.urandom(sizeof(self.secrets))
        memcpy(self.secrets, <const uint8_t *> secret, sizeof(self.secrets))
        self.grow()

    def __dealloc__(self):
        cdef int32_t i
        for i in range(self.capacity):
            free(self.flows[i].data)
            free(self.flows[i].frames)
        free(self.flows)
        free(self.slots)

    # ---- packets ----

    def feed(self, size_t records, size_t digests, size_t digest_bytes, size_t origins, uint32_t count):
        """All TCP packets among `count` digests (capture/pairs.pyi) of a batch of records."""
        cdef const uint32_t *origin = <const uint32_t *> origins
        cdef const digest *entry
        cdef const uint8_t *record
        cdef uint32_t i
        cdef int32_t slot
        cdef seen packet
        with nogil:
            for i in range(count):
                entry = <const digest *> (digests + i * digest_bytes)
                record = <const uint8_t *> records + origin[0]
                if entry.status & DIGEST_TCP:
                    self.take(&packet, entry, origin[1])
                    packet.number = <uint64_t> origin[2] << 32 | origin[3]
                    packet.original = record_u32(record + 24)
                    packet.timestamp_ns = record_timestamp_ns(record)
                    slot = self.assign(&packet)
                    if self.content == WITH_TEXT:
                        self.append_text(slot, &packet, entry, record)
                    elif self.content != WITHOUT:
                        self.append_pcap(slot, &packet, record)
                origin += ORIGIN_WORDS

    def observe(self, bytes source, bytes destination, uint16_t source_port, uint16_t destination_port,
                int64_t timestamp_ns, uint32_t tcp_flags, sequence, uint64_t number, uint32_t original,
                uint16_t linktype):
        """One packet by its fields, for who has no records. Returns whether it begins a flow; `last_slot` is which."""
        cdef seen packet
        cdef uint64_t flows_before = self.total_flows
        if len(source) != len(destination) or len(source) not in (4, 16):
            raise ValueError("the addresses are not both IPv4 or both IPv6")
        memset(&packet, 0, sizeof(packet))
        memcpy(packet.key.low_address, <const uint8_t *> source, len(source))
        memcpy(packet.key.high_address, <const uint8_t *> destination, len(destination))
        packet.key.low_port, packet.key.high_port = source_port, destination_port
        packet.key.ip_version = 4 if len(source) == 4 else 6
        packet.key.linktype = linktype
        packet.timestamp_ns = timestamp_ns
        packet.tcp_flags = tcp_flags
        packet.has_sequence = sequence is not None
        packet.sequence = sequence or 0
        packet.number = number
        packet.original = original
        self.canonical(&packet)
        self.last_slot = self.assign(&packet)
        return self.total_flows != flows_before

    cdef inline void take(self, seen *packet, const digest *entry, uint32_t linktype) noexcept nogil:
        memcpy(packet.key.low_address, entry.source_address, 16)
        memcpy(packet.key.high_address, entry.destination_address, 16)
        packet.key.low_port, packet.key.high_port = entry.source_port, entry.destination_port
        packet.key.ip_version = entry.ip_version
        packet.key.linktype = <uint16_t> linktype
        packet.tcp_flags = entry.tcp_flags
        packet.sequence = entry.tcp_sequence
        packet.has_sequence = True
        packet.acknowledgement = entry.tcp_acknowledgement
        packet.has_acknowledgement = entry.tcp_flags & TCP_ACK != 0
        self.canonical(packet)

    cdef inline void canonical(self, seen *packet) noexcept nogil:
        """In both directions the same key, when directions share a flow."""
        cdef int order
        cdef uint8_t[16] address
        packet.swapped = 0
        if not self.bidirectional:
            return
        order = memcmp(packet.key.low_address, packet.key.high_address, 16)
        if order > 0 or (order == 0 and packet.key.low_port > packet.key.high_port):
            memcpy(address, packet.key.low_address, 16)
            memcpy(packet.key.low_address, packet.key.high_address, 16)
            memcpy(packet.key.high_address, address, 16)
            packet.key.low_port, packet.key.high_port = packet.key.high_port, packet.key.low_port
            packet.swapped = 1

    cdef int32_t assign(self, seen *packet) except -2 nogil:
        """The flow of a packet, a new one if need be; everything about it but its content is noted."""
        cdef uint64_t hashed = self.hash_key(&packet.key)
        cdef int32_t slot
        cdef flow *one
        if packet.timestamp_ns > self.now_ns:
            self.now_ns = packet.timestamp_ns
        self.expire()
        slot = self.find(&packet.key, hashed)
        if slot != NOTHING and begins_anew(&self.flows[slot], packet):
            self.finish(slot, BY_CLOSE if self.flows[slot].list == LIST_CLOSED else BY_REUSE)
            slot = NOTHING
        if slot == NOTHING:
            slot = self.begin(packet, hashed)
        one = &self.flows[slot]
        one.packets += 1
        one.octets += packet.original
        self.held_packets += 1
        one.last_ns = max(one.last_ns, packet.timestamp_ns)
        if self.keeps_frames:
            self.note_frame(one, packet.number)
        # The RST that answers a SYN has the sequence number 0, which says nothing (RFC 9293, section 3.10.7.1).
        if not one.is_sequenced[packet.swapped] and packet.has_sequence and not packet.tcp_flags & TCP_RST:
            one.first_sequence[packet.swapped] = packet.sequence - (0 if packet.tcp_flags & TCP_SYN else 1)
            one.is_sequenced[packet.swapped] = 1
        if packet.tcp_flags & TCP_FIN:
            one.has_fin[packet.swapped] = 1
        self.unlink(slot)
        if packet.tcp_flags & TCP_RST or (one.has_fin[0] and one.has_fin[1]) or (
            packet.tcp_flags & TCP_FIN and not self.bidirectional
        ):
            one.list = LIST_CLOSED
        self.link(slot)
        self.tcp_packets += 1
        return slot

    # ---- content ----

    cdef int append_pcap(self, int32_t slot, const seen *packet, const uint8_t *record) except -1 nogil:
        cdef uint32_t captured = record_u32(record + 20)
        cdef uint8_t *out
        cdef size_t written
        if self.is_cut(slot, PCAP_PACKET_HEADER_BYTES + captured):
            return 0
        out = self.room(slot, PCAP_PACKET_HEADER_BYTES + captured)
        written = pcap_packet_at(out, packet.timestamp_ns, captured, packet.original,
                                 record + RECORD_PACKET_DATA, self.content == WITH_PCAP_NS)
        return self.appended(slot, <uint32_t> written)

    cdef bint is_cut(self, int32_t slot, uint32_t length) noexcept nogil:
        """Whether a flow's file has had its share: it holds the flow's first packets, and none behind a missing one."""
        cdef flow *one = &self.flows[slot]
        if one.cut_packets == 0 and (self.flow_bytes == 0 or one.content_bytes + length <= self.flow_bytes):
            return False
        one.cut_packets += 1
        return True

    cdef int appended(self, int32_t slot, uint32_t length) except -1 nogil:
        self.flows[slot].data_bytes += length
        self.flows[slot].content_bytes += length
        self.flows[slot].waiting_packets += 1
        return self.write_what_is_too_much(slot)

    cdef int append_text(self, int32_t slot, const seen *packet, const digest *entry,
                         const uint8_t *record) except -1 nogil:
        cdef const uint8_t *text_at
        cdef uint8_t *out
        cdef uint32_t length
        cdef uint32_t address_bytes = 4 if entry.ip_version == 4 else 16
        cdef bint cut = False
        with gil:
            text = self.encode(
                packet.number, packet.timestamp_ns, packet.key.linktype, packet.original,
                (<const char *> record + RECORD_PACKET_DATA)[:record_u32(record + 20)],
                (<const char *> entry.source_address)[:address_bytes],
                (<const char *> entry.destination_address)[:address_bytes],
                entry.source_port, entry.destination_port, entry.tcp_flags, entry.tcp_sequence,
                entry.tcp_acknowledgement, entry.tcp_window,
            )
            text_at = <const uint8_t *> (<bytes> text)
            length = <uint32_t> len(<bytes> text)
            cut = self.is_cut(slot, length)
            if not cut:
                out = self.room(slot, length)
                memcpy(out, text_at, length)
        return 0 if cut else self.appended(slot, length)

    cdef uint8_t *room(self, int32_t slot, uint32_t length) except NULL nogil:
        """Where the next `length` bytes of a flow's file go."""
        cdef flow *one = &self.flows[slot]
        cdef uint64_t capacity = max(one.data_capacity, <uint32_t> FIRST_BUFFER_BYTES)
        cdef uint8_t *larger
        while capacity < <uint64_t> one.data_bytes + length:
            capacity *= 2
        if capacity != one.data_capacity:
            larger = <uint8_t *> realloc(one.data, capacity)
            if larger == NULL:
                with gil:
                    raise MemoryError
            self.buffered_bytes += capacity - one.data_capacity
            one.data = larger
            one.data_capacity = <uint32_t> capacity
        return one.data + one.data_bytes

    cdef int write_what_is_too_much(self, int32_t slot) except -1 nogil:
        cdef int32_t at
        cdef int which
        if self.flows[slot].data_bytes >= FLOW_BUFFER_BYTES:
            self.flush(slot)
        if self.buffered_bytes <= self.buffer_bytes:
            return 0
        for which in range(LIST_CLOSED, LIST_OPEN - 1, -1):
            at = self.oldest[which]
            while at != NOTHING and self.buffered_bytes > self.buffer_bytes // 2:
                self.flush(at)
                at = self.flows[at].newer
        return 0

    cdef int flush(self, int32_t slot) except -1 nogil:
        """What a flow's file lacks is written, and its buffer's memory given back."""
        cdef flow *one = &self.flows[slot]
        if one.data_bytes == 0:
            return 0
        with gil:
            self.write(slot, None if one.is_begun else self.describe(slot),
                       (<const char *> one.data)[:one.data_bytes], one.waiting_packets)
        one.is_begun = 1
        one.waiting_packets = 0
        self.buffered_bytes -= one.data_capacity
        one.data_bytes = one.data_capacity = 0
        free(one.data)
        one.data = NULL
        return 0

    # ---- the life of a flow ----

    cdef int expire(self) except -1 nogil:
        cdef int32_t slot = self.oldest[LIST_CLOSED]
        while slot != NOTHING and self.linger_ns and self.now_ns - self.flows[slot].last_ns > self.linger_ns:
            self.finish(slot, BY_CLOSE)
            slot = self.oldest[LIST_CLOSED]
        slot = self.oldest[LIST_OPEN]
        while slot != NOTHING and self.idle_ns and self.now_ns - self.flows[slot].last_ns > self.idle_ns:
            self.finish(slot, BY_TIMEOUT)
            slot = self.oldest[LIST_OPEN]
        return 0

    cdef int32_t begin(self, const seen *packet, uint64_t hashed) except -2 nogil:
        cdef int32_t slot
        cdef flow *one
        if self.flow_count >= self.max_flows:
            slot = self.oldest[LIST_CLOSED]
            if slot == NOTHING:
                self.evicted_flows += 1
                self.finish(self.oldest[LIST_OPEN], BY_EVICTION)
            else:
                self.finish(slot, BY_CLOSE)
        if self.free_flow == NOTHING:
            with gil:
                self.grow()
        slot = self.free_flow
        one = &self.flows[slot]
        self.free_flow = one.next_of_hash
        memset(one, 0, sizeof(flow))
        one.key = packet.key
        one.hash = hashed
        one.swapped = packet.swapped
        one.first_ns = one.last_ns = packet.timestamp_ns
        self.total_flows += 1
        one.serial = self.total_flows
        one.is_used = 1
        one.next_of_hash = self.slots[hashed & self.slot_mask]
        self.slots[hashed & self.slot_mask] = slot
        self.flow_count += 1
        self.link(slot)
        return slot

    cdef int finish(self, int32_t slot, Reason reason) except -1 nogil:
        """A flow leaves: its bytes are written, `ended` is told, its place is free."""
        cdef flow *one = &self.flows[slot]
        cdef int32_t *at = &self.slots[one.hash & self.slot_mask]
        self.flush(slot)
        self.held_packets -= one.packets
        while at[0] != slot:
            at = &self.flows[at[0]].next_of_hash
        at[0] = one.next_of_hash
        self.unlink(slot)
        with gil:
            self.ended(slot, self.describe(slot), reason)
        free(one.data)
        free(one.frames)
        memset(one, 0, sizeof(flow))
        one.next_of_hash = self.free_flow
        self.free_flow = slot
        self.flow_count -= 1
        return 0

    def advance(self, int64_t time_ns):
        """No packet that is still to come is older than this."""
        with nogil:
            if time_ns > self.now_ns:
                self.now_ns = time_ns
            self.expire()

    def begin_anew(self):
        """Every flow ends, and time may begin anywhere."""
        self.finish_all()
        self.now_ns = 0

    def finish_all(self):
        """Every flow ends, in the order of their first packets."""
        cdef list order = sorted(
            (self.flows[i].serial, i) for i in range(self.capacity) if self.flows[i].is_used
        )
        for _serial, slot in order:
            self.finish(slot, BY_CLOSE if self.flows[<int32_t> slot].list == LIST_CLOSED else BY_THE_END)

    def flush_all(self):
        """Everything that waits is written; the flows stay."""
        cdef int32_t i
        for i in range(self.capacity):
            if self.flows[i].is_used:
                self.flush(i)

    cpdef describe(self, int32_t slot):
        """A flow as a tuple, see traceflow_table.pyi."""
        cdef flow *one = &self.flows[slot]
        cdef uint32_t address_bytes = 4 if one.key.ip_version == 4 else 16
        low = ((<const char *> one.key.low_address)[:address_bytes], one.key.low_port)
        high = ((<const char *> one.key.high_address)[:address_bytes], one.key.high_port)
        source, destination = (high, low) if one.swapped else (low, high)
        return Description(
            one.serial, *source, *destination, one.key.linktype, one.first_ns, one.last_ns, one.packets, one.octets,
            one.list == LIST_CLOSED, tuple([one.frames[i] for i in range(one.frame_count)]), one.cut_packets,
        )

    cdef int note_frame(self, flow *one, uint64_t number) except -1 nogil:
        cdef uint64_t *larger
        cdef uint32_t capacity
        if one.frame_count == one.frame_capacity:
            capacity = max(<uint32_t> 8, 2 * one.frame_capacity)
            larger = <uint64_t *> realloc(one.frames, capacity * sizeof(uint64_t))
            if larger == NULL:
                with gil:
                    raise MemoryError
            one.frames = larger
            one.frame_capacity = capacity
        one.frames[one.frame_count] = number
        one.frame_count += 1
        return 0

    # ---- index and lists ----

    cdef uint64_t hash_key(self, const flow_key *key) noexcept nogil:
        """Keyed, so that whoever sends packets does not choose who shares a slot."""
        cdef uint64_t[KEY_WORDS] words
        cdef uint64_t hashed = self.secrets[5]
        cdef int i
        memcpy(words, key, KEY_BYTES)
        for i in range(KEY_WORDS):
            hashed = (hashed ^ words[i] ^ self.secrets[i]) * 0x9E3779B97F4A7C15UL
            hashed ^= hashed >> 29
        hashed *= self.secrets[5] | 1
        return hashed ^ hashed >> 32

    cdef int32_t find(self, const flow_key *key, uint64_t hashed) noexcept nogil:
        cdef int32_t slot = self.slots[hashed & self.slot_mask]
        while slot != NOTHING:
            if self.flows[slot].hash == hashed and memcmp(&self.flows[slot].key, key, KEY_BYTES) == 0:
                return slot
            slot = self.flows[slot].next_of_hash
        return NOTHING

    cdef int grow(self) except -1:
        """Twice as many flows, and slots for all of them."""
        cdef int32_t capacity = max(FIRST_FLOWS, 2 * self.capacity)
        cdef int32_t slot
        cdef int32_t *slots
        cdef flow *larger = <flow *> realloc(self.flows, capacity * sizeof(flow))
        if larger == NULL:
            raise MemoryError
        self.flows = larger
        memset(self.flows + self.capacity, 0, (capacity - self.capacity) * sizeof(flow))
        for slot in range(capacity - 1, self.capacity - 1, -1):
            self.flows[slot].next_of_hash = self.free_flow
            self.free_flow = slot
        slots = <int32_t *> malloc(capacity * sizeof(int32_t))
        if slots == NULL:
            raise MemoryError
        free(self.slots)
        self.slots = slots
        self.slot_mask = capacity - 1
        memset(self.slots, 0xFF, capacity * sizeof(int32_t))
        for slot in range(self.capacity):
            if self.flows[slot].is_used:
                self.flows[slot].next_of_hash = self.slots[self.flows[slot].hash & self.slot_mask]
                self.slots[self.flows[slot].hash & self.slot_mask] = slot
        self.capacity = capacity
        return 0

    cdef void link(self, int32_t slot) noexcept nogil:
        """As the newest of its list."""
        cdef flow *one = &self.flows[slot]
        one.newer = NOTHING
        one.older = self.newest[one.list]
        if one.older == NOTHING:
            self.oldest[one.list] = slot
        else:
            self.flows[one.older].newer = slot
        self.newest[one.list] = slot

    cdef void unlink(self, int32_t slot) noexcept nogil:
        cdef flow *one = &self.flows[slot]
        if one.newer == NOTHING:
            self.newest[one.list] = one.older
        else:
            self.flows[one.newer].older = one.older
        if one.older == NOTHING:
            self.oldest[one.list] = one.newer
        else:
            self.flows[one.older].newer = one.newer


cdef inline bint begins_anew(const flow *one, const seen *packet) noexcept nogil:
    """A SYN that does not repeat the flow's own: the ports are used again (RFC 9293, section 3.10.7.4)."""
    if not packet.tcp_flags & TCP_SYN:
        return False
    if one.is_sequenced[packet.swapped] and packet.has_sequence:
        return packet.sequence != one.first_sequence[packet.swapped]
    if packet.has_acknowledgement and one.is_sequenced[not packet.swapped]:  # it answers the flow's own SYN, or not
        return packet.acknowledgement - 1 != one.first_sequence[not packet.swapped]
    return one.list == LIST_CLOSED
