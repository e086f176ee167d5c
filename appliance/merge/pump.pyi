"""The merge worker's steady state: rings to buffer, buffer to file, rest, sleep; without Python in between."""

from appliance.merge.books import Books
from appliance.merge.order import Merge

class Pump:
    """Drives `merge`. `wake_fd`: the eventfd by which producers wake us (it does not block); `channel_fd`: readable
    when the supervisor calls. `turn_ms`: all capture workers turn at multiples of this, and a rest ends when they have;
    0: they do not. The GIL is released in every call."""

    def __init__(
        self,
        merge: Merge,
        books: Books,
        *,
        live: bool,
        wake_fd: int,
        channel_fd: int,
        max_wait_ms: int,
        turn_ms: int = 0,
    ) -> None: ...
    max_wait_ms: int
    turn_ms: int
    done: int
    """Bytes of the batch in the merge's buffer that `serve` wrote before it gave up on it."""
    def gather_ns(self, now: int) -> int:
        """So long a rest after a batch may be that begins at `now` (CLOCK_MONOTONIC): until the end of the capture
        workers' next turn; else 12 ms and a quarter of `max_wait_ms` at most, or 20 ms and two fifths of it where the
        last `serve` could write directly."""
    def fill(self) -> int:
        """One look at the rings: moves what may go into the buffer and gives the rings back. Returns the merge's
        status."""
    direct_refused: bool
    """The file system cannot write directly: from then on nothing is."""
    def serve(self, fd: int, limit_ms: int, *, direct: bool = False) -> int:
        """Fills, writes to `fd`, counts, rests and sleeps, until Python is needed, for about `limit_ms` at most.

        Returns the merge's status. IDLE with an empty buffer: it has slept, and time is over or the supervisor calls.
        With a batch in the buffer: `fd` took `done` bytes of it and no more (a pipe took nothing for 100 ms, or it has
        failed). A batch is counted as written when all of it is; the open segment gets what was written by
        `Books.take`. `direct`: large batches go past the page cache as long as no ring is crowded; `fd` is a regular
        file then. If the merge lends its pages, large batches go into a pipe without a copy.
        """
    def gather(self) -> None:
        """A short rest after a batch, so that the next one is worth its turn. A ring that fills up allows none, and
        ends it."""
    def idle(self) -> None:
        """Sleeps until a ring has news, the supervisor calls, or something falls due: watermarks are asked for, and a
        segment whose time is over ends although a source is silent."""
    def sleep(self, timeout_ms: int) -> None: ...
    def hang_up(self) -> None:
        """The supervisor's channel is at its end, and would be readable for ever."""
