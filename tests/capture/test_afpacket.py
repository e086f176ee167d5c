"""The walk through the kernel's ring: records, tags, lengths, drops, and the resumption after a death."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import mmap
import os
import random
import struct
import threading
import time
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from support.frames import Shape, numbered_frame
from support.lab import Lab, requires_root, wait_until
from support.replay import send_frames

from appliance.capture import opener
from appliance.capture.afpacket import LiveCapture
from appliance.capture.opener import OpenedInterface, OpenRequest
from appliance.counters import CAPTURE_FIELDS, CounterPage, CounterPages
from appliance.errors import MissingInputError
from appliance.ring import memory
from appliance.ring.ring import Consumer, Producer, initialise

pytestmark = requires_root

CLONE_NEWNET = 0x40000000
GENERATION = 7
RING_BYTES = 8 << 20
HEAD_OFFSET = 128  # of ring_header.head, ring/layout.h
NO_TURN_EVER_MS = 1 << 40
PACKET = 6
COUNTERS = 0x80000C07


@contextlib.contextmanager
def inside(namespace: str) -> Iterator[None]:
    """This thread in a network namespace; the sockets that it opens there stay there."""
    libc = ctypes.CDLL(None, use_errno=True)
    with open("/proc/self/ns/net") as home, open(f"/run/netns/{namespace}") as there:
        assert libc.setns(there.fileno(), CLONE_NEWNET) == 0
        try:
            yield
        finally:
            assert libc.setns(home.fileno(), CLONE_NEWNET) == 0


class Bench:
    """A socket on one interface, its rings, and whoever captures into them at the moment."""

    def __init__(
        self,
        lab: Lab,
        interface: str,
        *,
        ring_bytes: int = RING_BYTES,
        metered: bool = True,
        turn_ms: int = 0,
        reorder_us: int = 1000,
        **request: Any,
    ):
        self.turn_ms = turn_ms
        self.reorder_us = reorder_us
        asked: dict[str, Any] = {"interface": interface, "kernel_ring_bytes": 64 << 20} | request
        with inside(lab.namespace):
            self.opened: OpenedInterface = opener.open_interface(OpenRequest(**asked))
        self.request = OpenRequest(**asked)
        self.page: CounterPage = CounterPages([("capture/a", CAPTURE_FIELDS)])["capture/a"]
        self.fds = [memory.allocate(ring_bytes, "test") for _ in range(2 if metered else 1)]
        for fd in self.fds:
            initialise(fd, ring_bytes, GENERATION)
        self.records = Consumer(self.fds[0], GENERATION)
        self.digests = Consumer(self.fds[1], GENERATION) if metered else None
        self.packets: list[tuple[int, bytes, int]] = []  # timestamp, data, original length
        self.accounts: list[tuple[int, ...]] = []  # the counters that came between the packets
        self.begin()

    def begin(self, serial: int = 1) -> None:
        """A capture worker's start, or its next life: the old one left without a word."""
        gc.collect()
        self.producer = Producer(self.fds[0], GENERATION)
        self.digest_producer = Producer(self.fds[1], GENERATION) if len(self.fds) > 1 else None
        self.capture = LiveCapture(
            self.opened.fd,
            self.opened.block_bytes,
            self.opened.block_count,
            self.producer,
            self.digest_producer,
            self.page,
            socket_serial=serial,
            linktype=self.opened.linktype,
            cooked=self.opened.cooked,
            snaplen=self.request.snaplen,
            ifindex=self.opened.ifindex,
            reorder_us=self.reorder_us,
            turn_ms=self.turn_ms,
        )

    def die(self) -> None:
        del self.capture, self.producer, self.digest_producer
        self.begin()

    def consume(self) -> None:
        self.records.refresh()
        while (record := self.records.pop()) is not None:
            kind, _, _, high, low, captured, original = struct.unpack_from("=IIIIIII", record)
            if kind == COUNTERS:
                self.accounts.append(struct.unpack_from("=5Q", record, 20))
            if kind == PACKET:
                self.packets.append((high << 32 | low, record[28 : 28 + captured], original))
        self.records.release()

    def count_digests(self) -> int:
        assert self.digests is not None
        self.digests.refresh()
        count = 0
        while self.digests.pop() is not None:
            count += 1
        self.digests.release()
        return count

    def pump_until(self, packets: int, timeout_s: float = 10.0) -> None:
        """Captures and consumes until so many packets were consumed in all."""
        deadline = time.monotonic() + timeout_s
        while len(self.packets) < packets:
            assert time.monotonic() < deadline, (len(self.packets), packets, self.page.snapshot())
            if self.capture.pump() == 0:
                time.sleep(0.002)
            self.consume()

    def drain(self) -> None:
        """What a worker does at its end."""
        opener.stop_accepting(self.opened.fd)
        deadline = time.monotonic() + 5
        while not self.capture.is_drained:
            assert time.monotonic() < deadline
            self.capture.pump()
            time.sleep(0.002)
        self.capture.finish()
        self.consume()

    def close(self) -> None:
        del self.capture
        os.close(self.opened.fd)
        for fd in self.fds:
            os.close(fd)

    @property
    def frames(self) -> list[bytes]:
        return [data for _, data, _ in self.packets]


