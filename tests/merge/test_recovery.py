"""After a death: what was in files is in files, what was lost is counted, and nothing is there twice."""

from __future__ import annotations

import fcntl
import gzip
import json
import os
import shutil
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lz4.frame
import pytest
from merge.outputs import Life, Make, balance_of
from merge.rings import S, packet
from support.judges import capinfos, decompressed, packets
from support.lab import wait_until

from appliance.counters import MERGE_SOURCE_FIELDS, CounterPages
from appliance.formats.encode import InterfaceDescription, interface_description, section_header
from appliance.merge import publish
from appliance.merge.naming import MtracecapNaming, SingleFileNaming
from appliance.merge.recovery import set_written

T0 = 1_700_000_040 * S
HEADER = section_header() + interface_description(InterfaceDescription(1, name="a"))


def successor(make: Make, dead: Life, **settings: Any) -> Life:
    """The next life of the same run, its recovery done and settled."""
    life = make(dead.labels, pages=dead.pages, sources=dead.sources, **settings)
    wait_until(lambda: life.recovery.is_done, "the recovery is done")
    life.recovery.settle()
    return life


def write(life: Life, index: int, *times: int) -> None:
    life.sources[index].packets_at(*(T0 + at for at in times), watermark=T0 + times[-1])
    for source in life.sources:
        source.producer.promise(T0 + times[-1])
    life.turn()


@pytest.mark.parametrize("compressor", ["none", "lz4"])
@pytest.mark.parametrize("file_format", ["pcapng", "pcap"])
def test_what_a_dead_merge_had_written_is_published_and_nothing_is_lost(
    make: Make, compressor: str, file_format: str
) -> None:
    dead = make(["a", "b"], compressor=compressor, format=file_format, rotate_packets=1000)
    dead.stream.open(T0)
    write(dead, 0, 1, 2)
    write(dead, 1, 3)
    dead.die()
    assert len(dead.staged()) == (1 if compressor == "none" else 2), "the open one, and the one started ahead"
    life = successor(make, dead, compressor=compressor, format=file_format)
    assert life.staged() == [], "what was started ahead held nothing, and is gone"
    assert life.files("quarantine") == []
    (path,) = life.files()
    assert capinfos(path).packets == 3
    assert life.sidecar(path)["recovered"] and life.sidecar(path)["closed_because"] == "crash"
    assert [page["written_packets"] for page in life.source_pages] == [2, 1]
    assert [page["lost_unclean_packets"] for page in life.source_pages] == [0, 0]
    assert [page["held_packets"] for page in life.source_pages] == [0, 0]
    assert life.page["recovered_packets"] == life.page["written_packets"] == 3
    assert life.page["segments_recovered"] == 1
    life.finish()


@pytest.mark.parametrize(("steps", "ever", "back"), [((5, 9), 9, 0), ((5, 2, 4), 7, 3), ((5, 0, 0, 5), 10, 5)], ids=str)
def test_what_was_written_and_what_of_it_was_lost_are_counters_that_never_go_down(
    steps: tuple[int, ...], ever: int, back: int
) -> None:
    page = CounterPages([("merge/main/a", MERGE_SOURCE_FIELDS)])["merge/main/a"]
    before = (0, 0)
    for written in steps:
        set_written(page, written)
        now = page["ever_written_packets"], page["taken_back_packets"]
        assert now[0] >= before[0] and now[1] >= before[1] and now[0] - now[1] == page["written_packets"] == written
        before = now
    assert before == (ever, back)


