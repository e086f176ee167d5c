# cython: language_level=3
"""Records into the output buffer, run by run: a run is what one source has before the next one has something older.

What the copying reads and counts lies in a `copying` on the stack, where a compiler can keep it in registers. Of what
lies in the merge it must believe that each store of a packet's octets changes it. What is known of a source is in a
cache line of its own, a `cursor`: where many take turns, a run is often a single record.
"""
from libc.stdint cimport UINT64_MAX, uint8_t, uint32_t, uint64_t
from libc.string cimport memcpy

from appliance.formats.erf cimport ERF_ETHERNET_PAD_BYTES, ERF_HEADER_BYTES, erf_packet_at
from appliance.formats.record cimport PCAP_PACKET_HEADER_BYTES, pcap_packet_at
from appliance.merge.order cimport *
from appliance.ring.digest cimport DIGEST_MIN_BYTES, PLAIN_DIGEST_BYTES, digest, plain_digest
from appliance.ring.layout cimport *
from appliance.ring.plain cimport expand_plain
from appliance.ring.prefetch cimport READ_AHEAD_BYTES, WRITE_AHEAD_BYTES, prefetch_for_write, prefetch_lines

cdef struct copying:
    int sink
    bint has_tap
    bint costs_data       # a packet takes its captured octets of `bytes_left`, not its record,
    uint32_t cost_bytes   # and so much with them
    # How far it may go.
    uint64_t promised_ns  # what is younger is forced
    uint64_t boundary_ns
    uint64_t horizon_ns
    uint64_t packets_left
    uint64_t bytes_left
    bint may_stop         # the segment has a packet
    uint8_t *target
    const uint8_t *full
    # What it did.
    uint64_t packets
    uint64_t forced
    uint64_t first_ns
    uint64_t newest_ns
    uint64_t last_ns      # of the stream; what is older is late
    uint64_t left_behind  # octets of a ring that are behind the position up to which it may go


cdef inline bint is_wanted(int sink, uint32_t type, uint32_t length) noexcept nogil:
    """Whether it is a record of the kind that is merged into `sink`."""
    if sink == TO_DIGESTS:
        return type == RECORD_DIGEST
    return type == RECORD_PACKET and length >= RECORD_PACKET_MIN


cdef inline uint32_t framing_bytes(int sink) noexcept nogil:
    """What a packet takes around its octets; 0: its record goes out as it is."""
    if sink == TO_PCAP_NS or sink == TO_PCAP_US:
        return PCAP_PACKET_HEADER_BYTES
    return ERF_HEADER_BYTES + ERF_ETHERNET_PAD_BYTES if sink == TO_ERF else 0


cdef inline void begin_copying(copying *now, Merge merge) noexcept nogil:
    now.sink = merge.sink
    now.costs_data = merge.count_captured_bytes or framing_bytes(merge.sink) != 0
    now.cost_bytes = 0 if merge.count_captured_bytes else framing_bytes(merge.sink)
    now.has_tap = merge.has_tap
    now.promised_ns = merge.promised_ns
    now.boundary_ns = merge.boundary_ns
    now.horizon_ns = merge.horizon_ns
    now.packets_left = merge.packets_left
    now.bytes_left = merge.bytes_left
    now.may_stop = merge.segment_packets != 0
    now.target = merge.out + merge.out_bytes
    now.full = merge.out + merge.out_capacity
    now.packets = now.forced = 0
    now.first_ns = merge.batch_first_ns if merge.out_packets else UINT64_MAX
    now.newest_ns = merge.batch_last_ns
    now.last_ns = merge.last_ns


cdef inline void end_copying(const copying *now, Merge merge) noexcept nogil:
    merge.forced += now.forced
    merge.bytes_left = now.bytes_left
    merge.packets_left = now.packets_left
    merge.segment_packets += now.packets
    merge.out_packets += now.packets
    merge.out_bytes = now.target - merge.out
    merge.last_ns = now.last_ns
    if merge.out_packets:
        merge.batch_first_ns = now.first_ns
        merge.batch_last_ns = now.newest_ns


cdef inline void begin_cursors(copying *now, Merge merge, uint64_t limit_position) noexcept nogil:
    """One for each front; its source is known. `limit_position`: for a single front, how far it may go in its ring."""
    cdef uint32_t i
    cdef cursor *at
    cdef merge_source *source
    now.left_behind = 0
    for i in range(merge.fronts.count):
        at = &merge.cursors[i]
        source = &merge.sources[at.source]
        if limit_position < source.view.other:
            now.left_behind = source.view.other - limit_position
        at.record = ring_at(source.view, source.view.position)
        at.left = source.view.other - source.view.position
        at.next_ns = source.next_ns
        at.interface_map = source.interface_map
        at.interface_count = source.interface_count
        at.bytes = at.packets = at.dropped = 0
        find_record(now, merge, at)


cdef inline void end_cursors(Merge merge) noexcept nogil:
    cdef uint32_t i
    cdef const cursor *at
    cdef merge_source *source
    for i in range(merge.fronts.count):
        at = &merge.cursors[i]
        source = &merge.sources[at.source]
        source.state = HAS_RECORD if at.length else IS_EMPTY  # as far as is known here
        source.view.position = source.view.other - at.left
        source.next_ns = at.next_ns
        source.consumed += at.packets + at.dropped
        source.dropped += at.dropped
        source.pending_packets += at.packets
        source.pending_bytes += at.bytes


