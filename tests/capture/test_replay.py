"""A file as a packet source: into memory, into a real ring, filtered, cut, paced by an injected clock."""

from __future__ import annotations

import ctypes
import struct
from pathlib import Path

import pytest

from appliance.capture.replay import FileSource
from appliance.capture.uri import file_of
from appliance.errors import FormatError, MissingInputError, UsageError
from appliance.formats.encode import pcap_header
from appliance.ring import memory
from appliance.ring.ring import Consumer, Producer, initialise

S = 10**9
ROOM = 1 << 20


class Target:
    """Memory that a worker would have got from its ring."""

    def __init__(self) -> None:
        self._buffer = bytearray(ROOM)
        self.address = ctypes.addressof(ctypes.c_char.from_buffer(self._buffer))

    def records(self, produced_bytes: int) -> list[bytes]:
        found = []
        offset = 0
        while offset < produced_bytes:
            (length,) = struct.unpack_from("=I", self._buffer, offset + 4)
            found.append(bytes(self._buffer[offset : offset + length]))
            offset += length
        return found


def write_pcap(path: Path, times_ns: list[int], data: bytes = b"abcdefghijklmnop") -> Path:
    packets = [struct.pack("=IIII", *divmod(at, S), len(data), len(data)) + data for at in times_ns]
    path.write_bytes(pcap_header(1, nanoseconds=True) + b"".join(packets))
    return path


def drain(source: FileSource, target: Target) -> list[bytes]:
    records = []
    while not (status := source.fill(target.address, ROOM)).end:
        records += target.records(status.produced_bytes)
    return records


def times(records: list[bytes]) -> list[int]:
    return [
        high << 32 | low
        for kind, _, _, high, low in (struct.unpack_from("=IIIII", record) for record in records)
        if kind == 6
    ]


@pytest.mark.parametrize("scheme", ["pcapfile:", "pcapng:", ""])
def test_every_packet_of_a_file_is_produced_in_order_and_then_the_end(tmp_path: Path, scheme: str) -> None:
    path = write_pcap(tmp_path / "a.pcap", list(range(1000)))
    source = FileSource(f"{scheme}{path}")
    records = drain(source, Target())
    assert records[0][0] == 1
    assert times(records) == list(range(1000))
    assert (source.read_packets, source.read_bytes, source.newest_ns) == (1000, 16_000, 999)
    assert source.interfaces[0].linktype == 1
    source.close()


def test_the_path_is_what_follows_a_file_scheme_colons_included() -> None:
    assert file_of("pcapfile:-") == ("-", "")
    assert file_of("pcapng:dir:with:colons/a.pcapng") == ("dir:with:colons/a.pcapng", "")
    assert file_of("12:30.pcap") == ("12:30.pcap", "")


def test_a_file_that_is_not_there_is_named() -> None:
    with pytest.raises(MissingInputError, match="nowhere"):
        FileSource("pcapfile:/nowhere/a.pcap")


def test_a_file_goes_through_a_real_ring_without_loss_however_small_the_ring_is(tmp_path: Path) -> None:
    path = write_pcap(tmp_path / "a.pcap", list(range(20_000)), bytes(range(50)))
    capacity = 1 << 16
    fd = memory.allocate(capacity, "replay")
    initialise(fd, capacity, 1)
    producer, consumer = Producer(fd, 1), Consumer(fd, 1)
    source = FileSource(f"pcapfile:{path}")
    received: list[bytes] = []
    ended = False
    while not ended:
        room = producer.free_bytes
        status = source.fill(producer.reserve(room), room) if room else None
        if status is not None:
            producer.advance(status.produced_bytes)
            producer.publish(source.newest_ns or 0)
            ended = status.end
        consumer.refresh()
        while (record := consumer.pop()) is not None:
            received.append(record)
        consumer.release()
    assert times(received) == list(range(20_000))
    assert all(record[28:78] == bytes(range(50)) for record in received[1:])


