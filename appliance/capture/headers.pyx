# cython: language_level=3, boundscheck=False, wraparound=False, cdivision=True
"""From packet bytes to a digest record: link layer, tags and labels, IP, tunnels, transport. Nothing here allocates.

A packet is hostile: see cursor.pxd for how it is read, and tunnels.pxd for what encapsulates what.
"""

from libc.stdint cimport uint8_t, uint16_t, uint32_t, uint64_t
from libc.stdlib cimport free, realloc
from libc.string cimport memcpy, memset

from appliance.capture.application cimport Inspection, Inspector, inspect, inspection_of
from appliance.capture.cursor cimport *
from appliance.capture.plain cimport *
from appliance.capture.tunnels cimport enter_tunnel
from appliance.ring.digest cimport *
from appliance.ring.layout cimport *
from appliance.ring.network_order cimport be16, be32
from appliance.ring.plain cimport *
from appliance.ring.prefetch cimport prefetch

cdef enum:
    AHEAD = 8  # packets whose headers are fetched ahead
    METERED = -1  # a parsing step's result when all is well; otherwise one of IGNORED_*

    # pcap link types (https://www.tcpdump.org/linktypes.html)
    LINKTYPE_NULL = 0
    LINKTYPE_ETHERNET = 1
    LINKTYPE_PPP = 9
    DLT_RAW_BSD = 12  # DLT_RAW of some systems, found in their files
    DLT_RAW_OPENBSD = 14
    LINKTYPE_PPP_HDLC = 50
    LINKTYPE_PPP_ETHER = 51
    LINKTYPE_ATM_RFC1483 = 100
    LINKTYPE_RAW = 101
    LINKTYPE_C_HDLC = 104
    LINKTYPE_LOOP = 108
    LINKTYPE_LINUX_SLL = 113
    LINKTYPE_PPP_WITH_DIRECTION = 204
    LINKTYPE_MPLS = 219
    LINKTYPE_IPV4 = 228
    LINKTYPE_IPV6 = 229
    LINKTYPE_LINUX_SLL2 = 276

    TCP_OPTION_END = 0
    TCP_OPTION_NOP = 1
    TCP_OPTION_MSS = 2
    TCP_OPTION_WINDOW_SCALE = 3
    MAX_WINDOW_SCALE = 14  # RFC 7323, 2.3: a larger one is taken for this

    OPTION_PAD1 = 0
    OPTION_JUMBO = 0xC2


cdef inline int shortage(const Cursor* c, uint64_t length) noexcept nogil:
    """Why `length` octets are missing: the capture was cut, or the packet itself ends too early."""
    return IGNORED_TRUNCATED if c.offset + length <= c.wire_end else IGNORED_MALFORMED


cdef int parse_ethernet(Cursor* c, digest* d) noexcept nogil:
    cdef const uint8_t* p = c.packet + c.offset
    if not holds(c, 14):
        return shortage(c, 14)
    if not d.status & DIGEST_LINK_ADDRESSES:  # the outermost ones
        memcpy(d.destination_mac, p, 6)
        memcpy(d.source_mac, p + 6, 6)
        d.status |= DIGEST_LINK_ADDRESSES
    c.ethertype = be16(p + 12)
    c.offset += 14
    return METERED


cdef int parse_sll(Cursor* c, digest* d) noexcept nogil:
    cdef const uint8_t* p = c.packet + c.offset
    if not holds(c, 16):
        return shortage(c, 16)
    if be16(p + 4) == 6:
        memcpy(d.source_mac, p + 6, 6)
        d.status |= DIGEST_LINK_ADDRESSES
    if be16(p) == 4:  # packet type: sent by us
        d.status |= DIGEST_OUTGOING
    c.ethertype = be16(p + 14)
    c.offset += 16
    return METERED


cdef int parse_sll2(Cursor* c, digest* d) noexcept nogil:
    cdef const uint8_t* p = c.packet + c.offset
    if not holds(c, 20):
        return shortage(c, 20)
    if p[11] == 6:
        memcpy(d.source_mac, p + 12, 6)
        d.status |= DIGEST_LINK_ADDRESSES
    if p[10] == 4:
        d.status |= DIGEST_OUTGOING
    c.ethertype = be16(p)
    c.offset += 20
    return METERED


cdef int parse_family(Cursor* c) noexcept nogil:
    """NULL and LOOP: an address family of 4 octets in either byte order; IPv6 has a number of each system's own."""
    cdef uint32_t family
    if not holds(c, 4):
        return shortage(c, 4)
    family = be32(c.packet + c.offset)
    if family > 0xFFFF:
        family = (family >> 24) | ((family >> 8) & 0xFF00)
    c.offset += 4
    if family == 2:
        c.ethertype = ETHERTYPE_IPV4
    elif family == 10 or family == 24 or family == 28 or family == 30:
        c.ethertype = ETHERTYPE_IPV6
    else:
        return IGNORED_NOT_IP
    return METERED