cdef inline void find_record(const copying *now, Merge merge, cursor *at) noexcept nogil:
    """What comes next in the source, if it can be copied; else look() knows what to do with it."""
    while at.left > now.left_behind:
        at.length = record_check(at.record, at.left)
        if at.length and is_wanted(now.sink, record_u32(at.record), at.length):
            prefetch_lines(at.record + max(2 * at.length, <uint32_t>READ_AHEAD_BYTES))
            at.next_ns = record_timestamp_ns(at.record)
            return
        if not note_counters(&merge.sources[at.source], at.record, at.length):
            break
        at.left -= at.length
        at.record += at.length
    at.length = 0


cdef inline bint note_counters(merge_source *source, const uint8_t *record, uint32_t length) noexcept nogil:
    """The source's counters, if the record is that. `length`: 0 for a damaged one."""
    if length != RECORD_COUNTERS_BYTES or record_u32(record) != RECORD_COUNTERS:
        return False
    memcpy(source.counters, record + RECORD_PREFIX_BYTES, 8 * RECORD_COUNTERS_WORDS)
    return True


cdef inline int copy_run(copying *now, Merge merge, cursor *at, uint64_t limit_ns) noexcept nogil:
    """Records of one source up to a time. IDLE: it has a record that is younger, or it has to be looked at."""
    cdef uint32_t cost
    cdef int status
    while at.length and at.next_ns <= limit_ns:
        cost = (record_u32(at.record + 20) if now.costs_data else at.length) + now.cost_bytes
        status = stop_before(now, at.next_ns, cost)
        if status != S_IDLE:
            return status
        copy_one(now, merge, at, cost)
        at.left -= at.length
        at.record += at.length
        find_record(now, merge, at)
    return S_IDLE


cdef inline int stop_before(const copying *now, uint64_t stamp, uint32_t cost) noexcept nogil:
    """Why the next record does not go into this segment, or into this batch."""
    if now.boundary_ns <= stamp < now.horizon_ns:
        return S_BOUNDARY
    if (now.packets_left == 0 or now.bytes_left < cost) and now.may_stop:
        return S_LIMIT
    if now.target >= now.full:
        return S_FULL
    return S_IDLE


cdef inline void copy_one(copying *now, Merge merge, cursor *at, uint32_t cost) noexcept nogil:
    cdef uint64_t stamp = at.next_ns
    cdef uint32_t written
    prefetch_for_write(now.target + WRITE_AHEAD_BYTES)
    written = emit(now, merge, at)
    now.forced += stamp > now.promised_ns
    if written == 0:
        at.dropped += 1
        return
    now.target += written
    now.packets += 1
    at.packets += 1
    now.may_stop = True
    now.packets_left -= now.packets_left != 0
    now.bytes_left -= cost if cost < now.bytes_left else now.bytes_left
    now.first_ns = min(now.first_ns, stamp)
    now.newest_ns = max(now.newest_ns, stamp)
    if stamp < now.last_ns:
        merge.note_late(&merge.sources[at.source], now.last_ns - stamp)
    elif stamp <= now.horizon_ns:
        now.last_ns = stamp


cdef inline uint32_t emit(copying *now, Merge merge, cursor *at) noexcept nogil:
    """The bytes written. 0: it was dropped, because it is damaged or its interface has no number in the output."""
    cdef const uint8_t *record = at.record
    cdef uint32_t length = at.length
    cdef uint32_t interface, number, captured, written
    if now.sink == TO_DIGESTS:
        return emit_digest(now.target, at.source, record, length)
    interface = number = record_u32(record + 8)
    captured = record_u32(record + 20)
    if now.sink != TO_RECORDS:
        number = at.interface_map[interface] if interface < at.interface_count else UNMAPPED
    if captured > length - RECORD_PACKET_MIN or (number == UNMAPPED and now.sink != TO_RECORDS):
        written = 0
    elif now.sink == TO_PCAP_NS or now.sink == TO_PCAP_US:
        written = <uint32_t>pcap_packet_at(now.target, at.next_ns, captured, record_u32(record + 24),
                                           record + RECORD_PACKET_DATA, now.sink == TO_PCAP_NS)
    elif now.sink == TO_ERF:
        written = <uint32_t>erf_packet_at(now.target, number, number >> 8, at.next_ns, captured,
                                          record_u32(record + 24), record + RECORD_PACKET_DATA)
    else:
        written = copy_record(now.target, record, RECORD_PACKET, length, number)
        record_set_u32(now.target + 20, captured)
    if written == 0:
        return 0
    at.bytes += captured
    if now.has_tap:
        merge.feed_tap(&merge.sources[at.source], record, length, interface, captured)
    return written


cdef inline uint32_t emit_digest(uint8_t *target, uint32_t index, const uint8_t *record,
                                 uint32_t length) noexcept nogil:
    if length != PLAIN_DIGEST_BYTES:
        return copy_record(target, record, RECORD_DIGEST, length, index)
    expand_plain(<const plain_digest *>record, index, <digest *>target)
    return DIGEST_MIN_BYTES


cdef inline uint32_t copy_record(uint8_t *target, const uint8_t *record, uint32_t type, uint32_t length,
                                 uint32_t interface) noexcept nogil:
    """Type and lengths are written, not copied: they are what was checked."""
    record_copy(target, record, length)
    record_set_u32(target, type)
    record_set_u32(target + 4, length)
    record_set_u32(target + 8, interface)
    record_set_u32(target + length - 4, length)
    return length
