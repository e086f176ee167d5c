"""The ring against a model, and against the death of its producer between any two stores."""

from __future__ import annotations

import collections
import ctypes
import os
import pathlib
import resource
import struct
import subprocess

import pytest
from hypothesis import settings, strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from appliance.ring import memory
from appliance.ring.ring import Consumer, Producer, initialise

CAPACITY = 1 << 16
GENERATION = 7
RECORD_PACKET = 6
HEAD_OFFSET, WATERMARK_OFFSET, REWOUND_OFFSET, TAIL_OFFSET = 128, 136, 152, 768


def new_ring() -> int:
    fd = memory.allocate(CAPACITY, "test")
    initialise(fd, CAPACITY, GENERATION)
    return fd


def record(body: bytes, timestamp_ns: int = 0) -> bytes:
    body += b"\0" * (-len(body) % 4)
    length = 24 + len(body)
    prefix = struct.pack("=IIIII", RECORD_PACKET, length, 0, timestamp_ns >> 32, timestamp_ns & 0xFFFFFFFF)
    return prefix + body + struct.pack("=I", length)


class RingAgainstDeque(RuleBasedStateMachine):
    """Pushes, publishes, deaths and reads in any order give what a deque gives."""

    def __init__(self) -> None:
        super().__init__()
        self.fd = new_ring()
        self.producer = Producer(self.fd, GENERATION)
        self.consumer = Consumer(self.fd, GENERATION)
        self.unpublished: list[bytes] = []
        self.published: collections.deque[bytes] = collections.deque()
        self.unreleased: list[bytes] = []
        self.commit = 0

    @rule()
    def rewind(self) -> None:
        self.producer.rewind()

    @rule(size=st.integers(0, 9000), fill=st.integers(0, 255))
    def push(self, size: int, fill: int) -> None:
        entry = record(bytes([fill]) * size)
        used = sum(map(len, self.unpublished)) + sum(map(len, self.published)) + sum(map(len, self.unreleased))
        accepted = self.producer.push(entry)
        assert accepted == (used + len(entry) <= CAPACITY)
        if accepted:
            self.unpublished.append(entry)

    @rule(watermark=st.integers(0, 2**62))
    def publish(self, watermark: int) -> None:
        self.commit += 1
        self.producer.set_commit_word(0, self.commit)
        self.producer.publish(watermark)
        self.published.extend(self.unpublished)
        self.unpublished.clear()
        self.consumer.refresh()
        assert self.consumer.watermark_ns == watermark

    @rule()
    def producer_dies_and_its_successor_resumes(self) -> None:
        self.producer = Producer(self.fd, GENERATION)
        self.unpublished.clear()
        assert self.producer.resumed == (self.commit > 0)
        assert self.producer.commit_words[0] == self.commit

    @rule()
    def pop(self) -> None:
        entry = self.consumer.pop()
        assert entry == (self.published.popleft() if self.published else None)
        if entry is not None:
            self.unreleased.append(entry)

    @rule()
    def release(self) -> None:
        self.consumer.release()
        self.unreleased.clear()

    @rule()
    def consumer_dies_and_its_successor_resumes_at_the_tail(self) -> None:
        self.consumer = Consumer(self.fd, GENERATION)
        self.published.extendleft(reversed(self.unreleased))
        self.unreleased.clear()

    @precondition(lambda self: not self.unpublished and not self.published and not self.unreleased)
    @rule()
    def an_empty_ring_is_all_free(self) -> None:
        self.consumer.release()
        assert self.producer.free_bytes == CAPACITY

    @invariant()
    def used_bytes_are_exact(self) -> None:
        shared = sum(map(len, self.published)) + sum(map(len, self.unreleased))
        assert self.producer.mapping.used_bytes == shared

    def teardown(self) -> None:
        os.close(self.fd)


TestRingAgainstDeque = RingAgainstDeque.TestCase
TestRingAgainstDeque.settings = settings(max_examples=150, stateful_step_count=60, deadline=None)


class Store(ctypes.Structure):
    _fields_ = [("offset", ctypes.c_uint64), ("bytes", ctypes.c_uint64), ("value", ctypes.c_uint64)]


