# cython: language_level=3
"""The oldest record of each source, as a tournament: when one has changed, the first of all is found by as many
comparisons as the number of sources has binary digits."""
from libc.stdint cimport UINT64_MAX, uint32_t, uint64_t
from libc.stdlib cimport calloc, free

cdef struct front:
    uint64_t next_ns
    uint32_t leaf  # not as long as the time: a compiler that took the two for a vector would make `move_first` slow

cdef struct fronts:
    front *nodes     # [1] is the first of all, [i] of [2 * i] and [2 * i + 1]; the leaves begin at [leaves]
    uint32_t leaves  # a power of two
    uint32_t count   # of them; the others, behind them, are later than any record


cdef inline bint allocate_fronts(fronts *all, uint32_t sources) noexcept nogil:
    """False: no memory. `free_fronts` in any case."""
    cdef uint32_t leaves = leaves_for(sources)
    all.nodes = <front *>calloc(2 * leaves, sizeof(front))
    return all.nodes != NULL


cdef inline void free_fronts(fronts *all) noexcept nogil:
    free(all.nodes)


cdef inline uint32_t leaves_for(uint32_t count) noexcept nogil:
    cdef uint32_t leaves = 1
    while leaves < count:
        leaves *= 2
    return leaves


cdef inline void begin_fronts(fronts *all, uint32_t count) noexcept nogil:
    """`count` calls of `add_front` follow, in the order of the sources, then `settle_fronts`."""
    all.leaves = leaves_for(count)
    all.count = 0


cdef inline uint32_t add_front(fronts *all, uint64_t next_ns) noexcept nogil:
    """Returns its leaf."""
    cdef uint32_t leaf = all.count
    all.nodes[all.leaves + leaf] = front(next_ns, leaf)
    all.count += 1
    return leaf


cdef inline void settle_fronts(fronts *all) noexcept nogil:
    cdef uint32_t i
    for i in range(all.leaves + all.count, 2 * all.leaves):
        all.nodes[i].next_ns = UINT64_MAX
    for i in range(all.leaves - 1, 0, -1):
        settle_node(all, i)


cdef inline void settle_node(fronts *all, uint32_t i) noexcept nogil:
    """The earlier of two. At the same time it is the left one: its source comes before the other's."""
    all.nodes[i] = all.nodes[2 * i + (all.nodes[2 * i + 1].next_ns < all.nodes[2 * i].next_ns)]


cdef inline const front *first_front(const fronts *all) noexcept nogil:
    return &all.nodes[1]


cdef inline void move_first(fronts *all, uint64_t next_ns) noexcept nogil:
    """The source that was the first has another record now. On its way up, the earlier one stays in registers, and is
    chosen by arithmetic: which one that is, no processor can guess."""
    cdef uint32_t leaf = all.nodes[1].leaf
    cdef const front *other
    cdef uint64_t i = all.leaves + leaf
    cdef uint64_t mask
    all.nodes[i].next_ns = next_ns
    while i > 1:
        other = &all.nodes[i ^ 1]
        # At the same time, a left one goes before a right one.
        mask = -<uint64_t>((other.next_ns < next_ns) | ((other.next_ns == next_ns) & i))
        next_ns ^= (next_ns ^ other.next_ns) & mask
        leaf ^= (leaf ^ other.leaf) & <uint32_t>mask
        i //= 2
        all.nodes[i].next_ns = next_ns
        all.nodes[i].leaf = leaf


cdef inline uint64_t first_until(const fronts *all, uint64_t limit_ns) noexcept nogil:
    """Up to when the first one's source goes before all others, `limit_ns` at most."""
    cdef uint32_t i = all.leaves + all.nodes[1].leaf
    while i > 1:
        limit_ns = min(limit_ns, all.nodes[i ^ 1].next_ns - (i & 1))  # at the same time, a left one goes before us
        i //= 2
    return limit_ns
