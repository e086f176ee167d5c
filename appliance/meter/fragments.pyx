# cython: language_level=3, boundscheck=False, wraparound=False, cdivision=True
"""The datagrams that are arriving in fragments: their ports, which only the first fragment has.

Sets of eight places, chosen by a hash with secret keys. A full set forgets one: a datagram whose last fragment came or
whose time is over, which costs nothing, else the one that is silent for longest, which is counted.
"""

import os

from libc.stdint cimport uint8_t, uint16_t, uint32_t, uint64_t
from libc.stdlib cimport calloc, free
from libc.string cimport memcpy

from appliance.ring.digest cimport *

cdef enum:
    WAYS = 8
    PROTOCOL_TCP = 6
    PROTOCOL_UDP = 17
    PROTOCOL_DCCP = 33
    PROTOCOL_SCTP = 132
    PROTOCOL_UDPLITE = 136

cdef struct Datagram:  # one cache line
    uint64_t[4] ends  # source and destination address, as in the digest
    uint64_t last_ns  # 0: a free place
    uint32_t identification
    uint32_t vlans
    uint32_t interface
    uint32_t end_octets  # where the fragments that came end
    uint16_t source_port
    uint16_t destination_port
    uint8_t ip_version
    uint8_t protocol  # of the transport header
    uint8_t key_protocol  # of the IPv4 header; 0 for IPv6, where fragments do not agree on it (RFC 8200, 4.5)
    uint8_t ended  # the last fragment came


cdef inline uint64_t pair(uint64_t words, const uint64_t* keys) noexcept nogil:
    """Two words of 32 bits under their two keys: a multilinear hash (Lemire and Kaser 2014)."""
    return (keys[0] + <uint32_t>words) * (keys[1] + (words >> 32))


cdef inline bint has_ports(uint8_t protocol) noexcept nogil:
    return (
        protocol == PROTOCOL_UDP or protocol == PROTOCOL_TCP or protocol == PROTOCOL_SCTP
        or protocol == PROTOCOL_UDPLITE or protocol == PROTOCOL_DCCP
    )


cdef inline uint32_t least_header_octets(uint8_t protocol) noexcept nogil:
    if protocol == PROTOCOL_TCP:
        return 20
    return 8 if protocol == PROTOCOL_UDP or protocol == PROTOCOL_UDPLITE else 12


cdef inline bint same(const Datagram* a, const Datagram* b) noexcept nogil:
    return (
        (a.ends[0] ^ b.ends[0]) | (a.ends[1] ^ b.ends[1]) | (a.ends[2] ^ b.ends[2]) | (a.ends[3] ^ b.ends[3])
        | (a.identification ^ b.identification) | (a.vlans ^ b.vlans) | (a.interface ^ b.interface)
        | (a.ip_version ^ b.ip_version) | (a.key_protocol ^ b.key_protocol)
    ) == 0


