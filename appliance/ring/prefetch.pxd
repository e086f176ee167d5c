# cython: language_level=3
"""Memory that is needed soon."""

cdef enum:
    # What is written record by record, from front to back, is fetched so far ahead: a ring is too large for the caches,
    # and a store to a line that is not there waits for it.
    WRITE_AHEAD_BYTES = 1024
    # The same for what is read so. A processor that sees the order fetches ahead by itself, but not beyond a page, and
    # not when it changes between sources after every few records.
    READ_AHEAD_BYTES = 1024

cdef extern from *:
    """
    /* The empty statement keeps gcc from taking a function of nothing but prefetches for one without effects. */
    static inline void prefetch(const void *p) { __builtin_prefetch(p, 0, 3); __asm__ volatile(""); }
    static inline void prefetch_for_write(const void *p) { __builtin_prefetch(p, 1, 3); __asm__ volatile(""); }
    /* A small packet with its header begins in one line and ends in the next. */
    static inline void prefetch_lines(const void *p) { prefetch(p); prefetch((const char *)p + 64); }
    """
    void prefetch(const void* p) noexcept nogil
    void prefetch_lines(const void* p) noexcept nogil
    void prefetch_for_write(const void* p) noexcept nogil