cdef int parse_ppp_framing(Cursor* c) noexcept nogil:
    """Address and control octets may be there or not (RFC 1662, 6.6); Cisco's framing carries an Ethernet type."""
    cdef const uint8_t* p = c.packet + c.offset
    if not holds(c, 2):
        return shortage(c, 2)
    c.ethertype = ETHERTYPE_PPP
    if p[0] == 0xFF and p[1] == 0x03:
        c.offset += 2
    elif (p[0] == 0x0F or p[0] == 0x8F) and p[1] == 0:
        if not holds(c, 4):
            return shortage(c, 4)
        c.ethertype = be16(p + 2)
        c.offset += 4
    return METERED


cdef int parse_raw(Cursor* c) noexcept nogil:
    if not holds(c, 1):
        return shortage(c, 1)
    c.ethertype = ETHERTYPE_IPV6 if c.packet[c.offset] >> 4 == 6 else ETHERTYPE_IPV4
    return METERED


cdef int parse_link(Cursor* c, digest* d, uint16_t linktype) noexcept nogil:
    if linktype == LINKTYPE_ETHERNET:
        return parse_ethernet(c, d)
    if linktype == LINKTYPE_RAW or linktype == DLT_RAW_BSD or linktype == DLT_RAW_OPENBSD:
        return parse_raw(c)
    if linktype == LINKTYPE_IPV4:
        c.ethertype = ETHERTYPE_IPV4
        return METERED
    if linktype == LINKTYPE_IPV6:
        c.ethertype = ETHERTYPE_IPV6
        return METERED
    if linktype == LINKTYPE_LINUX_SLL:
        return parse_sll(c, d)
    if linktype == LINKTYPE_LINUX_SLL2:
        return parse_sll2(c, d)
    if linktype == LINKTYPE_NULL or linktype == LINKTYPE_LOOP:
        return parse_family(c)
    if linktype == LINKTYPE_PPP or linktype == LINKTYPE_PPP_HDLC or linktype == LINKTYPE_C_HDLC:
        return parse_ppp_framing(c)
    if linktype == LINKTYPE_PPP_WITH_DIRECTION:
        c.offset += 1
        return parse_ppp_framing(c)
    if linktype == LINKTYPE_PPP_ETHER:
        c.ethertype = ETHERTYPE_PPPOE_SESSION
        return METERED
    if linktype == LINKTYPE_ATM_RFC1483:  # LLC
        return METERED
    if linktype == LINKTYPE_MPLS:
        c.ethertype = ETHERTYPE_MPLS
        return METERED
    return IGNORED_LINK_TYPE


cdef int parse_vlan_tag(Cursor* c, digest* d) noexcept nogil:
    if not holds(c, 4):
        return shortage(c, 4)
    if d.vlan_tags == 0:
        d.vlan_outer = be16(c.packet + c.offset)
    elif d.vlan_tags == 1:
        d.vlan_inner = be16(c.packet + c.offset)
    d.vlan_tags += 1
    c.ethertype = be16(c.packet + c.offset + 2)
    c.offset += 4
    return METERED


cdef int parse_mpls_entry(Cursor* c, digest* d) noexcept nogil:
    """One label stack entry (RFC 3032)."""
    cdef uint32_t entry
    if not holds(c, 4):
        return shortage(c, 4)
    entry = be32(c.packet + c.offset)
    if d.mpls == 0:
        d.mpls = entry
    c.offset += 4
    return parse_mpls_payload(c) if entry & 0x100 else METERED  # the bottom of the stack


cdef int parse_mpls_payload(Cursor* c) noexcept nogil:
    """Labels do not say what they carry. The first nibble does (RFC 4928), but for Ethernet without a control word,
    whose first nibble is anything: that is taken for it when IP's length contradicts and a known type stands there."""
    cdef const uint8_t* p = c.packet + c.offset
    cdef uint8_t nibble
    if not holds(c, 1):
        return shortage(c, 1)
    nibble = p[0] >> 4
    if nibble == 4 and not (holds(c, 4) and c.offset + be16(p + 2) > c.wire_end and names_known_type(c, 12)):
        c.ethertype = ETHERTYPE_IPV4
    elif nibble == 6 and not (holds(c, 6) and c.offset + 40 + be16(p + 4) > c.wire_end and names_known_type(c, 12)):
        c.ethertype = ETHERTYPE_IPV6
    elif nibble == 0 and (names_known_type(c, 16) or not names_known_type(c, 12)):  # a control word (RFC 4385)
        if not holds(c, 4):
            return shortage(c, 4)
        c.offset += 4
        c.ethertype = ETHERTYPE_TRANSPARENT_ETHERNET
    elif names_known_type(c, 12):
        c.ethertype = ETHERTYPE_TRANSPARENT_ETHERNET
    else:
        return IGNORED_NOT_IP
    return METERED


