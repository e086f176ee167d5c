"""Where the time goes: each stage by itself in this process, over memory, ns per packet."""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import os
import secrets
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from support.frames import Shape, numbered_frame
from support.kernel_ring import BLOCK_BYTES, KernelRing

from appliance.capture import headers
from appliance.capture.afpacket import LiveCapture
from appliance.capture.application import Inspector
from appliance.capture.digestfile import DigestFile
from appliance.capture.filesource import FileCapture
from appliance.config import Interface
from appliance.counters import CAPTURE_FIELDS, CounterPages
from appliance.formats.pcap import PcapDecoder
from appliance.merge import order
from appliance.meter.table import FlowTable
from appliance.ring.memory import allocate
from appliance.ring.ring import Consumer, Producer, initialise
from bench.context import Bench
from bench.results import Picture, RowResult, Table
from bench.rows.ipfix_pack import SECOND, each_batch
from bench.traffic import Mix, packets_of, write_capture

NAME = "stages"
TITLE = "Each stage by itself"
NEEDS_ROOT = False

SIZES = {"60 B": 60, "1500 B": 1500}
MERGES = (1, 2, 4, 8)
FLOWS = (1_000, 100_000, 400_000)
DIGEST_BYTES = 128
INSPECTIONS = {  # of payloads
    "applications": {"applications": True},
    "entropy": {"applications": False, "entropy": True},
}
TCP_SEQUENCE = 76 // 4  # in a digest (appliance/ring/digest.h)
OUT_BYTES = 1 << 20
WRITE_BYTES = 1 << 20
PACKET_RING_BYTES = 2 << 20  # small enough to stay in the cache
DIGEST_RING_BYTES = 1 << 20
DIGEST_BATCH_BYTES = 256 << 10
KERNEL_BLOCKS = 2
IFINDEX = 7
TURNS = 100
LINKTYPE_ETHERNET = 1
ROUNDS = 3

Times = dict[str, dict[str, float]]  # stage -> size -> ns per packet


