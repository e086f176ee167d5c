"""A place in a hostile packet, and how it is read: for the steps of the header parser (headers.pyx, tunnels.pxd).

The cursor carries two ends: `end`, how far the capture reaches, and `wire_end`, how far the packet reached on the
wire. Every read is preceded by a look at `end` (`holds`); every loop advances and enters a layer.
"""

from libc.stdint cimport uint8_t, uint16_t, uint32_t, uint64_t

cdef enum:
    MAX_LAYERS = 16

    # Ethernet types (IEEE 802 numbers); parsing steps speak of what is at the cursor by them.
    ETHERTYPE_NONE = 0
    ETHERTYPE_LENGTH_LIMIT = 0x0600  # below: an 802.3 length, and LLC behind it
    ETHERTYPE_IPV4 = 0x0800
    ETHERTYPE_ERSPAN_3 = 0x22EB
    ETHERTYPE_TRANSPARENT_ETHERNET = 0x6558
    ETHERTYPE_8021Q = 0x8100
    ETHERTYPE_IPV6 = 0x86DD
    ETHERTYPE_PPP = 0x880B  # a PPP protocol field follows
    ETHERTYPE_MPLS = 0x8847
    ETHERTYPE_MPLS_UPSTREAM = 0x8848
    ETHERTYPE_PPPOE_SESSION = 0x8864
    ETHERTYPE_8021AD = 0x88A8
    ETHERTYPE_ERSPAN_2 = 0x88BE
    ETHERTYPE_QINQ_OLD = 0x9100

    PROTOCOL_HOP_BY_HOP = 0
    PROTOCOL_ICMP = 1
    PROTOCOL_IPV4 = 4
    PROTOCOL_TCP = 6
    PROTOCOL_UDP = 17
    PROTOCOL_DCCP = 33
    PROTOCOL_IPV6 = 41
    PROTOCOL_ROUTING = 43
    PROTOCOL_FRAGMENT = 44
    PROTOCOL_GRE = 47
    PROTOCOL_AH = 51
    PROTOCOL_ICMPV6 = 58
    PROTOCOL_DESTINATION_OPTIONS = 60
    PROTOCOL_ETHERIP = 97
    PROTOCOL_SCTP = 132
    PROTOCOL_UDPLITE = 136
    PROTOCOL_MPLS = 137
    PROTOCOL_ETHERNET = 143

cdef struct Cursor:
    const uint8_t* packet
    uint64_t offset
    uint64_t end  # of what may be read
    uint64_t wire_end  # of what was there
    uint32_t layers
    uint32_t ethertype  # of what is at `offset`


cdef inline bint holds(const Cursor* c, uint64_t length) noexcept nogil:
    return c.offset + length <= c.end


cdef inline void end_at(Cursor* c, uint64_t end) noexcept nogil:
    """What is behind `end` belongs to what surrounds the packet: Ethernet's padding, for one."""
    c.wire_end = end
    if c.end > end:
        c.end = end


cdef inline bint enter_layer(Cursor* c) noexcept nogil:
    c.layers += 1
    return c.layers <= MAX_LAYERS
