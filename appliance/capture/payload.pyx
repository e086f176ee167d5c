# cython: language_level=3, boundscheck=False, wraparound=False, cdivision=True
"""Checks of what a frame carries: its check sequence, its checksums, and the trailer of test traffic.

Every length is checked against the frame before it is read; what cannot be judged is not called wrong.
"""
from libc.string cimport memcpy

from appliance.capture.payload cimport *

cdef extern from "arpa/inet.h" nogil:
    uint32_t ntohl(uint32_t value)
    uint16_t ntohs(uint16_t value)

cdef extern from "endian.h" nogil:
    uint64_t be64toh(uint64_t value)
    uint32_t le32toh(uint32_t value)

cdef enum:
    LINKTYPE_ETHERNET = 1
    LINKTYPE_RAW = 101
    LINKTYPE_LINUX_SLL2 = 276
    ETHERTYPE_IPV4 = 0x0800
    ETHERTYPE_IPV6 = 0x86dd
    MAX_TAGS = 16
    MAX_EXTENSIONS = 8
    PROTOCOL_TCP = 6
    PROTOCOL_UDP = 17
    TRAILER_MAGIC = 0x54504c31  # "TPL1"
    FCS_BYTES = 4
    FCS_FRAME_MIN = 18

cdef uint32_t CRC_POLYNOMIAL = 0xedb88320
cdef uint32_t[8][256] crc_table


cdef void make_crc_table() noexcept nogil:
    """Slicing by 8: table k is the remainder of a byte with k zero bytes behind it (IEEE 802.3, reflected)."""
    cdef uint32_t i, k, _, crc
    for i in range(256):
        crc = i
        for _ in range(8):
            crc = (crc >> 1) ^ (CRC_POLYNOMIAL * (crc & 1))
        crc_table[0][i] = crc
    for i in range(256):
        for k in range(1, 8):
            crc_table[k][i] = (crc_table[k - 1][i] >> 8) ^ crc_table[0][crc_table[k - 1][i] & 0xff]


make_crc_table()


cdef uint32_t crc32(uint32_t crc, const uint8_t *data, uint64_t length) noexcept nogil:
    cdef uint32_t low, high
    crc = ~crc
    while length >= 8:
        memcpy(&low, data, 4)
        memcpy(&high, data + 4, 4)
        low = le32toh(low) ^ crc
        high = le32toh(high)
        crc = (
            crc_table[7][low & 0xff] ^ crc_table[6][low >> 8 & 0xff]
            ^ crc_table[5][low >> 16 & 0xff] ^ crc_table[4][low >> 24]
            ^ crc_table[3][high & 0xff] ^ crc_table[2][high >> 8 & 0xff]
            ^ crc_table[1][high >> 16 & 0xff] ^ crc_table[0][high >> 24]
        )
        data += 8
        length -= 8
    while length:
        crc = (crc >> 8) ^ crc_table[0][(crc ^ data[0]) & 0xff]
        data += 1
        length -= 1
    return ~crc


cdef bint fcs_is_wrong(const uint8_t *frame, uint32_t length) noexcept nogil:
    cdef uint32_t sent
    if length < FCS_FRAME_MIN:
        return True
    memcpy(&sent, frame + length - FCS_BYTES, FCS_BYTES)
    return crc32(0, frame, length - FCS_BYTES) != le32toh(sent)


# ---- checksums ----


cdef inline uint16_t u16_at(const uint8_t *at) noexcept nogil:
    return <uint16_t>(at[0] << 8 | at[1])


cdef uint64_t add_up(const uint8_t *data, uint32_t length, uint64_t total) noexcept nogil:
    """Adds 16-bit words in host order (RFC 1071: the sum does not depend on it); an odd byte is padded with zero."""
    cdef uint16_t word = 0
    cdef uint32_t i
    for i in range(0, length & ~<uint32_t>1, 2):
        memcpy(&word, data + i, 2)
        total += word
    if length & 1:
        word = 0
        memcpy(&word, data + length - 1, 1)
        total += word
    return total


cdef inline bint sums_up(uint64_t total) noexcept nogil:
    while total >> 16:
        total = (total & 0xffff) + (total >> 16)
    return total == 0xffff


cdef bint transport_is_wrong(const uint8_t *segment, uint32_t length, uint8_t protocol, const uint8_t *addresses,
                             uint32_t address_bytes) noexcept nogil:
    """TCP (RFC 9293, 3.1) and UDP (RFC 768, RFC 8200 section 8.1) under their pseudo-header. `addresses`: source and
    destination, as they stand behind each other in the IP header."""
    cdef uint32_t counted = length
    cdef uint64_t total
    if protocol == PROTOCOL_UDP:
        if length < 8:
            return False
        counted = u16_at(segment + 4)
        if counted < 8 or counted > length or u16_at(segment + 6) == 0:
            return False  # a length that is another matter, or no checksum
    elif length < 20:
        return False
    total = add_up(addresses, 2 * address_bytes, 0)
    total += ntohs(protocol)
    total += ntohs(<uint16_t>(counted >> 16))
    total += ntohs(<uint16_t>counted)
    return not sums_up(add_up(segment, counted, total))


