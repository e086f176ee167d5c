"""Segments: when they begin and end, what they hold and tell, and what happens when they cannot be written."""

from __future__ import annotations

import os
import resource
import shutil
import stat
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from merge.outputs import Make, balance_of, statistics
from merge.rings import S, counters, packet
from support.judges import capinfos, decompressed, packets
from support.lab import requires_tool, wait_until

from appliance.errors import ConfigError, InputOutputError
from appliance.formats.encode import InterfaceDescription
from appliance.merge import order

MINUTE = 60 * S
T0 = 1_700_000_040 * S  # a full minute


def times(path: Path) -> list[int]:
    return [found.time_ns for found in packets(path)]


# ---- rotation ----


def test_segments_end_at_the_aligned_boundary_by_the_packets_own_time(make: Make) -> None:
    life = make(rotate_seconds=60, live=False)
    stamps = [T0 + 59 * S, T0 + MINUTE - 1, T0 + MINUTE, T0 + MINUTE + 1, T0 + 5 * MINUTE]
    life.sources[0].packets_at(*stamps)
    life.sources[0].producer.end()
    assert life.turn() == order.ENDED
    life.finish()
    assert [times(path) for path in life.files()] == [stamps[:2], stamps[2:4], stamps[4:]]
    assert [sidecar["closed_because"] for sidecar in life.sidecars()] == ["time", "time", "end"]
    assert [(s["first_ns"], s["last_ns"]) for s in life.sidecars()] == [
        (stamps[0], stamps[1]),
        (stamps[2], stamps[3]),
        (stamps[4], stamps[4]),
    ]
    assert "20231114T221459Z" in life.files()[0].name


def test_an_idle_live_segment_ends_by_its_watermark_and_the_next_one_begins(make: Make) -> None:
    life = make(rotate_seconds=60)
    life.stream.open(T0)
    life.sources[0].producer.promise(T0 + MINUTE + 5)
    assert life.turn() == order.IDLE
    assert life.stream.segment is not None and life.merge.boundary_ns == T0 + 2 * MINUTE
    life.finish()
    assert [sidecar["packets"] for sidecar in life.sidecars()] == [0, 0]


def test_a_forced_end_of_a_silent_segment_does_not_end_the_next_one_too(make: Make) -> None:
    """A dead source's watermark stays where it was: what ends by the clock must begin by the clock."""
    life = make(rotate_seconds=60)
    now = time.time_ns()
    life.stream.open(now - MINUTE)
    life.sources[0].producer.promise(now - 10 * MINUTE)
    assert life.turn() == order.IDLE
    life.merge.force()
    assert life.turn() == order.IDLE
    assert life.page["segments_opened"] == 2
    assert life.merge.boundary_ns > now
    life.finish()


@pytest.mark.parametrize(
    ("settings", "expected", "reason"),
    [({"rotate_packets": 3}, [3, 3, 2], "packets"), ({"rotate_bytes": 4096}, [2, 2, 2, 2], "size")],
)
@pytest.mark.parametrize("file_format", ["pcap", "pcapng"])
def test_segments_end_before_they_pass_their_size_or_count(
    make: Make, settings: dict[str, int], expected: list[int], reason: str, file_format: str
) -> None:
    life = make(format=file_format, live=False, **settings)
    life.sources[0].write(*(packet(T0 + n, bytes(1800)) for n in range(8)))
    life.sources[0].producer.end()
    life.turn()
    life.finish()
    assert [sidecar["packets"] for sidecar in life.sidecars()] == expected
    assert {sidecar["closed_because"] for sidecar in life.sidecars()[:-1]} == {reason}
    assert all(path.stat().st_size <= settings.get("rotate_bytes", 1 << 30) for path in life.files())


def test_the_size_is_used_to_the_last_byte(make: Make) -> None:
    """Statistics at the end and all: a file of exactly rotate_bytes is possible, a larger one is not."""
    life = make(rotate_bytes=1 << 20, live=False)
    life.sources[0].write(*(packet(T0 + n) for n in range(1500)))
    life.turn()
    life.finish()
    size = life.files()[0].stat().st_size
    for limit, count in ((size, 1), (size - 1, 2)):
        shutil.rmtree(life.directory)
        again = make(rotate_bytes=limit, live=False)
        again.sources[0].write(*(packet(T0 + n) for n in range(1500)))
        again.turn()
        again.finish()
        assert len(again.files()) == count


