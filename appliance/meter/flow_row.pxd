"""What leaves the flow table: a row for each record. All times are nanoseconds, all integers in host byte order."""

from libc.stdint cimport int8_t, uint8_t, uint16_t, uint32_t, uint64_t

cdef enum:
    FORWARD = 0
    REVERSE = 1

cdef struct Direction:  # one cache line
    uint64_t packets
    uint64_t octets  # IP total lengths
    uint64_t first_ns
    uint64_t last_ns
    uint64_t payload_octets  # behind the transport header
    uint32_t tcp_sequence  # of the first packet
    uint16_t min_length  # IP total length, at most 65535
    uint16_t max_length
    uint8_t min_ttl
    uint8_t max_ttl
    uint8_t tos  # of the first packet
    uint8_t fragment_flags  # union, as in fragmentFlags: 0x40 DF, 0x20 MF
    uint8_t tcp_flags  # union over all packets
    uint8_t tcp_initial_flags  # of the first packet
    uint8_t tcp_later_flags  # union over all but the first
    uint8_t entropy  # of the first payload that was measured; kept over active time-outs
    uint8_t has_entropy
    uint8_t[7] reserved

# One of a flow's first packets.
cdef struct PacketNote:
    uint64_t time_ns
    uint16_t length  # IP total length, at most 65535
    uint8_t tcp_flags
    int8_t direction  # 1 forward, -1 reverse
    uint32_t unused

# What TCP analysis says of one direction (tcp.pxd); microseconds are rounded down, 0: unknown.
cdef struct TcpReport:
    uint64_t goodput_octets  # payload without what was sent before
    uint32_t retransmitted_packets
    uint32_t out_of_order_packets
    uint32_t lost_segments
    uint32_t duplicate_acks
    uint32_t zero_windows
    uint32_t stalls
    uint32_t keep_alives
    uint32_t max_window  # octets
    uint32_t rtt_min_us
    uint32_t rtt_last_us
    uint32_t rtt_samples
    uint32_t initial_rtt_us  # of the connection: the same in both directions
    uint16_t mss
    uint16_t window_scale  # 0 also when none was declared
    uint32_t unused

# A text of a row, in the order of TEXT_*. Valid as long as the row.
cdef struct Text:
    const uint8_t* octets
    uint32_t length  # at most FIELD_NAME_MAX

cdef enum:
    TEXT_APPLICATION = 0
    TEXT_SERVER_NAME
    TEXT_ALPN
    TEXT_DNS_NAME
    TEXT_HTTP_HOST
    TEXT_HTTP_METHOD
    TEXT_FORWARD_SSH
    TEXT_REVERSE_SSH
    TEXT_COUNT

# What leaves the table.
cdef struct FlowRow:
    uint8_t[16] source_address
    uint8_t[16] destination_address
    uint16_t source_port
    uint16_t destination_port
    uint16_t vlan_outer  # whole tags
    uint16_t vlan_inner
    uint32_t interface
    uint32_t mpls
    uint8_t protocol
    uint8_t ip_version
    uint8_t end_reason  # flowEndReason
    uint8_t biflow_direction
    uint16_t icmp_type_code
    uint8_t vlan_tags
    uint8_t noted_packets  # in `notes`; only in a flow's first record
    const PacketNote* notes  # valid as long as the row
    uint64_t flow_id
    uint64_t due_ns  # when its time-out was over; 0: it was ended before
    uint64_t start_ns  # over both directions
    uint64_t end_ns
    uint8_t[6] source_mac
    uint8_t[6] destination_mac
    uint32_t unused2
    Direction forward
    Direction reverse
    uint32_t rtt_min_us  # of the whole way: the handshake's, or the sum of both directions' shortest
    uint32_t rtt_last_us
    uint32_t rtt_samples
    uint32_t unused3
    TcpReport forward_tcp  # with the three above: zero without TCP analysis and in rows of other protocols
    TcpReport reverse_tcp
    Text[TEXT_COUNT] texts  # zero without applications, as is the next
    uint16_t dns_type