cdef inline bint names_known_type(const Cursor* c, uint64_t at) noexcept nogil:
    """An Ethernet type that leads to IP stands `at` octets behind the cursor."""
    cdef uint32_t ethertype
    if not holds(c, at + 2):
        return False
    ethertype = be16(c.packet + c.offset + at)
    return (
        ethertype == ETHERTYPE_IPV4 or ethertype == ETHERTYPE_IPV6 or ethertype == ETHERTYPE_8021Q
        or ethertype == ETHERTYPE_8021AD or ethertype == ETHERTYPE_MPLS or ethertype == ETHERTYPE_PPPOE_SESSION
    )


cdef int parse_pppoe(Cursor* c) noexcept nogil:
    if not holds(c, 6):
        return shortage(c, 6)
    if c.packet[c.offset] != 0x11 or c.packet[c.offset + 1] != 0:  # version 1, type 1, session data (RFC 2516)
        return IGNORED_NOT_IP
    c.offset += 6
    c.ethertype = ETHERTYPE_PPP
    return METERED


cdef int parse_ppp_protocol(Cursor* c) noexcept nogil:
    cdef uint32_t protocol
    if holds(c, 2) and c.packet[c.offset] == 0xFF and c.packet[c.offset + 1] == 0x03:  # PPTP may keep them
        c.offset += 2
    if not holds(c, 1):
        return shortage(c, 1)
    protocol = c.packet[c.offset]
    if protocol & 1:  # compressed to one octet (RFC 1661, 6.5)
        c.offset += 1
    else:
        if not holds(c, 2):
            return shortage(c, 2)
        protocol = be16(c.packet + c.offset)
        c.offset += 2
    if protocol == 0x0021:
        c.ethertype = ETHERTYPE_IPV4
    elif protocol == 0x0057:
        c.ethertype = ETHERTYPE_IPV6
    elif protocol == 0x0281 or protocol == 0x0283:
        c.ethertype = ETHERTYPE_MPLS
    else:
        return IGNORED_NOT_IP
    return METERED


cdef int parse_llc(Cursor* c) noexcept nogil:
    """802.2 with SNAP and the OUI of encapsulated Ethernet (RFC 1042); all other LLC is not IP."""
    cdef const uint8_t* p = c.packet + c.offset
    if not holds(c, 8):
        return IGNORED_NOT_IP
    if p[0] != 0xAA or p[1] != 0xAA or p[2] != 0x03 or p[3] != 0 or p[4] != 0 or p[5] != 0:
        return IGNORED_NOT_IP
    c.ethertype = be16(p + 6)
    c.offset += 8
    return METERED if c.ethertype >= ETHERTYPE_LENGTH_LIMIT else IGNORED_NOT_IP


cdef int parse_to_ip(Cursor* c, digest* d) noexcept nogil:
    """Takes off tags, labels and inner frames until an IP header stands at the cursor."""
    cdef int result
    while c.ethertype != ETHERTYPE_IPV4 and c.ethertype != ETHERTYPE_IPV6:
        if not enter_layer(c):
            return IGNORED_TOO_MANY_LAYERS
        if c.ethertype == ETHERTYPE_8021Q or c.ethertype == ETHERTYPE_8021AD or c.ethertype == ETHERTYPE_QINQ_OLD:
            result = parse_vlan_tag(c, d)
        elif c.ethertype == ETHERTYPE_MPLS or c.ethertype == ETHERTYPE_MPLS_UPSTREAM:
            result = parse_mpls_entry(c, d)
        elif c.ethertype == ETHERTYPE_PPPOE_SESSION:
            result = parse_pppoe(c)
        elif c.ethertype == ETHERTYPE_PPP:
            result = parse_ppp_protocol(c)
        elif c.ethertype == ETHERTYPE_TRANSPARENT_ETHERNET:
            result = parse_ethernet(c, d)
        elif c.ethertype < ETHERTYPE_LENGTH_LIMIT:
            result = parse_llc(c)
        else:
            return IGNORED_NOT_IP
        if result != METERED:
            return result
    return METERED