def test_a_segment_ends_on_request(make: Make) -> None:
    life = make()
    life.stream.open(T0)
    life.sources[0].packets_at(T0 + 1)
    life.turn()
    life.rotate()
    life.sources[0].packets_at(T0 + 2)
    life.turn()
    life.finish()
    assert [times(path) for path in life.files()] == [[T0 + 1], [T0 + 2]]
    assert [sidecar["closed_because"] for sidecar in life.sidecars()] == ["request", "end"]


def test_empty_segments_are_skipped_when_told_so_and_look_young_to_whoever_watches(make: Make) -> None:
    life = make(rotate_seconds=60, empty_segments="skip")
    life.stream.open(T0)
    life.page["segment_opened_ns"] = 1
    for minute in range(1, 4):
        life.sources[0].producer.promise(T0 + minute * MINUTE)
        life.turn()
    assert life.page["segments_skipped"] == 3
    assert time.time_ns() - life.page["segment_opened_ns"] < MINUTE
    life.sources[0].packets_at(T0 + 3 * MINUTE + 1)
    life.turn()
    life.finish()
    (path,) = life.files()
    assert "20231114T221700Z" in path.name, "it is named by the minute that it is of"


def test_while_no_segment_is_open_the_ring_keeps_everything(make: Make) -> None:
    life = make()
    life.stream.open(T0)
    life.stream.close("request")
    life.sources[0].packets_at(T0)
    assert life.merge.fill() == order.BOUNDARY
    assert life.merge.out_bytes == 0
    assert life.source_pages[0]["consumed_packets"] == 0
    life.turn()
    life.finish()
    assert [s["packets"] for s in life.sidecars()] == [0, 1]


# ---- content ----


@requires_tool("capinfos", "tshark")
def test_counters_that_are_apart_or_go_back_or_are_impossible_end_no_file(make: Make) -> None:
    life = make()
    (source,) = life.sources
    top = (1 << 64) - 1
    # Received was counted before the first file's end, the filter's part after it; then both go back, and beyond all.
    for at, cumulative in enumerate(
        [(100, 0, 60, 0, 40), (100, 0, 90, 0, 40), (5, 0, 2, 0, 1), (top, top, top, top, top)]
    ):
        source.write(packet(T0 + at, b"x"), counters(*cumulative), watermark=T0 + at)
        life.turn()
        life.rotate()
    life.finish()
    filtered = [sidecar["dropped"]["filter"] for sidecar in life.sidecars()]
    assert filtered[:3] == [60, 30, 0]
    accepted = [numbers[6] for path in life.files() for _, numbers in statistics(path.read_bytes())]
    assert accepted[:4] == [40, 0, 0, top]


def test_a_pcapng_names_its_interfaces_and_tells_each_segments_own_losses(make: Make) -> None:
    life = make(["left", "right"])
    left, right = life.sources
    life.stream.open(T0)
    left.write(counters(100, 10, 5, 3, 82), packet(T0 + 1, b"x"), counters(110, 11, 6, 3, 90))
    right.write(packet(T0 + 2, b"y"), packet(T0 + 3, b"z"))
    for source in life.sources:
        source.producer.promise(T0 + 10)
    life.turn()
    life.rotate()
    left.write(counters(150, 20, 6, 4, 120), packet(T0 + 11, b"x"))
    right.producer.promise(T0 + 20)
    life.turn()
    life.finish()
    first, second = (statistics(path.read_bytes()) for path in life.files())
    names = {4: "received", 6: "accepted", 7: "lost", 8: "delivered"}
    told = [{names[code]: n for code, n in numbers.items() if code in names} for _, numbers in (*first, *second)]
    assert told == [
        {"received": 110, "accepted": 104, "lost": 14, "delivered": 1},
        {"received": 0, "accepted": 0, "lost": 0, "delivered": 2},
        {"received": 40, "accepted": 40, "lost": 10, "delivered": 1},
        {"received": 0, "accepted": 0, "lost": 0, "delivered": 0},
    ]
    assert first[0][1][2] <= first[0][1][3] <= second[0][1][2] <= second[0][1][3], "one's end is the other's start"
    dropped = [sidecar["dropped"] for sidecar in life.sidecars()]
    assert dropped == [
        {"kernel": 11, "filter": 6, "ring": 3, "merge": 0, "writer": 0},
        {"kernel": 9, "filter": 0, "ring": 1, "merge": 0, "writer": 0},
    ]
    assert life.sidecars()[0]["interfaces"] == {"left": 1, "right": 2}
    interfaces = subprocess.run(["capinfos", "-I", life.files()[0]], capture_output=True, text=True, check=True).stdout
    assert interfaces.index("Name = left") < interfaces.index("Name = right")
    assert capinfos(life.files()[0]).packets == 3