def run_row(bench: Bench) -> RowResult:
    packets = 50_000 if bench.quick else 200_000
    times: Times = {}
    with bench.directory() as directory:
        for name, size in SIZES.items():
            bench.progress.step(f"{name}: formats, digests, merge")
            _of_size(directory, name, size, packets if size == 60 else packets // 4, times)
        for flows in FLOWS[:2] if bench.quick else FLOWS:
            bench.progress.step(f"flow table, {flows:,} flows")
            times[f"flow update, {flows:,} flows"] = {
                "60 B": digests_of_flows(directory, flows, 4 * packets).update_ns({})
            }
    bench.progress.step("export packing")
    times["export packing (per record)"] = {"60 B": _export(packets // 2)}
    table = Table(
        NAME,
        f"{TITLE}, ns per packet; the fastest of {ROUNDS} passes",
        ("stage", *SIZES),
        [[stage, *(found.get(size) for size in SIZES)] for stage, found in times.items()],
        notes=["kernel blocks: walked and copied while they are in the cache; live, another CPU has just written them"],
        pictures=[Picture("60 B", "stage", "stage")],
    )
    return RowResult(NAME, TITLE, [table], conditions="one process, one thread, in memory, not pinned")


def best(work: Callable[[], float]) -> float:
    return min(work() for _ in range(ROUNDS))


def timed(work: Callable[[], object]) -> float:
    begun = time.perf_counter_ns()
    work()
    return time.perf_counter_ns() - begun


def _of_size(directory: Path, name: str, size: int, packets: int, times: Times) -> None:
    path = write_capture(directory / "stages.pcap", packets, Mix((size,), flows=10_000))
    records = decode(path.read_bytes())

    def note(stage: str, total_ns: float) -> None:
        times.setdefault(stage, {})[name] = total_ns / packets

    content = path.read_bytes()
    frame = numbered_frame(1, 1, Shape((size,), udp=True))
    for stage, with_digests in (("kernel blocks to packet ring", False), ("the same, and to digest ring", True)):
        times.setdefault(stage, {})[name] = best(lambda on=with_digests: _live_ns(frame, on))
    note("file decode (pcap to records)", best(lambda: _decode_ns(content)))
    note("file to packet ring", best(lambda: _capture_ns(path, False)))
    note("file to packet and digest ring", best(lambda: _capture_ns(path, True)))
    if size == 60:  # with long packets it drowns in the copying
        difference = times["file to packet and digest ring"][name] - times["file to packet ring"][name]
        times["header digest (the difference)"] = {name: difference}
    note("file to digests alone", best(lambda: digest_file_ns(path)))
    for stage, settings in INSPECTIONS.items():
        note(f"file to digests alone, {stage}", best(lambda s=settings: digest_file_ns(path, inspection=s)))
    for count in MERGES:
        stage = f"merge of {count}, pcapng"
        note(stage, best(lambda count=count: _merge_ns(directory, count, size, packets, order.SINK_PCAPNG)))
    for sink, stage in ((order.SINK_PCAP_US, "merge of 4, pcap us"), (order.SINK_PCAP_NS, "merge of 4, pcap ns")):
        note(stage, best(lambda sink=sink: _merge_ns(directory, 4, size, packets, sink)))
    note("write to memory, 1 MiB each", best(lambda: _write_ns(directory, records)))
    path.unlink()


class Buffer:
    """Aligned memory that has been touched."""

    def __init__(self, length: int) -> None:
        self._map = mmap.mmap(-1, length)
        self._map.write(bytes(length))
        self.address = ctypes.addressof(ctypes.c_char.from_buffer(self._map))
        self.length = length

    def content(self, length: int) -> bytes:
        return self._map[:length]


def decode(content: bytes) -> bytes:
    """The records (Enhanced Packet Blocks) of a pcap file, without the announcement of its interface."""
    buffer = Buffer(2 * len(content) + (1 << 20))
    produced = _decode_into(content, buffer)
    records = buffer.content(produced)
    first = int.from_bytes(records[4:8], "little")
    return records[first:] if int.from_bytes(records[:4], "little") != 6 else records


def _decode_into(content: bytes, buffer: Buffer) -> int:
    source = ctypes.cast(ctypes.c_char_p(content), ctypes.c_void_p).value
    assert source is not None
    _, _, produced = PcapDecoder().decode(source, len(content), buffer.address, buffer.length, True)
    return produced


def _decode_ns(content: bytes) -> float:
    buffer = Buffer(2 * len(content) + (1 << 20))
    return timed(lambda: _decode_into(content, buffer))


class Rings(contextlib.ExitStack):
    """Rings for one pass; gone at the end of the block."""

    def __init__(self) -> None:
        super().__init__()
        self.consumers: list[Consumer] = []

    def producer(self, capacity: int) -> Producer:
        """Of a new ring."""
        fd, generation = allocate(capacity, "bench"), secrets.randbits(63)
        self.callback(os.close, fd)
        initialise(fd, capacity, generation)
        self.consumers.append(Consumer(fd, generation))
        return Producer(fd, generation)

    def empty(self) -> None:
        for consumer in self.consumers:
            consumer.refresh()
            consumer.skip_to_head()


def _live_ns(frame: bytes, with_digests: bool) -> float:
    """Per packet: the kernel's blocks, which are full each time, into rings that are emptied after each turn."""
    pages = CounterPages([("live", CAPTURE_FIELDS)])
    with Rings() as rings, contextlib.closing(KernelRing(frame, KERNEL_BLOCKS, IFINDEX)) as kernel:
        packets = rings.producer(2 * PACKET_RING_BYTES)
        digests = rings.producer(2 * PACKET_RING_BYTES) if with_digests else None
        capture = LiveCapture(
            kernel.fd, BLOCK_BYTES, KERNEL_BLOCKS, packets, digests, pages["live"],
            socket_serial=1, linktype=LINKTYPE_ETHERNET, cooked=False, snaplen=262_144, ifindex=IFINDEX, reorder_us=0,
        )  # fmt: skip
        spent = 0.0
        for turn in range(TURNS):
            kernel.hand_over((turn + 1) * SECOND)
            spent += timed(capture.pump)
            rings.empty()
        return spent / (TURNS * kernel.packets)


def _capture_ns(path: Path, with_digests: bool) -> float:
    """A file into rings that are emptied after each batch."""
    pages = CounterPages([("file", CAPTURE_FIELDS)])
    with Rings() as rings:
        packets = rings.producer(PACKET_RING_BYTES)
        digests = rings.producer(DIGEST_RING_BYTES) if with_digests else None
        capture = FileCapture(Interface(uri=f"pcapfile:{path}"), packets, digests, pages["file"])
        begun = time.perf_counter_ns()
        while not capture.ended:
            capture.step()
            rings.empty()
        spent = time.perf_counter_ns() - begun
        capture.close()
        return spent


def digest_file_ns(path: Path, *, inner: bool = False, inspection: dict[str, bool] | None = None) -> float:
    """As `appliance flows` reads a file."""
    inspector = Inspector(**inspection) if inspection else None
    buffer = Buffer(DIGEST_BATCH_BYTES)
    file = DigestFile(path, inner=inner, inspector=inspector)
    try:
        begun = time.perf_counter_ns()
        while not file.ended:
            file.fill(buffer.address, buffer.length)
        return time.perf_counter_ns() - begun
    finally:
        file.close()


def _merge_ns(directory: Path, count: int, size: int, packets: int, sink: int) -> float:
    """`count` rings that are full when the clock starts; the output is passed over."""
    files = []
    for i in range(count):
        path = directory / f"{size}-{packets // count}-{i}.pcap"
        if not path.exists():
            write_capture(path, packets // count, Mix((size,), flows=1000), i)
        files.append(path)
    pages = CounterPages([(f"file/{i}", CAPTURE_FIELDS) for i in range(count)])
    capacity = 1 << (2 * (size + 64) * packets // count + (2 << 20)).bit_length()
    with Rings() as rings:
        for i, path in enumerate(files):
            producer = rings.producer(capacity)
            capture = FileCapture(Interface(uri=f"pcapfile:{path}"), producer, None, pages[f"file/{i}"])
            while not capture.ended:
                if capture.step():
                    raise RuntimeError("the ring is too small")
            producer.end()
            capture.close()
        merge = order.Merge(rings.consumers, [False] * count, sink=sink, max_wait_ms=1, out_bytes=OUT_BYTES)
        return timed(lambda: _drain(merge))


def _drain(merge: order.Merge) -> None:
    while (status := merge.fill()) != order.ENDED or merge.out_bytes:
        waits = status == order.IDLE and not merge.out_bytes
        merge.release()
        merge.emptied()
        if waits:
            raise RuntimeError("the merge waits for more than there is")
        if status == order.CONTROL:
            merge.map_interface(merge.control_source, 0, merge.control_source)
            merge.control_done()


def _write_ns(directory: Path, records: bytes) -> float:
    path = directory / "written"
    view = memoryview(records)
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    try:
        begun = time.perf_counter_ns()
        for start in range(0, len(view), WRITE_BYTES):
            os.write(fd, view[start : start + WRITE_BYTES])
        return time.perf_counter_ns() - begun
    finally:
        os.close(fd)
        path.unlink()


def digests_of_flows(directory: Path, flows: int, packets: int) -> DigestsInMemory:
    mix = Mix((60,), flows=flows)
    path = write_capture(directory / "flows.pcap", packets, mix)
    digests, _ = headers.digests(decode(path.read_bytes()), [1])
    path.unlink()
    return DigestsInMemory(digests, packets_of(packets, mix))


class DigestsInMemory:
    """To be metered again and again."""

    def __init__(self, digests: bytes, packets: int) -> None:
        self._buffer = Buffer(len(digests) + 8)
        self._length = len(digests)
        self._packets = packets
        ctypes.memmove(self._buffer.address, digests, len(digests))
        whole = (ctypes.c_char * len(digests)).from_address(self._buffer.address)
        self._words = np.frombuffer(whole, np.uint32).reshape(-1, DIGEST_BYTES // 4)

    def update_ns(self, settings: dict[str, Any]) -> float:
        """Per packet, of later passes: every flow is there already. `settings`: of the flow table. The connections of
        each pass are new ones, or every segment would be a repeat."""
        table = FlowTable(
            max_flows=1_000_000,
            idle_timeout_ns=30 * SECOND,
            active_timeout_ns=3000 * SECOND,
            tcp_linger_ns=SECOND,
            **settings,
        )

        def update() -> None:
            done = 0
            while done < self._length:
                done += table.update(self._buffer.address + done, self._length - done)
                table.clear_rows()

        def later_pass() -> float:
            self._words[:, TCP_SEQUENCE] += 1 << 24
            return timed(update)

        update()
        return best(later_pass) / self._packets


def _export(count: int) -> float:
    return best(lambda: 1e9 * each_batch(count, lambda messages: None)) / count