cdef int parse_ipv4(Cursor* c, digest* d) noexcept nogil:
    cdef const uint8_t* p = c.packet + c.offset
    cdef uint32_t header_octets, total, fragment
    if not holds(c, 20):
        return shortage(c, 20)
    header_octets = (p[0] & 0x0F) * 4
    if p[0] >> 4 != 4 or header_octets < 20:
        return IGNORED_MALFORMED
    total = be16(p + 2)
    if total != 0:
        if total < header_octets:
            return IGNORED_MALFORMED
        end_at(c, c.offset + total)
    else:
        total = <uint32_t>max(c.wire_end - c.offset, <uint64_t>header_octets)
        d.status |= DIGEST_ZERO_LENGTH
    if not holds(c, header_octets):
        return shortage(c, header_octets)
    d.ip_version = 4
    d.tos = p[1]
    d.ip_octets = total
    d.ttl = p[8]
    d.protocol = p[9]
    memcpy(d.source_address, p + 12, 4)
    memcpy(d.destination_address, p + 16, 4)
    if header_octets > 20:
        d.status |= DIGEST_OPTIONS
    d.fragment_id = be16(p + 4)
    fragment = be16(p + 6)
    if fragment & 0x4000:
        d.status |= DIGEST_DONT_FRAGMENT
    note_fragment(d, (fragment & 0x1FFF) * 8, (fragment & 0x2000) != 0)
    c.offset += header_octets
    return METERED


cdef inline void note_fragment(digest* d, uint32_t offset_octets, bint more) noexcept nogil:
    d.fragment_offset = <uint16_t>offset_octets
    if more:
        d.status |= DIGEST_MORE_FRAGMENTS
    if offset_octets:
        d.status |= DIGEST_LATER_FRAGMENT


cdef uint32_t jumbo_octets(const uint8_t* options, uint32_t length) noexcept nogil:
    """The jumbo payload option's length (RFC 2675), 0 without one. `options` is wholly captured."""
    cdef uint32_t i = 0
    while i < length:
        if options[i] == OPTION_PAD1:
            i += 1
            continue
        if i + 2 > length:
            return 0
        if options[i] == OPTION_JUMBO and options[i + 1] == 4 and i + 6 <= length:
            return be32(options + i + 2)
        i += 2 + <uint32_t>options[i + 1]
    return 0


cdef int parse_ipv6(Cursor* c, digest* d) noexcept nogil:
    cdef const uint8_t* p = c.packet + c.offset
    cdef uint32_t payload
    cdef uint64_t start = c.offset
    if not holds(c, 40):
        return shortage(c, 40)
    if p[0] >> 4 != 6:
        return IGNORED_MALFORMED
    payload = be16(p + 4)
    d.ip_version = 6
    d.tos = <uint8_t>((p[0] << 4) | (p[1] >> 4))
    d.protocol = p[6]
    d.ttl = p[7]
    memcpy(d.source_address, p + 8, 16)
    memcpy(d.destination_address, p + 24, 16)
    d.ip_octets = payload + 40
    if payload != 0:
        end_at(c, start + 40 + payload)
    elif d.protocol != 59 and start + 40 < c.wire_end:  # not an empty packet: a jumbogram, or an offloaded segment
        d.status |= DIGEST_ZERO_LENGTH
        d.ip_octets = <uint32_t>(c.wire_end - start)
    c.offset += 40
    return parse_extension_headers(c, d, start)


cdef int parse_extension_headers(Cursor* c, digest* d, uint64_t start) noexcept nogil:
    """RFC 8200, section 4: to the first header that is not an extension, or into a later fragment."""
    cdef const uint8_t* p
    cdef uint32_t length, jumbo
    cdef uint8_t header
    while True:
        header = d.protocol
        if (
            header != PROTOCOL_HOP_BY_HOP and header != PROTOCOL_ROUTING and header != PROTOCOL_FRAGMENT
            and header != PROTOCOL_DESTINATION_OPTIONS and header != PROTOCOL_AH
        ):
            return METERED
        if not enter_layer(c):
            return IGNORED_TOO_MANY_LAYERS
        if not holds(c, 8):
            return shortage(c, 8)
        p = c.packet + c.offset
        if header == PROTOCOL_FRAGMENT:
            length = 8
        elif header == PROTOCOL_AH:
            length = (<uint32_t>p[1] + 2) * 4
        else:
            length = (<uint32_t>p[1] + 1) * 8
        if not holds(c, length):
            return shortage(c, length)
        d.protocol = p[0]
        d.status |= DIGEST_OPTIONS
        c.offset += length
        if header == PROTOCOL_FRAGMENT:
            d.fragment_id = be32(p + 4)
            note_fragment(d, be16(p + 2) & 0xFFF8, p[3] & 1)
            if d.status & DIGEST_LATER_FRAGMENT:
                return METERED
        elif header == PROTOCOL_HOP_BY_HOP and d.status & DIGEST_ZERO_LENGTH:
            jumbo = jumbo_octets(p + 2, length - 2)
            if jumbo > 0xFFFF and jumbo <= <uint32_t>0xFFFFFFD7:  # 40 more still fit
                d.ip_octets = jumbo + 40
                d.status ^= DIGEST_ZERO_LENGTH
                end_at(c, start + 40 + jumbo)