cdef bint ipv4_is_wrong(const uint8_t *packet, uint32_t length) noexcept nogil:
    cdef uint32_t header, total
    if length < 20 or packet[0] >> 4 != 4:
        return False
    header = (packet[0] & 15) * 4
    total = u16_at(packet + 2)
    if header < 20 or header > length or total < header or total > length:
        return False
    if u16_at(packet + 6) & 0x3fff:
        return False  # a fragment
    if not sums_up(add_up(packet, header, 0)):
        return True
    if packet[9] != PROTOCOL_TCP and packet[9] != PROTOCOL_UDP:
        return False
    return transport_is_wrong(packet + header, total - header, packet[9], packet + 12, 4)


cdef bint ipv6_is_wrong(const uint8_t *packet, uint32_t length) noexcept nogil:
    cdef uint32_t end, at = 40
    cdef uint8_t next_header
    cdef int _
    if length < 40 or packet[0] >> 4 != 6:
        return False
    end = 40 + u16_at(packet + 4)
    next_header = packet[6]
    if end > length:
        return False
    for _ in range(MAX_EXTENSIONS):
        if next_header == PROTOCOL_TCP or next_header == PROTOCOL_UDP:
            return transport_is_wrong(packet + at, end - at, next_header, packet + 8, 16)
        if next_header != 0 and next_header != 60:  # hop-by-hop and destination options; not fragments, not routing
            return False
        if at + 8 > end:
            return False
        next_header = packet[at]
        at += 8 + packet[at + 1] * 8
        if at > end:
            return False
    return False


cdef bint checksum_is_wrong(const uint8_t *frame, uint32_t length, uint16_t linktype) noexcept nogil:
    cdef uint32_t at
    cdef uint16_t kind
    cdef int _
    if linktype == LINKTYPE_RAW:
        if length and frame[0] >> 4 == 6:
            return ipv6_is_wrong(frame, length)
        return ipv4_is_wrong(frame, length)
    if linktype == LINKTYPE_ETHERNET:
        at = 12
    elif linktype == LINKTYPE_LINUX_SLL2:
        at = 0
    else:
        return False
    if at + 2 > length:
        return False
    kind = u16_at(frame + at)
    at = 20 if linktype == LINKTYPE_LINUX_SLL2 else 14
    for _ in range(MAX_TAGS):
        if kind != 0x8100 and kind != 0x88a8 and kind != 0x9100:
            break
        if at + 4 > length:
            return False
        kind = u16_at(frame + at + 2)
        at += 4
    if at > length:
        return False
    if kind == ETHERTYPE_IPV4:
        return ipv4_is_wrong(frame + at, length - at)
    if kind == ETHERTYPE_IPV6:
        return ipv6_is_wrong(frame + at, length - at)
    return False


# ---- the trailer of test traffic ----


cdef bint find_test_payload(const uint8_t *frame, uint32_t length, test_payload *found) noexcept nogil:
    cdef const uint8_t *at
    cdef uint32_t word, covered
    cdef uint64_t number
    if length < TRAILER_BYTES:
        return False
    at = frame + length - TRAILER_BYTES
    memcpy(&word, at, 4)
    if ntohl(word) != TRAILER_MAGIC:
        return False
    memcpy(&word, at + 4, 4)
    found.stream = ntohl(word)
    memcpy(&number, at + 8, 8)
    found.sequence = be64toh(number)
    memcpy(&number, at + 16, 8)
    found.timestamp_ns = <int64_t>be64toh(number)
    memcpy(&word, at + 24, 4)
    covered = ntohl(word)
    memcpy(&word, at + 32, 4)
    found.sound = crc32(0, at, 32) == ntohl(word) and covered <= length - TRAILER_BYTES
    found.intact = False
    if found.sound:
        memcpy(&word, at + 28, 4)
        found.intact = crc32(0, at - covered, covered) == ntohl(word)
    return True


# ---- the same for Python ----


def has_wrong_fcs(const uint8_t[::1] frame not None):
    return frame.shape[0] < FCS_FRAME_MIN or fcs_is_wrong(&frame[0], <uint32_t>frame.shape[0])


def has_wrong_checksum(const uint8_t[::1] frame not None, int linktype=LINKTYPE_ETHERNET):
    return frame.shape[0] > 0 and checksum_is_wrong(&frame[0], <uint32_t>frame.shape[0], <uint16_t>linktype)


def parse_test_payload(const uint8_t[::1] frame not None):
    cdef test_payload found
    if frame.shape[0] == 0 or not find_test_payload(&frame[0], <uint32_t>frame.shape[0], &found):
        return None
    return found.stream, found.sequence, found.timestamp_ns, bool(found.sound), bool(found.intact)
