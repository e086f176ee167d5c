"""Large memory that costs nothing until it is touched, in huge pages where the kernel gives them."""

from libc.stdint cimport uint8_t, uintptr_t
from posix.mman cimport MAP_ANONYMOUS, MAP_FAILED, MAP_NORESERVE, MAP_PRIVATE, PROT_READ, PROT_WRITE, mmap, munmap

cdef extern from *:
    """
    #include <string.h>
    #include <sys/mman.h>
    static inline void prefer_huge_pages(void *p, size_t n) { (void)madvise(p, n, MADV_HUGEPAGE); }
    /* Anonymous memory of our own: it reads as zeros afterwards. */
    static inline void give_back(void *p, size_t n) { if (madvise(p, n, MADV_DONTNEED)) memset(p, 0, n); }
    """
    void prefer_huge_pages(void* p, size_t n) noexcept nogil
    void give_back(void* p, size_t n) noexcept nogil

cdef enum:
    HUGE_PAGE_BYTES = 2097152


cdef inline size_t whole_pages(size_t length) noexcept nogil:
    return (length + HUGE_PAGE_BYTES - 1) // HUGE_PAGE_BYTES * HUGE_PAGE_BYTES


cdef inline void* map_memory(size_t length) except NULL:
    """Zeroed memory on a huge page's border that costs nothing until it is touched; see unmap_memory."""
    cdef size_t mapped = whole_pages(length) + HUGE_PAGE_BYTES
    cdef void* memory = mmap(NULL, mapped, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0)
    cdef size_t before
    if memory == MAP_FAILED:
        raise MemoryError(f"the flow table's {length} bytes cannot be mapped")
    before = whole_pages(<uintptr_t>memory) - <uintptr_t>memory
    if before:
        munmap(memory, before)
    if before < HUGE_PAGE_BYTES:
        munmap(<uint8_t*>memory + before + whole_pages(length), HUGE_PAGE_BYTES - before)
    prefer_huge_pages(<uint8_t*>memory + before, length)  # the last one whole would be more than was asked for
    return <uint8_t*>memory + before


cdef inline void unmap_memory(void* memory, size_t length) noexcept:
    if memory != NULL:
        munmap(memory, whole_pages(length))
