# cython: language_level=3
"""A block of the kernel's packet ring and the packets in it (TPACKET_V3, Documentation/networking/packet_mmap.rst), and
a packet's record: the octets that the kernel keeps apart are back in their place."""
from libc.stdint cimport int64_t, uint8_t, uint16_t, uint32_t, uint64_t
from libc.string cimport memcpy, memset

from appliance.formats.record cimport packet_record_frame, padded
from appliance.ring.layout cimport RECORD_PACKET_DATA, RECORD_PACKET_MIN, record_copy, record_set_u32
from appliance.ring.prefetch cimport WRITE_AHEAD_BYTES, prefetch_for_write

cdef extern from "linux/if_packet.h" nogil:
    struct tpacket_hdr_variant1:
        uint32_t tp_vlan_tci
        uint16_t tp_vlan_tpid
    struct tpacket3_hdr:
        uint32_t tp_next_offset
        uint32_t tp_sec
        uint32_t tp_nsec
        uint32_t tp_snaplen
        uint32_t tp_len
        uint32_t tp_status
        uint16_t tp_mac
        uint16_t tp_net
        tpacket_hdr_variant1 hv1
    struct tpacket_hdr_v1:
        uint32_t block_status
        uint32_t num_pkts
        uint32_t offset_to_first_pkt
        uint32_t blk_len
        uint64_t seq_num
    union tpacket_bd_header_u:
        tpacket_hdr_v1 bh1
    struct tpacket_block_desc:
        tpacket_bd_header_u hdr
    struct sockaddr_ll:
        uint16_t sll_protocol
        int sll_ifindex
        uint16_t sll_hatype
        uint8_t sll_pkttype
        uint8_t sll_halen
        uint8_t sll_addr[8]
    enum:
        TP_STATUS_KERNEL
        TP_STATUS_USER
        TP_STATUS_CSUMNOTREADY
        TP_STATUS_VLAN_VALID
        TP_STATUS_VLAN_TPID_VALID
        PACKET_OUTGOING
    uint32_t TPACKET_ALIGN(uint32_t length)

cdef extern from *:
    """
    #define LOAD_STATUS(block) __atomic_load_n(&(block)->hdr.bh1.block_status, __ATOMIC_ACQUIRE)
    #define LOAD_PACKETS(block) __atomic_load_n(&(block)->hdr.bh1.num_pkts, __ATOMIC_ACQUIRE)
    #define GIVE_BACK(block) __atomic_store_n(&(block)->hdr.bh1.block_status, TP_STATUS_KERNEL, __ATOMIC_RELEASE)
    """
    uint32_t LOAD_STATUS(tpacket_block_desc *block) nogil
    uint32_t LOAD_PACKETS(tpacket_block_desc *block) nogil
    void GIVE_BACK(tpacket_block_desc *block) nogil

cdef enum:
    LINKTYPE_ETHERNET = 1
    LINKTYPE_LINUX_SLL2 = 276
    SLL2_HEADER_BYTES = 20
    OUTBOUND_OPTION_BYTES = 12  # epb_flags (8) and opt_endofopt (4)
    VLAN_TAG_BYTES = 4


cdef inline sockaddr_ll *packet_link(tpacket3_hdr *packet) noexcept nogil:
    return <sockaddr_ll *>(<uint8_t *>packet + TPACKET_ALIGN(sizeof(tpacket3_hdr)))


cdef inline uint64_t packet_stamp_ns(tpacket3_hdr *packet) noexcept nogil:
    return <uint64_t>packet.tp_sec * 1000000000 + packet.tp_nsec


cdef inline const uint8_t *packet_data(tpacket3_hdr *packet) noexcept nogil:
    return <uint8_t *>packet + packet.tp_mac


cdef inline uint32_t inserted_bytes(tpacket3_hdr *packet, bint cooked, uint16_t linktype) noexcept nogil:
    """What the kernel keeps apart from the data: a VLAN tag, or of a cooked interface all that a header can say."""
    if cooked:
        return SLL2_HEADER_BYTES
    if packet.tp_status & TP_STATUS_VLAN_VALID and linktype == LINKTYPE_ETHERNET and packet.tp_snaplen >= 12:
        return VLAN_TAG_BYTES
    return 0