@pytest.fixture
def lab() -> Iterator[Lab]:
    with Lab() as made:
        yield made


def numbers(frames: list[bytes]) -> list[int]:
    return [struct.unpack_from("!Q", frame, 20)[0] for frame in frames]


def test_every_frame_becomes_a_record_in_order_and_is_counted(lab: Lab) -> None:
    a, pa = lab.veth("a")
    bench = Bench(lab, a)
    before_ns = time.time_ns()
    lab.send([pa], frames=500, rate=20_000, sizes=(60, 61, 62, 63, 1514))
    bench.pump_until(500)
    expected = [numbered_frame(0, i, Shape(sizes=(60, 61, 62, 63, 1514))) for i in range(500)]
    assert bench.frames == expected
    assert [original for _, _, original in bench.packets] == [len(frame) for frame in expected]
    stamps = [stamp for stamp, _, _ in bench.packets]
    assert stamps == sorted(stamps)
    assert before_ns < stamps[0] < stamps[-1] < time.time_ns()
    page = bench.page
    assert page["received_packets"] == page["read_packets"] == page["published_packets"] == 500
    assert page["read_bytes"] == page["published_bytes"] == sum(map(len, expected))
    assert page["dropped_kernel_packets"] == page["dropped_ring_packets"] == page["foreign_packets"] == 0
    assert (page["ignored_not_ip_packets"], page["ignored_octets"]) == (500, page["read_bytes"])
    bench.drain()
    bench.close()


@pytest.mark.parametrize("tpid", [0x8100, 0x88A8])
@pytest.mark.parametrize("snaplen", [262144, 64, 70])
def test_a_vlan_tag_is_put_back_before_the_packet_is_cut(lab: Lab, tmp_path: Path, tpid: int, snaplen: int) -> None:
    a, pa = lab.veth("a")
    bench = Bench(lab, a, snaplen=snaplen)
    bare = numbered_frame(0, 1, Shape(sizes=(100,)))
    frame = bare[:12] + struct.pack("!HH", tpid, 0x6123) + bare[12:]
    send_frames(lab, pa, [frame] * 10, tmp_path)
    bench.pump_until(10)
    assert set(bench.frames) == {frame[:snaplen]}
    assert {original for _, _, original in bench.packets} == {104}
    assert bench.page["truncated_packets"] == (10 if snaplen < 104 else 0)
    bench.close()


def test_cooked_packets_have_a_header_of_their_own(lab: Lab) -> None:
    a, pa = lab.veth("a")
    bench = Bench(lab, a, linktype="sll2")
    assert (bench.opened.linktype, bench.opened.cooked) == (276, True)
    lab.send([pa], frames=10, rate=10_000, flows=1)
    bench.pump_until(10)
    expected = numbered_frame(0, 0, Shape(udp=True))
    frame = bench.frames[0]
    protocol, reserved, index, hardware, kind, length = struct.unpack_from("!HHIHBB", frame)
    assert (protocol, reserved, index, hardware, length) == (0x0800, 0, bench.opened.ifindex, 1, 6)
    assert kind == 3  # to another host: PACKET_OTHERHOST
    assert frame[12:18] == expected[6:12]
    assert frame[20:] == expected[14:]
    bench.close()


