# cython: language_level=3, boundscheck=False, wraparound=False, cdivision=True
"""From the flow table's rows to IPFIX messages (RFC 7011, section 3), by plans that are made out of the templates.

A plan is a list of steps, one for each field: where it stands in a row, how it is encoded, and to how many octets.
"""

from cpython.bytearray cimport PyByteArray_FromStringAndSize
from libc.stdint cimport uint8_t, uint16_t, uint32_t, uint64_t, uintptr_t
from libc.stdlib cimport calloc, free
from libc.string cimport memcpy

from appliance.meter.flow_row cimport *

cdef enum:
    MESSAGE_HEADER_BYTES = 16
    SET_HEADER_BYTES = 4
    MAX_STEPS = 192
    MAX_SEQUENCE = 20  # packets of a flow, as in the flow table
    MAX_MESSAGE_BYTES = 65535
    TEXT_BYTES_MAX = 254
    ROW_CLASSES = 6

    STEP_CONSTANT = 100
    STEP_COPY = 0
    STEP_UNSIGNED = 1
    STEP_MILLISECONDS = 2
    STEP_NANOSECONDS = 3
    STEP_VLAN = 4
    STEP_THOUSANDTHS = 5  # of a microsecond count: milliseconds
    STEP_TEXT = 6  # of variable length (RFC 7011, 7), with one octet before it that says how long it is

    SHAPE_FORWARD = 0
    SHAPE_REVERSE = 1
    SHAPE_BIFLOW = 2
    SHAPE_SEQUENCE = 3  # the fixed fields, and behind them the lists of LISTS

    LIST_COUNT = 4
    LIST_PREFIX_BYTES = 3  # of a variable-length field (RFC 7011, 7)
    LIST_HEADER_BYTES = 5  # of a basicList (RFC 6313, 4.5.1); an enterprise's number is 4 more
    ORDERED = 4  # the list's semantic

cdef uint64_t NTP_OFFSET_S = 2208988800  # from 1900 to 1970

cdef struct Step:
    uint16_t offset  # in the row
    uint8_t kind
    uint8_t source_bytes
    uint8_t bytes  # on the wire

cdef struct Plan:
    const uint8_t* constants  # the packer's
    uint16_t template_id
    uint8_t row_class
    uint8_t shape
    uint32_t record_bytes  # every text empty
    uint32_t text_count
    uint32_t step_count
    Step[MAX_STEPS] steps


cdef struct List:  # of one value for each packet
    uint16_t element
    uint32_t enterprise  # 0: IANA's
    uint8_t bytes  # on the wire

# In full size: libfixbuf misreads reduced ones in lists.
cdef List[LIST_COUNT] LISTS = [
    List(325, 0, 8),  # observationTimeNanoseconds
    List(224, 0, 8),  # ipTotalLength
    List(1016, 8057, 1),  # CESNET's packet direction: 1 or -1
    List(6, 0, 2),  # tcpControlBits
]


cdef class Message:
    """One IPFIX message, whole but for its export time and sequence number, which `stamp` fills in when it is sent."""

    cdef readonly bytearray data
    cdef readonly uint64_t records  # data records, options data included
    cdef readonly uint64_t flows  # flow records
    cdef readonly uint64_t packets  # in those
    cdef readonly uint64_t octets

    def __init__(self, bytearray data, uint64_t records, uint64_t flows=0, uint64_t packets=0, uint64_t octets=0):
        if not MESSAGE_HEADER_BYTES <= len(data) <= MAX_MESSAGE_BYTES:
            raise ValueError(f"a message of {len(data)} octets")
        self.data = data
        self.records = records
        self.flows = flows
        self.packets = packets
        self.octets = octets

    def stamp(self, uint64_t export_time_s, uint64_t sequence):
        cdef unsigned char[::1] header = self.data
        put(&header[4], export_time_s, 4)
        put(&header[8], sequence & 0xFFFFFFFF, 4)


cdef inline void put(uint8_t* out, uint64_t value, int length) noexcept nogil:
    cdef int i
    for i in range(length - 1, -1, -1):
        out[i] = <uint8_t>value
        value >>= 8


cdef inline uint64_t load(const uint8_t* source, int length) noexcept nogil:
    cdef uint16_t v2
    cdef uint32_t v4
    cdef uint64_t v8
    if length == 1:
        return source[0]
    if length == 2:
        memcpy(&v2, source, 2)
        return v2
    if length == 4:
        memcpy(&v4, source, 4)
        return v4
    memcpy(&v8, source, 8)
    return v8