cdef inline void set_payload(const Cursor* c, digest* d, uint64_t header_octets) noexcept nogil:
    cdef uint64_t payload = c.offset + header_octets
    if payload <= c.wire_end:
        d.payload_octets = <uint32_t>(c.wire_end - payload)
        if payload <= 0xFFFF:
            d.payload_offset = <uint16_t>payload
    else:
        d.status |= DIGEST_CUT_TRANSPORT


cdef void parse_syn_options(const uint8_t* option, const uint8_t* end, digest* d) noexcept nogil:
    """What a SYN declares. `end`: of the options or of what was captured, whichever comes first."""
    cdef uint8_t length
    while option < end and option[0] != TCP_OPTION_END:
        if option[0] == TCP_OPTION_NOP:
            option += 1
            continue
        if end - option < 2:
            return
        length = option[1]
        if length < 2 or length > end - option:
            return
        if option[0] == TCP_OPTION_MSS and length == 4:
            d.tcp_mss = be16(option + 2)
        elif option[0] == TCP_OPTION_WINDOW_SCALE and length == 3:
            d.tcp_flags = <uint16_t>(
                (d.tcp_flags & DIGEST_TCP_FLAGS)
                | ((min(option[2], <uint8_t>MAX_WINDOW_SCALE) + 1) << DIGEST_WINDOW_SCALE_SHIFT)
            )
        option += length


cdef void parse_tcp(const Cursor* c, digest* d) noexcept nogil:
    cdef const uint8_t* p = c.packet + c.offset
    if not holds(c, 16):
        d.status |= DIGEST_CUT_TRANSPORT
        return
    d.tcp_sequence = be32(p + 4)
    d.tcp_acknowledgement = be32(p + 8)
    d.tcp_flags = be16(p + 12) & 0x0FFF
    d.tcp_window = be16(p + 14)
    d.status |= DIGEST_TCP
    if p[12] >> 4 < 5:
        d.status |= DIGEST_CUT_TRANSPORT
    else:
        set_payload(c, d, (p[12] >> 4) * 4)
        if d.tcp_flags & TCP_SYN and not d.status & DIGEST_CUT_TRANSPORT:
            parse_syn_options(p + 20, p + min(<uint64_t>(p[12] >> 4) * 4, c.end - c.offset), d)


cdef void parse_transport(Cursor* c, digest* d) noexcept nogil:
    """What cannot be read here is left at zero and flagged: the packet is metered by its IP header all the same."""
    cdef const uint8_t* p = c.packet + c.offset
    cdef uint8_t protocol = d.protocol
    if d.status & DIGEST_LATER_FRAGMENT:
        set_payload(c, d, 0)
        return
    if (
        protocol == PROTOCOL_TCP or protocol == PROTOCOL_UDP or protocol == PROTOCOL_SCTP
        or protocol == PROTOCOL_UDPLITE or protocol == PROTOCOL_DCCP
    ):
        if not holds(c, 4):
            d.status |= DIGEST_CUT_TRANSPORT
            return
        d.source_port = be16(p)
        d.destination_port = be16(p + 2)
        d.status |= DIGEST_PORTS
        if protocol == PROTOCOL_TCP:
            parse_tcp(c, d)
        elif protocol == PROTOCOL_SCTP:
            set_payload(c, d, 12)
        elif protocol != PROTOCOL_DCCP:
            set_payload(c, d, 8)
    elif protocol == PROTOCOL_ICMP or protocol == PROTOCOL_ICMPV6:
        if not holds(c, 2):
            d.status |= DIGEST_CUT_TRANSPORT
            return
        d.icmp_type = p[0]
        d.icmp_code = p[1]
        d.status |= DIGEST_ICMP
        set_payload(c, d, 4)
    else:
        set_payload(c, d, 0)


cdef int parse_ip(Cursor* c, digest* d) noexcept nogil:
    """The IP header that `ethertype` announces, with all that stands between it and the transport header."""
    cdef int result
    if c.ethertype == ETHERTYPE_IPV6:
        return parse_ipv6(c, d)
    result = parse_ipv4(c, d)
    if result == METERED and d.protocol == PROTOCOL_AH and not d.status & DIGEST_LATER_FRAGMENT:
        result = parse_extension_headers(c, d, c.offset)
    return result