def test_until_the_recovery_is_settled_its_packets_count_as_held_and_new_ones_are_written(make: Make) -> None:
    dead = make()
    dead.stream.open(T0)
    write(dead, 0, 1, 2)
    dead.merge.fill()
    dead.sources[0].packets_at(T0 + 3, T0 + 4)
    dead.merge.fill()
    dead.merge.release()  # given back, and not written: lost with the worker
    dead.die()
    (staged,) = (dead.directory / "work").iterdir()
    lock = os.open(staged, os.O_RDONLY)
    fcntl.flock(lock, fcntl.LOCK_EX)
    life = make(pages=dead.pages, sources=dead.sources)
    page = life.source_pages[0]
    assert (page["consumed_packets"], page["written_packets"], page["held_packets"]) == (4, 2, 2)
    assert balance_of(page, 4) == 0
    life.stream.open(T0)
    write(life, 0, 5)
    assert (page["consumed_packets"], page["written_packets"], page["held_packets"]) == (5, 3, 2)
    assert balance_of(page, 5) == 0
    os.close(lock)
    wait_until(lambda: life.recovery.is_done, "the recovery is done")
    life.recovery.settle()
    assert (page["written_packets"], page["held_packets"], page["lost_unclean_packets"]) == (3, 0, 2)
    assert balance_of(page, 5) == 0
    life.finish()
    assert [s["packets"] for s in life.sidecars()] == [2, 1]
    assert page["closed_packets"] == 3


