# cython: language_level=3, boundscheck=False, wraparound=False, cdivision=True
"""Start and stop triggers and keep rules, per packet: into a port's buffer (PortTap), or for the recording (Gate).

A PortTap is the worker's end of a port (appliance/ring/port.h). The monitor writes the rules and a command; the worker
looks for commands once a turn, and shows packets only while `is_on`. What a successor needs is in the port's memory.
"""
from libc.stdint cimport UINT64_MAX
from libc.stdlib cimport calloc, free, malloc
from libc.string cimport memcpy, memset

from appliance.capture.payload cimport *
from appliance.capture.trigger cimport *
from appliance.ring.port cimport *

cdef extern from "pcap/pcap.h" nogil:
    struct bpf_insn:
        uint16_t code
        uint32_t k
    int bpf_validate(const bpf_insn *code, int length)
    unsigned int bpf_filter(const bpf_insn *code, const uint8_t *packet, unsigned int length, unsigned int captured)

cdef enum:
    BPF_JA = 0x05  # BPF_JMP | BPF_JA
    SCRATCH_BYTES = 262144 + 64
    PACKET_HEADER_BYTES = sizeof(port_packet)

cdef enum:  # of a gate
    GATE_CLOSED = 0
    GATE_OPEN = 1
    GATE_DONE = 2


cdef bint is_program(const port_filter *candidate) noexcept nogil:
    """What may be run: libpcap accepts jumps backwards, which could run for ever."""
    cdef uint32_t i
    cdef const bpf_insn *code = <const bpf_insn *>candidate.code
    if candidate.instructions > PORT_FILTER_INSTRUCTIONS:
        return False
    for i in range(candidate.instructions):
        if code[i].code == BPF_JA and code[i].k >= candidate.instructions - i:
            return False
    return candidate.instructions == 0 or bpf_validate(code, <int>candidate.instructions) != 0


