"""A flow in the table. All times are nanoseconds, all integers in host byte order."""

from libc.stdint cimport uint8_t, uint16_t, uint32_t, uint64_t

from appliance.meter.flow_row cimport Direction


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
