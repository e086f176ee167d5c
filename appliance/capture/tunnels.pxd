"""From an IP packet's payload to the packet that is encapsulated in it.

A payload that is no well-formed tunnel header is no tunnel: the packet then is what its IP header says. Over UDP a
tunnel is known by its port alone, so what its headers contradict is taken for something else on that port.
"""

from libc.stdint cimport uint8_t, uint16_t, uint32_t, uint64_t

from appliance.capture.cursor cimport *
from appliance.ring.digest cimport DIGEST_LATER_FRAGMENT, DIGEST_PORTS, digest
from appliance.ring.network_order cimport be16, be32

cdef enum:
    # UDP ports (IANA), and the one that Linux and flannel take for VXLAN
    PORT_L2TP = 1701
    PORT_GTP_USER = 2152
    PORT_TEREDO = 3544
    PORT_GRE = 4754
    PORT_VXLAN = 4789
    PORT_VXLAN_GPE = 4790
    PORT_CAPWAP_DATA = 5247
    PORT_GENEVE = 6081
    PORT_MPLS = 6635
    PORT_VXLAN_LINUX = 8472

    GRE_CHECKSUM = 0x8000
    GRE_ROUTING = 0x4000
    GRE_KEY = 0x2000
    GRE_SEQUENCE = 0x1000
    GRE_ACKNOWLEDGEMENT = 0x0080
    GRE_VERSION = 0x0007

    L2TP_CONTROL = 0x8000
    L2TP_LENGTH = 0x4000
    L2TP_SEQUENCE = 0x0800
    L2TP_OFFSET = 0x0200
    L2TP_VERSION = 0x000F

    GTP_EXTENSION = 0x04
    GTP_OPTIONAL = 0x07  # extension, sequence number or N-PDU number: all three fields are there
    GTP_G_PDU = 0xFF

    CAPWAP_NATIVE = 0x01  # in octet 2: the frame is of the wireless binding's kind, not Ethernet
    CAPWAP_FRAGMENT = 0x80  # in octet 3, as the next one
    CAPWAP_KEEP_ALIVE = 0x08
    WIRELESS_DATA = 0x08  # type and version, the low 4 bits of the first octet
    WIRELESS_NO_DATA = 0x40  # subtypes, in the same octet
    WIRELESS_QOS = 0x80
    WIRELESS_BETWEEN_STATIONS = 0x03  # flags, in the second octet: to and from the distribution system
    WIRELESS_PROTECTED = 0x40
    WIRELESS_ORDER = 0x80


cdef inline bint is_tunnel_port(uint16_t port) noexcept nogil:
    return (
        port == PORT_VXLAN or port == PORT_VXLAN_LINUX or port == PORT_VXLAN_GPE or port == PORT_GENEVE
        or port == PORT_GTP_USER or port == PORT_TEREDO or port == PORT_CAPWAP_DATA or port == PORT_L2TP
        or port == PORT_MPLS or port == PORT_GRE
    )


cdef inline bint enter_tunnel(Cursor* c, const digest* d) noexcept nogil:
    """From the payload of the IP header that `d` describes to what it carries, which `ethertype` then tells. False: it
    carries no packet that is known here; the cursor may stand anywhere."""
    cdef uint32_t protocol = d.protocol
    if d.status & DIGEST_LATER_FRAGMENT or protocol == PROTOCOL_TCP:
        return False
    if protocol == PROTOCOL_UDP:
        return (d.status & DIGEST_PORTS) != 0 and enter_over_udp(c, d.source_port, d.destination_port)
    if protocol == PROTOCOL_GRE:
        return enter_gre(c)
    if protocol == PROTOCOL_IPV4:
        c.ethertype = ETHERTYPE_IPV4
    elif protocol == PROTOCOL_IPV6:
        c.ethertype = ETHERTYPE_IPV6
    elif protocol == PROTOCOL_MPLS:
        c.ethertype = ETHERTYPE_MPLS
    elif protocol == PROTOCOL_ETHERNET:  # RFC 8986, End.DX2
        c.ethertype = ETHERTYPE_TRANSPARENT_ETHERNET
    elif protocol == PROTOCOL_ETHERIP:
        return enter_etherip(c)
    else:
        return False
    return True