def test_an_interface_that_does_not_exist_is_refused_by_name(lab: Lab) -> None:
    with inside(lab.namespace), pytest.raises(MissingInputError, match="nowhere0"):
        opener.open_interface(OpenRequest("nowhere0"))


# ---- deaths ----------------------------------------------------------------------------------------------------------


def test_whoever_takes_over_after_a_death_goes_on_at_the_very_packet(lab: Lab) -> None:
    """Many lives, each of which ends without a word, some with packets that they have walked and not published."""
    a, pa = lab.veth("a")
    bench = Bench(lab, a)
    sender = lab.start_sender([pa], frames=30_000, rate=20_000, flows=50)
    chance = random.Random(1)
    deaths = 0
    deadline = time.monotonic() + 20
    while len(bench.packets) < 30_000:
        assert time.monotonic() < deadline, bench.page.snapshot()
        for _ in range(chance.randrange(4)):
            bench.capture.pump()
            time.sleep(chance.uniform(0, 0.004))
        if chance.random() < 0.7:
            bench.consume()
        deaths += 1
        bench.die()
    assert sender.report().total == 30_000
    bench.drain()
    assert deaths > 0
    assert [struct.unpack_from("!Q", frame, 48)[0] for frame in bench.frames] == list(range(30_000))
    page = bench.page
    assert page["received_packets"] == page["read_packets"] == page["published_packets"] == 30_000
    assert page["digests_published"] == bench.count_digests() == 30_000
    assert page["kernel_queued_packets"] == page["unpublished_packets"] == 0
    bench.close()


def test_a_death_between_the_publication_of_packets_and_of_their_digests_loses_no_digest(lab: Lab) -> None:
    a, pa = lab.veth("a")
    bench = Bench(lab, a)
    lab.send([pa], frames=200, rate=20_000, flows=5)
    bench.pump_until(200)
    assert bench.count_digests() == 200
    with mmap.mmap(bench.fds[1], 4096) as header:
        head_before = header[HEAD_OFFSET : HEAD_OFFSET + 8]
        lab.send([pa], frames=100, rate=1e6, flows=5, first_sequence=200)
        bench.pump_until(300)
        header[HEAD_OFFSET : HEAD_OFFSET + 8] = head_before  # as if the second store had not been made any more
    # Only the last publish can be in that state: the resumption takes up what its commit says.
    bench.die()
    assert bench.count_digests() == 100
    assert bench.page["digests_published"] == 300
    bench.close()


def test_another_socket_of_the_same_interface_is_walked_from_its_beginning(lab: Lab) -> None:
    a, pa = lab.veth("a")
    bench = Bench(lab, a)
    lab.send([pa], frames=100, rate=20_000)
    bench.pump_until(100)
    bench.capture.finish()
    del bench.capture
    os.close(bench.opened.fd)
    with inside(lab.namespace):
        bench.opened = opener.open_interface(bench.request)
    lab.send([pa], frames=100, rate=20_000, first_sequence=100)
    bench.begin(serial=2)
    bench.pump_until(200)
    assert numbers(bench.frames) == list(range(200))
    assert bench.page["received_packets"] == 200
    bench.close()


# ---- full rings ------------------------------------------------------------------------------------------------------


def test_a_full_ring_drops_the_newest_packets_and_counts_them(lab: Lab) -> None:
    a, pa = lab.veth("a")
    bench = Bench(lab, a, ring_bytes=1 << 20)
    lab.send([pa], frames=2000, rate=50_000, sizes=(1514,))
    deadline = time.monotonic() + 5
    while bench.page["read_packets"] < 2000:
        assert time.monotonic() < deadline
        bench.capture.pump()
        time.sleep(0.002)
    bench.consume()
    kept = len(bench.packets)
    assert numbers(bench.frames) == list(range(kept))
    assert bench.page["dropped_ring_packets"] == 2000 - kept > 0
    assert bench.page["received_packets"] == 2000
    lab.send([pa], frames=100, rate=20_000, first_sequence=2000)
    bench.pump_until(kept + 100)
    assert numbers(bench.frames)[kept:] == list(range(2000, 2100))
    bench.close()