def test_too_small_a_room_says_how_much_is_needed(tmp_path: Path) -> None:
    source = FileSource(str(write_pcap(tmp_path / "a.pcap", [1, 2], bytes(1000))))
    target = Target()
    assert source.fill(target.address, 100).produced_bytes > 0  # the interface
    status = source.fill(target.address, 100)
    assert (status.produced_bytes, status.needed_room) == (0, 1032)


def test_the_snaplen_cuts_after_the_filter_has_seen_the_whole_packet(tmp_path: Path) -> None:
    path = write_pcap(tmp_path / "a.pcap", list(range(10)))
    seen = []

    def keep_even_times(address: int, batch_bytes: int) -> int:
        kept = b""
        batch = ctypes.string_at(address, batch_bytes)
        while batch:
            (length,) = struct.unpack_from("=I", batch, 4)
            record, batch = batch[:length], batch[length:]
            if record[0] == 6:
                seen.append(struct.unpack_from("=I", record, 20)[0])
            if record[0] != 6 or record[16] % 2 == 0:
                kept += record
        ctypes.memmove(address, kept, len(kept))
        return len(kept)

    source = FileSource(str(path), snaplen=5, packet_filter=keep_even_times)
    records = drain(source, Target())
    assert seen == [16] * 10
    assert times(records) == [0, 2, 4, 6, 8]
    assert all(struct.unpack_from("=II", record, 20) == (5, 16) for record in records[1:])
    assert (source.read_packets, source.filtered_packets, source.truncated_packets) == (10, 5, 5)


def test_recorded_speed_waits_for_each_packet_and_never_sleeps_itself(tmp_path: Path) -> None:
    path = write_pcap(tmp_path / "a.pcap", [100 * S, 100 * S + 10, 101 * S, 103 * S])
    now = [5000]
    source = FileSource(str(path), speed=1.0, clock_ns=lambda: now[0])
    target = Target()
    produced: list[int] = []
    waits = []
    while True:
        status = source.fill(target.address, ROOM)
        produced += times(target.records(status.produced_bytes))
        if status.end:
            break
        if status.wait_ns:
            waits.append(status.wait_ns)
            now[0] += status.wait_ns
            before = len(produced)
            status = source.fill(target.address, ROOM)
            produced += times(target.records(status.produced_bytes))
            assert len(produced) > before  # what was waited for is due
            if status.wait_ns:
                waits.append(status.wait_ns)
                now[0] += status.wait_ns
    assert produced == [100 * S, 100 * S + 10, 101 * S, 103 * S]
    assert waits == [10, S - 10, 2 * S]


def test_nothing_comes_early_at_twice_the_recorded_speed(tmp_path: Path) -> None:
    path = write_pcap(tmp_path / "a.pcap", [S, 2 * S, 3 * S])
    now = [0]
    source = FileSource(str(path), speed=2.0, clock_ns=lambda: now[0])
    target = Target()
    while source.read_packets == 0:
        source.fill(target.address, ROOM)
    assert source.fill(target.address, ROOM).wait_ns == S // 2
    now[0] = S // 2 - 1
    source.fill(target.address, ROOM)
    assert source.read_packets == 1
    now[0] = S // 2
    source.fill(target.address, ROOM)
    assert source.read_packets == 2


def test_a_negative_speed_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="replay speed is -1"):
        FileSource(str(write_pcap(tmp_path / "a.pcap", [1])), speed=-1)


def test_a_damaged_file_gives_its_whole_records_before_the_error(tmp_path: Path) -> None:
    path = write_pcap(tmp_path / "a.pcap", list(range(100)))
    path.write_bytes(path.read_bytes()[:-1])
    source = FileSource(str(path))
    target = Target()
    records: list[bytes] = []
    with pytest.raises(FormatError) as damage:
        while True:
            records += target.records(source.fill(target.address, ROOM).produced_bytes)
    assert times(records) == list(range(99))
    assert damage.value.packets == 99
