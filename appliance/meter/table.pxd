"""The flow table's records, for compiled modules. All times are nanoseconds, all integers in host byte order."""

from libc.stdint cimport int8_t, uint8_t, uint16_t, uint32_t, uint64_t


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

# Both ends in an order of their own, so that the two directions of a conversation have one key.
cdef struct FlowKey:
    uint64_t[4] ends  # the low and the high end's address, 16 octets each in wire order
    uint64_t ports_vlans  # low port, high port, outer and inner VLAN identifier from the lowest bits up
    uint32_t interface  # 0 when interfaces are not in the key
    uint8_t protocol
    uint8_t ip_version
    uint8_t state  # bits STATE_*; neither hashed nor compared
    uint8_t forward_is_low  # the forward direction goes from low to high; neither hashed nor compared

# A lookup touches the first line, a packet the first and one direction's; the last is for birth and end.
cdef struct Flow:
    FlowKey key
    uint64_t last_ns  # stream time of the newest packet
    uint64_t start_ns  # stream time at which the current record began
    Direction[2] directions  # FORWARD, REVERSE
    uint64_t flow_id  # 0: a free place in the pool
    uint32_t hash
    uint32_t bucket  # of the wheel; kept right in the first flow of a list only
    uint32_t previous  # flow number + 1; 0: none
    uint32_t next
    uint32_t interface  # of the first packet, as all of these
    uint32_t mpls
    uint16_t vlan_outer
    uint16_t vlan_inner
    uint16_t icmp_type_code
    uint8_t vlan_tags
    uint8_t biflow_direction  # RFC 5103, 6.3: 0 arbitrary, 1 initiator, 2 reverse initiator
    uint8_t[6] source_mac
    uint8_t[6] destination_mac
    uint8_t noted_packets  # in its sequence
    uint8_t application  # APPLICATION_*
    uint8_t partial_names  # a bit for each direction: better ones may come
    uint8_t unused
    uint32_t[2] names  # of each direction, in the pool; 0: none

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
