"""Bounded memory for what flows say of themselves: octets of any length in chains of blocks of 64."""

from libc.stdint cimport uint8_t, uint16_t, uint32_t
from libc.string cimport memcpy

cdef enum:
    BLOCK_OCTETS = 58

cdef struct NameBlock:  # one cache line
    uint32_t next  # block number + 1; 0: the last
    uint16_t length  # of what stands here and behind
    uint8_t[58] octets

cdef struct NamePool:
    NameBlock* blocks
    uint32_t count
    uint32_t used
    uint32_t high_water
    uint32_t free_list  # block number + 1


cdef inline uint32_t blocks_for(uint32_t length) noexcept nogil:
    return (length + BLOCK_OCTETS - 1) // BLOCK_OCTETS


cdef inline uint32_t take_block(NamePool* pool) noexcept nogil:
    """Its number + 1; the caller has seen that one is free."""
    cdef uint32_t block = pool.free_list
    pool.used += 1
    if block != 0:
        pool.free_list = pool.blocks[block - 1].next
        return block
    pool.high_water += 1
    return pool.high_water


cdef inline uint32_t store_name(NamePool* pool, const uint8_t* octets, uint32_t length) noexcept nogil:
    """The first block's number + 1. 0: there is no room. `length`: 1 to 65535."""
    cdef uint32_t first = 0
    cdef uint32_t block, some
    if blocks_for(length) > pool.count - pool.used:
        return 0
    # From the end, so that each block knows the next.
    while length != 0:
        some = length % BLOCK_OCTETS
        if some == 0 or first != 0:
            some = BLOCK_OCTETS
        block = take_block(pool)
        length -= some
        memcpy(pool.blocks[block - 1].octets, octets + length, some)
        pool.blocks[block - 1].next = first
        pool.blocks[block - 1].length = <uint16_t>(some + (pool.blocks[first - 1].length if first != 0 else 0))
        first = block
    return first


cdef inline void free_name(NamePool* pool, uint32_t first) noexcept nogil:
    cdef uint32_t next
    while first != 0:
        next = pool.blocks[first - 1].next
        pool.blocks[first - 1].next = pool.free_list
        pool.free_list = first
        pool.used -= 1
        first = next


cdef inline uint32_t load_name(const NamePool* pool, uint32_t first, uint8_t* out) noexcept nogil:
    """Returns the octets written, as many as were stored."""
    cdef const NameBlock* block
    cdef uint32_t at = 0
    cdef uint32_t some
    while first != 0:
        block = &pool.blocks[first - 1]
        some = block.length if block.next == 0 else BLOCK_OCTETS
        memcpy(out + at, block.octets, some)
        at += some
        first = block.next
    return at