cdef class FragmentTable:
    """See fragments.pyi."""

    def __cinit__(self, *, uint32_t max_datagrams, uint64_t timeout_ns):
        cdef uint64_t sets = 1
        if not 1 <= max_datagrams <= 1 << 24:
            raise ValueError(f"max_datagrams {max_datagrams} is not within 1 .. {1 << 24}")
        if timeout_ns == 0:
            raise ValueError("the time-out must be above 0")
        while 2 * sets * WAYS <= max_datagrams:
            sets *= 2
        self.set_mask = <uint32_t>(sets - 1)
        self.timeout_ns = timeout_ns
        secrets = os.urandom(sizeof(self.secrets))
        memcpy(self.secrets, <const char*>secrets, sizeof(self.secrets))
        self.datagrams = <Datagram*>calloc(sets * WAYS, sizeof(Datagram))
        if self.datagrams == NULL:
            raise MemoryError(f"no memory for {sets * WAYS} datagrams in fragments")

    def __dealloc__(self):
        free(self.datagrams)

    cdef Datagram* set_of(self, const Datagram* key) noexcept nogil:
        cdef const uint64_t* k = self.secrets
        cdef uint64_t total = pair(key.ends[0], &k[0]) + pair(key.ends[1], &k[2]) + pair(key.ends[2], &k[4])
        total += pair(key.ends[3], &k[6]) + (k[8] + key.identification) * (k[9] + key.vlans)
        total += (k[10] + key.interface) * (k[11] + ((<uint64_t>key.ip_version << 8) | key.key_protocol))
        total ^= total >> 32
        total *= k[12] | 1
        return &self.datagrams[<uint64_t>((total >> 32) & self.set_mask) * WAYS]

    cdef bint is_over(self, const Datagram* x, uint64_t now_ns) noexcept nogil:
        return x.last_ns == 0 or x.last_ns + self.timeout_ns <= now_ns

    cdef Datagram* find(self, Datagram* places, const Datagram* key, uint64_t now_ns) noexcept nogil:
        cdef int i
        for i in range(WAYS):
            if same(&places[i], key) and not self.is_over(&places[i], now_ns):
                return &places[i]
        return NULL

    cdef Datagram* free_place(self, Datagram* places, uint64_t now_ns) noexcept nogil:
        cdef Datagram* oldest = &places[0]
        cdef int i
        for i in range(WAYS):
            if self.is_over(&places[i], now_ns):
                return &places[i]
        for i in range(WAYS):
            if places[i].ended != oldest.ended:
                if places[i].ended:
                    oldest = &places[i]
            elif places[i].last_ns < oldest.last_ns:
                oldest = &places[i]
        self.counts.evicted += not oldest.ended
        return oldest

    cdef void begin(self, Datagram* places, Datagram* key, const digest* d, uint64_t now_ns) noexcept nogil:
        """A first fragment. The newest one counts: identifications are used again soon on a fast link."""
        cdef Datagram* x = self.find(places, key, now_ns)
        if x == NULL:
            x = self.free_place(places, now_ns)
        elif not x.ended:
            self.counts.overlapping += 1
        x[0] = key[0]
        x.last_ns = now_ns
        x.source_port = d.source_port
        x.destination_port = d.destination_port
        x.protocol = d.protocol
        x.end_octets = d.payload_octets + least_header_octets(d.protocol)

    cdef bint complete(
        self, const digest* d, uint32_t vlans, uint32_t interface, uint64_t now_ns, digest* out
    ) noexcept nogil:
        cdef Datagram key
        cdef Datagram* places
        cdef Datagram* x
        memcpy(key.ends, d.source_address, 32)  # the destination stands behind it
        key.identification = d.fragment_id
        key.vlans = vlans
        key.interface = interface
        key.ip_version = d.ip_version
        key.key_protocol = d.protocol if d.ip_version == 4 else 0
        key.ended = False
        places = self.set_of(&key)
        if not d.status & DIGEST_LATER_FRAGMENT:
            if d.status & DIGEST_PORTS:
                self.begin(places, &key, d, max(now_ns, <uint64_t>1))
            return False
        x = self.find(places, &key, now_ns)
        if x == NULL:
            self.counts.unmatched += has_ports(d.protocol)
            return False
        self.counts.keyed += 1
        self.counts.overlapping += d.fragment_offset < x.end_octets
        x.end_octets = max(x.end_octets, d.fragment_offset + d.payload_octets)
        x.last_ns = max(now_ns, x.last_ns)
        if not d.status & DIGEST_MORE_FRAGMENTS:
            x.ended = True
        out[0] = d[0]
        out.protocol = x.protocol
        out.source_port = x.source_port
        out.destination_port = x.destination_port
        return True

    @property
    def memory_bytes(self):
        return (<size_t>self.set_mask + 1) * WAYS * sizeof(Datagram)

    def counters(self):
        return {
            "fragments_keyed": self.counts.keyed,
            "fragments_unmatched": self.counts.unmatched,
            "fragments_overlapping": self.counts.overlapping,
            "fragment_evictions": self.counts.evicted,
        }