cdef inline bint enter_etherip(Cursor* c) noexcept nogil:
    """RFC 3378: version 3, the rest of 16 bits zero."""
    if not holds(c, 2) or be16(c.packet + c.offset) != 0x3000:
        return False
    c.offset += 2
    c.ethertype = ETHERTYPE_TRANSPARENT_ETHERNET
    return True


# ---- GRE ----


cdef inline bint enter_gre(Cursor* c) noexcept nogil:
    """Version 0 (RFC 1701, 2784, 2890, NVGRE of RFC 7637) and version 1 (PPTP, RFC 2637)."""
    cdef const uint8_t* p = c.packet + c.offset
    cdef uint32_t flags, length = 4
    if not holds(c, 4):
        return False
    flags = be16(p)
    c.ethertype = be16(p + 2)
    if flags & GRE_VERSION == 0:
        if flags & (GRE_CHECKSUM | GRE_ROUTING):  # checksum and offset go together
            length += 4
    elif flags & GRE_VERSION == 1:
        if c.ethertype != ETHERTYPE_PPP or not flags & GRE_KEY or not flags & GRE_SEQUENCE:
            return False  # without a sequence number: an acknowledgement alone
        if flags & GRE_ACKNOWLEDGEMENT:
            length += 4
    else:
        return False
    if flags & GRE_KEY:
        length += 4
    if flags & GRE_SEQUENCE:
        length += 4
    c.offset += length
    if flags & GRE_VERSION == 0 and flags & GRE_ROUTING and not skip_source_routes(c):
        return False
    if c.ethertype == ETHERTYPE_ERSPAN_2:
        return enter_erspan(c, (flags & GRE_SEQUENCE) != 0)
    if c.ethertype == ETHERTYPE_ERSPAN_3:
        return enter_erspan_3(c)
    return True


cdef inline bint skip_source_routes(Cursor* c) noexcept nogil:
    """RFC 1701: entries of family, offset and length, ended by one of family 0 and length 0."""
    cdef const uint8_t* p
    while enter_layer(c):
        if not holds(c, 4):
            return False
        p = c.packet + c.offset
        c.offset += 4 + <uint32_t>p[3]
        if be16(p) == 0 and p[3] == 0:
            return True
    return False


cdef inline bint enter_erspan(Cursor* c, bint has_header) noexcept nogil:
    """Type I has no header but GRE's, and no sequence number; type II (draft-foschiano-erspan, 4.2) has version 1."""
    if has_header:
        if not holds(c, 8) or c.packet[c.offset] >> 4 != 1:
            return False
        c.offset += 8
    c.ethertype = ETHERTYPE_TRANSPARENT_ETHERNET
    return True


cdef inline bint enter_erspan_3(Cursor* c) noexcept nogil:
    """draft-foschiano-erspan, 4.3: version 2; the frame type is 0 for Ethernet, 2 for IP; O adds 8 octets."""
    cdef const uint8_t* p = c.packet + c.offset
    cdef uint32_t frame_type
    if not holds(c, 12) or p[0] >> 4 != 2:
        return False
    frame_type = (p[10] >> 2) & 0x1F
    c.offset += 20 if p[11] & 1 else 12
    if frame_type == 2:
        return enter_ip(c)
    c.ethertype = ETHERTYPE_TRANSPARENT_ETHERNET
    return frame_type == 0


# ---- UDP ----


