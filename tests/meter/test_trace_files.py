"""Live flow traces on disk: staged, published whole, counted if they fail, kept within limits, mended after a kill."""

from __future__ import annotations

import errno
import ipaddress
import json
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from support.judges import capinfos

from appliance.config import Traceflow
from appliance.counters import PAGE_BYTES, TRACEFLOW_FIELDS, CounterPage
from appliance.meter import trace_files, trace_publisher
from appliance.meter.trace_files import TraceFiles, remove_leftovers
from appliance.meter.trace_publisher import settle_with_the_dead
from appliance.meter.traceflow_formats import FORMATS, Description, pcap_packet

S = 1_000_000_000
LEFT_OUT = ("cut_packets", "refused_packets", "failed_packets")


def flow(number: int, packets: int = 1, cut: int = 0) -> Description:
    first_ns = 1_700_000_000 * S + number
    ends = (ipaddress.ip_address("192.0.2.1").packed, 40000, ipaddress.ip_address("192.0.2.2").packed, 80)
    return Description(number, *ends, 1, first_ns, first_ns, packets, 60 * packets, True, (), cut)


def entries(packets: int = 1, size: int = 60) -> bytes:
    return pcap_packet(1_700_000_000 * S, bytes(size), size, nanoseconds=True, byteorder="little") * packets


class Bench:
    def __init__(self, directory: Path, page: CounterPage | None = None, **settings: Any) -> None:
        self.directory = directory
        self.work, self.ready = directory / "work", directory / "ready"
        for path in (self.work, self.ready):
            path.mkdir(parents=True, exist_ok=True)
        self.page = page or CounterPage(memoryview(bytearray(PAGE_BYTES)), TRACEFLOW_FIELDS, 0)
        self.free = 1 << 40
        made = Traceflow(enabled=True, **settings)
        self.files = TraceFiles(
            directory, made, FORMATS[made.format], self.page, lambda: None, free=lambda _: self.free
        )

    def trace(self, number: int, packets: int = 1, size: int = 60) -> None:
        """A whole flow."""
        self.files.write(number, flow(number, packets), entries(packets, size), packets)
        self.files.ended(number, flow(number, packets), 1)

    def names(self, suffix: str = ".pcap") -> list[str]:
        return sorted(path.name for path in self.ready.iterdir() if path.suffix == suffix)

    def index(self) -> list[dict[str, Any]]:
        paths = sorted(self.ready.glob("*.jsonl"))
        return [json.loads(line) for path in paths for line in path.read_text().splitlines()]


@pytest.fixture
def bench(tmp_path: Path) -> Iterator[Bench]:
    yield Bench(tmp_path)


def test_a_flow_is_staged_until_it_is_over_and_then_published_with_its_line(bench: Bench) -> None:
    bench.files.write(1, flow(1, 3), entries(2), 2)
    bench.files.write(1, None, entries(1), 1)
    assert bench.names() == []
    assert [path.name for path in bench.work.iterdir()] == ["192.0.2.1_40000-192.0.2.2_80-1700000000.000000001.pcap"]
    bench.files.ended(1, flow(1, 3), 1)
    bench.files.close()
    (name,) = bench.names()
    assert capinfos(bench.ready / name).packets == 3
    (line,) = bench.index()
    assert (line["file"], line["packets"], line["packets_in_file"], line["ended"]) == (name, 3, 3, "closed")
    assert list(bench.work.iterdir()) == []
    assert (bench.page["published_files"], bench.page["published_packets"], bench.page["flows_closed"]) == (1, 3, 1)
    assert bench.page["stored_files"] == 2  # and the index


def test_hundreds_that_end_together_are_all_published_under_names_of_their_own(bench: Bench) -> None:
    for i in range(700):
        bench.trace(i % 350)
    bench.files.close()
    assert len(bench.names()) == 700
    assert sum(name.endswith("-2.pcap") for name in bench.names()) == 350
    assert {line["file"] for line in bench.index()} == set(bench.names())
    assert bench.page["published_packets"] == 700
    assert bench.page["queued_flows"] == bench.page["queued_packets"] == 0


def test_what_a_disk_refuses_is_counted_and_the_file_holds_the_packets_before_it(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench.files.write(1, flow(1), entries(2), 2)
    put = trace_files.put

    def torn(fd: int, *rest: Any) -> None:
        os.lseek(fd, 0, os.SEEK_END)
        os.write(fd, b"half a pac")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(trace_files, "put", torn)
    bench.files.write(1, None, entries(3), 3)
    monkeypatch.setattr(trace_files, "put", put)
    bench.files.write(1, None, entries(4), 4)  # behind a hole: the file holds a flow's first packets alone
    bench.files.ended(1, flow(1, 9), 1)
    bench.files.close()
    assert capinfos(bench.ready / bench.names()[0]).packets == 2
    assert [bench.page[name] for name in LEFT_OUT] == [0, 0, 7]
    assert (bench.page["published_packets"], bench.page["write_errors"]) == (2, 1)


@pytest.mark.parametrize("format", ["json", "plist"])
def test_a_textual_file_is_whole_again_behind_a_write_that_failed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, format: str
) -> None:
    bench = Bench(tmp_path, format=format)
    entry = FORMATS[format].entry
    assert entry is not None
    bench.files.write(1, flow(1), entry(1, {"a": 1}), 1)
    (path,) = bench.work.iterdir()
    before = path.read_bytes()

    def torn(fd: int, *rest: Any) -> None:
        os.ftruncate(fd, len(before) - len(FORMATS[format].end))
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(trace_files, "put", torn)
    bench.files.write(1, None, entry(2, {"a": 2}), 1)
    assert path.read_bytes() == before