def test_a_full_kernel_ring_is_counted_by_the_kernel(lab: Lab) -> None:
    a, pa = lab.veth("a")
    bench = Bench(lab, a, kernel_ring_bytes=2 << 20)
    lab.send([pa], frames=4000, rate=100_000, sizes=(1514,))
    bench.pump_until(1)
    bench.drain()
    page = bench.page
    assert page["received_packets"] == 4000
    assert page["dropped_kernel_packets"] == 4000 - len(bench.packets) > 0
    assert page["kernel_freezes"] >= 1
    assert page["read_packets"] == len(bench.packets)
    bench.close()


def test_a_full_digest_ring_costs_no_packet(lab: Lab) -> None:
    a, pa = lab.veth("a")
    bench = Bench(lab, a, ring_bytes=1 << 20)
    for first in range(0, 12_000, 3000):
        lab.send([pa], frames=3000, rate=50_000, flows=10, first_sequence=first)
        bench.pump_until(first + 3000)
    page = bench.page
    assert page["digests_dropped"] > 0
    assert page["digests_published"] == bench.count_digests() == 12_000 - page["digests_dropped"]
    assert page["dropped_ring_packets"] == 0
    bench.close()


# ---- turns ----------------------------------------------------------------------------------------------------------


class Serving:
    """A capture that serves in a thread of its own, to the end of the block."""

    def __init__(self, bench: Bench) -> None:
        self.bench = bench
        self.wake_fd, self.channel_fd = os.eventfd(0), os.eventfd(0)
        self.called = threading.Thread(target=bench.capture.serve, args=(self.wake_fd, self.channel_fd, 60_000))

    def __enter__(self) -> Serving:
        self.called.start()
        return self

    def wait_until_taken(self, packets: int) -> None:
        """Until it has taken so many packets in all from the kernel."""
        wait_until(lambda: self.taken == packets, f"{packets} packets taken", timeout_s=20)

    @property
    def taken(self) -> int:
        """The youngest may have to wait for the next turn, unpublished."""
        return self.bench.page["read_packets"] + self.bench.page["unpublished_packets"]

    def __exit__(self, *_: object) -> None:
        os.eventfd_write(self.channel_fd, 1)
        self.called.join()
        os.close(self.wake_fd)
        os.close(self.channel_fd)


def test_while_packets_come_a_worker_sleeps_until_the_turn_of_all_or_until_the_supervisor_calls(lab: Lab) -> None:
    a, pa = lab.veth("a")
    bench = Bench(lab, a, turn_ms=NO_TURN_EVER_MS)
    with Serving(bench) as serving:
        lab.send([pa], frames=1, rate=0)  # two could come in two blocks
        serving.wait_until_taken(1)  # what comes after a pause is handed over by the kernel, and wakes
        lab.send([pa], frames=5, rate=0)
        time.sleep(10 * bench.request.block_timeout_ms / 1000)
        assert serving.taken == 1
    bench.pump_until(6)
    bench.close()


def test_another_turn_is_taken_up_while_a_worker_turns(lab: Lab) -> None:
    a, pa = lab.veth("a")
    bench = Bench(lab, a, turn_ms=NO_TURN_EVER_MS)
    with Serving(bench) as serving:
        lab.send([pa], frames=1, rate=0)
        serving.wait_until_taken(1)
    lab.send([pa], frames=5, rate=0)
    bench.capture.turn_ms = 0
    with Serving(bench) as serving:
        serving.wait_until_taken(6)
        lab.send([pa], frames=1, rate=0)
        serving.wait_until_taken(7)
    assert bench.capture.turn_ms == 0
    bench.consume()
    assert len(bench.packets) == 7
    bench.close()


def test_a_worker_turns_at_multiples_of_the_turn_and_hears_the_kernel_again_when_a_turn_was_in_vain(lab: Lab) -> None:
    a, pa = lab.veth("a")
    bench = Bench(lab, a, turn_ms=100)
    with Serving(bench) as serving:
        for i in range(1, 4):
            lab.send([pa], frames=10, rate=0)
            serving.wait_until_taken(10 * i)
    bench.close()