cdef void begin_inner(const Cursor* c, digest* d) noexcept nogil:
    """Another IP header is going to describe the flow. Tags, labels and link addresses are the innermost frame's:
    they stay when IP carries IP, and go when the tunnel carries frames or labels of its own."""
    cdef digest outer = d[0]
    cdef uint16_t kept = DIGEST_CALLER_STATUS | DIGEST_TRUNCATED
    clear_digest(d)
    if c.ethertype != ETHERTYPE_TRANSPARENT_ETHERNET:
        kept |= DIGEST_LINK_ADDRESSES
        memcpy(d.source_mac, outer.source_mac, 12)  # both
        d.vlan_tags = outer.vlan_tags
        d.vlan_outer = outer.vlan_outer
        d.vlan_inner = outer.vlan_inner
        if c.ethertype != ETHERTYPE_MPLS and c.ethertype != ETHERTYPE_MPLS_UPSTREAM:
            d.mpls = outer.mpls
    d.status = outer.status & kept


cdef int parse_innermost(Cursor* c, digest* d) noexcept nogil:
    """From a parsed outer IP header down through the tunnels. An inner packet that holds no IP, or whose headers are
    cut or broken, leaves the digest at the last header that could be read: the packet belongs to the tunnel's flow."""
    cdef digest outer
    cdef int result
    while True:
        parse_transport(c, d)
        if not enter_tunnel(c, d):
            return METERED if c.layers <= MAX_LAYERS else IGNORED_TOO_MANY_LAYERS
        if not enter_layer(c):
            return IGNORED_TOO_MANY_LAYERS
        outer = d[0]
        begin_inner(c, d)
        result = parse_to_ip(c, d)
        if result == METERED:
            result = parse_ip(c, d)
        if result == IGNORED_TOO_MANY_LAYERS:
            return result
        if result != METERED:
            d[0] = outer
            return METERED


cdef int parse_packet(const uint8_t* packet, uint32_t captured_length, uint32_t original_length, digest* d,
                      uint16_t linktype, bint inner) noexcept nogil:
    cdef Cursor c = Cursor(packet, 0, captured_length, original_length, 0, ETHERTYPE_NONE)
    cdef int result = parse_link(&c, d, linktype)
    if result == METERED:
        result = parse_to_ip(&c, d)
    if result == METERED:
        result = parse_ip(&c, d)
    if result == METERED:
        if inner:
            return parse_innermost(&c, d)
        parse_transport(&c, d)
    return result


cdef inline bint parse_plain(const uint8_t* p, uint32_t captured_length, digest* d, bint inner) noexcept nogil:
    """False, and nothing written: it is not a plain packet."""
    if not is_plain(p, captured_length, inner):
        return False
    read_plain(p, d)
    if d.protocol == PROTOCOL_TCP and d.tcp_flags & TCP_SYN and not d.status & DIGEST_CUT_TRANSPORT:
        parse_syn_options(p + PLAIN_HEADERS_BYTES, p + min(<uint32_t>d.payload_offset, captured_length), d)
    return True


cdef inline void ignore(uint64_t* ignored, int reason, uint32_t original_length) noexcept nogil:
    ignored[reason] += 1
    ignored[IGNORED_OCTETS] += original_length


cdef inline uint32_t digest_by(
    bint plain,
    const uint8_t* packet,
    uint32_t captured_length,
    uint32_t original_length,
    uint16_t linktype,
    uint32_t interface,
    uint64_t timestamp_ns,
    uint32_t status,
    bint inner,
    Inspection* inspection,
    uint8_t* out,
    uint64_t* ignored,
) noexcept nogil:
    """digest_packet; without `plain` by all the steps, whatever the packet is."""
    cdef digest* d = <digest*>out
    cdef int result
    if original_length < captured_length:
        original_length = captured_length
    begin_digest(d, captured_length, original_length, status)
    if not (plain and linktype == LINKTYPE_ETHERNET and parse_plain(packet, captured_length, d, inner)):
        result = parse_packet(packet, captured_length, original_length, d, linktype, inner)
        if result != METERED:
            ignore(ignored, result, original_length)
            return 0
    end_digest(d, interface, <uint32_t>(timestamp_ns >> 32), <uint32_t>timestamp_ns, captured_length, original_length)
    if inspection != NULL:
        return inspect(inspection, packet, d)
    return DIGEST_MIN_BYTES


cdef uint32_t digest_packet(
    const uint8_t* packet,
    uint32_t captured_length,
    uint32_t original_length,
    uint16_t linktype,
    uint32_t interface,
    uint64_t timestamp_ns,
    uint32_t status,
    bint inner,
    Inspection* inspection,
    uint8_t* out,
    uint64_t* ignored,
) noexcept nogil:
    return digest_by(True, packet, captured_length, original_length, linktype, interface, timestamp_ns, status, inner,
                     inspection, out, ignored)


cdef inline uint32_t status_of_flags(uint32_t flags) noexcept nogil:
    if flags & 3 == 1:
        return DIGEST_INCOMING
    return DIGEST_OUTGOING if flags & 3 == 2 else 0


