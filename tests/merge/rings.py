"""Rings with a producer in the test's hand, and what comes out of a merge of them."""

from __future__ import annotations

import os
import struct
from collections.abc import Sequence
from typing import Any

from appliance.merge import order
from appliance.ring import memory
from appliance.ring.ring import Consumer, Producer, initialise

CAPACITY = 1 << 16
GENERATION = 11
PACKET, INTERFACE = 6, 1
DIGEST, COUNTERS, EPOCH = 0x80000D16, 0x80000C07, 0x80000E90
HEAD_OFFSET, WATERMARK_OFFSET, COMMIT_OFFSET, DATA_OFFSET = 128, 136, 256, 4096
S = 10**9
PLAIN_BODY_BYTES = 60  # a digest with so much behind its first eight octets is one that was left plain


def record(kind: int, body: bytes, timestamp_ns: int = 0, interface: int = 0) -> bytes:
    body += bytes(-len(body) % 4)
    length = 24 + len(body)
    prefix = struct.pack("=IIIII", kind, length, interface, timestamp_ns >> 32, timestamp_ns & 0xFFFFFFFF)
    return prefix + body + struct.pack("=I", length)


def packet(timestamp_ns: int, data: bytes = b"", *, interface: int = 0, captured: int | None = None) -> bytes:
    """An Enhanced Packet Block. `captured`: claims another captured length than it has."""
    lengths = struct.pack("=II", len(data) if captured is None else captured, len(data))
    return record(PACKET, lengths + data, timestamp_ns, interface)


def counters(received: int, kernel: int, filtered: int, ring: int, published: int) -> bytes:
    return record(COUNTERS, struct.pack("=5Q", received, kernel, filtered, ring, published))


def epoch(offset_ns: int) -> bytes:
    return record(EPOCH, struct.pack("=q", offset_ns))


class Source:
    """One ring with both its ends."""

    def __init__(self, capacity: int = CAPACITY) -> None:
        self.fd = memory.allocate(capacity, "test")
        initialise(self.fd, capacity, GENERATION)
        self.wake_fd = os.eventfd(0, os.EFD_NONBLOCK)
        self.producer = Producer(self.fd, GENERATION)
        self.consumer = Consumer(self.fd, GENERATION, self.wake_fd)
        self.packets = 0

    def write(self, *records: bytes, watermark: int | None = None) -> None:
        """Publishes records; without `watermark`, the promise stays what it was."""
        for entry in records:
            assert self.producer.push(entry), "the test's ring is too small"
            self.packets += struct.unpack_from("=I", entry)[0] == PACKET
        self.producer.set_commit_word(0, self.packets)
        self.producer.publish(self.consumer.mapping.watermark_ns if watermark is None else watermark)

    def packets_at(self, *times: int, watermark: int | None = None) -> None:
        self.write(*(packet(at, struct.pack("=Q", at)) for at in times), watermark=watermark)

    def poke(self, offset: int, value: bytes) -> None:
        """Writes into the shared memory behind the producer's back."""
        os.pwrite(self.fd, value, offset)

    def close(self) -> None:
        os.close(self.fd)
        os.close(self.wake_fd)


def make_merge(
    sources: Sequence[Source],
    live: Sequence[bool] | bool = True,
    *,
    sink: int = order.SINK_PCAPNG,
    max_wait_ms: int = 3_600_000,
    out_bytes: int = 1 << 20,
    mapped: bool = True,
    lends: bool = False,
) -> order.Merge:
    """`mapped`: interface 0 of source i goes out with the number i."""
    flags = [live] * len(sources) if isinstance(live, bool) else live
    merge = order.Merge(
        [source.consumer for source in sources],
        flags,
        sink=sink,
        max_wait_ms=max_wait_ms,
        out_bytes=out_bytes,
        lends=lends,
    )
    if mapped:
        for i in range(len(sources)):
            merge.map_interface(i, 0, i)
    return merge


def take(merge: order.Merge) -> list[tuple[int, int]]:
    """(interface, time) of the records in the output buffer, which is empty then."""
    found = [(block[2], block[3] << 32 | block[4]) for block in blocks(bytes(merge.output()))]
    merge.release()
    merge.emptied()
    return found


def drain(merge: order.Merge) -> tuple[int, list[tuple[int, int]]]:
    """Fills and takes until something else than a full buffer is to be said: (status, records)."""
    found = []
    while True:
        status = merge.fill()
        found += take(merge)
        if status != order.FULL:
            return status, found


def blocks(data: bytes) -> list[tuple[Any, ...]]:
    """(type, length, interface, time high, time low, captured, original, data) of every block."""
    found = []
    offset = 0
    while offset < len(data):
        (length,) = struct.unpack_from("=I", data, offset + 4)
        assert data[offset + length - 4 : offset + length] == data[offset + 4 : offset + 8]
        assert length >= 12 and length % 4 == 0
        words = (
            struct.unpack_from("=IIIIIII", data, offset) if length >= 32 else struct.unpack_from("=II", data, offset)
        )
        found.append((*words, data[offset + 28 : offset + length - 4]))
        offset += length
    assert offset == len(data)
    return found


class PageLike(dict[str, int]):
    """Counters without shared memory."""

    def add(self, name: str, count: int = 1) -> None:
        self[name] += count