def test_what_was_lost_between_two_segments_is_told_by_the_second(make: Make) -> None:
    life = make(live=True)
    life.stream.open(T0)
    life.stream.close("request")
    life.sources[0].write(counters(9, 4, 0, 0, 5), packet(T0))
    life.turn()
    life.finish()
    assert [sidecar["dropped"]["kernel"] for sidecar in life.sidecars()] == [0, 4]


def test_an_interface_that_appears_in_the_middle_is_described_in_the_middle_and_at_each_later_start(make: Make) -> None:
    life = make(["a"], live=False)
    life.sources[0].packets_at(T0)
    life.turn()
    life.stream.add_interface(0, InterfaceDescription(1, name="second"))
    life.sources[0].write(packet(T0 + 1, interface=1))
    life.turn()
    life.rotate()
    life.finish()
    assert [capinfos(path).packets for path in life.files()] == [2, 0]
    for path in life.files():
        shown = subprocess.run(["capinfos", "-I", path], capture_output=True, text=True, check=True).stdout
        assert "Name = a" in shown and "Name = second" in shown


def test_a_pcap_refuses_a_second_link_type_and_names_both(make: Make) -> None:
    life = make(["a", "b"], format="pcap")
    life.stream.add_interface(0, InterfaceDescription(1, name="ether"))
    with pytest.raises(ConfigError, match=r"a has link type 1, b has 113.*pcapng"):
        life.stream.add_interface(1, InterfaceDescription(113, name="cooked"))
    life.finish()


def test_late_packets_and_the_worst_lateness_are_in_the_sidecar_of_their_file(make: Make) -> None:
    life = make()
    life.stream.open(T0)
    life.sources[0].packets_at(T0 + 100, T0 + 60, T0 + 90)
    life.turn()
    life.rotate()
    life.sources[0].packets_at(T0 + 99)
    life.turn()
    life.finish()
    assert [(s["late"], s["late_max_ns"]) for s in life.sidecars()] == [(2, 40), (1, 1)]
    assert [s["first_ns"] - T0 for s in life.sidecars()] == [60, 99]
    assert (life.page["late_packets"], life.page["late_max_ns"]) == (3, 40)


# ---- modes ----


@pytest.mark.parametrize(("group_readable", "mode"), [(True, 0o640), (False, 0o600)])
@pytest.mark.parametrize("mask", [0o000, 0o077])
@pytest.mark.parametrize("compressor", ["none", "lz4"])
def test_modes_are_exact_from_the_first_byte_on_whatever_the_umask(
    make: Make, group_readable: bool, mode: int, mask: int, compressor: str
) -> None:
    before = os.umask(mask)
    try:
        life = make(group_readable=group_readable, compressor=compressor, rotate_seconds=60)
        life.stream.open(T0)
        assert {stat.S_IMODE(path.stat().st_mode) for path in life.files("work")} == {mode}
        life.sources[0].packets_at(T0)
        life.turn()
        life.finish()
    finally:
        os.umask(before)
    (path,) = life.files()
    assert stat.S_IMODE(path.stat().st_mode) == mode
    assert stat.S_IMODE((life.directory / "meta" / f"{path.name}.json").stat().st_mode) == mode


def test_a_staging_path_that_exists_is_never_written_over_nor_followed(make: Make, tmp_path: Path) -> None:
    victim = tmp_path / "victim"
    victim.write_bytes(b"precious")
    life = make()
    (life.directory / "work" / "main-00000000.pcapng").symlink_to(victim)
    life.stream.open(T0)
    life.sources[0].packets_at(T0)
    life.turn()
    life.finish()
    assert victim.read_bytes() == b"precious"
    assert [sidecar["packets"] for sidecar in life.sidecars()] == [1]