cdef uint32_t status_of_options(const uint8_t* options, uint64_t length) noexcept nogil:
    """Direction out of an Enhanced Packet Block's epb_flags option (draft-ietf-opsawg-pcapng, 4.3.1)."""
    cdef uint64_t i = 0
    cdef uint16_t code, value_length
    cdef uint32_t value
    while i + 4 <= length:
        memcpy(&code, options + i, 2)
        memcpy(&value_length, options + i + 2, 2)
        i += 4
        if code == 0 or i + value_length > length:
            return 0
        if code == 2 and value_length == 4:
            memcpy(&value, options + i, 4)
            return status_of_flags(value)
        i += (value_length + 3) & 0x1FFFC
    return 0


cdef bint digest_records(
    const uint8_t* records,
    uint64_t record_bytes,
    const uint16_t* linktypes,
    uint32_t linktype_count,
    bint inner,
    Inspection* inspection,
    uint8_t* out,
    uint64_t out_room,
    uint64_t* ignored,
    DigestBatch* batch,
) noexcept nogil:
    cdef const uint8_t* r
    cdef uint32_t[7] head  # type, length, interface, timestamp high and low, captured length, original length
    cdef uint64_t data_end
    cdef uint32_t written
    cdef uint32_t needed = DIGEST_MAX_BYTES if inspection == NULL else DIGEST_EXTENDED_MAX_BYTES
    memset(batch, 0, sizeof(DigestBatch))
    while batch.consumed_bytes < record_bytes:
        r = records + batch.consumed_bytes
        if record_bytes - batch.consumed_bytes < RECORD_PREFIX_BYTES:
            return False
        memcpy(head, r, 8)
        if (
            head[1] < RECORD_PREFIX_BYTES or head[1] > RECORD_MAX_BYTES or head[1] & 3
            or head[1] > record_bytes - batch.consumed_bytes
        ):
            return False
        if head[0] == RECORD_PACKET:
            if head[1] < RECORD_PACKET_MIN:
                return False
            if out_room - batch.written_bytes < needed:
                return True
            memcpy(head, r, RECORD_PACKET_DATA)
            data_end = RECORD_PACKET_DATA + ((<uint64_t>head[5] + 3) & ~<uint64_t>3)
            if data_end > head[1] - 4:
                return False
            batch.packets += 1
            if head[2] >= linktype_count:
                ignore(ignored, IGNORED_LINK_TYPE, max(head[5], head[6]))
            else:
                written = digest_packet(
                    r + RECORD_PACKET_DATA, head[5], head[6], linktypes[head[2]], head[2],
                    (<uint64_t>head[3] << 32) | head[4],
                    status_of_options(r + data_end, head[1] - 4 - data_end),
                    inner, inspection, out + batch.written_bytes, ignored,
                )
                batch.written_bytes += written
                batch.digests += written != 0
        batch.consumed_bytes += head[1]
    return True


cdef class LinkTypes:

    def __dealloc__(self):
        free(self.types)

    cdef int learn(self, list interfaces) except -1:
        """`interfaces`: all that were announced so far."""
        cdef uint32_t known = len(interfaces)
        cdef uint16_t *larger
        if known == self.count:
            return 0
        larger = <uint16_t *>realloc(self.types, known * sizeof(uint16_t))
        if larger == NULL:
            raise MemoryError
        self.types = larger
        for i in range(self.count, known):
            self.types[i] = interfaces[i].linktype
        self.count = known
        return 0


cdef uint64_t digest_references(
    const PacketReference* packets,
    uint64_t count,
    const uint16_t* linktypes,
    uint32_t linktype_count,
    uint32_t source,
    bint inner,
    Inspection* inspection,
    uint8_t* out,
    uint64_t out_room,
    uint64_t* ignored,
    DigestBatch* batch,
) noexcept nogil:
    cdef const PacketReference* p
    cdef uint64_t i
    cdef uint32_t written
    cdef uint32_t needed = DIGEST_MAX_BYTES if inspection == NULL else DIGEST_EXTENDED_MAX_BYTES
    memset(batch, 0, sizeof(DigestBatch))
    for i in range(count):
        if out_room - batch.written_bytes < needed:
            return i
        p = &packets[i]
        if i + AHEAD < count:
            prefetch(packets[i + AHEAD].data)
        batch.packets += 1
        if p.interface >= linktype_count:
            ignore(ignored, IGNORED_LINK_TYPE, max(p.captured, p.original))
            continue
        written = digest_by(
            True, p.data, p.captured, p.original, linktypes[p.interface], source, <uint64_t>p.timestamp_ns,
            status_of_flags(p.flags), inner, inspection, out + batch.written_bytes, ignored,
        )
        batch.written_bytes += written
        batch.digests += written != 0
    return count