def test_recovered_files_stand_before_later_ones_in_the_order_of_names(make: Make) -> None:
    dead = make()
    dead.stream.open(T0)
    write(dead, 0, 1)
    dead.die()
    life = make(pages=dead.pages, sources=dead.sources)
    life.stream.open(T0)
    write(life, 0, 2)
    wait_until(lambda: life.recovery.is_done, "the recovery is done")
    life.finish()
    assert [p.time_ns for path in life.files() for p in packets(path)] == [T0 + 1, T0 + 2]


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_publisher_that_died_right_after_the_rename_lost_nothing(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    dead = make()
    dead.stream.open(T0)
    write(dead, 0, 1, 2, 3)
    monkeypatch.setattr(publish, "rename_without_replacing", rename_then_die)
    dead.stream.close("request")
    wait_until(lambda: bool(dead.files()), "the file is published")
    dead.publisher.finish(lambda: None)
    monkeypatch.undo()
    assert dead.source_pages[0]["closed_packets"] == 0, "the counting did not come to pass"
    life = successor(make, dead)
    page = life.source_pages[0]
    assert (page["written_packets"], page["closed_packets"], page["lost_unclean_packets"]) == (3, 3, 0)
    life.finish()


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_publisher_that_died_right_before_the_rename_published_nothing_twice(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    dead = make()
    dead.stream.open(T0)
    write(dead, 0, 1, 2, 3)
    monkeypatch.setattr(publish, "rename_without_replacing", die)
    dead.stream.close("request")
    dead.publisher.finish(lambda: None)
    monkeypatch.undo()
    assert len(os.listdir(dead.directory / "meta")) == 2, "the number, and the sidecar of what is not there"
    life = successor(make, dead)
    page = life.source_pages[0]
    assert (page["written_packets"], page["closed_packets"], page["lost_unclean_packets"]) == (3, 3, 0)
    (path,) = life.files()
    sidecars = sorted(name for name in os.listdir(life.directory / "meta") if name.endswith(".json"))
    assert sidecars == [f"{path.name}.json"]
    life.finish()


def die(source: str, target: str) -> None:
    """Ends the publisher's thread, as SIGKILL would: no handler of any error runs."""
    raise SystemExit


def rename_then_die(source: str, target: str) -> None:
    os.rename(source, target)
    raise SystemExit


def test_two_deaths_in_a_row_keep_the_balance(make: Make) -> None:
    first = make()
    first.stream.open(T0)
    write(first, 0, 1, 2)
    first.die()
    second = successor(make, first)
    second.stream.open(T0)
    write(second, 0, 3)
    second.die()
    third = successor(make, second)
    page = third.source_pages[0]
    assert (page["consumed_packets"], page["written_packets"], page["lost_unclean_packets"]) == (3, 3, 0)
    third.finish()
    assert [s["packets"] for s in third.sidecars()] == [2, 1]


def test_drops_and_lateness_of_a_dead_merge_stay_counted(make: Make) -> None:
    dead = make()
    dead.stream.open(T0)
    dead.sources[0].write(packet(T0 + 5), packet(T0 + 1), packet(T0 + 6, interface=3))
    dead.turn()
    dead.die()
    life = successor(make, dead)
    life.stream.open(T0)
    life.sources[0].write(packet(T0 + 9), packet(T0 + 8), packet(T0 + 9, interface=3))
    life.turn()
    page = life.source_pages[0]
    assert (page["dropped_merge_packets"], page["late_packets"], page["written_packets"]) == (2, 2, 4)
    assert life.page["late_packets"] == 2
    assert balance_of(page, 6) == 0
    life.finish()


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
@pytest.mark.parametrize(
    ("rename", "quarantined", "recovered"), [(die, 0, 2), (rename_then_die, 2, 0)], ids=["before it", "after it"]
)
def test_who_dies_at_the_move_to_quarantine_counts_its_packets_once(
    make: Make, monkeypatch: pytest.MonkeyPatch, rename: Callable[[str, str], None], quarantined: int, recovered: int
) -> None:
    dead = make(compressor=["sh", "-c", "cat; exit 1"])
    dead.stream.open(T0)
    write(dead, 0, 1, 2)
    with monkeypatch.context() as patched:
        patched.setattr(publish, "rename_without_replacing", rename)
        dead.stream.close("request")
        dead.die()
    assert dead.page["quarantined_packets"] == 0
    life = successor(make, dead, compressor="none")
    life.finish()
    assert (life.page["quarantined_packets"], life.page["recovered_packets"]) == (quarantined, recovered)
    assert balance_of(life.source_pages[0], 2) == 0


# ---- leftovers of earlier runs ----


def leftover(life: Life, name: str, content: bytes) -> Path:
    path = life.directory / "work" / name
    path.write_bytes(content)
    return path


def recovered(make: Make, content: bytes, name: str = "main-00000007.pcapng", **settings: Any) -> Life:
    """A new run that finds one file in `work/`."""
    first = make(**settings)
    first.finish()
    shutil.rmtree(first.directory / "ready")
    leftover(first, name, content)
    life = make(recover=True, **settings)
    life.finish()
    return life


@pytest.mark.parametrize("cut", [0, 1, 35])
def test_a_file_cut_anywhere_comes_back_to_its_last_whole_record(make: Make, cut: int) -> None:
    content = HEADER + packet(T0, b"one") + packet(T0 + 1, b"two")
    life = recovered(make, content[: len(content) - cut])
    (path,) = life.files()
    assert capinfos(path).packets == (2 if cut == 0 else 1)
    assert stat.S_IMODE(path.stat().st_mode) == 0o640 or cut == 0
    assert life.page["recovered_packets"] == (2 if cut == 0 else 1)
    assert life.staged() == []


@pytest.mark.parametrize(
    "content",
    [b"", HEADER, lz4.frame.compress(b""), lz4.frame.compress(HEADER), lz4.frame.compress(b"")[:7], gzip.compress(b"")],
    ids=["nothing", "header", "lz4 of nothing", "lz4 of header", "half of lz4 of nothing", "gzip of nothing"],
)
def test_a_leftover_without_a_packet_is_removed(make: Make, content: bytes) -> None:
    life = recovered(make, content, compressor="lz4", name="main-00000007.pcapng.lz4")
    assert (life.files(), life.staged(), life.files("quarantine")) == ([], [], [])


def test_a_leftover_that_cannot_be_decoded_goes_to_quarantine_with_the_reason(make: Make) -> None:
    life = recovered(make, b"\x89LZO\x00 something packed by a program that is not read here")
    (path,) = life.files("quarantine")
    assert "lzop" in json.loads(path.with_name(f"{path.name}.json").read_text())["reason"]
    assert life.page["segments_quarantined"] == 1


def test_a_leftover_is_packed_as_its_published_name_says(make: Make) -> None:
    content = gzip.compress(HEADER + packet(T0, b"one"))
    life = recovered(make, content, name="main-00000007.pcapng.gz", compressor="lz4")
    (path,) = life.files()
    assert path.name.endswith(".pcapng.lz4")
    assert decompressed(path) == HEADER + packet(T0, b"one")
    assert path.read_bytes()[:4] == b"\x04\x22\x4d\x18"


def test_a_leftover_of_another_format_is_kept_aside_whole(make: Make) -> None:
    content = HEADER + packet(T0, b"one")
    life = recovered(make, content, format="pcap", name="main-00000007.pcapng")
    assert life.files() == []
    (path,) = life.files("quarantine")
    assert path.read_bytes() == content


def test_a_leftover_that_somebody_still_writes_is_left_alone(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("appliance.merge.recovery.LOCK_WAIT_S", 0.1)
    first = make()
    first.finish()
    path = leftover(first, "main-00000007.pcapng", HEADER + packet(T0, b"one"))
    with path.open("rb") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        life = make(recover=True)
        life.finish()
    assert path.exists()


def test_a_recovery_that_was_cut_off_itself_is_repeated_and_leaves_nothing(make: Make) -> None:
    content = (HEADER + packet(T0, b"one") + packet(T0 + 1, b"two"))[:-4]
    first = make()
    first.finish()
    for suffix in ("", ".salvage", ".salvage.packed"):
        leftover(first, f"main-00000007.pcapng{suffix}", content)
    leftover(first, "main-00000009.pcapng.salvage", b"of a file that is published")
    life = make(recover=True)
    life.finish()
    assert sum(s["packets"] for s in life.sidecars()) == 1
    assert life.staged() == []


def test_a_file_that_is_published_under_a_second_name_already_is_not_published_again(make: Make) -> None:
    """Where renameat2(2) does not know RENAME_NOREPLACE, link(2) and unlink(2) take its place."""
    first = make()
    first.finish()
    path = leftover(first, "main-00000007.pcapng", HEADER + packet(T0, b"one"))
    os.link(path, first.directory / "ready" / "main-20231114T221400Z-00000007.pcapng")
    life = make(recover=True)
    life.finish()
    assert len(life.files()) == 1
    assert life.staged() == []


# ---- other namings ----


def test_a_single_file_whose_merge_died_goes_on_under_the_next_name(make: Make, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    naming = SingleFileNaming(tmp_path / "out" / "all.pcapng")
    dead = make(naming=naming)
    dead.stream.open(T0)
    write(dead, 0, 1, 2)
    dead.die()
    life = successor(make, dead, naming=naming)
    life.stream.open(T0)
    write(life, 0, 3)
    life.finish()
    files = sorted((tmp_path / "out").iterdir())
    assert [path.name for path in files] == ["all.pcapng", "all.pcapng.1"]
    assert [capinfos(path).packets for path in files] == [2, 1]
    assert life.source_pages[0]["lost_unclean_packets"] == 0


def test_another_outputs_leftover_in_the_same_directory_is_not_ours(make: Make, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    theirs = tmp_path / "out" / "tmp-4194304-00000003"
    theirs.write_bytes(HEADER + packet(T0, b"one"))
    life = make(naming=MtracecapNaming(tmp_path / "out", ".pcap"), format="pcap", recover=True)
    life.finish()
    assert theirs.exists()
    assert [path.name for path in (tmp_path / "out").iterdir()] == [theirs.name]


def test_a_failed_file_that_keeps_its_name_is_not_counted_twice_after_a_death(make: Make, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    naming = MtracecapNaming(tmp_path / "out", ".pcapng")
    dead = make(naming=naming, compressor=["sh", "-c", "cat; exit 1"])
    dead.stream.open(T0)
    write(dead, 0, 1, 2)
    dead.stream.close("request")
    dead.die()
    assert dead.publisher.failed
    assert dead.page["quarantined_packets"] == 2
    life = successor(make, dead, naming=naming, compressor="none")
    page = life.source_pages[0]
    assert (page["written_packets"], page["closed_packets"], page["lost_unclean_packets"]) == (2, 2, 0)
    assert [capinfos(path).packets for path in (tmp_path / "out").iterdir()] == [2]
    life.finish()