# ---- compressors ----

COMPRESSORS = ["lz4", ["lz4", "-q", "-c"], ["zstd", "-q", "-1"], ["xz", "-1"], ["gzip", "-1"]]


@pytest.mark.parametrize("compressor", COMPRESSORS, ids=lambda value: value if isinstance(value, str) else value[0])
def test_compressed_files_hold_every_packet_and_pass_their_own_programs_test(make: Make, compressor: Any) -> None:
    if isinstance(compressor, list) and shutil.which(compressor[0]) is None:
        pytest.skip(f"not installed: {compressor[0]}")
    life = make(compressor=compressor, rotate_packets=400, live=False)
    life.sources[0].write(*(packet(T0 + n, n.to_bytes(40, "little")) for n in range(1000)))
    life.sources[0].producer.end()
    life.turn()
    life.finish()
    found = [int.from_bytes(p.data, "little") for path in life.files() for p in packets_of(path)]
    assert found == list(range(1000))
    assert [s["packets"] for s in life.sidecars()] == [400, 400, 200]
    assert life.staged() == [], "the compressor that was started ahead leaves nothing"


def packets_of(path: Path) -> Iterator[Any]:
    plain = path.with_name(f"plain-{path.name}")
    plain.write_bytes(decompressed(path))
    yield from packets(plain)
    plain.unlink()


def script(tmp_path: Path, text: str) -> list[str]:
    path = tmp_path / "compressor"
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return [str(path)]


def test_a_compressor_that_dies_in_the_middle_costs_a_file_and_no_packet(make: Make, tmp_path: Path) -> None:
    """The batch that it did not take is written again into the next segment."""
    marker = tmp_path / "dead"
    life = make(compressor=script(tmp_path, f"if [ -e {marker} ]; then cat; else head -c 100000; touch {marker}; fi"))
    life.stream.open(T0)
    total = 0
    for round_ in range(100):
        life.sources[0].write(*(packet(T0 + round_ * 10 + n, bytes(5000)) for n in range(10)))
        total += 10
        life.turn()
    life.finish()
    quarantined = life.page["quarantined_packets"]
    assert 0 < quarantined < total
    assert sum(capinfos(path).packets for path in life.files()) + quarantined == total
    assert life.source_pages[0]["written_packets"] == total
    assert life.page["compressor_failures"] == 1
    assert (life.page["segments_published"], life.page["segments_quarantined"]) == (1, 1)
    (failed,) = life.files("quarantine")
    assert "compressor" in failed.with_name(f"{failed.name}.json").read_text()
    assert life.stream.failed and life.publisher.failed


def test_a_compressor_that_always_fails_costs_packets_and_no_flood_of_files(make: Make) -> None:
    life = make(compressor=["false"])
    life.stream.open(T0)
    total = 0
    deadline = time.monotonic() + 0.7
    while time.monotonic() < deadline:
        life.sources[0].packets_at(T0 + total)
        total += 1
        life.turn()
        time.sleep(0.01)
    life.finish()
    page = life.source_pages[0]
    assert life.files() == []
    assert len(life.files("quarantine")) <= 2
    assert balance_of(page, total) == total - page["consumed_packets"], "the rest is in the ring"
    assert life.staged() == []


def test_a_compressor_that_never_reads_times_out_while_the_worker_shows_its_life(make: Make) -> None:
    beats: list[int] = []
    life = make(compressor=["sleep", "60"], compressor_timeout_s=1, beats=beats)
    life.stream.open(T0)
    started = time.monotonic()
    for n in range(30):
        if time.monotonic() - started > 1.5:
            break
        life.sources[0].write(*(packet(T0 + n, bytes(60000)) for _ in range(1)))
        life.turn()
    life.finish()
    assert 1 <= time.monotonic() - started < 6
    assert len(beats) >= 2
    assert life.files() == []


def test_a_compressor_that_hangs_at_its_end_is_ended_and_its_file_not_published(make: Make, tmp_path: Path) -> None:
    life = make(compressor=script(tmp_path, "cat; sleep 60"), compressor_timeout_s=1)
    life.stream.open(T0)
    life.sources[0].packets_at(T0)
    life.turn()
    life.finish()
    assert life.files() == []
    (failed,) = life.files("quarantine")
    assert "did not end within 1 s" in failed.with_name(f"{failed.name}.json").read_text()
    assert life.source_pages[0]["closed_packets"] == 1