# ---- for Python: tests, and tools that look at single packets ----

IGNORED = ("not_ip", "truncated", "malformed", "too_many_layers", "link_type")
IGNORED_COUNTED = (*IGNORED, "octets")


def parse(
    const unsigned char[::1] packet not None, int linktype, original_length=None, captured_length=None,
    *, bint inner=False, bint plain=True, bint left=False,
):
    cdef uint64_t[IGNORED_COUNTS] ignored
    cdef digest d
    cdef plain_digest headers
    cdef uint32_t captured = packet.shape[0] if captured_length is None else captured_length
    cdef uint32_t original = captured if original_length is None else original_length
    cdef const unsigned char* data = &packet[0] if packet.shape[0] else <const unsigned char*>&d
    if captured > packet.shape[0]:
        raise ValueError(f"captured_length {captured} exceeds the {packet.shape[0]} octets given")
    memset(ignored, 0, sizeof(ignored))
    if left and linktype == LINKTYPE_ETHERNET and may_be_left(data, captured, inner):
        put_plain(data, captured, original, 0, 0, 0, <uint8_t*>&headers)
        expand_plain(&headers, 0, &d)
        return digest_fields(&d)
    if not digest_by(plain, data, captured, original, <uint16_t>linktype, 0, 0, 0, inner, NULL, <uint8_t*>&d, ignored):
        for i in range(IGNORED_REASON_COUNT):
            if ignored[i]:
                return {"ignored": IGNORED[i]}
    return digest_fields(&d)


cdef dict digest_fields(const digest* d):
    cdef Py_ssize_t address_bytes = 4 if d.ip_version == 4 else 16
    return {
        "interface": d.interface,
        "timestamp_ns": (<uint64_t>d.timestamp_high << 32) | d.timestamp_low,
        "ip_version": d.ip_version,
        "protocol": d.protocol,
        "source_address": (<const char*>d.source_address)[:address_bytes],
        "destination_address": (<const char*>d.destination_address)[:address_bytes],
        "source_port": d.source_port,
        "destination_port": d.destination_port,
        "ip_octets": d.ip_octets,
        "payload_octets": d.payload_octets,
        "payload_offset": d.payload_offset,
        "original_length": d.original_length,
        "captured_length": d.captured_length,
        "ttl": d.ttl,
        "tos": d.tos,
        "vlan_tags": d.vlan_tags,
        "vlan_outer": d.vlan_outer,
        "vlan_inner": d.vlan_inner,
        "mpls": d.mpls,
        "tcp_sequence": d.tcp_sequence,
        "tcp_acknowledgement": d.tcp_acknowledgement,
        "tcp_window": d.tcp_window,
        "tcp_flags": d.tcp_flags & DIGEST_TCP_FLAGS,
        "tcp_window_scale": (d.tcp_flags >> DIGEST_WINDOW_SCALE_SHIFT) - 1 if d.tcp_flags > DIGEST_TCP_FLAGS else None,
        "tcp_mss": d.tcp_mss if d.status & DIGEST_TCP else 0,
        "icmp_type": d.icmp_type if d.status & DIGEST_ICMP else 0,
        "icmp_code": d.icmp_code if d.status & DIGEST_ICMP else 0,
        "fragment_id": d.fragment_id,
        "fragment_offset": d.fragment_offset,
        "source_mac": (<const char*>d.source_mac)[:6],
        "destination_mac": (<const char*>d.destination_mac)[:6],
        "status": d.status,
    }


def digests(const unsigned char[::1] records not None, linktypes, *, bint inner=False,
            Inspector inspector=None):
    cdef uint64_t[IGNORED_COUNTS] ignored
    cdef uint16_t[256] table
    cdef DigestBatch batch
    cdef uint32_t longest = DIGEST_MAX_BYTES if inspector is None else DIGEST_EXTENDED_MAX_BYTES
    cdef bytearray out = bytearray((len(records) // RECORD_PACKET_MIN + 1) * longest)
    cdef unsigned char[::1] room = out
    cdef uint32_t count = len(linktypes)
    cdef bint whole
    if count > 256:
        raise ValueError(f"{count} interfaces, at most 256 here")
    for i in range(count):
        table[i] = linktypes[i]
    memset(ignored, 0, sizeof(ignored))
    if records.shape[0] == 0:
        return b"", dict.fromkeys(IGNORED_COUNTED, 0)
    whole = digest_records(
        &records[0], records.shape[0], table, count, inner, inspection_of(inspector), &room[0], room.shape[0], ignored,
        &batch,
    )
    if not whole:
        raise ValueError(f"damaged record at offset {batch.consumed_bytes}")
    return bytes(out[: batch.written_bytes]), {name: ignored[i] for i, name in enumerate(IGNORED_COUNTED)}
