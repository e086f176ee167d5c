# cython: language_level=3, boundscheck=False, wraparound=False, cdivision=True
"""The application of a flow by what its first messages say, and the entropy of its payload. See application.pyi."""

import os

from libc.math cimport log2
from libc.stdint cimport uint8_t, uint16_t, uint32_t, uint64_t
from libc.stdlib cimport calloc, free, malloc
from libc.string cimport memcpy, memset

from appliance.capture.cursor cimport PROTOCOL_TCP, PROTOCOL_UDP
from appliance.capture.findings cimport *
from appliance.capture.hello cimport *
from appliance.capture.messages cimport *
from appliance.capture.quic cimport *
from appliance.ring.digest cimport *
from appliance.ring.network_order cimport be16

cdef enum:
    HELLOS = 64  # that are on their way in pieces, at once
    HELLO_WAYS = 4  # places that one direction may take: so many meet before one drives another out
    ENTROPY_BYTES = 1024  # of a payload that are looked at
    MEASURED = 1 << 15  # directions that are known to have been measured
    HELLO_TIMEOUT_S = 2
    QUIC_PER_S = 10000  # decryptions: a flood of Initial packets must not cost captured packets
    TCP_SYN = 0x02

    PORT_DNS = 53
    PORT_MDNS = 5353
    PORT_LLMNR = 5355

cdef uint64_t NS_PER_S = 1000000000

# A ClientHello whose end has not come yet.
cdef struct Hello:
    uint64_t time_ns  # of the packet that brought the newest piece
    uint32_t next_sequence  # of TCP
    uint32_t length
    Pieces pieces

# One direction of a flow whose entropy was measured lately.
cdef struct Measured:
    uint32_t tag
    uint32_t second

cdef struct Inspection:
    bint applications
    bint entropy
    uint64_t[6] secrets
    uint64_t[HELLOS] hello_tags  # 0: a free place
    uint32_t hello_count
    uint64_t hello_ns  # when the newest one was begun
    Hello* hellos
    Measured* measured
    double* entropy_terms  # n log2 n, for n up to ENTROPY_BYTES
    Crypto crypto
    uint64_t quic_second  # of the newest packet that was decrypted
    uint32_t quic_count  # of decryptions in it
    uint8_t[QUIC_PACKET_MAX] plain


cdef inline uint64_t time_of(const digest* d) noexcept nogil:
    return (<uint64_t>d.timestamp_high << 32) | d.timestamp_low


cdef inline uint64_t direction_tag(const Inspection* s, const digest* d) noexcept nogil:
    """A hash of source, destination, ports and protocol under this process's secrets; never 0. Strangers who do not
    know those cannot make two directions meet."""
    cdef uint64_t[4] ends
    cdef uint64_t total
    cdef int i
    memcpy(ends, d.source_address, 32)  # the destination stands behind it
    total = s.secrets[0] ^ (<uint64_t>d.source_port << 32 | <uint64_t>d.destination_port << 16 | d.protocol)
    for i in range(4):
        total = (total ^ ends[i]) * s.secrets[i + 1]
        total ^= total >> 32
    total *= s.secrets[5]
    return (total ^ (total >> 29)) | 1


# ---- entropy ----

cdef inline uint8_t entropy_of(const Inspection* s, const uint8_t* p, uint32_t length) noexcept nogil:
    """Shannon's, of the first ENTROPY_BYTES octets: 255 is 8 bits an octet."""
    cdef uint32_t[256] counts
    cdef double total = 0
    cdef uint32_t i
    length = min(length, <uint32_t>ENTROPY_BYTES)
    memset(counts, 0, sizeof(counts))
    for i in range(length):
        counts[p[i]] += 1
    for i in range(256):
        total += s.entropy_terms[counts[i]]
    total = (s.entropy_terms[length] - total) / length
    return <uint8_t>(total / 8 * 255 + 0.5)


