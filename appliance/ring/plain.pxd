"""The digest of a plain packet: Ethernet, IPv4 without options and not fragmented, TCP or UDP, all headers captured.
Most packets are plain; capture/plain.pxd knows which.

It is written in a third of the time that the steps of the header parser need. A live source leaves even that to whoever
reads its digests: it hands the headers on as they are (`put_plain`), and the merge of the digests makes the digest of
them (`expand_plain`), in the time of the meter, not of the capture.
"""

from libc.stdint cimport uint8_t, uint16_t, uint32_t, uint64_t
from libc.string cimport memcpy

from appliance.ring.digest cimport *
from appliance.ring.layout cimport *
from appliance.ring.network_order cimport be16, be32

cdef extern from *:
    """
    /* Not memset: gcc makes a string instruction of it here, which costs as much as all the parsing. */
    typedef uint64_t sixteen_octets __attribute__((vector_size(16), aligned(4), may_alias));
    static inline void clear_digest(void *digest)
    {
        sixteen_octets *at = (sixteen_octets *)digest;
        const sixteen_octets zero = {0, 0};
        at[0] = zero, at[1] = zero, at[2] = zero, at[3] = zero;
        at[4] = zero, at[5] = zero, at[6] = zero, at[7] = zero;
    }
    """
    void clear_digest(void* digest) noexcept nogil

cdef enum:
    PLAIN_TCP = 6  # IP protocol


cdef inline void read_plain(const uint8_t* p, digest* d) noexcept nogil:
    """What the parser's steps would have written, but for what a SYN's options declare. Reads no octet beyond
    PLAIN_HEADERS_BYTES, whatever they say."""
    cdef uint32_t total = be16(p + 16)
    cdef uint32_t header_octets = 8
    memcpy(d.destination_mac, p, 6)
    memcpy(d.source_mac, p + 6, 6)
    d.ip_version = 4
    d.tos = p[15]
    d.ip_octets = total
    d.fragment_id = be16(p + 18)
    d.ttl = p[22]
    d.protocol = p[23]
    memcpy(d.source_address, p + 26, 4)
    memcpy(d.destination_address, p + 30, 4)
    d.source_port = be16(p + 34)
    d.destination_port = be16(p + 36)
    d.status |= DIGEST_LINK_ADDRESSES | DIGEST_PORTS | (DIGEST_DONT_FRAGMENT if be16(p + 20) & 0x4000 else 0)
    if d.protocol == PLAIN_TCP:
        d.tcp_sequence = be32(p + 38)
        d.tcp_acknowledgement = be32(p + 42)
        d.tcp_flags = be16(p + 46) & 0x0FFF
        d.tcp_window = be16(p + 48)
        d.status |= DIGEST_TCP
        header_octets = (p[46] >> 4) * 4
        if header_octets < 20 or 20 + header_octets > total:
            d.status |= DIGEST_CUT_TRANSPORT
            return
    d.payload_offset = <uint16_t>(34 + header_octets)
    d.payload_octets = total - 20 - header_octets


cdef inline void begin_digest(digest* d, uint32_t captured_length, uint32_t original_length,
                              uint32_t status) noexcept nogil:
    clear_digest(d)
    d.status = <uint16_t>(status & DIGEST_CALLER_STATUS)
    if captured_length < original_length:
        d.status |= DIGEST_TRUNCATED


cdef inline void end_digest(digest* d, uint32_t interface, uint32_t timestamp_high, uint32_t timestamp_low,
                            uint32_t captured_length, uint32_t original_length) noexcept nogil:
    d.type = RECORD_DIGEST
    d.length = d.length_again = DIGEST_MIN_BYTES
    d.interface = interface
    d.timestamp_high = timestamp_high
    d.timestamp_low = timestamp_low
    d.version = DIGEST_VERSION
    d.original_length = original_length
    d.captured_length = captured_length


cdef inline void put_plain(const uint8_t* p, uint32_t captured_length, uint32_t original_length, uint32_t interface,
                           uint64_t timestamp_ns, uint32_t status, uint8_t* room) noexcept nogil:
    """A plain packet, PLAIN_DIGEST_BYTES of it."""
    cdef plain_digest* d = <plain_digest*>room
    d.type = RECORD_DIGEST
    d.length = d.length_again = PLAIN_DIGEST_BYTES
    d.interface = interface
    d.timestamp_high = <uint32_t>(timestamp_ns >> 32)
    d.timestamp_low = <uint32_t>timestamp_ns
    d.version = DIGEST_VERSION
    d.status = <uint16_t>status
    d.captured_length = captured_length
    d.original_length = max(captured_length, original_length)
    memcpy(d.headers, p, PLAIN_HEADERS_BYTES)


cdef inline void expand_plain(const plain_digest* plain, uint32_t interface, digest* d) noexcept nogil:
    """The whole digest, DIGEST_MIN_BYTES. Whoever wrote `plain` may go on writing: nothing here depends on it."""
    cdef uint32_t captured_length = plain.captured_length
    cdef uint32_t original_length = plain.original_length
    begin_digest(d, captured_length, original_length, plain.status)
    read_plain(plain.headers, d)
    end_digest(d, interface, plain.timestamp_high, plain.timestamp_low, captured_length, original_length)