cdef inline bint enter_over_udp(Cursor* c, uint16_t source_port, uint16_t destination_port) noexcept nogil:
    """Overlays are addressed to their port; GTP, Teredo, L2TP and CAPWAP answer from theirs."""
    cdef uint32_t length
    if not (is_tunnel_port(destination_port) or is_tunnel_port(source_port)) or not holds(c, 8):
        return False
    length = be16(c.packet + c.offset + 4)
    if length >= 8 and c.offset + length < c.wire_end:
        end_at(c, c.offset + length)
    c.offset += 8
    if destination_port == PORT_VXLAN or destination_port == PORT_VXLAN_LINUX:
        return enter_vxlan(c)
    if destination_port == PORT_VXLAN_GPE:
        return enter_vxlan_gpe(c)
    if destination_port == PORT_GENEVE:
        return enter_geneve(c)
    if destination_port == PORT_GRE:  # RFC 8086
        return enter_gre(c)
    if destination_port == PORT_MPLS:  # RFC 7510
        c.ethertype = ETHERTYPE_MPLS
        return True
    if destination_port == PORT_GTP_USER or source_port == PORT_GTP_USER:
        return enter_gtp(c)
    if destination_port == PORT_TEREDO or source_port == PORT_TEREDO:
        return enter_teredo(c)
    if destination_port == PORT_CAPWAP_DATA or source_port == PORT_CAPWAP_DATA:
        return enter_capwap(c)
    if destination_port == PORT_L2TP or source_port == PORT_L2TP:
        return enter_l2tp(c)
    return False


cdef inline bint enter_ip(Cursor* c) noexcept nogil:
    """By the first nibble."""
    cdef uint8_t nibble
    if not holds(c, 1):
        return False
    nibble = c.packet[c.offset] >> 4
    c.ethertype = ETHERTYPE_IPV6 if nibble == 6 else ETHERTYPE_IPV4
    return nibble == 4 or nibble == 6


cdef inline bint enter_vxlan(Cursor* c) noexcept nogil:
    """RFC 7348: the I flag is set."""
    if not holds(c, 8) or not c.packet[c.offset] & 0x08:
        return False
    c.offset += 8
    c.ethertype = ETHERTYPE_TRANSPARENT_ETHERNET
    return True


cdef inline bint enter_vxlan_gpe(Cursor* c) noexcept nogil:
    """draft-ietf-nvo3-vxlan-gpe: version 0; the P flag says that there is a next protocol."""
    cdef const uint8_t* p = c.packet + c.offset
    cdef uint8_t next_protocol
    if not holds(c, 8) or p[0] & 0x30:
        return False
    next_protocol = p[3] if p[0] & 0x04 else 3
    c.offset += 8
    if next_protocol == 1:
        c.ethertype = ETHERTYPE_IPV4
    elif next_protocol == 2:
        c.ethertype = ETHERTYPE_IPV6
    elif next_protocol == 3:
        c.ethertype = ETHERTYPE_TRANSPARENT_ETHERNET
    elif next_protocol == 5:
        c.ethertype = ETHERTYPE_MPLS
    else:
        return False
    return True


cdef inline bint enter_geneve(Cursor* c) noexcept nogil:
    """RFC 8926: version 0, the options' length in words of 4 octets."""
    cdef const uint8_t* p = c.packet + c.offset
    if not holds(c, 8) or p[0] >> 6 != 0:
        return False
    c.ethertype = be16(p + 2)
    c.offset += 8 + (p[0] & 0x3F) * 4
    return True


cdef inline bint enter_l2tp(Cursor* c) noexcept nogil:
    """RFC 2661, 3.1: a data message of version 2, with what its flags announce before the PPP frame."""
    cdef uint32_t flags, length = 6
    if not holds(c, 2):
        return False
    flags = be16(c.packet + c.offset)
    if flags & L2TP_CONTROL or flags & L2TP_VERSION != 2:
        return False
    if flags & L2TP_LENGTH:
        length += 2
    if flags & L2TP_SEQUENCE:
        length += 4
    if flags & L2TP_OFFSET:
        if not holds(c, length + 2):
            return False
        length += 2 + <uint32_t>be16(c.packet + c.offset + length)
    c.offset += length
    c.ethertype = ETHERTYPE_PPP
    return True