cdef inline bint is_to_measure(Inspection* s, const digest* d) noexcept nogil:
    """Once a second for each direction of a flow: the flow table takes the first, and a flow never begins again
    within the second (its time-outs are longer), but by a SYN."""
    cdef uint64_t tag = direction_tag(s, d)
    cdef uint32_t second = <uint32_t>(time_of(d) // NS_PER_S)
    cdef Measured* place = &s.measured[tag & (MEASURED - 1)]
    if place.tag == <uint32_t>(tag >> 32) and place.second == second:
        return False
    place.tag = <uint32_t>(tag >> 32)
    place.second = second
    return True


cdef inline void forget_measured(Inspection* s, const digest* d) noexcept nogil:
    """A connection begins: what was known of these ports belongs to an earlier one."""
    cdef uint64_t tag = direction_tag(s, d)
    cdef Measured* place = &s.measured[tag & (MEASURED - 1)]
    if place.tag == <uint32_t>(tag >> 32):
        place.tag = 0
        place.second = 0


# ---- a ClientHello in pieces ----

cdef inline Hello* hello_place(Inspection* s, const digest* d, bint begin) noexcept nogil:
    """Where this direction's pieces are; `begin`: else an empty place, or the one of its set that rested longest,
    whatever was there. NULL: there are none."""
    cdef uint64_t tag = direction_tag(s, d)
    cdef uint64_t now = time_of(d)
    cdef uint32_t first = <uint32_t>((tag >> 32) % (HELLOS // HELLO_WAYS)) * HELLO_WAYS
    cdef uint32_t number = first
    cdef uint32_t i
    for i in range(first, first + HELLO_WAYS):
        if s.hello_tags[i] == tag:
            number = i
            break
        if s.hello_tags[number] != 0 and (s.hello_tags[i] == 0 or s.hellos[i].time_ns < s.hellos[number].time_ns):
            number = i
    cdef Hello* hello = &s.hellos[number]
    if s.hello_tags[number] == tag and now - min(now, hello.time_ns) <= HELLO_TIMEOUT_S * NS_PER_S:
        hello.time_ns = now
        return hello
    if not begin:
        return NULL
    if s.hello_tags[number] == 0:
        s.hello_count += 1
    s.hello_tags[number] = tag
    s.hello_ns = now
    memset(hello.pieces.have, 0, sizeof(hello.pieces.have))
    hello.length = 0
    hello.time_ns = now
    return hello


cdef inline bint waits_for_hello(Inspection* s, const digest* d) noexcept nogil:
    """Some ClientHello is not whole; those whose rest does not come are forgotten all at once."""
    if s.hello_count == 0:
        return False
    if time_of(d) > s.hello_ns + HELLO_TIMEOUT_S * NS_PER_S:
        memset(s.hello_tags, 0, sizeof(s.hello_tags))
        s.hello_count = 0
    return s.hello_count != 0


cdef inline void end_hello(Inspection* s, const Hello* hello) noexcept nogil:
    s.hello_tags[hello - s.hellos] = 0
    s.hello_count -= 1


cdef inline void begin_tls(Inspection* s, const digest* d, const uint8_t* p, uint32_t length,
                           Findings* f) noexcept nogil:
    """A record that begins with a ClientHello. What goes on in the next segment waits for it; what goes on in another
    record is read no further."""
    cdef uint32_t record_bytes = be16(p + 3)
    cdef uint32_t there = min(length - RECORD_HEADER_BYTES, record_bytes)
    cdef const uint8_t* message = p + RECORD_HEADER_BYTES
    cdef uint32_t wanted = hello_bytes(message)
    cdef Hello* hello
    f.application = APPLICATION_TLS
    read_hello(message, there, f)
    if there < wanted <= record_bytes and wanted <= HELLO_BYTES_MAX and d.payload_octets == length:
        hello = hello_place(s, d, True)
        memcpy(hello.pieces.octets, message, there)
        hello.length = there
        hello.next_sequence = d.tcp_sequence + length


cdef inline bint go_on_with_tls(Inspection* s, const digest* d, const uint8_t* p, uint32_t length,
                                Findings* f) noexcept nogil:
    """The segment that a ClientHello waits for. False: it is none, or not the last."""
    cdef Hello* hello = hello_place(s, d, False)
    cdef uint32_t wanted
    if hello == NULL or hello.length == 0 or hello.next_sequence != d.tcp_sequence:
        return False
    wanted = hello_bytes(hello.pieces.octets)
    length = min(length, wanted - hello.length)
    memcpy(hello.pieces.octets + hello.length, p, length)
    hello.length += length
    hello.next_sequence += length
    if hello.length < wanted:
        return False
    f.application = APPLICATION_TLS
    read_hello(hello.pieces.octets, wanted, f)
    end_hello(s, hello)
    return True


# ---- QUIC ----

cdef inline bint may_decrypt(Inspection* s, uint64_t now_ns) noexcept nogil:
    cdef uint64_t second = now_ns // NS_PER_S
    if second != s.quic_second:
        s.quic_second = second
        s.quic_count = 0
    s.quic_count += 1
    return s.quic_count <= QUIC_PER_S


cdef void look_into_initials(Inspection* s, const digest* d, const uint8_t* p, uint32_t length,
                             Findings* f) noexcept nogil:
    """A datagram whose first packet is an Initial one: all of the client's, into the pieces of its ClientHello."""
    cdef Initial packet
    cdef uint32_t at = 0
    cdef uint32_t plain_bytes = 0
    cdef uint32_t whole
    cdef Hello* hello = NULL
    for _ in range(QUIC_PACKETS_MAX):
        if not read_initial(p + at, length - at, &packet) or packet.id_bytes < QUIC_CLIENT_ID_MIN:
            break
        if not may_decrypt(s, time_of(d)):
            f.flags |= EXTENSION_PARTIAL
            break
        if not open_initial(&s.crypto, p + at, &packet, s.plain, &plain_bytes):
            break
        hello = hello_place(s, d, True)
        take_crypto(s.plain, plain_bytes, &hello.pieces)
        at += packet.end
        if at >= length:
            break
    if hello == NULL:
        return
    whole = whole_octets(&hello.pieces)
    if whole < HANDSHAKE_HEADER_BYTES or hello.pieces.octets[0] != CLIENT_HELLO:
        f.flags |= EXTENSION_PARTIAL
        return
    read_hello(hello.pieces.octets, whole, f)
    if whole >= hello_bytes(hello.pieces.octets):
        end_hello(s, hello)


cdef inline bint read_quic(Inspection* s, const digest* d, const uint8_t* p, uint32_t length,
                           Findings* f) noexcept nogil:
    """False: it does not begin with a whole Initial packet."""
    cdef Initial packet
    if length < QUIC_DATAGRAM_MIN or not read_initial(p, length, &packet):
        return False
    f.application = APPLICATION_QUIC
    look_into_initials(s, d, p, length, f)
    return True


# ---- a packet ----

cdef inline bint is_dns_port(uint16_t port) noexcept nogil:
    return port == PORT_DNS or port == PORT_MDNS or port == PORT_LLMNR


cdef void find_over_tcp(Inspection* s, const digest* d, const uint8_t* p, uint32_t length, Findings* f) noexcept nogil:
    cdef uint32_t message_bytes
    if waits_for_hello(s, d) and go_on_with_tls(s, d, p, length, f):
        return
    if p[0] == TLS_HANDSHAKE:
        if is_handshake(p, length, CLIENT_HELLO):
            begin_tls(s, d, p, length, f)
        elif is_handshake(p, length, SERVER_HELLO):
            f.application = APPLICATION_TLS
    elif is_dns_port(d.source_port) or is_dns_port(d.destination_port):
        if length > 2:  # RFC 7766, 8
            message_bytes = be16(p)
            read_dns(p + 2, min(length - 2, message_bytes), f)
    elif 0x41 <= p[0] <= 0x5A and not read_ssh(p, length, f):
        read_http(p, length, f)


cdef void find_over_udp(Inspection* s, const digest* d, const uint8_t* p, uint32_t length, Findings* f) noexcept nogil:
    if is_dns_port(d.source_port) or is_dns_port(d.destination_port):
        read_dns(p, length, f)
    elif p[0] & 0xC0 == 0xC0:
        read_quic(s, d, p, length, f)


cdef uint32_t extend(digest* d, const Findings* f) noexcept nogil:
    """The findings behind the digest's fixed part; its length."""
    cdef uint8_t* out = <uint8_t*>d + DIGEST_FIXED_BYTES
    cdef digest_extension head
    cdef uint32_t used = sizeof(digest_extension) + f.used
    cdef uint32_t padded = (used + 3) & ~<uint32_t>3
    memset(&head, 0, sizeof(head))
    head.application = f.application
    head.flags = f.flags
    head.entropy = f.entropy
    memcpy(out, &head, sizeof(head))
    memcpy(out + sizeof(head), f.fields, f.used)
    memset(out + used, 0, padded - used)
    d.extension_length = <uint16_t>padded
    d.length = DIGEST_MIN_BYTES + padded
    memcpy(out + padded, &d.length, 4)
    return d.length


cdef uint32_t inspect(Inspection* s, const uint8_t* packet, digest* d) noexcept nogil:
    cdef Findings f
    cdef const uint8_t* p
    cdef uint32_t length
    if d.protocol != PROTOCOL_TCP and d.protocol != PROTOCOL_UDP or d.payload_offset == 0:
        return DIGEST_MIN_BYTES
    if s.entropy and d.protocol == PROTOCOL_TCP and d.tcp_flags & TCP_SYN:
        forget_measured(s, d)
    if (
        d.payload_octets == 0 or d.captured_length <= d.payload_offset
        or d.status & (DIGEST_LATER_FRAGMENT | DIGEST_CUT_TRANSPORT)
    ):
        return DIGEST_MIN_BYTES
    p = packet + d.payload_offset
    length = min(d.captured_length - d.payload_offset, d.payload_octets)
    f.application = APPLICATION_NONE
    f.flags = 0
    f.entropy = 0
    f.used = 0
    if s.applications and d.protocol == PROTOCOL_TCP:
        find_over_tcp(s, d, p, length, &f)
    elif s.applications:
        find_over_udp(s, d, p, length, &f)
    if s.entropy and is_to_measure(s, d):
        f.flags |= EXTENSION_ENTROPY
        f.entropy = entropy_of(s, p, length)
    if f.application == APPLICATION_NONE and f.flags & EXTENSION_ENTROPY == 0:
        return DIGEST_MIN_BYTES
    return extend(d, &f)


cdef Inspection* inspection_of(Inspector inspector) noexcept:
    return inspector.inspection if inspector is not None else NULL


cdef class Inspector:
    """See application.pyi."""

    def __cinit__(self, *, bint applications=True, bint entropy=False):
        cdef Inspection* s = <Inspection*>calloc(1, sizeof(Inspection))
        cdef uint32_t n
        if s == NULL:
            raise MemoryError
        self.inspection = s
        secrets = os.urandom(sizeof(s.secrets))
        memcpy(s.secrets, <const char*>secrets, sizeof(s.secrets))
        for n in range(6):
            s.secrets[n] |= 1
        s.applications = applications
        s.entropy = entropy
        if applications:
            s.hellos = <Hello*>calloc(HELLOS, sizeof(Hello))
            if s.hellos == NULL or not open_crypto(&s.crypto):
                raise MemoryError("no room for what inspects payloads, or libcrypto lacks SHA-256 or AES-128")
        if entropy:
            s.measured = <Measured*>calloc(MEASURED, sizeof(Measured))
            s.entropy_terms = <double*>malloc((ENTROPY_BYTES + 1) * sizeof(double))
            if s.measured == NULL or s.entropy_terms == NULL:
                raise MemoryError
            s.entropy_terms[0] = 0
            for n in range(1, ENTROPY_BYTES + 1):
                s.entropy_terms[n] = n * log2(<double>n)

    def __dealloc__(self):
        cdef Inspection* s = self.inspection
        if s == NULL:
            return
        free(s.hellos)
        free(s.measured)
        free(s.entropy_terms)
        close_crypto(&s.crypto)
        free(s)


# ---- for Python: tests ----

APPLICATIONS = ("", "tls", "quic", "dns", "http", "ssh")
FIELDS = ("", "server_name", "alpn", "dns_name", "dns_type", "http_host", "http_method", "ssh_version")


def findings(const unsigned char[::1] extension not None):
    cdef bytes octets = bytes(extension)
    found = {
        "application": APPLICATIONS[octets[0]],
        "partial": octets[1] & EXTENSION_PARTIAL != 0,
        "entropy": octets[2] if octets[1] & EXTENSION_ENTROPY else None,
    }
    at = sizeof(digest_extension)
    while at < len(octets) and octets[at]:
        value = octets[at + 2 : at + 2 + octets[at + 1]]
        name = FIELDS[octets[at]]
        found[name] = int.from_bytes(value, "big") if name == "dns_type" else value.decode("ascii")
        at += 2 + octets[at + 1]
    return found


def crypto_findings(*packets):
    """See application.pyi."""
    cdef Pieces pieces
    cdef Findings f
    cdef const unsigned char[::1] octets
    memset(&pieces, 0, sizeof(pieces))
    memset(&f, 0, sizeof(f))
    for packet in packets:
        octets = packet
        if octets.shape[0]:
            take_crypto(&octets[0], octets.shape[0], &pieces)
    read_hello(pieces.octets, whole_octets(&pieces), &f)
    return findings(bytes((APPLICATION_QUIC, f.flags, 0, 0)) + (<const char*>f.fields)[: f.used])