cdef inline void put_unsigned(uint8_t* out, uint64_t value, int length) noexcept nogil:
    """Big-endian; a value that does not fit becomes the largest one (reduced-size encoding, RFC 7011, 6.2)."""
    if length < 8 and value >> (8 * length):
        value = ((<uint64_t>1) << (8 * length)) - 1
    if length == 8:
        put(out, value, 8)
    elif length == 4:
        put(out, value, 4)
    elif length == 2:
        put(out, value, 2)
    else:
        put(out, value, length)


cdef inline uint32_t text_bytes(const Text* text, uint32_t room) noexcept nogil:
    return min(min(text.length, <uint32_t>TEXT_BYTES_MAX), room)


cdef uint32_t texts_bytes(const Plan* plan, const FlowRow* row, uint32_t room) noexcept nogil:
    """Of all texts of a record: at most `room`, so that it fits into a message; what does not is cut off."""
    cdef uint32_t left = room
    cdef uint32_t i
    if plan.text_count != 0:
        for i in range(plan.step_count):
            if plan.steps[i].kind == STEP_TEXT:
                left -= text_bytes(<const Text*>(<const uint8_t*>row + plan.steps[i].offset), left)
    return room - left


cdef inline void encode_record(const Plan* plan, const FlowRow* row, uint8_t* out, uint32_t text_room) noexcept nogil:
    cdef const uint8_t* source
    cdef uint32_t length
    cdef const Step* step
    cdef uint64_t value
    cdef uint32_t i
    for i in range(plan.step_count):
        step = &plan.steps[i]
        source = <const uint8_t*>row + step.offset
        if step.kind == STEP_COPY:
            memcpy(out, source, step.bytes)
        elif step.kind == STEP_TEXT:
            length = text_bytes(<const Text*>source, text_room)
            text_room -= length
            out[0] = <uint8_t>length
            if length != 0:
                memcpy(out + 1, (<const Text*>source).octets, length)
                out += length
        elif step.kind == STEP_CONSTANT:
            memcpy(out, plan.constants + step.offset, step.bytes)
        else:
            value = load(source, step.source_bytes)
            if step.kind == STEP_MILLISECONDS:
                value //= 1000000
            elif step.kind == STEP_NANOSECONDS:
                value = ntp_time(value)
            elif step.kind == STEP_VLAN:
                value &= 0x0FFF
            elif step.kind == STEP_THOUSANDTHS:
                value //= 1000
            put_unsigned(out, value, step.bytes)
        out += step.bytes