cdef int set_program(port_filter *target, bytes program) except -1:
    if len(program) % 8 or len(program) > PORT_FILTER_INSTRUCTIONS * 8:
        raise ValueError(f"a filter has at most {PORT_FILTER_INSTRUCTIONS} instructions")
    target.instructions = <uint32_t>(len(program) // 8)
    memcpy(<void *>target.code, <const uint8_t *>program, len(program))
    return 0


cdef class Criteria:
    """The rules of one capture, a private copy of them: what lies in shared memory may change."""

    cdef bint prepare(self, const port_rules *rules) noexcept nogil:
        """False: a criterion or a program in `rules` is none."""
        cdef uint32_t i
        cdef port_settings *s = &self.rules.settings
        memcpy(&self.rules, rules, sizeof(port_rules))
        if s.start_criterion > PORT_START_PLDERR or s.stop_criterion > PORT_STOP_USERSTOP or s.keep > PORT_KEEP_PLDERR:
            return False
        for i in range(PORT_FILTERS):
            if not is_program(&self.rules.filters[i]):
                return False
        self.looks_at_fcs = s.fcs_bytes == 4
        self.looks_at_payload = (
            s.start_criterion == PORT_START_PLDERR or s.stop_criterion == PORT_STOP_PLDERR or s.keep == PORT_KEEP_PLDERR
        )
        return True

    cdef uint32_t judge(self, const packet_view *packet) noexcept nogil:
        """PORT_FLAG_FCSERR, PORT_FLAG_PLDERR, PORT_FLAG_TPLD of a packet. Only what was captured whole is judged."""
        cdef uint32_t flags = PORT_FLAG_OUTGOING if packet.outgoing else 0
        cdef uint32_t length = packet.captured_length
        if length < packet.original_length:
            return flags
        if self.looks_at_fcs and not packet.outgoing:  # frames that this host sends have none yet
            if fcs_is_wrong(packet.data, length):
                flags |= PORT_FLAG_FCSERR
            length = length - 4 if length > 4 else 0
        if find_test_payload(packet.data, length, &self.found):
            flags |= PORT_FLAG_TPLD
            if not self.found.intact and not packet.checksum_not_ready:
                flags |= PORT_FLAG_PLDERR
        if self.looks_at_payload and not packet.checksum_not_ready and checksum_is_wrong(
                packet.data, length, self.linktype):
            flags |= PORT_FLAG_PLDERR
        return flags

    cdef bint matches(self, uint32_t index, const packet_view *packet) noexcept nogil:
        """An index without a filter matches nothing."""
        if index >= PORT_FILTERS or self.rules.filters[index].instructions == 0:
            return False
        return bpf_filter(<const bpf_insn *>self.rules.filters[index].code, packet.data, packet.original_length,
                          packet.captured_length) != 0

    cdef bint meets_start(self, uint32_t flags, const packet_view *packet) noexcept nogil:
        cdef uint32_t criterion = self.rules.settings.start_criterion
        if criterion == PORT_START_FCSERR:
            return flags & PORT_FLAG_FCSERR != 0
        if criterion == PORT_START_PLDERR:
            return flags & PORT_FLAG_PLDERR != 0
        if criterion == PORT_START_FILTER:
            return self.matches(self.rules.settings.start_filter, packet)
        return True

    cdef bint meets_stop(self, uint32_t flags, const packet_view *packet) noexcept nogil:
        cdef uint32_t criterion = self.rules.settings.stop_criterion
        if criterion == PORT_STOP_FCSERR:
            return flags & PORT_FLAG_FCSERR != 0
        if criterion == PORT_STOP_PLDERR:
            return flags & PORT_FLAG_PLDERR != 0
        if criterion == PORT_STOP_FILTER:
            return self.matches(self.rules.settings.stop_filter, packet)
        return False

    cdef bint keeps(self, uint32_t flags, const packet_view *packet) noexcept nogil:
        cdef uint32_t keep = self.rules.settings.keep
        if keep == PORT_KEEP_FCSERR:
            return flags & PORT_FLAG_FCSERR != 0
        if keep == PORT_KEEP_NOTPLD:
            return flags & PORT_FLAG_TPLD == 0
        if keep == PORT_KEEP_TPLD:
            return flags & PORT_FLAG_TPLD != 0 and self.found.stream == self.rules.settings.keep_index
        if keep == PORT_KEEP_FILTER:
            return self.matches(self.rules.settings.keep_index, packet)
        if keep == PORT_KEEP_PLDERR:
            return flags & PORT_FLAG_PLDERR != 0
        return True


cdef class PortTap:
    """See trigger.pyi."""

    def __cinit__(self, int fd, uint64_t generation):
        self.memory = PortMemory(fd, generation)
        self.criteria = Criteria()
        self.scratch = <uint8_t *>malloc(SCRATCH_BYTES)
        if self.scratch == NULL:
            raise MemoryError
        self.seen_request = load_u64(&self.memory.header.answered)

    def __dealloc__(self):
        free(self.scratch)

    def attach(self, uint64_t socket_serial, uint16_t linktype):
        """A socket, ours or a predecessor's, is about to be walked. A capture that goes on is taken up."""
        cdef port_header *h = self.memory.header
        self.criteria.linktype = linktype
        h.linktype = linktype
        if h.socket_serial != socket_serial:
            h.socket_serial = socket_serial
            h.block_sequence = 0
            h.block_packets = 0
        if h.state != PORT_STOPPED and not self.is_on:
            if self.criteria.prepare(self.memory.rules):
                self.is_on = True
            else:
                self.stop(PORT_BECAUSE_BAD_FILTER)

    def show(self, const uint8_t[::1] data not None, uint64_t timestamp_ns, original_length=None, *,
             bint checksum_not_ready=False, bint outgoing=False):
        """Offers one packet, as the walk through a block does."""
        cdef packet_view packet
        if data.shape[0] == 0:
            raise ValueError("a packet has at least one byte")
        packet.data = &data[0]
        packet.captured_length = <uint32_t>data.shape[0]
        packet.original_length = packet.captured_length if original_length is None else original_length
        packet.timestamp_ns = timestamp_ns
        packet.checksum_not_ready = checksum_not_ready
        packet.outgoing = outgoing
        self.look(timestamp_ns)
        if self.is_on:
            self.offer(&packet)

    def rest(self, uint64_t now_ns):
        """Says that everything that had arrived was shown, as a turn does when it finds the kernel's ring empty."""
        self.look(now_ns)
        self.kernel_was_empty()

    # ---- commands ----

    cdef void look(self, uint64_t now_ns) noexcept nogil:
        """Once a turn, before it walks anything: is there a new command? `now_ns`: CLOCK_REALTIME."""
        cdef port_header *h = self.memory.header
        cdef uint64_t request = load_u64(&h.request)
        if request == self.seen_request:
            return
        self.seen_request = request
        if h.command == PORT_COMMAND_START and h.state == PORT_STOPPED:
            self.start(now_ns)
        elif h.command == PORT_COMMAND_STOP and h.state != PORT_STOPPED:
            h.stop_ns = h.request_ns
            self.stop_request = request
            return  # answered when all that arrived before it has been seen
        store_u64(&h.answered, request)

    cdef void start(self, uint64_t now_ns) noexcept nogil:
        cdef port_header *h = self.memory.header
        store_u64(&h.tail, h.head)
        h.captures += 1
        h.packets = h.seen_packets = h.overwritten_packets = h.unknown_streams = 0
        h.start_ns = <int64_t>now_ns  # every packet from here on is still to be walked
        h.stop_ns = h.last_packet_ns = 0
        h.stopped_because = PORT_BECAUSE_NOTHING
        memset(self.memory.streams, 0, PORT_STREAMS * sizeof(port_stream))
        if not self.criteria.prepare(self.memory.rules):
            h.stopped_because = PORT_BECAUSE_BAD_FILTER
            return
        store_u32(&h.state, PORT_CAPTURING if self.criteria.rules.settings.start_criterion == PORT_START_ON
                  else PORT_WAITING)
        self.is_on = True

    cdef void stop(self, uint32_t because) noexcept nogil:
        cdef port_header *h = self.memory.header
        self.is_on = False
        h.stopped_because = because
        store_u32(&h.state, PORT_STOPPED)
        if self.stop_request:
            store_u64(&h.answered, self.stop_request)
            self.stop_request = 0

    cdef void kernel_was_empty(self) noexcept nogil:
        """Whatever arrived before the last look has been shown."""
        if self.stop_request and self.is_on:
            self.stop(PORT_BECAUSE_USER)

    # ---- packets ----

    cdef uint32_t begin_block(self, uint64_t sequence) noexcept nogil:
        """A kernel block is about to be shown; returns how many of its packets a predecessor has shown already."""
        cdef port_header *h = self.memory.header
        if sequence < h.block_sequence:
            return <uint32_t>UINT64_MAX
        if sequence > h.block_sequence:
            h.block_sequence = sequence
            h.block_packets = 0
        return <uint32_t>h.block_packets

    cdef void offer(self, const packet_view *packet) noexcept nogil:
        cdef port_header *h = self.memory.header
        h.block_packets += 1
        if not self.is_on or <int64_t>packet.timestamp_ns < h.start_ns:
            return  # it had arrived before the capture was started
        if self.stop_request and <int64_t>packet.timestamp_ns > h.stop_ns:
            self.stop(PORT_BECAUSE_USER)
            return
        self.decide(packet)

    cdef void decide(self, const packet_view *packet) noexcept nogil:
        cdef port_header *h = self.memory.header
        cdef uint32_t flags = self.criteria.judge(packet)
        cdef uint64_t gap_ns = 0
        if h.seen_packets and <int64_t>packet.timestamp_ns > h.last_packet_ns:
            gap_ns = packet.timestamp_ns - <uint64_t>h.last_packet_ns
        h.last_packet_ns = <int64_t>packet.timestamp_ns
        if flags & PORT_FLAG_TPLD:
            self.count_stream(packet, flags)
        if h.state == PORT_WAITING:
            if self.criteria.meets_start(flags, packet):
                flags |= PORT_FLAG_MET_START
                store_u32(&h.state, PORT_CAPTURING)
            else:
                flags |= PORT_FLAG_PRETRIGGER
        elif self.criteria.meets_stop(flags, packet):
            flags |= PORT_FLAG_MET_STOP
        if not self.criteria.keeps(flags, packet):
            pass
        elif not self.store(packet, flags, gap_ns):
            self.stop(PORT_BECAUSE_FULL)
        h.seen_packets += 1
        if flags & PORT_FLAG_MET_STOP and self.is_on:
            self.stop(PORT_BECAUSE_TRIGGER)

    cdef bint store(self, const packet_view *packet, uint32_t flags, uint64_t gap_ns) noexcept nogil:
        """False: the buffer is full, and is to keep the earliest packets."""
        cdef port_header *h = self.memory.header
        cdef const port_settings *settings = &self.criteria.rules.settings
        cdef port_packet header
        cdef uint64_t padding = 0
        cdef uint32_t captured = packet.captured_length
        if flags & PORT_FLAG_PRETRIGGER:
            if settings.pretrigger_packets == 0:
                return True
            while h.packets >= settings.pretrigger_packets:
                self.drop_oldest()
        if settings.byte_count and captured > settings.byte_count:
            captured = settings.byte_count
        memset(&header, 0, sizeof(header))
        header.length = (PACKET_HEADER_BYTES + captured + 7) & ~<uint32_t>7
        if header.length > self.memory.capacity:
            return False
        while h.head + header.length - h.tail > self.memory.capacity:
            if settings.stop_criterion == PORT_STOP_FULL and not flags & PORT_FLAG_PRETRIGGER:
                return False
            self.drop_oldest()
            h.overwritten_packets += 1
        header.captured_length = captured
        header.original_length = packet.original_length
        header.flags = flags
        header.timestamp_ns = packet.timestamp_ns
        header.number = h.seen_packets
        header.gap_ns = gap_ns
        header.latency_ns = PORT_NO_LATENCY
        if flags & PORT_FLAG_TPLD and self.criteria.found.sound:
            header.latency_ns = <int64_t>packet.timestamp_ns - self.criteria.found.timestamp_ns
            header.sequence = self.criteria.found.sequence
            header.stream = self.criteria.found.stream
        self.put(h.head, &header, sizeof(header))
        self.put(h.head + sizeof(header), packet.data, captured)
        self.put(h.head + sizeof(header) + captured, &padding, header.length - sizeof(header) - captured)
        h.packets += 1
        store_u64(&h.head, h.head + header.length)
        return True

    cdef void put(self, uint64_t position, const void *source, uint64_t length) noexcept nogil:
        cdef uint64_t at = position & (self.memory.capacity - 1)
        cdef uint64_t first = self.memory.capacity - at
        if first > length:
            first = length
        memcpy(self.memory.data + at, source, first)
        memcpy(self.memory.data, <const uint8_t *>source + first, length - first)

    cdef void drop_oldest(self) noexcept nogil:
        """The tail moves before its bytes are overwritten: readers look at it after they copied."""
        cdef port_header *h = self.memory.header
        # Packets begin at multiples of 8, so their length is never split by the end of the data.
        cdef uint64_t at = h.tail & (self.memory.capacity - 1) & ~<uint64_t>7
        cdef uint32_t length = (<uint32_t *>(self.memory.data + at))[0]
        cdef uint64_t used = h.head - h.tail
        if (h.packets <= 1 or used > self.memory.capacity or length < PACKET_HEADER_BYTES or length & 7
                or length > used):
            store_u64(&h.tail, h.head)  # the last one, or damage: then all of it goes
            h.packets = 0
        else:
            store_u64(&h.tail, h.tail + length)
            h.packets -= 1
        PORT_FENCE()

    # ---- streams of test payloads ----

    cdef void count_stream(self, const packet_view *packet, uint32_t flags) noexcept nogil:
        cdef test_payload *found = &self.criteria.found
        cdef port_stream *s
        cdef uint32_t i
        cdef int64_t latency
        if not found.sound:
            return  # its stream is not known
        for i in range(PORT_STREAMS):
            s = &self.memory.streams[(found.stream + i) % PORT_STREAMS]
            if s.packets == 0 or s.stream == found.stream:
                break
        else:
            self.memory.header.unknown_streams += 1
            return
        if s.packets == 0:
            s.stream = found.stream
            s.next_sequence = found.sequence
        s.packets += 1
        s.bytes += packet.original_length
        if flags & PORT_FLAG_PLDERR:
            s.payload_errors += 1
        if found.sequence >= s.next_sequence:
            s.lost += found.sequence - s.next_sequence
            s.next_sequence = found.sequence + 1
        else:
            s.misordered += 1
            if s.lost:
                s.lost -= 1  # it was taken for lost
        latency = <int64_t>packet.timestamp_ns - found.timestamp_ns
        if s.latency_packets == 0 or latency < s.latency_min_ns:
            s.latency_min_ns = latency
        if s.latency_packets == 0 or latency > s.latency_max_ns:
            s.latency_max_ns = latency
        s.latency_sum_ns += latency
        s.latency_packets += 1


cdef class Gate:
    """See trigger.pyi."""

    def __cinit__(self, uint16_t linktype, uint32_t start, bytes start_program not None, uint32_t stop,
                  bytes stop_program not None, uint32_t keep, bytes keep_program not None, uint32_t stream=0,
                  bint fcs=False, bint repeats=True):
        cdef port_rules *rules = <port_rules *>calloc(1, sizeof(port_rules))
        cdef bint is_sound
        if rules == NULL:
            raise MemoryError
        try:
            rules.settings.start_criterion = start
            rules.settings.stop_criterion = stop
            rules.settings.keep = keep
            rules.settings.stop_filter = 1
            rules.settings.keep_index = 2 if keep == PORT_KEEP_FILTER else stream
            rules.settings.fcs_bytes = 4 if fcs else 0
            for index, program in enumerate((start_program, stop_program, keep_program)):
                set_program(&rules.filters[index], program)
            self.criteria = Criteria()
            self.criteria.linktype = linktype
            is_sound = self.criteria.prepare(rules)
        finally:
            free(rules)
        if not is_sound or stop == PORT_STOP_FULL:
            raise ValueError("a gate's rules are out of range")
        self.repeats = repeats and start != PORT_START_ON
        self.state = GATE_OPEN if start == PORT_START_ON else GATE_CLOSED

    cdef uint32_t next_state(self, uint32_t state) noexcept nogil:
        """Where a packet takes it that opens it, or closes it."""
        if state == GATE_CLOSED:
            return GATE_OPEN
        return GATE_CLOSED if self.repeats else GATE_DONE

    cdef bint passes(self, const packet_view *packet) noexcept nogil:
        cdef uint32_t flags = self.criteria.judge(packet)
        cdef bint ends = False
        if self.state == GATE_CLOSED:
            if not self.criteria.meets_start(flags, packet):
                return False
            self.state = GATE_OPEN
        elif self.state == GATE_DONE:
            return False
        else:
            ends = self.criteria.meets_stop(flags, packet)
        if ends:
            self.state = self.next_state(GATE_OPEN)
        return self.criteria.keeps(flags, packet)

    def lets_pass(self, const uint8_t[::1] data not None):
        cdef packet_view packet
        memset(&packet, 0, sizeof(packet))
        if data.shape[0] == 0:
            raise ValueError("a packet has at least one byte")
        packet.data = &data[0]
        packet.captured_length = packet.original_length = <uint32_t>data.shape[0]
        return self.passes(&packet)
