"""How parts of a flow's row are filled: its texts, and what TCP analysis says."""

from libc.stdint cimport uint8_t, uint16_t, uint32_t, uint64_t
from libc.string cimport memset

from appliance.meter.flow_row cimport *
from appliance.meter.tcp cimport TcpCounts, TcpFlow, TcpHalf
from appliance.ring.digest cimport *


cdef inline uint32_t fields_length(const uint8_t* fields, uint32_t length) noexcept nogil:
    """Of the whole fields of an extension, without padding and damage."""
    cdef uint32_t at = 0
    while length - at >= 2 and fields[at] != 0 and fields[at + 1] <= length - at - 2:
        at += 2 + fields[at + 1]
    return at


cdef inline int text_of_field(uint8_t kind, int side) noexcept nogil:
    """-1: it is none."""
    if kind == FIELD_SERVER_NAME:
        return TEXT_SERVER_NAME
    if kind == FIELD_ALPN:
        return TEXT_ALPN
    if kind == FIELD_DNS_NAME:
        return TEXT_DNS_NAME
    if kind == FIELD_HTTP_HOST:
        return TEXT_HTTP_HOST
    if kind == FIELD_HTTP_METHOD:
        return TEXT_HTTP_METHOD
    if kind == FIELD_SSH_VERSION:
        return TEXT_FORWARD_SSH if side == FORWARD else TEXT_REVERSE_SSH
    return -1


cdef inline void point_to_fields(FlowRow* row, const uint8_t* fields, uint32_t length, int side) noexcept nogil:
    """The row's texts, to whole fields that stay where they are; a name of the forward direction goes first."""
    cdef uint32_t at = 0
    cdef int text
    while at < length:
        text = text_of_field(fields[at], side)
        if text >= 0 and row.texts[text].length == 0:
            row.texts[text].octets = fields + at + 2
            row.texts[text].length = min(<uint32_t>fields[at + 1], FIELD_NAME_MAX)
        elif fields[at] == FIELD_DNS_TYPE and fields[at + 1] == 2 and row.dns_type == 0:
            row.dns_type = <uint16_t>((fields[at + 2] << 8) | fields[at + 3])
        at += 2 + fields[at + 1]


cdef inline void report_tcp(TcpReport* r, const TcpFlow* t, int side, uint64_t payload_octets) noexcept nogil:
    cdef const TcpHalf* half = &t.halves[side]
    cdef const TcpCounts* c = &t.counts[side]
    cdef TcpCounts nothing
    if not t.halves[0].has_counts:
        memset(&nothing, 0, sizeof(nothing))
        c = &nothing
    r.goodput_octets = payload_octets - min(payload_octets, c.repeated_octets)
    r.retransmitted_packets = c.retransmitted_packets
    r.out_of_order_packets = c.out_of_order_packets
    r.lost_segments = c.lost_segments
    r.duplicate_acks = c.duplicate_acks
    r.zero_windows = c.zero_windows
    r.stalls = c.stalls
    r.keep_alives = c.keep_alives
    r.max_window = half.max_window
    r.rtt_min_us = half.rtt_min_us
    r.rtt_last_us = half.rtt_last_us
    r.rtt_samples = half.rtt_samples
    r.initial_rtt_us = t.halves[0].initial_rtt_us
    r.mss = half.mss
    r.window_scale = half.window_scale - 1 if half.window_scale != 0 else 0


cdef inline void report_round_trips(FlowRow* row) noexcept nogil:
    """This is somewhere on the way: from here to either end and back is the whole way once."""
    cdef const TcpReport* f = &row.forward_tcp
    cdef const TcpReport* r = &row.reverse_tcp
    row.rtt_min_us = row.rtt_last_us = f.initial_rtt_us
    row.rtt_samples = f.rtt_samples + r.rtt_samples
    if f.rtt_samples != 0 and r.rtt_samples != 0:
        row.rtt_last_us = f.rtt_last_us + r.rtt_last_us
        if row.rtt_min_us == 0 or f.rtt_min_us + r.rtt_min_us < row.rtt_min_us:
            row.rtt_min_us = f.rtt_min_us + r.rtt_min_us
