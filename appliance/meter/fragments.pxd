"""The fragment table, for the flow table. See fragments.pyi."""

from libc.stdint cimport uint32_t, uint64_t

from appliance.ring.digest cimport digest

cdef enum:
    DATAGRAM_SECRETS = 13  # of 64 bits

cdef struct FragmentCounts:
    uint64_t keyed
    uint64_t unmatched
    uint64_t overlapping
    uint64_t evicted

cdef struct Datagram

cdef class FragmentTable:
    cdef Datagram* datagrams
    cdef uint64_t[DATAGRAM_SECRETS] secrets
    cdef uint64_t timeout_ns
    cdef uint32_t set_mask
    cdef FragmentCounts counts

    cdef Datagram* set_of(self, const Datagram* key) noexcept nogil
    cdef bint is_over(self, const Datagram* x, uint64_t now_ns) noexcept nogil
    cdef Datagram* find(self, Datagram* places, const Datagram* key, uint64_t now_ns) noexcept nogil
    cdef Datagram* free_place(self, Datagram* places, uint64_t now_ns) noexcept nogil
    cdef void begin(self, Datagram* places, Datagram* key, const digest* d, uint64_t now_ns) noexcept nogil

    # `d` is a fragment that comes at `now_ns`, a time that never goes back. True: a later one whose first one came
    # before; `out` is then `d` with the transport protocol and the ports of the first. `vlans` and `interface`: what of
    # them is part of the flow key, 0 otherwise.
    cdef bint complete(
        self, const digest* d, uint32_t vlans, uint32_t interface, uint64_t now_ns, digest* out
    ) noexcept nogil