cdef inline bint goes_as_it_is(tpacket3_hdr *packet, int ifindex, uint32_t snaplen) noexcept nogil:
    """Of this interface, inbound, not longer than `snaplen`, and nothing was taken out of it."""
    cdef sockaddr_ll *link = packet_link(packet)
    return (link.sll_ifindex == ifindex and link.sll_pkttype != PACKET_OUTGOING
            and packet.tp_status & TP_STATUS_VLAN_VALID == 0 and packet.tp_snaplen <= snaplen)


cdef inline void put_vlan_tag(uint8_t *target, tpacket3_hdr *packet) noexcept nogil:
    cdef uint16_t tpid = 0x8100
    if packet.tp_status & TP_STATUS_VLAN_TPID_VALID:
        tpid = packet.hv1.tp_vlan_tpid
    target[0] = <uint8_t>(tpid >> 8)
    target[1] = <uint8_t>tpid
    target[2] = <uint8_t>(packet.hv1.tp_vlan_tci >> 8)
    target[3] = <uint8_t>packet.hv1.tp_vlan_tci


cdef inline void put_sll2_header(uint8_t *target, const sockaddr_ll *link) noexcept nogil:
    """LINKTYPE_LINUX_SLL2: protocol, reserved, interface, ARPHRD, packet type, address; in network order."""
    memset(target, 0, SLL2_HEADER_BYTES)
    memcpy(target, &link.sll_protocol, 2)
    target[4] = <uint8_t>(link.sll_ifindex >> 24)
    target[5] = <uint8_t>(link.sll_ifindex >> 16)
    target[6] = <uint8_t>(link.sll_ifindex >> 8)
    target[7] = <uint8_t>link.sll_ifindex
    target[8] = <uint8_t>(link.sll_hatype >> 8)
    target[9] = <uint8_t>link.sll_hatype
    target[10] = link.sll_pkttype
    target[11] = link.sll_halen if link.sll_halen <= 8 else 8
    memcpy(target + 12, link.sll_addr, target[11])


cdef inline void copy_inserting(uint8_t *target, tpacket3_hdr *packet, uint32_t captured,
                                uint32_t inserted) noexcept nogil:
    """`captured` octets of the packet, the `inserted` ones of them."""
    cdef const uint8_t *data = packet_data(packet)
    if inserted == SLL2_HEADER_BYTES:
        put_sll2_header(target, packet_link(packet))
        if captured > SLL2_HEADER_BYTES:
            memcpy(target + SLL2_HEADER_BYTES, data, captured - SLL2_HEADER_BYTES)
    else:
        memcpy(target, data, 12)
        put_vlan_tag(target + 12, packet)
        if captured > 16:
            memcpy(target + 16, data + 12, captured - 16)


cdef inline uint32_t packet_record_bytes(uint32_t captured, bint outbound) noexcept nogil:
    return RECORD_PACKET_MIN + padded(captured) + (OUTBOUND_OPTION_BYTES if outbound else 0)


cdef inline void put_packet_record(uint8_t *room, tpacket3_hdr *packet, uint32_t captured, uint32_t inserted,
                                   bint outbound, uint32_t interface, uint64_t stamp_ns) noexcept nogil:
    """One Enhanced Packet Block (draft-ietf-opsawg-pcapng, section 4.3) of packet_record_bytes()."""
    cdef uint8_t *data = room + RECORD_PACKET_DATA
    prefetch_for_write(room + WRITE_AHEAD_BYTES)
    packet_record_frame(room, interface, <int64_t>stamp_ns, captured, packet.tp_len + inserted,
                        OUTBOUND_OPTION_BYTES if outbound else 0)
    if inserted:
        copy_inserting(data, packet, captured, inserted)
    else:
        record_copy(data, packet_data(packet), captured)
    if outbound:
        put_outbound_option(data + padded(captured))


cdef inline void put_outbound_option(uint8_t *options) noexcept nogil:
    record_set_u32(options, 2 | (4 << 16))  # epb_flags, 4 octets
    record_set_u32(options + 4, 2)  # outbound
    record_set_u32(options + 8, 0)  # opt_endofopt
