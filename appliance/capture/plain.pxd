"""Which packets are plain: see ring/plain.pxd for what becomes of them."""

from libc.stdint cimport uint8_t, uint32_t

from appliance.capture.cursor cimport ETHERTYPE_IPV4, PROTOCOL_TCP, PROTOCOL_UDP
from appliance.capture.tunnels cimport is_tunnel_port
from appliance.ring.digest cimport PLAIN_HEADERS_BYTES
from appliance.ring.network_order cimport be16

cdef enum:
    TCP_SYN = 0x02


cdef inline bint is_plain(const uint8_t* p, uint32_t captured_length, bint inner) noexcept nogil:
    """`inner`: a tunnel is to be looked into, so its packets are not plain."""
    if captured_length < PLAIN_HEADERS_BYTES or be16(p + 12) != ETHERTYPE_IPV4 or p[14] != 0x45:
        return False
    if be16(p + 16) < PLAIN_HEADERS_BYTES - 14 or be16(p + 20) & 0x3FFF:
        return False
    if p[23] == PROTOCOL_TCP:
        return True
    return p[23] == PROTOCOL_UDP and not (
        inner and (is_tunnel_port(be16(p + 34)) or is_tunnel_port(be16(p + 36)))
    )


cdef inline bint may_be_left(const uint8_t* p, uint32_t captured_length, bint inner) noexcept nogil:
    """A plain packet whose headers say it all. Those of a SYN do not: its TCP options matter."""
    return is_plain(p, captured_length, inner) and not (p[23] == PROTOCOL_TCP and p[47] & TCP_SYN)