cdef inline bint enter_gtp(Cursor* c) noexcept nogil:
    """3GPP TS 29.281: version 1, GTP (not GTP'), a G-PDU; extension headers in words of 4 octets."""
    cdef const uint8_t* p = c.packet + c.offset
    cdef uint64_t end
    cdef uint32_t extension = 0
    if not holds(c, 8) or p[0] >> 4 != 3 or p[1] != GTP_G_PDU:
        return False
    end = c.offset + 8 + be16(p + 2)
    c.offset += 8
    if p[0] & GTP_OPTIONAL:
        if not holds(c, 4):
            return False
        if p[0] & GTP_EXTENSION:
            extension = p[11]
        c.offset += 4
    while extension != 0:
        p = c.packet + c.offset
        if not enter_layer(c) or not holds(c, 4) or p[0] == 0:
            return False
        c.offset += <uint32_t>p[0] * 4
        if not holds(c, 0):
            return False
        extension = c.packet[c.offset - 1]
    if end < c.offset:
        return False
    if end < c.wire_end:
        end_at(c, end)
    return enter_ip(c)


cdef inline bint enter_teredo(Cursor* c) noexcept nogil:
    """RFC 4380, 5.1.1: an authentication and an origin indication may stand before the IPv6 packet."""
    cdef const uint8_t* p = c.packet + c.offset
    if holds(c, 4) and p[0] == 0 and p[1] == 1:
        c.offset += 13 + <uint32_t>p[2] + p[3]  # client identifier, authentication value, nonce, confirmation
        p = c.packet + c.offset
    if holds(c, 8) and p[0] == 0 and p[1] == 0:
        c.offset += 8
    return enter_ip(c) and c.ethertype == ETHERTYPE_IPV6


cdef inline bint enter_capwap(Cursor* c) noexcept nogil:
    """RFC 5415, 4.3: not encrypted, the header's length in words of 4 octets; no later fragment, no keep-alive."""
    cdef const uint8_t* p = c.packet + c.offset
    cdef bint is_native
    if not holds(c, 8) or p[0] != 0 or p[1] >> 3 < 2 or p[3] & CAPWAP_KEEP_ALIVE:
        return False
    if p[3] & CAPWAP_FRAGMENT and be16(p + 6) & 0xFFF8:
        return False
    is_native = p[2] & CAPWAP_NATIVE
    if is_native and (p[2] >> 1) & 0x1F != 1:  # the wireless binding: IEEE 802.11
        return False
    c.offset += (p[1] >> 3) * 4
    if is_native:
        return enter_wireless(c)
    c.ethertype = ETHERTYPE_TRANSPARENT_ETHERNET
    return True


cdef inline bint enter_wireless(Cursor* c) noexcept nogil:
    """An IEEE 802.11 data frame; some controllers exchange the two octets of its frame control."""
    cdef const uint8_t* p = c.packet + c.offset
    cdef uint8_t kind, flags
    cdef uint32_t length = 24
    if not holds(c, 24):
        return False
    kind = p[0]
    flags = p[1]
    if kind & 0x0F != WIRELESS_DATA:
        kind = p[1]
        flags = p[0]
    if kind & 0x0F != WIRELESS_DATA or kind & WIRELESS_NO_DATA or flags & WIRELESS_PROTECTED:
        return False
    if flags & WIRELESS_BETWEEN_STATIONS == WIRELESS_BETWEEN_STATIONS:
        length += 6
    if kind & WIRELESS_QOS:
        length += 6 if flags & WIRELESS_ORDER else 2
    c.offset += length
    c.ethertype = ETHERTYPE_NONE  # LLC
    return True
