# cython: language_level=3, boundscheck=False, wraparound=False, cdivision=True
"""The merge worker's steady state: rings to buffer, buffer to file, rest, sleep; without Python in between.

Python comes in when there is something to decide: a segment's end, an interface, a clock that was set, a write that
failed, a word of the supervisor; and once a second.
"""
cimport cython
from libc.errno cimport EAGAIN, EINTR, errno
from libc.stdint cimport UINT64_MAX, int64_t, uint8_t, uint64_t
from posix.time cimport CLOCK_REALTIME, clock_gettime, timespec
from posix.unistd cimport read, write

from appliance.merge.books cimport Books
from appliance.merge.direct cimport direct_writing, offset_in_page, write_directly
from appliance.merge.lending cimport LENDING_MIN_BYTES, lend_pages, may_lend, note_taken
from appliance.merge.order cimport S_FULL, S_IDLE, Merge, monotonic_ns
from appliance.ring.layout cimport RING_AWAKE, RING_RESTS, RING_SLEEPS

cdef extern from "<poll.h>" nogil:
    struct pollfd:
        int fd
        short events
        short revents
    int poll(pollfd *fds, unsigned long count, int timeout)
    int ppoll(pollfd *fds, unsigned long count, const timespec *timeout, const void *signals)
    short POLLIN
    short POLLOUT

cdef enum:
    HEARTBEAT_MS = 500
    # A live output that has just written waits for so long before it looks again: a turn has its price, and so has each
    # write, whatever its length. A file may wait for longer than who reads a pipe: two rests are within max_wait.
    GATHER_MS = 12
    FILE_GATHER_MS = 20
    TURN_NS = 2000000  # so long after its begin, a turn of all capture workers is over
    ROOM_MS = 100  # a compressor that takes nothing for longer is waited for, and given up, where its time-out is known
    FORCE_GRACE_MS = 200  # a segment's time is over for longer than max_wait and this: some source is silent

# Not in an enum: see order.pyx. A packet cannot have been captured later than this from now, whatever clock is wrong.
cdef uint64_t HORIZON_NS = 3600000000000


cdef uint64_t realtime_ns() noexcept nogil:
    cdef timespec t
    clock_gettime(CLOCK_REALTIME, &t)
    return <uint64_t>t.tv_sec * 1000000000 + <uint64_t>t.tv_nsec


