"""A single-producer, single-consumer ring of records in shared memory.

The hot paths never use these methods: compiled code cimports the classes and calls the inline functions of ring.h on
their `view`, without the GIL. The methods are for wiring, for slow sources, and for tests.

Records are in the framing of layout.h. Positions are monotonic byte counts. Nothing here blocks; "full" and "empty"
are return values, exceptions are for faults.
"""

from typing_extensions import Buffer

def initialise(fd: int, capacity: int, generation: int) -> None:
    """Writes the header of a new ring (memory.allocate made the memory). `generation` tells runs apart."""

class Mapping:
    """A ring's memory in this process, mapped with the data twice in a row. Reading its properties is free of locks.

    Raises ValueError when the memory is not a ring of this version and generation, OSError when it cannot be mapped.
    """

    def __init__(self, fd: int, expected_generation: int) -> None: ...
    capacity: int
    head: int
    tail: int
    used_bytes: int
    watermark_ns: int
    ended: bool
    def published_packets(self) -> int:
        """Packets or digests published, ever, as committed with the head."""
    def occupancy(self) -> tuple[int, int]:
        """(packets or digests published ever, those between tail and head), by walking the records.

        Their difference is what was consumed, exactly, whoever died. Call it while no consumer runs.
        """

class Producer:
    """The writing end: push or reserve/advance any number of records, then publish them all with one store.

    A new producer on a used ring resumes at its published head; what its predecessor had not published is gone, and
    `commit_words` is what it had stored with its last publish (`resumed` is False when there was none).
    `consumer_eventfd` is signalled only when the consumer sleeps.
    """

    def __init__(self, fd: int, generation: int, consumer_eventfd: int = -1) -> None: ...
    mapping: Mapping
    resumed: bool
    free_bytes: int
    unpublished_bytes: int
    commit_words: list[int]
    def push(self, record: Buffer) -> bool:
        """Copies one record behind the last one, unpublished. False: the ring is full, nothing was written."""
    def reserve(self, length: int) -> int:
        """The address of `length` contiguous free bytes, or 0 when the ring is full."""
    def advance(self, length: int) -> None:
        """The first `length` reserved bytes are whole records now."""
    def publish(self, watermark_ns: int) -> None:
        """Makes all written records visible, and promises that none that follows is older than `watermark_ns`."""
    def rewind(self) -> None:
        """Goes on at the start of the data, where memory is still in the cache, if the consumer has released everything
        published, and the ring's eighth or the first MiB is behind. What is unpublished moves along."""
    def promise(self, watermark_ns: int) -> None:
        """A new watermark without new records."""
    def end(self) -> None:
        """Nothing will follow."""
    def watermark_wanted(self) -> bool:
        """Whether the consumer waits for a fresh watermark; asking takes the request down."""
    def sleeps(self, sleeping: bool, *, for_room: bool = False) -> None:
        """True before a sleep: look at `free_bytes` and `watermark_wanted` once more afterwards. False after it.

        The consumer wakes a sleeping producer when it wants a watermark; with `for_room` also when it gives memory back
        and half of the ring is free then."""
    def set_commit_word(self, index: int, value: int) -> None:
        """Sets one of the 30 words that are stored with the next publish."""

class Consumer:
    """The reading end. `producer_eventfd` is signalled only when the producer sleeps."""

    def __init__(self, fd: int, generation: int, producer_eventfd: int = -1) -> None: ...
    mapping: Mapping
    watermark_ns: int
    """As of the last look; records published before that promise are all visible."""
    ended: bool
    corrupt: bool
    unread_bytes: int
    def refresh(self) -> int:
        """Looks at the producer; returns the unread bytes. ValueError: the producer's position is impossible."""
    def pop(self) -> bytes | None:
        """The next record, or None when there is none. ValueError: it is corrupt. Does not release it."""
    def release(self) -> None:
        """Gives the memory of everything read back to the producer."""
    def skip_to_head(self) -> int:
        """Gives up everything published, corrupt or not; returns how many bytes that was."""
    def want_watermark(self) -> None:
        """Asks the producer for a fresh watermark, waking it if it sleeps."""
    def sleeps(self, sleeping: bool, *, resting: bool = False) -> None:
        """True before a sleep: call `refresh` once more afterwards. False after it.

        The producer wakes a sleeping consumer whenever it publishes something; with `resting` only when a quarter of
        the ring is used then."""