def test_a_full_file_system_cuts_flows_and_old_files_make_room(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trace_files, "LOOK_EVERY_S", 0)
    bench.trace(1, size=1400)
    deadline = time.monotonic() + 10
    while not bench.names() and time.monotonic() < deadline:
        time.sleep(0.01)
    bench.free = 0
    bench.trace(2, packets=5)
    bench.files.close()
    assert bench.page["refused_packets"] == 5
    assert bench.page["expired_files"] >= 1
    assert bench.names() == []


def test_unfinished_files_are_within_retain_bytes_too(tmp_path: Path) -> None:
    bench = Bench(tmp_path, retain_bytes=1 << 20)
    many = entries(7, 100_000)
    bench.files.write(1, flow(1, 7), many, 7)
    bench.files.write(2, flow(2, 7), many, 7)  # would be 1.4 MB
    assert sum(path.stat().st_size for path in bench.work.iterdir()) <= 1 << 20
    for i in (1, 2):
        bench.files.ended(i, flow(i, 7), 1)
    bench.files.close()
    assert (bench.page["published_packets"], bench.page["refused_packets"]) == (7, 7)
    assert [(line["packets"], line["packets_in_file"], bool(line["file"])) for line in bench.index()] == [
        (7, 7, True),
        (7, 0, False),
    ]


def test_the_oldest_go_first_and_what_a_consumer_took_is_no_expiry(tmp_path: Path) -> None:
    bench = Bench(tmp_path, retain_files=3)
    for i in range(1, 4):
        bench.trace(i)
    bench.files.close()
    (tmp_path / "ready" / bench.names()[0]).unlink()
    again = Bench(tmp_path, page=bench.page, retain_files=3)  # adopts what is there: two flows and an index
    again.trace(4)
    again.files.close()
    left = [name[-8:-5] for name in again.names()]
    assert "004" in left and len(list(again.ready.iterdir())) <= 3
    assert again.page["expired_files"] + len(list(again.ready.iterdir())) == 4 + 2 - 1  # flows, indexes


def test_files_go_by_age(tmp_path: Path) -> None:
    bench = Bench(tmp_path)
    bench.trace(1)
    bench.files.close()
    for path in bench.ready.iterdir():
        os.utime(path, (1, 1))
    again = Bench(tmp_path, page=bench.page, retain_seconds=3600)
    again.files.close()
    assert list(again.ready.iterdir()) == []
    assert again.page["expired_files"] == 2


def test_what_a_killed_worker_left_is_removed_and_counted_and_its_index_is_kept_to_the_last_whole_line(
    bench: Bench,
) -> None:
    bench.files.close()
    (bench.work / "192.0.2.1_1-192.0.2.2_2-1.pcap").write_bytes(b"torn")
    (bench.work / "flows-20260101T000000Z-000007.jsonl").write_bytes(b'{"label": "a"}\n{"label": "to')
    (bench.work / "flows-20260101T000000Z-000008.jsonl").write_bytes(b'{"lab')
    remove_leftovers(bench.work, bench.page)
    again = Bench(bench.directory, page=bench.page)
    again.files.close()
    assert bench.page["leftover_files"] == 1
    assert list(bench.work.iterdir()) == []
    assert again.index() == [{"label": "a"}]


@pytest.mark.parametrize("got_there", [True, False])
def test_the_file_that_a_worker_died_publishing_is_counted_if_it_got_there(bench: Bench, got_there: bool) -> None:
    bench.files.close()
    path = (bench.ready if got_there else bench.work) / "a.pcap"
    path.write_bytes(entries())
    begun = {"settling_inode": path.stat().st_ino, "settling_published_files": 3, "settling_published_packets": 5}
    for name, value in begun.items():
        bench.page[name] = value
    settle_with_the_dead(bench.page, str(bench.work))
    assert (bench.page["published_files"], bench.page["published_packets"]) == ((3, 5) if got_there else (0, 0))
    assert bench.page["settling_inode"] == 0


def test_a_file_that_a_worker_died_right_after_counting_is_counted_once(bench: Bench) -> None:
    """And although a consumer has taken it away already."""
    bench.trace(1, packets=4)
    bench.files.close()
    counted = bench.page.snapshot()
    (published,) = (path for path in bench.ready.iterdir() if path.suffix == ".pcap")
    bench.page["settling_inode"] = published.stat().st_ino
    published.unlink()
    settle_with_the_dead(bench.page, str(bench.work))
    assert bench.page.snapshot() == counted
    assert counted["published_packets"] == 4


def test_what_cannot_be_synced_is_not_published(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(fd: int) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(trace_publisher.os, "fsync", fails)
    bench.trace(1, packets=4)
    deadline = time.monotonic() + 10
    while bench.files._publisher.queued_flows and time.monotonic() < deadline:
        time.sleep(0.01)
    monkeypatch.undo()
    bench.files.close()
    assert bench.names() == []
    assert (bench.page["unpublished_packets"], bench.page["published_packets"]) == (4, 0)