@cython.final
cdef class Pump:
    """See pump.pyi."""
    cdef Merge merge
    cdef Books books
    cdef bint live
    cdef int wake_fd
    cdef int channel_fd
    cdef public uint64_t max_wait_ms
    cdef uint64_t turn_ns
    cdef uint64_t wrote_ns  # CLOCK_MONOTONIC of the last batch; 0: there was none
    cdef readonly uint64_t done
    cdef bint direct
    cdef readonly bint direct_refused

    def __cinit__(self, Merge merge not None, Books books not None, *, bint live, int wake_fd, int channel_fd,
                  uint64_t max_wait_ms, uint64_t turn_ms=0):
        self.merge = merge
        self.books = books
        self.live = live
        self.wake_fd = wake_fd
        self.channel_fd = channel_fd
        self.max_wait_ms = max_wait_ms
        self.turn_ns = turn_ms * 1000000

    def hang_up(self):
        self.channel_fd = -1

    @property
    def turn_ms(self):
        return self.turn_ns // 1000000

    @turn_ms.setter
    def turn_ms(self, uint64_t turn_ms):
        self.turn_ns = turn_ms * 1000000

    # ---- a turn ----

    def fill(self):
        cdef int status
        self.done = 0
        with nogil:
            status = self.move()
        return status

    def serve(self, int fd, uint64_t limit_ms, *, bint direct=False):
        cdef int status
        self.done = 0
        self.direct = direct and not self.direct_refused
        if self.direct and self.merge.out_bytes == 0:
            self.merge.begin_batch_at(offset_in_page(fd))
        with nogil:
            status = self.serve_until(fd, monotonic_ns() + limit_ms * 1000000)
        return status

    cdef int move(self) noexcept nogil:
        """What may go into the buffer; its place in the rings is given back at once, so nothing is written twice."""
        cdef int status
        if self.live:
            self.merge.horizon_ns = realtime_ns() + HORIZON_NS
        self.merge.refresh_all()
        status = self.merge.run()
        self.merge.give_back()
        self.merge.publish_tap()
        return status

    cdef int serve_until(self, int fd, uint64_t until_ns) noexcept nogil:
        cdef int status
        cdef bint has_written
        while True:
            self.books.heartbeat_ns[0] = monotonic_ns()
            status = self.move()
            has_written = self.merge.out_bytes > 0
            if has_written and not self.put(fd):
                return status
            if status == S_IDLE:
                if self.pause(has_written):
                    return status
            elif status != S_FULL:
                return status
            if monotonic_ns() >= until_ns:
                return S_IDLE

    cdef bint put(self, int fd) noexcept nogil:
        """Writes the batch. False: `done` bytes of it; whoever knows the file does the rest."""
        cdef int64_t count
        self.books.batch_consumed()
        if self.direct and not self.merge.crowded:  # a crowded ring must not wait for a disk
            self.put_directly(fd)
        while self.done < self.merge.out_bytes:
            count = self.put_on(fd)
            if count < 0 and errno == EINTR:
                continue
            if count < 0 and errno == EAGAIN and self.has_room(fd):
                continue
            if count <= 0:
                return False
            self.done += <uint64_t>count
        self.books.batch_written(self.done)
        if may_lend(&self.merge.room):
            note_taken(&self.merge.room, fd)
        self.merge.forget_batch()
        if self.direct:
            self.merge.begin_batch_at(offset_in_page(fd))
        self.done = 0
        return True

    cdef int64_t put_on(self, int fd) noexcept nogil:
        """Like write(2), for what is not done yet."""
        cdef uint8_t *data = self.merge.out + self.done
        cdef uint64_t length = self.merge.out_bytes - self.done
        cdef int64_t count
        if not may_lend(&self.merge.room) or self.merge.out_bytes < LENDING_MIN_BYTES:
            return write(fd, data, length)
        count = lend_pages(&self.merge.room, fd, data, length)
        if count < 0 and errno != EAGAIN and errno != EINTR:
            return write(fd, data, length)  # it can do without lending, or has the better words
        return count

    cdef bint has_room(self, int fd) noexcept nogil:
        """Waits for a compressor to take some of its full pipe."""
        cdef pollfd pipe = pollfd(fd, POLLOUT, 0)
        cdef bint has_room = poll(&pipe, 1, ROOM_MS) > 0
        self.books.heartbeat_ns[0] = monotonic_ns()
        return has_room

    cdef void put_directly(self, int fd) noexcept nogil:
        cdef direct_writing written = write_directly(fd, self.merge.out, self.merge.out_bytes)
        self.done = written.done
        self.books.went_directly(written.direct)
        if written.refused:
            self.direct = False
            self.direct_refused = True

    # ---- waiting ----

    def gather(self):
        with nogil:
            self.pause(True)

    def idle(self):
        with nogil:
            self.doze()

    def sleep(self, int timeout_ms):
        with nogil:
            self.doze_for(timeout_ms)

    cpdef int64_t gather_ns(self, uint64_t now) noexcept nogil:
        if self.turn_ns:
            return self.turn_ns - (now - TURN_NS) % self.turn_ns
        if self.direct:
            return max(<int64_t>1, min(<int64_t>FILE_GATHER_MS, <int64_t>self.max_wait_ms * 2 // 5)) * 1000000
        return min(<int64_t>GATHER_MS, self.quarter_of_max_wait()) * 1000000

    cdef bint pause(self, bint has_written) noexcept nogil:
        """After a look at the rings, all was moved that could be. Returns whether the supervisor calls."""
        cdef int64_t rest_ns = 0
        if has_written:
            self.wrote_ns = monotonic_ns()
        if self.live and (has_written or self.is_turn() or self.has_just_written()):
            rest_ns = self.longest_rest_ns()
        if rest_ns > 0:
            return self.rest(rest_ns)
        return False if self.live and has_written else self.doze()

    cdef bint is_turn(self) noexcept nogil:
        """The capture workers have their turn: in a doze each of them would wake us."""
        return self.turn_ns and monotonic_ns() % self.turn_ns < TURN_NS

    cdef bint has_just_written(self) noexcept nogil:
        """With that the workers' turn was over: what comes next, comes with their next one. In a doze each of them
        would wake us then, we would write too early for a rest until the turn after, and so on."""
        return self.turn_ns and self.wrote_ns and monotonic_ns() - self.wrote_ns < self.turn_ns // 2

    cdef int64_t longest_rest_ns(self) noexcept nogil:
        """0 or less when something is due or a ring fills up."""
        cdef int64_t timeout_ns = self.gather_ns(monotonic_ns())
        cdef int64_t hold_ms = self.merge.hold_left_ms()
        if self.merge.crowded:
            return 0
        if hold_ms >= 0:
            timeout_ns = min(timeout_ns, hold_ms * 1000000)
            if self.turn_ns:
                timeout_ns = min(timeout_ns, self.quarter_of_max_wait() * 1000000)
        if self.merge.boundary_ns != UINT64_MAX:
            timeout_ns = min(timeout_ns, -self.overdue_ns())
        return timeout_ns

    cdef bint rest(self, int64_t rest_ns) noexcept nogil:
        """Lets packets come together without a wake for each batch."""
        self.merge.rest_ns = rest_ns
        self.merge.announce_sleep(RING_RESTS)
        return self.sleep_for(rest_ns)

    cdef bint doze(self) noexcept nogil:
        """Sleeps until something comes or falls due. Returns whether the supervisor calls."""
        cdef int64_t timeout_ms = HEARTBEAT_MS
        cdef int64_t hold_ms
        self.books.consumed()
        if self.merge.has_tap:
            self.merge.ask_all()  # its consumer's time must move although no packet comes
        if self.merge.ask_who_holds():
            timeout_ms = self.quarter_of_max_wait()
        hold_ms = self.merge.hold_left_ms()
        if hold_ms >= 0:
            timeout_ms = min(timeout_ms, max(<int64_t>1, hold_ms), self.quarter_of_max_wait())
        if self.live and not self.merge.held and self.merge.boundary_ns != UINT64_MAX:
            timeout_ms = min(timeout_ms, self.until_boundary_ms())
        return self.doze_for(min(timeout_ms, <int64_t>HEARTBEAT_MS))

    cdef int64_t quarter_of_max_wait(self) noexcept nogil:
        return max(<int64_t>1, <int64_t>self.max_wait_ms // 4)

    cdef int64_t overdue_ns(self) noexcept nogil:
        """How long ago the segment's time was over by the wall clock; negative: it is not."""
        return <int64_t>realtime_ns() - <int64_t>self.merge.boundary_ns

    cdef int64_t until_boundary_ms(self) noexcept nogil:
        """Until the segment's time is over; when it is, the watermarks must move."""
        cdef int64_t overdue_ns = self.overdue_ns()
        if overdue_ns < 0:
            return -overdue_ns // 1000000 + 3
        self.merge.ask_all()
        if overdue_ns > <int64_t>(self.max_wait_ms + FORCE_GRACE_MS) * 1000000:
            self.merge.forced_end = True
            return 0
        return self.quarter_of_max_wait()

    cdef bint doze_for(self, int64_t timeout_ms) noexcept nogil:
        self.merge.announce_sleep(RING_SLEEPS)
        return self.sleep_for(0 if self.merge.moved() else timeout_ms * 1000000)

    cdef bint sleep_for(self, int64_t timeout_ns) noexcept nogil:
        """The sleep has been announced to the producers. Returns whether the supervisor calls."""
        cdef timespec timeout
        cdef pollfd[2] fds
        cdef uint64_t woken
        fds[0].fd = self.wake_fd
        fds[1].fd = self.channel_fd
        fds[0].events = fds[1].events = POLLIN
        fds[0].revents = fds[1].revents = 0
        timeout.tv_sec = timeout_ns // 1000000000
        timeout.tv_nsec = timeout_ns % 1000000000
        ppoll(fds, 2, &timeout, NULL)
        self.merge.announce_sleep(RING_AWAKE)
        if fds[0].revents:
            read(self.wake_fd, &woken, sizeof(woken))
        return fds[1].revents != 0
