# cython: language_level=3
"""A batch into a pipe without a copy (vmsplice(2)): the pipe gets our pages, and its reader copies out of them.

That spares a copy, and a page of the kernel for each page. But a page must stay as it is until the reader has it. So
the output buffer is several regions that take turns: a batch whose pages were lent is followed by one in another
region. It lies there in the pages of an earlier batch only if the pipe is known to be rid of them (FIONREAD, see
ioctl_tty(2)); if not, the region gets fresh pages, and the pipe keeps the old ones for as long as it needs them.

FIONREAD knows nothing of a reader that splices pages on instead of reading them. So only for readers that are known to
read: see compressor.py.
"""
from libc.stdint cimport INT64_MAX, int64_t, uint8_t, uint32_t, uint64_t
from libc.stdlib cimport free

from appliance.merge.direct cimport DIRECT_PAGE_BYTES
from appliance.ring.layout cimport RECORD_MAX_BYTES

cdef extern from "<fcntl.h>" nogil:
    struct iovec:
        void *iov_base
        size_t iov_len
    ssize_t vmsplice(int fd, const iovec *pieces, unsigned long count, unsigned int flags)
    unsigned int SPLICE_F_NONBLOCK

cdef extern from "<sys/ioctl.h>" nogil:
    int ioctl(int fd, unsigned long request, ...)
    unsigned long FIONREAD

cdef extern from "<stdlib.h>" nogil:
    int posix_memalign(void **memory, size_t alignment, size_t length)

cdef extern from "<sys/mman.h>" nogil:
    int madvise(void *address, size_t length, int advice)
    int MADV_DONTNEED
    int MADV_HUGEPAGE

cdef enum:
    HUGE_PAGE_BYTES = 2 << 20
    LENT_REGIONS = 3            # in the pipe, on its way into it, and one in between
    LENDING_MIN_BYTES = 64 << 10  # less is copied: a pipe has a place for each page, however little of it is used

cdef struct output_room:
    uint8_t *start
    uint64_t region_bytes
    uint32_t regions
    uint32_t region              # of the batch
    int64_t given                # octets that went into this pipe
    int64_t[LENT_REGIONS] ends   # what was given when the last of a region's lent octets had gone; 0: nothing is lent


cdef inline bint allocate_room(output_room *room, uint64_t out_bytes, bint lends) noexcept nogil:
    """Each region has room for a batch of so many octets, the record that makes it full, and what it lies behind the
    begin of a page. False: there is no memory. A large one is of huge pages where there are any: the kernel writes
    them with less work."""
    cdef bint huge = not lends and out_bytes >= HUGE_PAGE_BYTES // 4
    cdef size_t unit = HUGE_PAGE_BYTES if huge else DIRECT_PAGE_BYTES
    room.region_bytes = (out_bytes + RECORD_MAX_BYTES + DIRECT_PAGE_BYTES + unit - 1) // unit * unit
    room.regions = LENT_REGIONS + 1 if lends else 1  # the last one is never lent
    if posix_memalign(<void **>&room.start, unit, room.regions * room.region_bytes) != 0:
        room.start = NULL
        return False
    if huge:
        madvise(room.start, room.region_bytes, MADV_HUGEPAGE)
    return True


cdef inline void free_room(output_room *room) noexcept nogil:
    free(room.start)


cdef inline uint8_t *region_of(const output_room *room) noexcept nogil:
    return room.start + room.region * room.region_bytes


cdef inline bint may_lend(const output_room *room) noexcept nogil:
    return room.region + 1 < room.regions


cdef inline int64_t lend_pages(output_room *room, int fd, uint8_t *data, uint64_t length) noexcept nogil:
    """Like write(2) to a pipe that does not block."""
    cdef iovec piece = iovec(data, length)
    cdef int64_t count = vmsplice(fd, &piece, 1, SPLICE_F_NONBLOCK)
    if count > 0:
        room.given += count
        room.ends[room.region] = room.given
    return count


cdef inline void note_taken(output_room *room, int fd) noexcept nogil:
    """What the reader has taken since is ours again. What others wrote into the pipe only makes that later."""
    cdef int unread = 0
    cdef uint32_t i
    if ioctl(fd, FIONREAD, &unread) != 0:
        return
    for i in range(LENT_REGIONS):
        if room.ends[i] <= room.given - unread:
            room.ends[i] = 0


cdef inline void forget_pipe(output_room *room) noexcept nogil:
    """Another pipe follows: nobody will know any longer what the reader of this one takes."""
    cdef uint32_t i
    room.given = 0
    for i in range(LENT_REGIONS):
        if room.ends[i] != 0:
            room.ends[i] = INT64_MAX


cdef inline void next_region(output_room *room) noexcept nogil:
    """For the next batch: another region, if pages of this one are lent."""
    cdef uint32_t following = (room.region + 1) % LENT_REGIONS
    if not may_lend(room) or room.ends[room.region] == 0:
        return
    if room.ends[following] == 0 or madvise(
            room.start + following * room.region_bytes, room.region_bytes, MADV_DONTNEED) == 0:
        room.ends[following] = 0
        room.region = following
    else:
        room.region = LENT_REGIONS  # from now on nothing is lent
