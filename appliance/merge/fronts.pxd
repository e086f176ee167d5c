# cython: language_level=3
"""The oldest record of each source, as a tournament: when one has changed, the first of all is found by as many
comparisons as the number of sources has binary digits."""
from libc.stdint cimport UINT32_MAX, UINT64_MAX, uint32_t, uint64_t
from libc.stdlib cimport calloc, free

cdef struct front:
    uint64_t next_ns  # UINT64_MAX, and a source behind all others: there is none
    uint32_t source

cdef struct fronts:
    front *nodes     # [1] is the first of all, [i] of [2 * i] and [2 * i + 1]; from [leaves] on there is one a source
    uint32_t leaves  # a power of two


cdef inline bint allocate_fronts(fronts *all, uint32_t sources) noexcept nogil:
    """False: no memory. `free_fronts` is for whatever was allocated."""
    all.leaves = 1
    while all.leaves < sources:
        all.leaves *= 2
    all.nodes = <front *>calloc(2 * all.leaves, sizeof(front))
    return all.nodes != NULL


cdef inline void free_fronts(fronts *all) noexcept nogil:
    free(all.nodes)


cdef inline void clear_fronts(fronts *all) noexcept nogil:
    cdef uint32_t i
    for i in range(all.leaves):
        all.nodes[all.leaves + i].next_ns = UINT64_MAX
        all.nodes[all.leaves + i].source = UINT32_MAX


cdef inline void set_front(fronts *all, uint32_t source, uint64_t next_ns) noexcept nogil:
    """Between `clear_fronts` and `settle_fronts`."""
    all.nodes[all.leaves + source].next_ns = next_ns
    all.nodes[all.leaves + source].source = source


cdef inline void settle_fronts(fronts *all) noexcept nogil:
    cdef uint32_t i
    for i in range(all.leaves - 1, 0, -1):
        settle_node(all, i)


cdef inline void settle_node(fronts *all, uint32_t i) noexcept nogil:
    """The earlier of two; of equal ones, the first source's."""
    cdef const front *one = &all.nodes[2 * i]
    cdef const front *other = &all.nodes[2 * i + 1]
    cdef bint later = other.next_ns < one.next_ns or (other.next_ns == one.next_ns and other.source < one.source)
    all.nodes[i] = other[0] if later else one[0]


cdef inline const front *first_front(const fronts *all) noexcept nogil:
    return &all.nodes[1]


cdef inline void move_first(fronts *all, uint64_t next_ns) noexcept nogil:
    """The source that was the first has another record now."""
    cdef uint32_t i = all.leaves + all.nodes[1].source
    all.nodes[i].next_ns = next_ns
    while i > 1:
        i //= 2
        settle_node(all, i)


cdef inline uint64_t first_until(const fronts *all, uint64_t limit_ns) noexcept nogil:
    """Up to when the first one's source goes before all others, `limit_ns` at most."""
    cdef const front *first = &all.nodes[1]
    cdef const front *other
    cdef uint32_t i = all.leaves + first.source
    while i > 1:
        other = &all.nodes[i ^ 1]
        limit_ns = min(limit_ns, other.next_ns - (other.source < first.source))  # at the same time, that one goes first
        i //= 2
    return limit_ns
