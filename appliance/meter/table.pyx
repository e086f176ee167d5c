# cython: language_level=3, boundscheck=False, wraparound=False, cdivision=True
"""A bounded table of bidirectional flows, driven by digests and by stream time alone.

A pool of flows of 256 octets, an index of (hash, flow) slots with linear probing at a load of at most a half, and a
timer wheel; beside the pool, 256 octets more for each flow's TCP analysis (tcp.pxd), if that is wanted. A packet moves
no timer: when a flow's bucket comes up, the flow either has expired or goes to the bucket of its new deadline, so a
flow is looked at about once per idle time-out, however many packets it has.

Whether a packet belongs to a flow or begins the next one is decided by exact times when the packet comes; the wheel's
tick only decides how soon an expired flow leaves. So the flows do not depend on how the packets were batched.
"""

import os
from math import gcd

from libc.stdint cimport int64_t, uint8_t, uint16_t, uint32_t, uint64_t, uintptr_t
from libc.string cimport memcpy, memset, strlen

cimport cython

from appliance.counters import EXPORT_DELAY_BUCKETS_MS
from appliance.meter.flow_row cimport *
from appliance.meter.fragments cimport FragmentTable
from appliance.meter.memory cimport give_back, map_memory, unmap_memory
from appliance.meter.names cimport *
from appliance.meter.row_fields cimport row_fields
from appliance.meter.row_parts cimport fields_length, point_to_fields, report_round_trips, report_tcp
from appliance.meter.tcp cimport *
from appliance.ring.digest cimport *
from appliance.ring.layout cimport *
from appliance.ring.prefetch cimport prefetch, prefetch_for_write

cdef extern from *:
    """
    static inline int lowest_bit(unsigned int word) { return __builtin_ctz(word); }
    """
    int lowest_bit(unsigned int word) noexcept nogil

cdef enum:
    GROUP = 16  # digests whose memory is fetched ahead
    FLUSH_AHEAD = 8
    RECORDS_AHEAD = 2048  # octets: the digests themselves come out of another processor's cache
    SECRETS = 14  # of 64 bits, for hash_key
    EVICTION_SAMPLE = 16
    FIRST_SLOTS = 4096  # of the index; it doubles when half of them are taken
    WHEEL_BUCKETS = 8192
    WHEEL_DUE = WHEEL_BUCKETS  # the list that is being worked off
    MIN_TICK_SHIFT = 20  # about 1 ms

    STATE_CLOSED = 1  # FIN both ways, or RST
    STATE_EMPTY = 2  # no packet since its last record
    STATE_OLD = 4  # has had a record
    STATE_NOTED = 8  # its first packets are

    MAX_SEQUENCE = 20  # a record of so many packets fits into the shortest message
    MOST_NAME_BLOCKS = 1 << 26  # 4 GiB

    WORTH_NOTHING = 0  # has ended, or is empty
    WORTH_SINGLE_PACKET = 1
    WORTH_HALF_OPEN = 2
    WORTH_MORE = 3

    DELAY_BUCKETS = 6  # EXPORT_DELAY_BUCKETS_MS

    PROTOCOL_TCP = 6

    END_IDLE = 1
    END_ACTIVE = 2
    END_OF_FLOW = 3
    END_FORCED = 4
    END_LACK_OF_RESOURCES = 5

cdef uint64_t MAX_TIME_NS = <uint64_t>1 << 62  # the year 2116: later stamps are taken for it, so that sums cannot wrap

cdef struct Slot:
    uint32_t hash
    uint32_t flow  # number + 1; 0: free

cdef struct Arrival:  # a digest on its way into the table
    FlowKey key
    uint32_t hash
    uint32_t from_low  # 1 or 0
    const digest* packet  # NULL: of a version that is not known here
    uint64_t end  # offset behind its record

cdef struct Group:
    Arrival[GROUP] arrivals
    int count

cdef struct Input:
    const uint8_t* records
    uint64_t length  # cut back to what is whole
    uint64_t offset
    bint damaged

cdef struct Counters:
    uint64_t observed_packets
    uint64_t metered_packets
    uint64_t metered_octets
    uint64_t ignored_packets
    uint64_t unsampled_packets
    uint64_t late_packets
    uint64_t active_flow_packets
    uint64_t flows_created
    uint64_t exported_flows
    uint64_t exported_packets
    uint64_t exported_octets
    uint64_t peak_flows
    uint64_t[6] ended  # by flowEndReason
    uint64_t[TCP_EVENTS] tcp_events
    uint64_t[WORTH_MORE + 1] evicted  # for lack of resources, by worth
    uint64_t delay_ns
    uint64_t[DELAY_BUCKETS + 1] delays
    uint64_t[6] applications  # flows by application
    uint64_t partial_names
    uint64_t dropped_names


cdef const char* application_texts[6]
application_texts[0] = ""
application_texts[1] = "tls"
application_texts[2] = "quic"
application_texts[3] = "dns"
application_texts[4] = "http"
application_texts[5] = "ssh"

cdef uint64_t[DELAY_BUCKETS] delay_bounds_ns
for _i, _bound_ms in enumerate(EXPORT_DELAY_BUCKETS_MS):
    delay_bounds_ns[_i] = _bound_ms * 1000000
DELAY_FIELDS = (*(f"export_delay_{bound_ms}_ms" for bound_ms in EXPORT_DELAY_BUCKETS_MS), "export_delay_longer")


cdef inline uint64_t pair(uint64_t words, const uint64_t* keys) noexcept nogil:
    """Two words of 32 bits under their two keys."""
    return (keys[0] + <uint32_t>words) * (keys[1] + (words >> 32))