@pytest.fixture(scope="module")
def traced(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    here = pathlib.Path(__file__).parent
    library = tmp_path_factory.mktemp("traced") / "traced_ring.so"
    include = here.parent.parent / "appliance" / "ring"
    subprocess.run(
        [
            "gcc",
            "-std=gnu11",
            "-O1",
            "-shared",
            "-fPIC",
            f"-I{include}",
            str(here / "traced_ring.c"),
            "-o",
            str(library),
        ],
        check=True,
    )
    dll = ctypes.CDLL(str(library))
    dll.traced_publish.restype = ctypes.c_uint64
    dll.traced_publish.argtypes = [
        ctypes.c_void_p,
        ctypes.c_char_p,
        ctypes.c_uint64,
        ctypes.c_int64,
        ctypes.c_uint64,
        ctypes.c_int,
    ]
    dll.traced_log.restype = ctypes.POINTER(Store)
    return dll


def trace_publish(
    dll: ctypes.CDLL, image: bytearray, records: bytes, watermark_ns: int, word: int, *, rewind: bool = False
) -> list[Store]:
    """Publishes into `image`; returns the stores in the order in which the producer made them."""
    buffer = (ctypes.c_char * len(image)).from_buffer(image)
    count = dll.traced_publish(ctypes.addressof(buffer), records, len(records), watermark_ns, word, rewind)
    del buffer
    log = dll.traced_log()
    return [Store(log[i].offset, log[i].bytes, log[i].value) for i in range(count)]


def apply(image: bytearray, store: Store) -> None:
    image[store.offset : store.offset + store.bytes] = (store.value & (2 ** (8 * store.bytes) - 1)).to_bytes(
        store.bytes, "little"
    )


def fresh_image() -> bytearray:
    fd = new_ring()
    image = bytearray(os.pread(fd, memory.HEADER_BYTES + CAPACITY, 0))
    os.close(fd)
    return image


def read_everything(image: bytes) -> tuple[list[bytes], int]:
    """What a consumer sees of this memory, and the commit word that a new producer would resume with."""
    fd = new_ring()
    os.pwrite(fd, image, 0)
    consumer = Consumer(fd, GENERATION)
    seen = []
    while (entry := consumer.pop()) is not None:
        seen.append(entry)
    word = Producer(fd, GENERATION).commit_words[0]
    os.close(fd)
    return seen, word


def test_a_producer_that_dies_between_any_two_stores_leaves_whole_batches_and_a_matching_commit(
    traced: ctypes.CDLL,
) -> None:
    image = fresh_image()
    first = [record(b"a" * 60, 1), record(b"b" * 33, 2)]
    trace_publish(traced, image, b"".join(first), 2, 101)
    before = bytes(image)
    second = [record(b"c" * 100, 3), record(b"d", 4), record(b"", 5)]
    stores = trace_publish(traced, image, b"".join(second), 5, 102)
    assert len(stores) > sum(map(len, second))

    replayed = bytearray(before)
    head_stored = False
    for store in stores:
        seen, word = read_everything(bytes(replayed))
        assert (seen, word) == ((first + second, 102) if head_stored else (first, 101))
        apply(replayed, store)
        head_stored = head_stored or store.offset == HEAD_OFFSET
    assert head_stored
    assert replayed == image
    assert read_everything(bytes(replayed)) == (first + second, 102)


def image_with_everything_consumed(dll: ctypes.CDLL, batch: list[bytes]) -> bytearray:
    """A ring's memory far from the start of its data, in which nothing waits."""
    image = fresh_image()
    trace_publish(dll, image, b"".join(batch), 1, 100)
    (head,) = struct.unpack_from("=Q", image, HEAD_OFFSET)
    struct.pack_into("=Q", image, TAIL_OFFSET, head)
    return image


def test_a_producer_that_dies_between_any_two_stores_of_a_rewinding_leaves_whole_batches(traced: ctypes.CDLL) -> None:
    consumed = [record(b"a" * 5000, 1), record(b"b" * 6000, 2)]
    image = image_with_everything_consumed(traced, consumed)
    replayed = bytearray(image)
    batch = [record(b"c" * 100, 3), record(b"d", 4)]
    stores = trace_publish(traced, image, b"".join(batch), 5, 102, rewind=True)
    assert struct.unpack_from("=Q", image, REWOUND_OFFSET) == (CAPACITY,)

    head_stored = False
    for store in stores:
        assert read_everything(bytes(replayed)) == ((batch, 102) if head_stored else ([], 100))
        apply(replayed, store)
        head_stored = head_stored or store.offset == HEAD_OFFSET
    assert replayed == image
    assert read_everything(bytes(image)) == (batch, 102)


def test_the_successor_of_a_producer_that_died_while_it_rewound_loses_nothing(traced: ctypes.CDLL) -> None:
    image = image_with_everything_consumed(traced, [record(b"a" * 9000, 1)])
    at_death = bytearray(image)
    for store in trace_publish(traced, image, record(b"dead", 3), 5, 102, rewind=True):
        if store.offset == HEAD_OFFSET:
            break
        apply(at_death, store)
    assert struct.unpack_from("=Q", at_death, REWOUND_OFFSET) == (CAPACITY,)  # above the head
    batch = [record(bytes([i]) * 15_000, i) for i in range(3)]
    trace_publish(traced, at_death, b"".join(batch), 6, 103)
    assert read_everything(bytes(at_death)) == (batch, 103)


def test_two_deaths_in_a_row_never_cost_the_last_commit(traced: ctypes.CDLL) -> None:
    image = fresh_image()
    trace_publish(traced, image, record(b"", 1), 1, 101)
    once_torn = bytearray(image)
    for store in trace_publish(traced, bytearray(image), record(b"", 2), 2, 102):
        twice_torn = bytearray(once_torn)
        expected = read_everything(bytes(once_torn))
        for second_store in trace_publish(traced, bytearray(once_torn), record(b"", 3), 3, 103):
            assert read_everything(bytes(twice_torn)) == expected
            if second_store.offset == HEAD_OFFSET:
                break
            apply(twice_torn, second_store)
        apply(once_torn, store)


def test_whoever_loads_the_watermark_before_the_head_never_misses_a_promised_record(traced: ctypes.CDLL) -> None:
    image = fresh_image()
    states: list[tuple[int, int]] = []

    def note(state: bytearray) -> None:
        states.append(struct.unpack_from("=Qq", state, HEAD_OFFSET))

    promised_head: dict[int, int] = {0: 0}
    for timestamp in (10, 20, 30, 40):
        before = bytearray(image)
        stores = trace_publish(traced, image, record(b"x" * 40, timestamp), timestamp, timestamp)
        note(before)
        for store in stores:
            apply(before, store)
            note(before)
        promised_head[timestamp] = states[-1][0]

    def misses(watermark: int, head: int) -> bool:
        return head < promised_head[watermark]

    interleavings = [(i, j) for i in range(len(states)) for j in range(i, len(states))]
    assert not any(misses(states[i][1], states[j][0]) for i, j in interleavings)
    # The other order of loads does miss records: the model is able to see the fault.
    assert any(misses(states[j][1], states[i][0]) for i, j in interleavings)


@pytest.mark.parametrize(
    ("offset", "value"),
    [(4, 0), (4, 3), (4, 12), (4, 21), (4, 1 << 30), (4, 68), (60, 1)],
    ids=["zero", "tiny", "short", "odd", "huge", "beyond the head", "trailing length differs"],
)
def test_a_record_with_an_impossible_length_is_refused_and_can_be_skipped(offset: int, value: int) -> None:
    fd = new_ring()
    producer, consumer = Producer(fd, GENERATION), Consumer(fd, GENERATION)
    producer.push(record(b"y" * 40))
    producer.publish(1)
    os.pwrite(fd, struct.pack("=I", value), memory.HEADER_BYTES + offset)
    with pytest.raises(ValueError, match="corrupt"):
        consumer.pop()
    assert consumer.skip_to_head() == 64
    producer.push(record(b"next"))
    producer.publish(2)
    assert consumer.pop() == record(b"next")
    os.close(fd)


@pytest.mark.parametrize("head", [CAPACITY + 4, 2**63, 2**64 - 4])
def test_an_impossible_head_is_refused(head: int) -> None:
    fd = new_ring()
    consumer = Consumer(fd, GENERATION)
    os.pwrite(fd, struct.pack("=Q", head), HEAD_OFFSET)
    with pytest.raises(ValueError, match="impossible"):
        consumer.refresh()
    os.close(fd)


def test_an_impossible_tail_makes_the_ring_full_and_never_overwrites() -> None:
    fd = new_ring()
    producer = Producer(fd, GENERATION)
    assert producer.push(record(b"z" * (CAPACITY - 1024)))
    os.pwrite(fd, struct.pack("=Q", CAPACITY * 9), 768)
    assert not producer.push(record(b"z" * 1024))
    assert producer.free_bytes == 0
    os.close(fd)


def test_a_ring_that_is_always_emptied_stays_at_its_start() -> None:
    fd = new_ring()
    producer, consumer = Producer(fd, GENERATION), Consumer(fd, GENERATION)
    entry = record(b"x" * 5000)
    indices = set()
    for _ in range(50):
        producer.rewind()
        assert producer.push(entry)
        producer.publish(1)
        assert consumer.pop() == entry
        consumer.release()
        indices.add(consumer.mapping.head % CAPACITY)
        assert consumer.mapping.used_bytes == 0
    assert max(indices) < CAPACITY // 4
    os.close(fd)


def test_a_ring_with_an_unread_or_an_unreleased_record_is_not_rewound() -> None:
    fd = new_ring()
    producer, consumer = Producer(fd, GENERATION), Consumer(fd, GENERATION)
    entries = [record(bytes([i]) * 9000) for i in range(3)]
    for entry in entries:
        producer.push(entry)
        producer.publish(1)
        producer.rewind()
    assert [consumer.pop() for _ in entries] == entries
    producer.rewind()
    assert producer.push(entries[0])
    producer.publish(1)
    assert consumer.mapping.head == 3 * len(entries[0]) + len(entries[0])
    assert consumer.pop() == entries[0]
    os.close(fd)


def test_what_is_not_published_yet_moves_along_when_a_ring_is_rewound() -> None:
    fd = new_ring()
    producer, consumer = Producer(fd, GENERATION), Consumer(fd, GENERATION)
    producer.push(record(b"a" * 20_000))
    producer.publish(1)
    consumer.pop()
    consumer.release()
    waiting = [record(b"b" * 3000), record(b"c" * 7000)]
    for entry in waiting:
        producer.push(entry)
    producer.rewind()
    assert producer.free_bytes == CAPACITY - sum(map(len, waiting))
    producer.publish(2)
    assert consumer.mapping.used_bytes == sum(map(len, waiting))
    assert consumer.mapping.occupancy() == (0, 2)
    assert [consumer.pop(), consumer.pop(), consumer.pop()] == [*waiting, None]
    assert consumer.mapping.head == CAPACITY + sum(map(len, waiting))
    os.close(fd)


def test_a_rewinding_over_unread_records_is_refused() -> None:
    fd = new_ring()
    producer, consumer = Producer(fd, GENERATION), Consumer(fd, GENERATION)
    for _ in range(2):
        producer.push(record(b"a" * 100))
    producer.publish(1)
    consumer.pop()
    os.pwrite(fd, struct.pack("=Q", consumer.mapping.head), REWOUND_OFFSET)
    with pytest.raises(ValueError, match="position is impossible"):
        consumer.refresh()
    os.close(fd)


def test_records_that_wrap_are_read_in_one_piece() -> None:
    fd = new_ring()
    producer, consumer = Producer(fd, GENERATION), Consumer(fd, GENERATION)
    for i in range(500):
        entry = record(os.urandom(997), i)
        assert producer.push(entry)
        producer.publish(i)
        assert consumer.pop() == entry
        consumer.release()
    os.close(fd)


def test_another_generation_or_a_damaged_header_is_refused() -> None:
    fd = new_ring()
    with pytest.raises(ValueError, match="header does not match"):
        Consumer(fd, GENERATION + 1)
    os.pwrite(fd, b"\0", 0)
    with pytest.raises(ValueError, match="header does not match"):
        Producer(fd, GENERATION)
    os.close(fd)


def test_the_memory_of_a_ring_is_allocated_and_cannot_change_its_size() -> None:
    fd = new_ring()
    assert os.fstat(fd).st_blocks * 512 >= CAPACITY
    with pytest.raises(PermissionError):
        os.ftruncate(fd, 0)
    os.close(fd)


def test_the_first_lap_costs_few_page_faults() -> None:
    capacity = 16 << 20
    fd = memory.allocate(capacity, "test")
    initialise(fd, capacity, GENERATION)
    producer = Producer(fd, GENERATION)
    block = record(b"x" * 1000)
    before = resource.getrusage(resource.RUSAGE_THREAD).ru_minflt
    while producer.push(block):
        pass
    faults = resource.getrusage(resource.RUSAGE_THREAD).ru_minflt - before
    os.close(fd)
    assert faults < capacity // 4096 // 4


def test_only_a_sleeping_consumer_is_woken() -> None:
    fd, event = new_ring(), os.eventfd(0, os.EFD_NONBLOCK)
    producer, consumer = Producer(fd, GENERATION, event), Consumer(fd, GENERATION)
    producer.publish(1)
    with pytest.raises(BlockingIOError):
        os.eventfd_read(event)
    consumer.sleeps(True)
    producer.publish(2)
    producer.publish(3)
    assert os.eventfd_read(event) == 1
    os.close(fd)
    os.close(event)


def test_a_consumer_that_rests_is_woken_when_a_quarter_of_the_ring_is_used() -> None:
    fd, event = new_ring(), os.eventfd(0, os.EFD_NONBLOCK)
    producer, consumer = Producer(fd, GENERATION, event), Consumer(fd, GENERATION)
    block = record(b"x" * 1000)
    for lap in range(3):
        consumer.sleeps(True, resting=True)
        used = 0
        while used + len(block) < CAPACITY // 4:
            producer.push(block)
            used += len(block)
            producer.publish(lap)
            with pytest.raises(BlockingIOError):
                os.eventfd_read(event)
        producer.push(block)
        producer.publish(lap)
        assert os.eventfd_read(event) == 1
        while consumer.pop() is not None:
            consumer.release()
    os.close(fd)
    os.close(event)


def test_a_producer_that_sleeps_for_room_is_woken_when_half_of_the_ring_is_free() -> None:
    fd, event = new_ring(), os.eventfd(0, os.EFD_NONBLOCK)
    producer, consumer = Producer(fd, GENERATION), Consumer(fd, GENERATION, event)
    block = record(b"x" * 8000)
    while producer.push(block):
        pass
    producer.publish(1)
    producer.sleeps(True, for_room=True)
    consumer.refresh()
    while consumer.unread_bytes > CAPACITY // 2:
        with pytest.raises(BlockingIOError):
            os.eventfd_read(event)
        assert consumer.pop() is not None
        consumer.release()
    assert os.eventfd_read(event) == 1
    os.close(fd)
    os.close(event)


def test_a_producer_that_waits_for_packets_is_not_woken_by_room() -> None:
    fd, event = new_ring(), os.eventfd(0, os.EFD_NONBLOCK)
    producer, consumer = Producer(fd, GENERATION), Consumer(fd, GENERATION, event)
    producer.push(record(b"x"))
    producer.publish(1)
    producer.sleeps(True)
    assert consumer.pop() is not None
    consumer.release()
    with pytest.raises(BlockingIOError):
        os.eventfd_read(event)
    os.close(fd)
    os.close(event)


def test_a_request_for_the_watermark_wakes_a_sleeping_producer_and_is_answered_once() -> None:
    fd, event = new_ring(), os.eventfd(0, os.EFD_NONBLOCK)
    producer, consumer = Producer(fd, GENERATION), Consumer(fd, GENERATION, event)
    producer.sleeps(True)
    consumer.want_watermark()
    assert os.eventfd_read(event) == 1
    assert producer.watermark_wanted()
    assert not producer.watermark_wanted()
    os.close(fd)
    os.close(event)