# ---- failed writes ----


@pytest.fixture
def file_size_limit() -> Iterator[Callable[[int], None]]:
    """Lets every write beyond so many bytes of a file fail with EFBIG, as a full disk does with ENOSPC."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield lambda limit: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("file_format", ["pcap", "pcapng"])
def test_a_full_disk_cuts_the_file_to_its_last_whole_batch_and_the_next_file_goes_on(
    make: Make, file_size_limit: Callable[[int], None], file_format: str
) -> None:
    life = make(format=file_format)
    life.stream.open(T0)
    file_size_limit(100_000)
    for round_ in range(30):
        life.sources[0].write(*(packet(T0 + round_ * 10 + n, bytes(990)) for n in range(10)))
        life.turn()
    file_size_limit(resource.RLIM_INFINITY)
    life.finish()
    assert [capinfos(path).packets for path in life.files()] == [s["packets"] for s in life.sidecars()]
    stamps = [stamp for path in life.files() for stamp in times(path)]
    assert stamps == [T0 + n for n in range(300)], "every packet once: what did not fit is in the next file"
    assert life.sidecars()[0]["closed_because"] == "write_error"
    assert life.page["write_errors"] >= len(life.files()) - 1
    assert life.source_pages[0]["written_packets"] == 300
    assert life.files("quarantine") == []
    assert [(s["first_ns"], s["last_ns"]) for s in life.sidecars()] == [
        (times(path)[0], times(path)[-1]) for path in life.files()
    ]


def test_a_batch_that_fits_into_no_file_is_dropped_by_the_writer_and_the_rest_waits_in_the_ring(
    make: Make, file_size_limit: Callable[[int], None]
) -> None:
    life = make()
    life.stream.open(T0)
    file_size_limit(5000)
    life.sources[0].write(*(packet(T0 + n, bytes(990)) for n in range(10)))
    life.turn()
    page = life.source_pages[0]
    assert page["dropped_writer_packets"] == 10
    assert life.stream.segment is None
    life.sources[0].packets_at(T0 + 50)
    assert life.turn() == order.BOUNDARY
    assert page["consumed_packets"] == 10, "it is held back"
    file_size_limit(resource.RLIM_INFINITY)
    life.stream._retry_at = 0.0
    life.turn()
    life.finish()
    (sidecar,) = life.sidecars()
    assert (sidecar["packets"], sidecar["dropped"]["writer"]) == (1, 10), "the next file tells what was lost before it"
    assert balance_of(page, 11) == 0
    assert life.staged() == []


def test_recorded_inputs_fail_the_run_instead_of_losing_packets(
    make: Make, file_size_limit: Callable[[int], None]
) -> None:
    life = make(live=False)
    life.sources[0].write(*(packet(T0 + n, bytes(990)) for n in range(10)))
    file_size_limit(5000)
    with pytest.raises(InputOutputError, match="File too large"):
        life.turn()
    file_size_limit(resource.RLIM_INFINITY)
    life.finish("write_error")
    assert life.source_pages[0]["dropped_writer_packets"] == 10
    assert life.staged() == []


def test_directories_that_were_removed_are_made_again(make: Make) -> None:
    life = make()
    life.stream.open(T0)
    life.sources[0].packets_at(T0)
    life.turn()
    life.stream.close("request")
    wait_until(lambda: life.page["segments_published"] == 1, "the first file is published")
    shutil.rmtree(life.directory)
    assert not life.stream.open(T0)
    life.stream._retry_at = 0.0
    assert life.stream.open(T0)
    life.sources[0].packets_at(T0 + 1)
    life.turn()
    life.finish()
    assert [times(path) for path in life.files()] == [[T0 + 1]]


def test_at_the_end_what_no_file_can_take_is_counted(make: Make) -> None:
    life = make()
    shutil.rmtree(life.directory)
    life.directory.write_text("a file where a directory should be")
    assert not life.stream.open(T0)
    life.sources[0].packets_at(T0, T0 + 1)
    life.sources[0].producer.end()
    assert life.turn() == order.BOUNDARY
    life.stream.drop_what_waits()
    assert life.turn() == order.ENDED
    life.finish()
    assert life.source_pages[0]["dropped_writer_packets"] == 2