def test_a_worker_whose_kernel_ring_fills_up_does_not_wait_for_the_turn_of_all(lab: Lab) -> None:
    a, pa = lab.veth("a")
    bench = Bench(lab, a, turn_ms=NO_TURN_EVER_MS, kernel_ring_bytes=8 << 20)
    lab.send([pa], frames=1500, rate=0, sizes=(1514,))  # three blocks of 1 MiB or a few more, of eight
    time.sleep(10 * bench.request.block_timeout_ms / 1000)
    with Serving(bench) as serving:
        serving.wait_until_taken(1500)
        lab.send([pa], frames=1, rate=0)
        serving.wait_until_taken(1501)
    bench.close()


def test_workers_that_turn_together_publish_up_to_one_and_the_same_millisecond(lab: Lab) -> None:
    a, pa = lab.veth("a")
    bench = Bench(lab, a, turn_ms=100)
    lab.send([pa], frames=1, rate=0)
    while bench.capture.pump() == 0:  # from then on it turns with the others
        time.sleep(0.001)
    lab.send([pa], frames=1, rate=0)
    time.sleep(0.3)
    bench.capture.pump()
    bench.consume()
    assert bench.records.watermark_ns > bench.packets[0][0]
    assert bench.records.watermark_ns % 1_000_000 == 0
    bench.close()


def test_small_blocks_of_one_turn_are_published_together_with_one_account_of_all_that_was_received(lab: Lab) -> None:
    a, pa = lab.veth("a")
    bench = Bench(lab, a)
    for i in range(5):
        lab.send([pa], frames=1, rate=0, first_sequence=i)
        time.sleep(0.1)  # the kernel hands its block over
    assert bench.capture.pump() == 5
    bench.consume()
    assert numbers(bench.frames) == list(range(5))
    assert [account[:2] for account in bench.accounts] == [(5, 0)]
    bench.close()


def test_a_kernel_ring_that_is_taken_whole_in_one_turn_is_walked_once(lab: Lab) -> None:
    a, pa = lab.veth("a")
    bench = Bench(lab, a, kernel_ring_bytes=2 << 20, reorder_us=1_000_000)
    lab.send([pa], frames=4000, rate=0, sizes=(1514,))
    bench.drain()
    kept = 4000 - bench.page["dropped_kernel_packets"]
    assert numbers(bench.frames) == list(range(kept))
    assert bench.page["read_packets"] == kept
    bench.close()


def test_a_capture_keeps_the_memory_of_its_counters(lab: Lab) -> None:
    a, _ = lab.veth("a")
    bench = Bench(lab, a)
    page = weakref.ref(bench.page)
    del bench.page
    gc.collect()
    assert page() is not None
    bench.close()
    assert page() is None


# ---- promises --------------------------------------------------------------------------------------------------------


def test_an_idle_interface_moves_its_watermark_when_it_is_asked(lab: Lab) -> None:
    a, _ = lab.veth("a")
    bench = Bench(lab, a)
    bench.capture.pump()
    for _ in range(3):
        before_ns = time.time_ns()
        bench.records.want_watermark()
        bench.capture.pump()
        bench.records.refresh()
        # It keeps `reorder_us` behind the clock.
        assert before_ns - 1_000_000 <= bench.records.watermark_ns <= time.time_ns() - 1_000_000
    bench.close()


def test_no_record_is_older_than_the_watermark_that_was_promised_before_it(lab: Lab) -> None:
    a, pa = lab.veth("a")
    bench = Bench(lab, a)
    sender = lab.start_sender([pa], frames=4000, rate=10_000)
    promised = 0
    while len(bench.packets) < 4000:
        bench.records.want_watermark()
        bench.capture.pump()
        seen = len(bench.packets)
        bench.consume()
        assert all(stamp >= promised for stamp, _, _ in bench.packets[seen:])
        promised = bench.records.watermark_ns
        time.sleep(0.0005)
    sender.report()
    bench.close()
