# cython: language_level=3
"""A batch into a file past the page cache (open(2), O_DIRECT): the disk takes the octets out of our buffer.

That spares the copy, the pages of the cache and writing them back, and what others have in the cache stays there. What
the disk takes must begin and end with whole pages, of memory as of the file; what a batch has before and behind those
goes through the cache. So no page goes both ways, which the kernel would have to put in order each time.
"""
from libc.errno cimport EINVAL, errno
from libc.stdint cimport int64_t, uint8_t, uint64_t
from posix.fcntl cimport F_SETFL, fcntl
from posix.unistd cimport SEEK_CUR, lseek, write

cdef extern from "<fcntl.h>" nogil:
    int O_DIRECT

cdef enum:
    DIRECT_PAGE_BYTES = 4096      # no disk's logical block is larger
    DIRECT_MIN_BYTES = 128 << 10  # less is cheaper through the cache: each wait for the disk has its price

cdef struct direct_writing:
    uint64_t done    # octets of the batch, from its begin
    uint64_t direct  # of them past the cache
    bint refused     # the file system cannot do that


cdef inline uint64_t offset_in_page(int fd) noexcept nogil:
    """Where in a page the file goes on."""
    cdef int64_t offset = lseek(fd, 0, SEEK_CUR)
    return <uint64_t>offset % DIRECT_PAGE_BYTES if offset > 0 else 0


cdef inline direct_writing write_directly(int fd, const uint8_t *data, uint64_t length) noexcept nogil:
    """Writes as much of the batch as can go directly, with what stands before it; nothing of a batch that is small, or
    that lies in memory otherwise than it will in the file. What is left, for whatever reason, is left to write(2).
    `fd`: a regular file without O_APPEND."""
    cdef direct_writing now = direct_writing(0, 0, False)
    cdef uint64_t head = (DIRECT_PAGE_BYTES - offset_in_page(fd)) % DIRECT_PAGE_BYTES
    cdef uint64_t room
    cdef int64_t count
    if length < head + DIRECT_MIN_BYTES or (<uint64_t>data + head) % DIRECT_PAGE_BYTES:
        return now
    while now.done < head:
        count = write(fd, data + now.done, head - now.done)
        if count <= 0:
            return now
        now.done += <uint64_t>count
    room = (length - head) // DIRECT_PAGE_BYTES * DIRECT_PAGE_BYTES
    now.refused = fcntl(fd, F_SETFL, O_DIRECT) != 0
    if now.refused:
        return now
    count = write(fd, data + head, room)
    now.refused = count < 0 and errno == EINVAL
    fcntl(fd, F_SETFL, 0)
    if count > 0:
        now.done += <uint64_t>count
        now.direct = <uint64_t>count
    return now