cdef inline uint64_t ntp_time(uint64_t time_ns) noexcept nogil:
    """Seconds since 1900, fraction in 2^-32 s."""
    return ((time_ns // 1000000000 + NTP_OFFSET_S) << 32) | (((time_ns % 1000000000) << 32) // 1000000000)


cdef inline uint64_t value_of_note(const PacketNote* note, int which) noexcept nogil:
    if which == 0:
        return ntp_time(note.time_ns)
    if which == 1:
        return note.length
    return <uint8_t>note.direction if which == 2 else note.tcp_flags


cdef inline uint32_t list_header_bytes(const List* x) noexcept nogil:
    return LIST_PREFIX_BYTES + LIST_HEADER_BYTES + (4 if x.enterprise != 0 else 0)


cdef inline uint32_t lists_bytes(uint32_t packets) noexcept nogil:
    cdef uint32_t total = 0
    for i in range(LIST_COUNT):
        total += list_header_bytes(&LISTS[i]) + packets * LISTS[i].bytes
    return total


cdef void encode_lists(const FlowRow* row, uint8_t* out) noexcept nogil:
    """The long form of the length is allowed for short fields too; so every list begins in one way."""
    cdef const List* x
    cdef uint32_t header_bytes, i, which
    for which in range(LIST_COUNT):
        x = &LISTS[which]
        header_bytes = list_header_bytes(x)
        put(out, 255, 1)
        put(out + 1, header_bytes - LIST_PREFIX_BYTES + row.noted_packets * x.bytes, 2)
        put(out + 3, ORDERED, 1)
        put(out + 4, x.element | (0x8000 if x.enterprise != 0 else 0), 2)
        put(out + 6, x.bytes, 2)
        if x.enterprise != 0:
            put(out + 8, x.enterprise, 4)
        out += header_bytes
        for i in range(row.noted_packets):
            put(out, value_of_note(&row.notes[i], which), x.bytes)
            out += x.bytes


cdef inline int row_class(const FlowRow* row) noexcept nogil:
    cdef int family = 3 if row.ip_version == 6 else 0
    if row.protocol == 6:
        return family + 1
    if row.protocol == (58 if row.ip_version == 6 else 1):
        return family + 2
    return family


cdef inline bint has_shape(const FlowRow* row, int shape, bint biflow) noexcept nogil:
    if shape == SHAPE_SEQUENCE:
        return row.noted_packets != 0
    if shape == SHAPE_BIFLOW:
        return row.reverse.packets != 0
    if shape == SHAPE_REVERSE:
        return row.reverse.packets != 0
    return row.forward.packets != 0 and not (biflow and row.reverse.packets != 0)


cdef class Packer:
    cdef Plan* plans
    cdef int plan_count
    cdef uint32_t domain, message_bytes
    cdef bint biflow
    cdef uint8_t[MAX_MESSAGE_BYTES] room
    cdef uint32_t used, set_start
    cdef uint64_t records, flows, packets, octets
    cdef list messages
    cdef bytes constants

    def __cinit__(self, plans, *, bint biflow, uint32_t observation_domain, uint32_t message_bytes,
                  bytes constants=b""):
        cdef Plan* plan
        if not 512 <= message_bytes <= MAX_MESSAGE_BYTES:
            raise ValueError(f"message_bytes {message_bytes} is not within 512 .. {MAX_MESSAGE_BYTES}")
        self.plans = <Plan*>calloc(len(plans) or 1, sizeof(Plan))
        if self.plans == NULL:
            raise MemoryError
        self.constants = constants
        self.biflow = biflow
        self.domain = observation_domain
        self.message_bytes = message_bytes
        for template_id, class_number, shape, steps in plans:
            plan = &self.plans[self.plan_count]
            if len(steps) > MAX_STEPS or not 0 <= class_number < ROW_CLASSES or not 0 <= shape <= SHAPE_SEQUENCE:
                raise ValueError(f"template {template_id} cannot be packed")
            plan.constants = self.constants
            plan.template_id = template_id
            plan.row_class = class_number
            plan.shape = shape
            for kind, offset, source_bytes, wire_bytes in steps:
                self.add_step(plan, kind, offset, source_bytes, wire_bytes)
            longest = plan.record_bytes + (lists_bytes(MAX_SEQUENCE) if shape == SHAPE_SEQUENCE else 0)
            if longest > 512 - MESSAGE_HEADER_BYTES - SET_HEADER_BYTES:
                raise ValueError(f"template {template_id}: records of {longest} octets")
            self.plan_count += 1

    def __dealloc__(self):
        free(self.plans)

    cdef add_step(self, Plan* plan, int kind, int offset, int source_bytes, int wire_bytes):
        if kind == STEP_CONSTANT:
            if not (0 <= offset and 1 <= wire_bytes <= 255 and offset + wire_bytes <= len(self.constants)):
                raise ValueError("a step reads outside of the constants")
        elif kind == STEP_TEXT:
            if not 0 <= offset <= <int>(sizeof(FlowRow) - sizeof(Text)) or wire_bytes != 1:
                raise ValueError("a step reads outside of its row")
            plan.text_count += 1
        elif not 0 <= offset <= <int>sizeof(FlowRow) - max(source_bytes, wire_bytes if kind == STEP_COPY else 0):
            raise ValueError("a step reads outside of its row")
        is_number = kind not in (STEP_COPY, STEP_CONSTANT, STEP_TEXT)
        if is_number and (source_bytes not in (1, 2, 4, 8) or not 1 <= wire_bytes <= 8):
            raise ValueError("a step of an unknown size")
        plan.steps[plan.step_count].kind = <uint8_t>kind
        plan.steps[plan.step_count].offset = <uint16_t>offset
        plan.steps[plan.step_count].source_bytes = <uint8_t>source_bytes
        plan.steps[plan.step_count].bytes = <uint8_t>wire_bytes
        plan.step_count += 1
        plan.record_bytes += wire_bytes

    def pack(self, uintptr_t rows_address, uint32_t row_count):
        """Rows of one kind stand together, so that sets are long and templates change seldom within a message."""
        cdef const FlowRow* rows = <const FlowRow*>rows_address
        cdef bytearray class_bytes = bytearray(row_count)
        cdef unsigned char[::1] classes = class_bytes
        cdef uint32_t[ROW_CLASSES] population
        cdef uint32_t i
        cdef int p
        cdef const Plan* plan
        for p in range(ROW_CLASSES):
            population[p] = 0
        for i in range(row_count):
            classes[i] = row_class(&rows[i])
            population[classes[i]] += 1
        self.messages = []
        self.begin_message()
        for p in range(self.plan_count):
            plan = &self.plans[p]
            self.set_start = 0
            if population[plan.row_class] == 0:
                continue
            for i in range(row_count):
                if classes[i] == plan.row_class and has_shape(&rows[i], plan.shape, self.biflow):
                    self.add_record(plan, &rows[i])
            self.end_set()
        self.end_message()
        messages = self.messages
        self.messages = None
        return messages

    cdef inline void begin_message(self) noexcept:
        self.used = MESSAGE_HEADER_BYTES
        self.set_start = 0
        self.records = self.flows = self.packets = self.octets = 0

    cdef inline void end_set(self) noexcept:
        if self.set_start:
            put(&self.room[self.set_start + 2], self.used - self.set_start, 2)
            self.set_start = 0

    cdef int end_message(self) except -1:
        self.end_set()
        if self.records:
            put(&self.room[0], 10, 2)
            put(&self.room[2], self.used, 2)
            put(&self.room[4], 0, 8)
            put(&self.room[12], self.domain, 4)
            data = PyByteArray_FromStringAndSize(<char*>self.room, self.used)
            self.messages.append(Message(data, self.records, self.flows, self.packets, self.octets))
        return 0

    cdef inline int add_record(self, const Plan* plan, const FlowRow* row) except -1:
        cdef uint32_t record_bytes = plan.record_bytes
        cdef uint32_t text_room = self.message_bytes - MESSAGE_HEADER_BYTES - SET_HEADER_BYTES - plan.record_bytes
        cdef uint32_t needed
        if plan.shape == SHAPE_SEQUENCE:
            record_bytes += lists_bytes(row.noted_packets)
        record_bytes += texts_bytes(plan, row, text_room)
        needed = record_bytes + (0 if self.set_start else SET_HEADER_BYTES)
        if self.used + needed > self.message_bytes:
            self.end_message()
            self.begin_message()
        if self.set_start == 0:
            self.set_start = self.used
            put(&self.room[self.used], plan.template_id, 2)
            self.used += SET_HEADER_BYTES
        encode_record(plan, row, &self.room[self.used], text_room)
        if plan.shape == SHAPE_SEQUENCE:
            encode_lists(row, &self.room[self.used + plan.record_bytes])
        self.used += record_bytes
        self.records += 1
        if plan.shape == SHAPE_SEQUENCE:
            return 0
        self.flows += 1
        if plan.shape != SHAPE_REVERSE:
            self.packets += row.forward.packets
            self.octets += row.forward.octets
        if plan.shape != SHAPE_FORWARD:
            self.packets += row.reverse.packets
            self.octets += row.reverse.octets
        return 0


KINDS = {
    "copy": STEP_COPY, "unsigned": STEP_UNSIGNED, "milliseconds": STEP_MILLISECONDS,
    "nanoseconds": STEP_NANOSECONDS, "vlan": STEP_VLAN, "thousandths": STEP_THOUSANDTHS, "text": STEP_TEXT,
}
SHAPES = {"forward": SHAPE_FORWARD, "reverse": SHAPE_REVERSE, "biflow": SHAPE_BIFLOW, "sequence": SHAPE_SEQUENCE}


cdef dict offsets_of_rows():
    """Name of a row's field: (offset, octets). A direction's fields are named forward.NAME and reverse.NAME."""
    cdef FlowRow row
    cdef char* base = <char*>&row
    fields = {
        "source_address": (<char*>&row.source_address - base, 16),
        "destination_address": (<char*>&row.destination_address - base, 16),
        "source_port": (<char*>&row.source_port - base, sizeof(row.source_port)),
        "destination_port": (<char*>&row.destination_port - base, sizeof(row.destination_port)),
        "vlan_outer": (<char*>&row.vlan_outer - base, sizeof(row.vlan_outer)),
        "vlan_inner": (<char*>&row.vlan_inner - base, sizeof(row.vlan_inner)),
        "interface": (<char*>&row.interface - base, sizeof(row.interface)),
        "protocol": (<char*>&row.protocol - base, sizeof(row.protocol)),
        "ip_version": (<char*>&row.ip_version - base, sizeof(row.ip_version)),
        "end_reason": (<char*>&row.end_reason - base, sizeof(row.end_reason)),
        "biflow_direction": (<char*>&row.biflow_direction - base, sizeof(row.biflow_direction)),
        "icmp_type_code": (<char*>&row.icmp_type_code - base, sizeof(row.icmp_type_code)),
        "flow_id": (<char*>&row.flow_id - base, sizeof(row.flow_id)),
        "start_ns": (<char*>&row.start_ns - base, sizeof(row.start_ns)),
        "end_ns": (<char*>&row.end_ns - base, sizeof(row.end_ns)),
        "source_mac": (<char*>&row.source_mac - base, 6),
        "destination_mac": (<char*>&row.destination_mac - base, 6),
        "rtt_min_us": (<char*>&row.rtt_min_us - base, sizeof(row.rtt_min_us)),
        "rtt_last_us": (<char*>&row.rtt_last_us - base, sizeof(row.rtt_last_us)),
        "rtt_samples": (<char*>&row.rtt_samples - base, sizeof(row.rtt_samples)),
        "dns_type": (<char*>&row.dns_type - base, sizeof(row.dns_type)),
        "initial_rtt_us": (<char*>&row.forward_tcp.initial_rtt_us - base, sizeof(row.forward_tcp.initial_rtt_us)),
    }
    for name, (offset, length) in offsets_of_directions().items():
        fields["forward." + name] = (<char*>&row.forward - base + offset, length)
        fields["reverse." + name] = (<char*>&row.reverse - base + offset, length)
    for name, (offset, length) in offsets_of_reports().items():
        fields["forward.tcp." + name] = (<char*>&row.forward_tcp - base + offset, length)
        fields["reverse.tcp." + name] = (<char*>&row.reverse_tcp - base + offset, length)
    return fields


cdef dict offsets_of_directions():
    cdef Direction x
    cdef char* base = <char*>&x
    return {
        "packets": (<char*>&x.packets - base, sizeof(x.packets)),
        "octets": (<char*>&x.octets - base, sizeof(x.octets)),
        "first_ns": (<char*>&x.first_ns - base, sizeof(x.first_ns)),
        "last_ns": (<char*>&x.last_ns - base, sizeof(x.last_ns)),
        "tcp_sequence": (<char*>&x.tcp_sequence - base, sizeof(x.tcp_sequence)),
        "min_length": (<char*>&x.min_length - base, sizeof(x.min_length)),
        "max_length": (<char*>&x.max_length - base, sizeof(x.max_length)),
        "min_ttl": (<char*>&x.min_ttl - base, sizeof(x.min_ttl)),
        "max_ttl": (<char*>&x.max_ttl - base, sizeof(x.max_ttl)),
        "tos": (<char*>&x.tos - base, sizeof(x.tos)),
        "fragment_flags": (<char*>&x.fragment_flags - base, sizeof(x.fragment_flags)),
        "tcp_flags": (<char*>&x.tcp_flags - base, sizeof(x.tcp_flags)),
        "tcp_initial_flags": (<char*>&x.tcp_initial_flags - base, sizeof(x.tcp_initial_flags)),
        "tcp_later_flags": (<char*>&x.tcp_later_flags - base, sizeof(x.tcp_later_flags)),
        "entropy": (<char*>&x.entropy - base, sizeof(x.entropy)),
    }


cdef dict offsets_of_reports():
    cdef TcpReport x
    cdef char* base = <char*>&x
    return {
        "goodput_octets": (<char*>&x.goodput_octets - base, sizeof(x.goodput_octets)),
        "retransmitted_packets": (<char*>&x.retransmitted_packets - base, sizeof(x.retransmitted_packets)),
        "out_of_order_packets": (<char*>&x.out_of_order_packets - base, sizeof(x.out_of_order_packets)),
        "lost_segments": (<char*>&x.lost_segments - base, sizeof(x.lost_segments)),
        "duplicate_acks": (<char*>&x.duplicate_acks - base, sizeof(x.duplicate_acks)),
        "stalls": (<char*>&x.stalls - base, sizeof(x.stalls)),
        "max_window": (<char*>&x.max_window - base, sizeof(x.max_window)),
        "rtt_min_us": (<char*>&x.rtt_min_us - base, sizeof(x.rtt_min_us)),
        "mss": (<char*>&x.mss - base, sizeof(x.mss)),
        "window_scale": (<char*>&x.window_scale - base, sizeof(x.window_scale)),
    }


cdef dict offsets_of_texts():
    """The texts of a row: name, offset. Only steps of the kind `text` read them."""
    cdef FlowRow row
    cdef char* base = <char*>&row
    places = {
        "application": TEXT_APPLICATION, "server_name": TEXT_SERVER_NAME, "alpn": TEXT_ALPN,
        "dns_name": TEXT_DNS_NAME, "http_host": TEXT_HTTP_HOST, "http_method": TEXT_HTTP_METHOD,
        "forward.ssh_version": TEXT_FORWARD_SSH, "reverse.ssh_version": TEXT_REVERSE_SSH,
    }
    return {name: <char*>&row.texts[place] - base for name, place in places.items()}


ROW_FIELDS = offsets_of_rows()
TEXT_FIELDS = offsets_of_texts()
KINDS["constant"] = STEP_CONSTANT