@cython.final
cdef class FlowTable:
    cdef Flow* flows
    cdef TcpHalf* tcp_halves  # two beside each flow; NULL without TCP analysis
    cdef TcpCounts* tcp_counts  # two beside each flow
    cdef Slot* slots  # the index, in one of the two rooms
    cdef Slot* slot_room
    cdef Slot* other_slot_room
    cdef uint64_t most_slots
    cdef FlowRow* row_buffer
    cdef uint32_t* wheel  # heads of the buckets' lists, and of WHEEL_DUE
    cdef uint64_t[SECRETS] secrets
    cdef uint64_t zero_ends
    cdef uint32_t max_flows, used, high_water, flushed, free_list, hand, hand_step, slot_mask
    cdef uint32_t row_capacity, rows_ready
    cdef uint64_t idle_ns, active_ns, linger_ns, now_ns, tick, next_flow_id
    cdef int64_t stepped_ns
    cdef uint32_t tick_shift
    cdef uint32_t packet_sampling, flow_sampling, sampling_turn
    cdef uint32_t sequence_packets
    cdef PacketNote* notes  # sequence_packets beside each flow
    cdef PacketNote* row_notes  # and beside each row
    cdef NamePool names  # without blocks: names are not kept
    cdef uint8_t* row_names  # two extensions' fields beside each row
    cdef bint has_extensions
    cdef bint vlan_in_key, interface_in_key, frame_octets
    cdef FragmentTable fragments  # or None
    cdef Counters counts

    def __cinit__(
        self, *, uint32_t max_flows, uint64_t idle_timeout_ns, uint64_t active_timeout_ns, uint64_t tcp_linger_ns,
        bint vlan_in_key=True, bint interface_in_key=False, bint tcp_analysis=False, uint32_t packet_sampling=1,
        uint32_t flow_sampling=1, uint32_t packet_sequence=0, uint32_t row_capacity=4096,
        FragmentTable fragments=None, bint frame_octets=False, bint entropy=False, uint64_t name_bytes=0,
    ):
        cdef uint64_t slots = 16
        cdef uint64_t longest_ns = max(idle_timeout_ns, active_timeout_ns, tcp_linger_ns)
        if not 1 <= max_flows <= 1 << 27:
            raise ValueError(f"max_flows {max_flows} is not within 1 .. {1 << 27}")
        if not 1 <= row_capacity <= 1 << 20:
            raise ValueError(f"row_capacity {row_capacity} is not within 1 .. {1 << 20}")
        if min(idle_timeout_ns, active_timeout_ns) == 0 or longest_ns > MAX_TIME_NS:
            raise ValueError("time-outs must be above 0 and below 146 years")
        if packet_sampling == 0 or flow_sampling == 0:
            raise ValueError("sampling is one out of at least 1")
        if packet_sequence > MAX_SEQUENCE:
            raise ValueError(f"packet_sequence {packet_sequence} is not within 0 .. {MAX_SEQUENCE}")
        while slots < 2 * <uint64_t>max_flows:
            slots *= 2
        self.most_slots = slots
        slots = min(slots, <uint64_t>FIRST_SLOTS)
        self.max_flows = max_flows
        self.hand_step = <uint32_t>(<uint64_t>max_flows * 618 // 1000 + 1)
        while gcd(self.hand_step, max_flows) != 1:
            self.hand_step += 1
        self.row_capacity = row_capacity
        self.slot_mask = <uint32_t>(slots - 1)
        self.idle_ns = idle_timeout_ns
        self.active_ns = active_timeout_ns
        self.linger_ns = tcp_linger_ns
        self.vlan_in_key = vlan_in_key
        self.interface_in_key = interface_in_key
        self.packet_sampling = packet_sampling
        self.flow_sampling = flow_sampling
        self.sequence_packets = packet_sequence
        self.fragments = fragments
        self.frame_octets = frame_octets
        self.tick_shift = MIN_TICK_SHIFT
        while longest_ns >> self.tick_shift > WHEEL_BUCKETS - 4:
            self.tick_shift += 1
        self.next_flow_id = 1
        secrets = os.urandom(sizeof(self.secrets))
        memcpy(self.secrets, <const char*>secrets, sizeof(self.secrets))
        self.zero_ends = pair(0, &self.secrets[2]) + pair(0, &self.secrets[6])
        self.flows = <Flow*>map_memory(<size_t>max_flows * sizeof(Flow))
        if tcp_analysis:
            self.tcp_halves = <TcpHalf*>map_memory(<size_t>max_flows * 2 * sizeof(TcpHalf))
            self.tcp_counts = <TcpCounts*>map_memory(<size_t>max_flows * 2 * sizeof(TcpCounts))
        if packet_sequence:
            self.notes = <PacketNote*>map_memory(<size_t>max_flows * packet_sequence * sizeof(PacketNote))
            self.row_notes = <PacketNote*>map_memory(<size_t>row_capacity * packet_sequence * sizeof(PacketNote))
        self.has_extensions = entropy or name_bytes != 0
        if name_bytes != 0:
            self.names.count = <uint32_t>min(name_bytes // sizeof(NameBlock), <uint64_t>MOST_NAME_BLOCKS)
            self.names.blocks = <NameBlock*>map_memory(<size_t>self.names.count * sizeof(NameBlock))
            self.row_names = <uint8_t*>map_memory(<size_t>row_capacity * 2 * DIGEST_EXTENSION_MAX_BYTES)
        self.slot_room = <Slot*>map_memory(self.most_slots * sizeof(Slot))
        self.other_slot_room = <Slot*>map_memory(self.most_slots // 2 * sizeof(Slot))
        self.slots = self.room_of_slots(slots)
        self.row_buffer = <FlowRow*>map_memory(<size_t>row_capacity * sizeof(FlowRow))
        self.wheel = <uint32_t*>map_memory((WHEEL_BUCKETS + 1) * sizeof(uint32_t))

    def __dealloc__(self):
        unmap_memory(self.flows, <size_t>self.max_flows * sizeof(Flow))
        unmap_memory(self.tcp_halves, <size_t>self.max_flows * 2 * sizeof(TcpHalf))
        unmap_memory(self.tcp_counts, <size_t>self.max_flows * 2 * sizeof(TcpCounts))
        unmap_memory(self.notes, <size_t>self.max_flows * self.sequence_packets * sizeof(PacketNote))
        unmap_memory(self.row_notes, <size_t>self.row_capacity * self.sequence_packets * sizeof(PacketNote))
        unmap_memory(self.names.blocks, <size_t>self.names.count * sizeof(NameBlock))
        unmap_memory(self.row_names, <size_t>self.row_capacity * 2 * DIGEST_EXTENSION_MAX_BYTES)
        unmap_memory(self.slot_room, self.most_slots * sizeof(Slot))
        unmap_memory(self.other_slot_room, self.most_slots // 2 * sizeof(Slot))
        unmap_memory(self.row_buffer, <size_t>self.row_capacity * sizeof(FlowRow))
        unmap_memory(self.wheel, (WHEEL_BUCKETS + 1) * sizeof(uint32_t))

    # ---- the key ----

    cdef inline uint32_t hash_key(self, const FlowKey* key) noexcept nogil:
        """Multilinear-HM hashing with secret keys: two different keys meet with a probability of 2^-32, whoever chose
        them (Lemire and Kaser 2014, Strongly universal string hashing is fast). The last step is a bijection of 64
        bits that breaks the linearity, so that ranges of addresses and ports spread over the slots."""
        cdef const uint64_t* k = self.secrets
        cdef uint64_t total = k[12]
        total += pair(key.ends[0], &k[0]) + pair(key.ends[2], &k[4])
        if key.ip_version == 4:  # the other halves are zero: their sum is a constant
            total += self.zero_ends
        else:
            total += pair(key.ends[1], &k[2]) + pair(key.ends[3], &k[6])
        total += pair(key.ports_vlans, &k[8])
        total += (k[10] + key.interface) * (k[11] + ((<uint64_t>key.ip_version << 8) | key.protocol))
        total ^= total >> 32
        total *= k[13] | 1
        return <uint32_t>(total >> 32)

    cdef inline void take_in(self, Arrival* a, const digest* d) noexcept nogil:
        """Without branches that depend on the direction: that is a coin's toss for every packet."""
        cdef uint64_t[4] ends
        cdef uint64_t ports_vlans = 0
        cdef uint32_t low, from_low
        memcpy(ends, d.source_address, 32)  # the destination stands behind it
        # Any order will do that both directions agree on.
        if ends[0] != ends[2]:
            from_low = ends[0] < ends[2]
        elif ends[1] != ends[3]:
            from_low = ends[1] < ends[3]
        else:
            from_low = d.source_port <= d.destination_port
        low = 2 - 2 * from_low
        a.from_low = from_low
        a.packet = d
        a.key.ends[0] = ends[low]
        a.key.ends[1] = ends[low + 1]
        a.key.ends[2] = ends[2 - low]
        a.key.ends[3] = ends[3 - low]
        if self.vlan_in_key:
            ports_vlans = (<uint64_t>(d.vlan_inner & 0x0FFF) << 48) | (<uint64_t>(d.vlan_outer & 0x0FFF) << 32)
        ports_vlans |= <uint64_t>d.source_port << (8 * low)
        ports_vlans |= <uint64_t>d.destination_port << (16 - 8 * low)
        a.key.ports_vlans = ports_vlans
        a.key.interface = d.interface if self.interface_in_key else 0
        a.key.protocol = d.protocol
        a.key.ip_version = d.ip_version
        a.key.state = STATE_EMPTY
        a.key.forward_is_low = from_low
        a.hash = self.hash_key(&a.key)

    @staticmethod
    cdef inline bint same_key(const FlowKey* a, const FlowKey* b) noexcept nogil:
        return (
            (a.ends[0] ^ b.ends[0]) | (a.ends[1] ^ b.ends[1]) | (a.ends[2] ^ b.ends[2]) | (a.ends[3] ^ b.ends[3])
            | (a.ports_vlans ^ b.ports_vlans) | (a.interface ^ b.interface)
            | (a.protocol ^ b.protocol) | (a.ip_version ^ b.ip_version)
        ) == 0

    # ---- the index ----

    cdef inline Flow* find(self, const FlowKey* key, uint32_t hash) noexcept nogil:
        cdef uint32_t i = hash & self.slot_mask
        cdef Flow* flow
        while self.slots[i].flow != 0:
            if self.slots[i].hash == hash:
                flow = &self.flows[self.slots[i].flow - 1]
                if FlowTable.same_key(&flow.key, key):
                    return flow
            i = (i + 1) & self.slot_mask
        return NULL

    cdef inline void index_flow(self, uint32_t number, uint32_t hash) noexcept nogil:
        cdef uint32_t i = hash & self.slot_mask
        while self.slots[i].flow != 0:
            i = (i + 1) & self.slot_mask
        self.slots[i].hash = hash
        self.slots[i].flow = number + 1

    cdef Slot* room_of_slots(self, uint64_t count) noexcept nogil:
        """The largest index and each quarter of one stand in one room, the sizes between in the other."""
        cdef Slot* room = self.slot_room
        while count < self.most_slots:
            count *= 2
            room = self.other_slot_room if room == self.slot_room else self.slot_room
        return room

    cdef void double_index(self) noexcept nogil:
        """A small index stays in the cache, so it grows with the flows."""
        cdef Slot* old = self.slots
        cdef uint32_t count = self.slot_mask + 1
        cdef uint32_t i
        self.slots = self.room_of_slots(2 * <uint64_t>count)
        self.slot_mask = 2 * count - 1
        for i in range(count):
            if old[i].flow != 0:
                self.index_flow(old[i].flow - 1, old[i].hash)
        give_back(old, count * sizeof(Slot))

    cdef void unindex_flow(self, uint32_t number, uint32_t hash) noexcept nogil:
        """Closes the gap by moving later slots of the same run back, so that no markers of deletion pile up."""
        cdef uint32_t gap = hash & self.slot_mask
        cdef uint32_t i
        while self.slots[gap].flow != number + 1:
            gap = (gap + 1) & self.slot_mask
        i = gap
        while True:
            i = (i + 1) & self.slot_mask
            if self.slots[i].flow == 0:
                break
            # A slot may move to the gap unless its home lies behind the gap.
            if ((i - self.slots[i].hash) & self.slot_mask) >= ((i - gap) & self.slot_mask):
                self.slots[gap] = self.slots[i]
                gap = i
        self.slots[gap].flow = 0

    # ---- the wheel ----

    cdef inline uint64_t deadline_ns(self, const Flow* flow, int* reason) noexcept nogil:
        cdef uint64_t deadline
        if flow.key.state & STATE_CLOSED:
            deadline = flow.last_ns + self.linger_ns
            reason[0] = END_OF_FLOW
        else:
            deadline = flow.last_ns + self.idle_ns
            reason[0] = END_IDLE
        if flow.start_ns + self.active_ns < deadline and not flow.key.state & STATE_EMPTY:
            deadline = flow.start_ns + self.active_ns
            reason[0] = END_ACTIVE
        return deadline

    cdef inline void arm(self, Flow* flow, uint64_t deadline_ns) noexcept nogil:
        cdef uint32_t number = <uint32_t>(flow - self.flows)
        cdef uint64_t tick = ((deadline_ns - 1) >> self.tick_shift) + 1  # the first tick at or behind the deadline
        cdef uint32_t bucket
        if tick <= self.tick:
            tick = self.tick + 1
        bucket = tick & (WHEEL_BUCKETS - 1)
        flow.bucket = bucket
        flow.previous = 0
        flow.next = self.wheel[bucket]
        if flow.next != 0:
            self.flows[flow.next - 1].previous = number + 1
        self.wheel[bucket] = number + 1

    cdef inline void disarm(self, Flow* flow) noexcept nogil:
        if flow.previous != 0:
            self.flows[flow.previous - 1].next = flow.next
        else:
            self.wheel[flow.bucket] = flow.next
        if flow.next != 0:
            self.flows[flow.next - 1].previous = flow.previous
            if flow.previous == 0:
                self.flows[flow.next - 1].bucket = flow.bucket

    cdef bint turn_wheel(self) noexcept nogil:
        """Expires what is due at now_ns. False: the row buffer is full, call again after it was emptied."""
        cdef uint64_t target = self.now_ns >> self.tick_shift
        cdef uint64_t deadline
        cdef uint32_t bucket
        cdef Flow* flow
        cdef int reason
        while True:
            while self.wheel[WHEEL_DUE] != 0:
                flow = &self.flows[self.wheel[WHEEL_DUE] - 1]
                if flow.next != 0:
                    prefetch_for_write(&self.flows[flow.next - 1])
                    prefetch_for_write(&self.flows[flow.next - 1].flow_id)
                deadline = self.deadline_ns(flow, &reason)
                if deadline > self.now_ns:
                    self.disarm(flow)
                    self.arm(flow, deadline)
                elif self.rows_ready == self.row_capacity:
                    return False
                elif reason == END_ACTIVE:
                    self.split(flow)
                    self.disarm(flow)
                    self.arm(flow, self.deadline_ns(flow, &reason))
                else:
                    self.end(flow, reason)
            if self.tick >= target:
                return True
            if target - self.tick > WHEEL_BUCKETS:
                self.tick = target - WHEEL_BUCKETS  # one turn meets every flow
            self.tick += 1
            bucket = self.tick & (WHEEL_BUCKETS - 1)
            self.wheel[WHEEL_DUE] = self.wheel[bucket]
            if self.wheel[bucket] != 0:
                self.flows[self.wheel[bucket] - 1].bucket = WHEEL_DUE
                self.wheel[bucket] = 0

    cdef inline bint move_time(self, uint64_t now_ns) noexcept nogil:
        """Stream time only grows. False: the row buffer is full."""
        if now_ns > self.now_ns:
            self.now_ns = now_ns
            if self.used == 0:
                self.tick = now_ns >> self.tick_shift
        if self.now_ns >> self.tick_shift > self.tick or self.wheel[WHEEL_DUE] != 0:
            return self.turn_wheel()
        return True

    cdef inline uint64_t stream_time(self, uint64_t timestamp_ns) noexcept nogil:
        """The time stamp on the time line of the first epoch: steps of the clock taken out."""
        cdef int64_t t = <int64_t>min(timestamp_ns, MAX_TIME_NS) - self.stepped_ns
        return <uint64_t>t if t > 0 else 0

    # ---- birth and end of a flow ----

    cdef Flow* begin(self, const Arrival* a) noexcept nogil:
        """A new flow for this packet. The caller has seen to it that a row is free, should one have to go."""
        cdef const digest* d = a.packet
        cdef Flow* flow
        cdef uint32_t number
        if self.used == self.max_flows:
            self.evict()
        if self.free_list != 0:
            number = self.free_list - 1
            self.free_list = self.flows[number].next
        else:
            number = self.high_water
            self.high_water += 1
        flow = &self.flows[number]
        memset(flow, 0, sizeof(Flow))
        if self.tcp_halves != NULL and d.protocol == PROTOCOL_TCP:
            memset(&self.tcp_halves[2 * <size_t>number], 0, 2 * sizeof(TcpHalf))
        flow.key = a.key
        flow.hash = a.hash
        flow.flow_id = self.next_flow_id
        flow.last_ns = self.now_ns
        flow.start_ns = self.now_ns
        flow.interface = d.interface
        flow.mpls = d.mpls
        flow.vlan_tags = d.vlan_tags
        flow.vlan_outer = d.vlan_outer
        flow.vlan_inner = d.vlan_inner
        if d.status & DIGEST_ICMP:
            flow.icmp_type_code = <uint16_t>((d.icmp_type << 8) | d.icmp_code)
        memcpy(flow.source_mac, d.source_mac, 6)
        memcpy(flow.destination_mac, d.destination_mac, 6)
        if d.protocol != PROTOCOL_TCP or d.tcp_flags & (TCP_SYN | TCP_ACK) == TCP_SYN:
            flow.biflow_direction = 1
        elif d.tcp_flags & TCP_SYN:
            flow.biflow_direction = 2
        self.next_flow_id += 1
        if 2 * (self.used + 1) > self.slot_mask + 1 and self.slot_mask + 1 < self.most_slots:
            self.double_index()
        self.index_flow(number, a.hash)
        self.arm(flow, self.now_ns + min(self.idle_ns, self.active_ns))
        self.used += 1
        self.counts.flows_created += 1
        if self.used > self.counts.peak_flows:
            self.counts.peak_flows = self.used
        return flow

    cdef void end(self, Flow* flow, int reason) noexcept nogil:
        cdef uint32_t number = <uint32_t>(flow - self.flows)
        self.write_row(flow, reason)
        self.disarm(flow)
        self.unindex_flow(number, flow.hash)
        if flow.application != APPLICATION_NONE:
            free_name(&self.names, flow.names[FORWARD])
            free_name(&self.names, flow.names[REVERSE])
            self.counts.partial_names += flow.partial_names != 0
        flow.flow_id = 0
        flow.next = self.free_list
        self.free_list = number + 1
        self.used -= 1

    cdef void split(self, Flow* flow) noexcept nogil:
        """The active time-out: the record leaves, the flow stays, with its direction and its flowId."""
        cdef TcpFlow tcp
        cdef int side
        cdef Direction[2] before
        memcpy(before, flow.directions, sizeof(before))
        self.write_row(flow, END_ACTIVE)
        memset(flow.directions, 0, sizeof(flow.directions))
        for side in range(2):
            flow.directions[side].entropy = before[side].entropy
            flow.directions[side].has_entropy = before[side].has_entropy
        if self.tcp_halves != NULL and flow.key.protocol == PROTOCOL_TCP:
            tcp = self.tcp_of(flow)
            forget_counts(&tcp)
        flow.key.state |= STATE_EMPTY | STATE_OLD

    cdef void evict(self) noexcept nogil:
        """Makes room: the first flow that the hand meets which has ended or is a single packet, else of EVICTION_SAMPLE
        flows TCP that never was answered, else the longest silent.

        The hand visits every flow once a round in steps of the golden section, so that its next few flows are spread
        over the pool, and a flow that took a place has a whole round to show more packets."""
        cdef int _i, value, reason, least = 100
        cdef Flow* flow
        cdef Flow* victim = NULL
        for _i in range(EVICTION_SAMPLE):
            flow = &self.flows[self.hand]
            self.hand = <uint32_t>((<uint64_t>self.hand + self.hand_step) % self.max_flows)
            value = FlowTable.worth(flow)
            if victim == NULL or value < least or (value == least and flow.last_ns < victim.last_ns):
                victim = flow
                least = value
            if least <= WORTH_SINGLE_PACKET:
                break
        reason = self.reason_now(victim, END_LACK_OF_RESOURCES)
        if reason == END_LACK_OF_RESOURCES and not victim.key.state & STATE_EMPTY:
            self.counts.evicted[least] += 1
        self.end(victim, reason)

    cdef inline int reason_now(self, const Flow* flow, int otherwise) noexcept nogil:
        """The reason of a flow that has to go before the wheel came to it."""
        cdef int reason
        if self.deadline_ns(flow, &reason) <= self.now_ns:
            return reason
        return END_OF_FLOW if flow.key.state & STATE_CLOSED else otherwise

    @staticmethod
    cdef inline int worth(const Flow* flow) noexcept nogil:
        cdef uint64_t forward = flow.directions[FORWARD].packets
        cdef uint64_t reverse = flow.directions[REVERSE].packets
        if flow.key.state & (STATE_EMPTY | STATE_CLOSED):
            return WORTH_NOTHING
        if flow.key.state & STATE_OLD:  # these packets are only those since its last record
            return WORTH_MORE
        if forward + reverse == 1:
            return WORTH_SINGLE_PACKET
        if flow.key.protocol == PROTOCOL_TCP and (forward == 0 or reverse == 0):
            return WORTH_HALF_OPEN
        return WORTH_MORE

    cdef inline uint64_t due_ns(self, const Flow* flow, int reason) noexcept nogil:
        """When the flow's time-out was over, by the clock that stamps the packets; 0: it was ended before that."""
        cdef int _reason
        cdef uint64_t deadline
        if reason == END_FORCED or reason == END_LACK_OF_RESOURCES:
            return 0
        deadline = self.deadline_ns(flow, &_reason)
        return <uint64_t>max(<int64_t>min(deadline, self.now_ns) + self.stepped_ns, <int64_t>1)

    cdef void write_row(self, const Flow* flow, int reason) noexcept nogil:
        cdef FlowRow* row = &self.row_buffer[self.rows_ready]
        cdef TcpFlow tcp
        cdef const Direction* f = &flow.directions[FORWARD]
        cdef const Direction* r = &flow.directions[REVERSE]
        cdef int source = 0 if flow.key.forward_is_low else 2
        cdef uint16_t low_port = <uint16_t>flow.key.ports_vlans
        cdef uint16_t high_port = <uint16_t>(flow.key.ports_vlans >> 16)
        if f.packets + r.packets == 0:  # nothing came since the last split
            return
        memcpy(row.source_address, &flow.key.ends[source], 16)
        memcpy(row.destination_address, &flow.key.ends[2 - source], 16)
        row.source_port = low_port if source == 0 else high_port
        row.destination_port = high_port if source == 0 else low_port
        row.vlan_outer = flow.vlan_outer
        row.vlan_inner = flow.vlan_inner
        row.vlan_tags = flow.vlan_tags
        row.interface = flow.interface
        row.mpls = flow.mpls
        row.protocol = flow.key.protocol
        row.ip_version = flow.key.ip_version
        row.end_reason = <uint8_t>reason
        row.biflow_direction = flow.biflow_direction
        row.icmp_type_code = flow.icmp_type_code
        row.flow_id = flow.flow_id
        row.due_ns = self.due_ns(flow, reason)
        row.start_ns = f.first_ns if r.packets == 0 or (f.packets != 0 and f.first_ns < r.first_ns) else r.first_ns
        row.end_ns = f.last_ns if f.last_ns > r.last_ns else r.last_ns
        memcpy(row.source_mac, flow.source_mac, 12)  # both
        row.forward = f[0]
        row.reverse = r[0]
        if self.tcp_halves != NULL and flow.key.protocol == PROTOCOL_TCP:
            tcp = self.tcp_of(flow)
            report_tcp(&row.forward_tcp, &tcp, FORWARD, f.payload_octets)
            report_tcp(&row.reverse_tcp, &tcp, REVERSE, r.payload_octets)
            report_round_trips(row)
        elif self.tcp_halves != NULL:
            row.rtt_min_us = row.rtt_last_us = row.rtt_samples = 0
            memset(&row.forward_tcp, 0, sizeof(row.forward_tcp))
            memset(&row.reverse_tcp, 0, sizeof(row.reverse_tcp))
        if self.names.blocks != NULL:
            self.write_names(flow, row)
        row.noted_packets = 0
        if flow.noted_packets != 0 and not flow.key.state & STATE_OLD:
            self.write_notes(flow, row)
        self.rows_ready += 1
        self.counts.ended[reason] += 1
        self.counts.exported_flows += 1
        self.counts.exported_packets += f.packets + r.packets
        self.counts.exported_octets += f.octets + r.octets
        self.counts.active_flow_packets -= f.packets + r.packets

    cdef void write_notes(self, const Flow* flow, FlowRow* row) noexcept nogil:
        cdef PacketNote* room = &self.row_notes[<size_t>self.rows_ready * self.sequence_packets]
        memcpy(room, self.notes_of(flow), flow.noted_packets * sizeof(PacketNote))
        row.noted_packets = flow.noted_packets
        row.notes = room

    cdef void write_names(self, const Flow* flow, FlowRow* row) noexcept nogil:
        cdef uint8_t* room = self.row_names + <size_t>self.rows_ready * 2 * DIGEST_EXTENSION_MAX_BYTES
        cdef uint32_t length
        cdef int side
        memset(row.texts, 0, sizeof(row.texts))
        row.dns_type = 0
        row.texts[TEXT_APPLICATION].octets = <const uint8_t*>application_texts[flow.application]
        row.texts[TEXT_APPLICATION].length = <uint32_t>strlen(application_texts[flow.application])
        for side in range(2):
            if flow.names[side] != 0:
                length = load_name(&self.names, flow.names[side], room)
                point_to_fields(row, room, length, side)
                room += length

    # ---- what inspection found ----

    cdef void take_extension(self, Flow* flow, int side, const digest* d) noexcept nogil:
        """The first application that is recognised is the flow's; of each direction, the first names that are whole."""
        cdef const uint8_t* fields = <const uint8_t*>d + DIGEST_FIXED_BYTES
        cdef digest_extension head
        cdef Direction* x = &flow.directions[side]
        cdef uint32_t length = d.extension_length
        if length < sizeof(head) or length > DIGEST_EXTENSION_MAX_BYTES or d.length - DIGEST_MIN_BYTES != length:
            return
        memcpy(&head, fields, sizeof(head))
        if head.flags & EXTENSION_ENTROPY and not x.has_entropy:
            x.has_entropy = True
            x.entropy = head.entropy
        if self.names.blocks == NULL or head.application == APPLICATION_NONE or head.application >= APPLICATION_COUNT:
            return
        if flow.application == APPLICATION_NONE:
            flow.application = head.application
            self.counts.applications[head.application] += 1
        if flow.application == head.application:
            self.take_names(flow, side, fields + sizeof(head), length - sizeof(head), head.flags & EXTENSION_PARTIAL)

    cdef void take_names(self, Flow* flow, int side, const uint8_t* fields, uint32_t length,
                         bint is_partial) noexcept nogil:
        cdef uint8_t bit = <uint8_t>(1 << side)
        if flow.names[side] != 0 and not flow.partial_names & bit:
            return
        length = fields_length(fields, length)
        if is_partial:
            flow.partial_names |= bit
        else:
            flow.partial_names &= ~bit
        if length == 0 or (flow.names[side] != 0 and length <= self.names.blocks[flow.names[side] - 1].length):
            return
        free_name(&self.names, flow.names[side])
        flow.names[side] = store_name(&self.names, fields, length)
        if flow.names[side] == 0:
            self.counts.dropped_names += 1

    # ---- a packet ----

    cdef inline PacketNote* notes_of(self, const Flow* flow) noexcept nogil:
        return &self.notes[<size_t>(flow - self.flows) * self.sequence_packets]

    cdef void note_packet(self, Flow* flow, uint64_t time_ns, uint16_t length, uint8_t flags, bint back) noexcept nogil:
        cdef PacketNote* note = self.notes_of(flow) + flow.noted_packets
        note.time_ns = time_ns
        note.length = length
        note.tcp_flags = flags
        note.direction = -1 if back else 1
        flow.noted_packets += 1
        if flow.noted_packets == self.sequence_packets:
            flow.key.state |= STATE_NOTED

    cdef inline void count(self, Flow* flow, const Arrival* a) noexcept nogil:
        cdef const digest* d = a.packet
        cdef Direction* x = &flow.directions[a.from_low ^ flow.key.forward_is_low]
        cdef uint64_t time_ns = min((<uint64_t>d.timestamp_high << 32) | d.timestamp_low, MAX_TIME_NS)
        cdef uint32_t octets = d.ip_octets
        cdef uint16_t length
        cdef uint8_t flags = <uint8_t>d.tcp_flags
        if d.status & DIGEST_ZERO_LENGTH and not self.frame_octets:
            octets = 0 if d.ip_version == 4 else 40
        length = <uint16_t>min(octets, <uint32_t>0xFFFF)
        if flow.key.state & STATE_EMPTY:
            flow.start_ns = self.now_ns
            flow.key.state ^= STATE_EMPTY
        if x.packets == 0:
            x.first_ns = time_ns
            x.last_ns = time_ns
            x.min_length = length
            x.min_ttl = d.ttl
            x.tos = d.tos
            x.tcp_sequence = d.tcp_sequence
            x.tcp_initial_flags = flags
        else:
            x.tcp_later_flags |= flags
        x.packets += 1
        x.octets += octets
        x.payload_octets += d.payload_octets
        x.tcp_flags |= flags
        x.first_ns = min(x.first_ns, time_ns)
        x.last_ns = max(x.last_ns, time_ns)
        x.min_length = min(x.min_length, length)
        x.max_length = max(x.max_length, length)
        x.min_ttl = min(x.min_ttl, d.ttl)
        x.max_ttl = max(x.max_ttl, d.ttl)
        if d.status & DIGEST_DONT_FRAGMENT:
            x.fragment_flags |= 0x40
        if d.status & DIGEST_MORE_FRAGMENTS:
            x.fragment_flags |= 0x20
        if self.tcp_halves != NULL and d.status & DIGEST_TCP:
            self.analyse_tcp(flow, a.from_low ^ flow.key.forward_is_low, d, time_ns)
        if self.sequence_packets != 0 and not flow.key.state & (STATE_OLD | STATE_NOTED):
            self.note_packet(flow, time_ns, length, flags, a.from_low ^ flow.key.forward_is_low)
        flow.last_ns = self.now_ns
        self.counts.metered_packets += 1
        self.counts.metered_octets += octets
        self.counts.active_flow_packets += 1
        if flags & (TCP_FIN | TCP_RST) and d.protocol == PROTOCOL_TCP and not flow.key.state & STATE_CLOSED:
            self.close_tcp(flow, flags)

    cdef inline TcpFlow tcp_of(self, const Flow* flow) noexcept nogil:
        cdef TcpFlow tcp
        cdef size_t first = 2 * <size_t>(flow - self.flows)
        tcp.halves = &self.tcp_halves[first]
        tcp.counts = &self.tcp_counts[first]
        return tcp

    cdef inline void analyse_tcp(self, const Flow* flow, int side, const digest* d, uint64_t time_ns) noexcept nogil:
        """Of a segment whose length is not known, nothing is said, and the next one begins anew."""
        cdef uint32_t events
        cdef Segment segment
        cdef TcpFlow tcp = self.tcp_of(flow)
        if d.status & (DIGEST_CUT_TRANSPORT | DIGEST_MORE_FRAGMENTS):
            forget_state(&tcp, side)
            return
        take_digest(&segment, d, time_ns)
        events = analyse(&tcp, side, &segment)
        while events != 0:
            self.counts.tcp_events[lowest_bit(events)] += 1
            events &= events - 1

    cdef void close_tcp(self, Flow* flow, uint8_t flags) noexcept nogil:
        """FIN both ways or RST ends the flow after a short wait, for the last acknowledgement and for repeats."""
        cdef int reason
        cdef uint8_t both = flow.directions[FORWARD].tcp_flags & flow.directions[REVERSE].tcp_flags
        if flags & TCP_RST or both & TCP_FIN:
            flow.key.state |= STATE_CLOSED
            self.disarm(flow)
            self.arm(flow, self.deadline_ns(flow, &reason))

    cdef bint selects(self, uint32_t hash) noexcept nogil:
        """Every packet_sampling-th packet (RFC 5475, 5.1), of the flows that have one flow_sampling-th of all hashes
        (RFC 7014, 6.1.2): both directions of a flow have one hash, and nobody knows its secrets."""
        cdef bint in_turn = self.sampling_turn == 0
        self.sampling_turn += 1
        if self.sampling_turn == self.packet_sampling:
            self.sampling_turn = 0
        return in_turn and (<uint64_t>hash * self.flow_sampling) >> 32 == 0

    cdef inline bint meter(self, const Arrival* a) noexcept nogil:
        """One packet into its flow. False, and nothing done, when the row buffer is full."""
        cdef const digest* d = a.packet
        cdef uint64_t time_ns
        cdef Flow* flow
        cdef int reason
        cdef digest completed
        cdef Arrival with_ports
        if d == NULL:
            self.counts.observed_packets += 1
            self.counts.ignored_packets += 1
            return True
        time_ns = self.stream_time((<uint64_t>d.timestamp_high << 32) | d.timestamp_low)
        if not self.move_time(time_ns) or self.rows_ready == self.row_capacity:
            return False
        if d.status & (DIGEST_MORE_FRAGMENTS | DIGEST_LATER_FRAGMENT) and self.fragments is not None:
            if self.fragments.complete(d, a.key.ports_vlans >> 32, a.key.interface, self.now_ns, &completed):
                completed.extension_length = 0  # it stays behind the record
                self.take_in(&with_ports, &completed)
                a = &with_ports
                d = a.packet
        if (self.packet_sampling != 1 or self.flow_sampling != 1) and not self.selects(a.hash):
            self.counts.observed_packets += 1
            self.counts.unsampled_packets += 1
            return True
        flow = self.find(&a.key, a.hash)
        while flow != NULL and self.deadline_ns(flow, &reason) <= self.now_ns:  # one row at most: a split empties it
            if reason == END_ACTIVE:
                self.split(flow)
            else:
                self.end(flow, reason)
                flow = NULL
        if flow != NULL and flow.key.state & STATE_CLOSED and d.tcp_flags & (TCP_SYN | TCP_ACK) == TCP_SYN:
            self.end(flow, END_OF_FLOW)  # the ports are used again
            flow = NULL
        if flow == NULL:
            flow = self.begin(a)
        if time_ns < self.now_ns:
            self.counts.late_packets += 1
        self.counts.observed_packets += 1
        self.count(flow, a)
        if self.has_extensions and a.packet.extension_length != 0:
            self.take_extension(flow, a.from_low ^ flow.key.forward_is_low, a.packet)
        return True

    cdef inline void gather(self, Group* group, Input* source) noexcept nogil:
        """The next digests, their index slots on the way into the cache."""
        cdef const uint8_t* r
        cdef const digest* d
        cdef uint32_t[2] head
        cdef Arrival* a
        group.count = 0
        while group.count < GROUP and source.offset < source.length:
            r = source.records + source.offset
            prefetch(r + RECORDS_AHEAD)
            prefetch(r + RECORDS_AHEAD + 64)
            if source.length - source.offset >= RECORD_PREFIX_BYTES + 4:
                memcpy(head, r, 8)
            else:
                head[1] = 0
            if head[1] < RECORD_PREFIX_BYTES + 4 or head[1] & 3 or head[1] > source.length - source.offset:
                source.damaged = True
                source.length = source.offset
                return
            source.offset += head[1]
            if head[0] == RECORD_DIGEST:
                a = &group.arrivals[group.count]
                group.count += 1
                a.end = source.offset
                a.packet = NULL
                a.hash = 0
                d = <const digest*>r
                if head[1] >= DIGEST_MIN_BYTES and d.version == DIGEST_VERSION:
                    self.take_in(a, d)
                prefetch_for_write(&self.slots[a.hash & self.slot_mask])

    cdef inline void fetch(self, const Group* group) noexcept nogil:
        """The flows that have their hashes, on the way into the cache: most likely those that `find` will find."""
        cdef Flow* flow
        cdef uint32_t slot, hash
        cdef int i
        for i in range(group.count):
            hash = group.arrivals[i].hash
            slot = hash & self.slot_mask
            while self.slots[slot].flow != 0 and self.slots[slot].hash != hash:
                slot = (slot + 1) & self.slot_mask
            if self.slots[slot].flow != 0:
                flow = &self.flows[self.slots[slot].flow - 1]
                prefetch_for_write(flow)
                prefetch_for_write(&flow.directions[FORWARD])
                prefetch_for_write(&flow.directions[REVERSE])
                if self.tcp_halves != NULL and group.arrivals[i].key.protocol == PROTOCOL_TCP:
                    prefetch_for_write(&self.tcp_halves[2 * <size_t>(self.slots[slot].flow - 1) + FORWARD])
                    prefetch_for_write(&self.tcp_halves[2 * <size_t>(self.slots[slot].flow - 1) + REVERSE])

    cdef uint64_t run(self, Input* source) noexcept nogil:
        """Octets consumed: short of the end when the row buffer is full, or at damaged framing.

        Three groups are under way: the slots of one and the flows of another travel into the cache while the packets
        of the third are counted."""
        cdef Group[3] groups
        cdef Group* current
        cdef uint64_t done = 0
        cdef int turn = 0
        cdef int i
        self.gather(&groups[0], source)
        self.gather(&groups[1], source)
        self.fetch(&groups[0])
        while True:
            self.gather(&groups[(turn + 2) % 3], source)
            self.fetch(&groups[(turn + 1) % 3])
            current = &groups[turn]
            if current.count == 0:
                return source.length
            for i in range(current.count):
                if not self.meter(&current.arrivals[i]):
                    source.damaged = False  # not reached yet
                    return done
                done = current.arrivals[i].end
            turn = (turn + 1) % 3

    cdef inline void fetch_to_end(self, const Flow* flow) noexcept nogil:
        """A flow that `end` comes to soon, and its slot."""
        prefetch_for_write(&self.slots[flow.hash & self.slot_mask])
        prefetch_for_write(flow + FLUSH_AHEAD)
        prefetch_for_write(&(flow + FLUSH_AHEAD).directions[FORWARD])
        prefetch_for_write(&(flow + FLUSH_AHEAD).directions[REVERSE])
        prefetch_for_write(&(flow + FLUSH_AHEAD).flow_id)

    # ---- for Python ----

    def update(self, uintptr_t address, uint64_t length):
        cdef Input source
        cdef uint64_t consumed
        if address & 3:
            raise ValueError("records are aligned to 4 octets")
        source.records = <const uint8_t*>address
        source.length = length
        source.offset = 0
        source.damaged = False
        with nogil:
            consumed = self.run(&source)
        if source.damaged:
            raise ValueError(f"damaged record at offset {consumed}")
        return consumed

    def advance(self, uint64_t stream_time_ns):
        cdef bint done
        with nogil:
            done = self.move_time(self.stream_time(stream_time_ns))
        return done

    def step(self, int64_t delta_ns):
        self.stepped_ns += delta_ns

    def flush(self):
        """In the order of the pool, so that the processor sees what comes next."""
        cdef Flow* flow
        with nogil:
            while self.used != 0 and self.rows_ready < self.row_capacity:
                if self.flushed >= self.high_water:
                    self.flushed = 0
                flow = &self.flows[self.flushed]
                self.flushed += 1
                if self.flushed + FLUSH_AHEAD < self.high_water:
                    self.fetch_to_end(flow + FLUSH_AHEAD)
                if flow.flow_id != 0:
                    self.end(flow, self.reason_now(flow, END_FORCED))
        if self.used == 0:
            self.flushed = 0
        return self.used == 0

    @property
    def rows_address(self):
        return <uintptr_t>self.row_buffer

    @property
    def row_count(self):
        return self.rows_ready

    def count_delays(self, uint64_t now_ns):
        cdef uint64_t delay_ns
        cdef uint32_t i
        cdef int bucket
        for i in range(self.rows_ready):
            if self.row_buffer[i].due_ns == 0:
                continue
            delay_ns = now_ns - min(now_ns, self.row_buffer[i].due_ns)
            bucket = 0
            while bucket < DELAY_BUCKETS and delay_ns > delay_bounds_ns[bucket]:
                bucket += 1
            self.counts.delays[bucket] += 1
            self.counts.delay_ns += delay_ns

    def clear_rows(self):
        self.rows_ready = 0

    def rows(self):
        return [row_fields(&self.row_buffer[i]) for i in range(self.rows_ready)]

    @property
    def active_flows(self):
        return self.used

    @property
    def stream_time_ns(self):
        return max(<int64_t>self.now_ns + self.stepped_ns, 0)

    @property
    def memory_bytes(self):
        return (
            <size_t>self.max_flows * sizeof(Flow)
            + <size_t>self.max_flows * (2 * (sizeof(TcpHalf) + sizeof(TcpCounts)) if self.tcp_halves != NULL else 0)
            + self.most_slots * 3 // 2 * sizeof(Slot)
            + <size_t>(self.max_flows + self.row_capacity) * self.sequence_packets * sizeof(PacketNote)
            + <size_t>self.names.count * sizeof(NameBlock)
            + (<size_t>self.row_capacity * 2 * DIGEST_EXTENSION_MAX_BYTES if self.row_names != NULL else 0)
            + <size_t>self.row_capacity * sizeof(FlowRow) + (WHEEL_BUCKETS + 1) * sizeof(uint32_t)
            + (self.fragments.memory_bytes if self.fragments is not None else 0)
        )

    @property
    def tick_ns(self):
        return 1 << self.tick_shift

    def index_probes(self):
        cdef uint64_t probes = 0
        cdef uint32_t i
        for i in range(self.slot_mask + 1):
            if self.slots[i].flow != 0:
                probes += ((i - self.slots[i].hash) & self.slot_mask) + 1
        return self.used, probes

    def hash_of(self, uintptr_t address):
        cdef Arrival arrival
        self.take_in(&arrival, <const digest*>address)
        return arrival.hash

    def counters(self):
        return {
            "observed_packets": self.counts.observed_packets,
            "metered_packets": self.counts.metered_packets,
            "metered_octets": self.counts.metered_octets,
            "ignored_packets": self.counts.ignored_packets,
            "unsampled_packets": self.counts.unsampled_packets,
            "late_packets": self.counts.late_packets,
            "flows_created": self.counts.flows_created,
            "flows_idle_timeout": self.counts.ended[END_IDLE],
            "flows_active_timeout": self.counts.ended[END_ACTIVE],
            "flows_end_of_flow": self.counts.ended[END_OF_FLOW],
            "flows_forced_end": self.counts.ended[END_FORCED],
            "flows_lack_of_resources": self.counts.ended[END_LACK_OF_RESOURCES],
            "exported_flows": self.counts.exported_flows,
            "exported_packets": self.counts.exported_packets,
            "exported_octets": self.counts.exported_octets,
            "evicted_single_packet_flows": self.counts.evicted[WORTH_SINGLE_PACKET],
            "evicted_half_open_flows": self.counts.evicted[WORTH_HALF_OPEN],
            "evicted_other_flows": self.counts.evicted[WORTH_MORE],
            "tcp_retransmitted_packets": (
                self.counts.tcp_events[0] + self.counts.tcp_events[1] + self.counts.tcp_events[2]
            ),
            "tcp_out_of_order_packets": self.counts.tcp_events[3],
            "tcp_lost_segments": self.counts.tcp_events[4],
            "tcp_duplicate_acks": self.counts.tcp_events[5],
            "tcp_zero_windows": self.counts.tcp_events[8],
            "export_delay_ns": self.counts.delay_ns,
            "partial_names": self.counts.partial_names,
            "dropped_names": self.counts.dropped_names,
        } | {
            f"flows_{(<bytes>application_texts[i]).decode()}": self.counts.applications[i]
            for i in range(1, APPLICATION_COUNT)
        } | {name: self.counts.delays[i] for i, name in enumerate(DELAY_FIELDS)} | (
            self.fragments.counters() if self.fragments is not None else {}
        )

    def tcp_events(self):
        return {name: self.counts.tcp_events[bit] for bit, name in enumerate(TCP_EVENT_NAMES)}

    def gauges(self):
        return {
            "active_flows": self.used,
            "active_flow_packets": self.counts.active_flow_packets,
            "peak_flows": self.counts.peak_flows,
            "table_bytes": self.memory_bytes,
            "stream_time_ns": self.stream_time_ns,
        }


TCP_EVENT_NAMES = (
    "retransmission", "fast_retransmission", "spurious_retransmission", "out_of_order", "lost_segment",
    "duplicate_ack", "keep_alive", "keep_alive_ack", "zero_window", "zero_window_probe",
)


FLOW_BYTES = sizeof(Flow)
ROW_BYTES = sizeof(FlowRow)
