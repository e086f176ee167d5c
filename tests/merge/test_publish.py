"""What is published is whole, on the disk, under a name that was free; what is not goes to quarantine."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from merge.outputs import Life, Make
from merge.rings import S
from support.lab import requires_tool, wait_until

from appliance import disk
from appliance.config import Output
from appliance.counters import PUBLISH_BUCKETS_MS
from appliance.merge import publish
from appliance.merge.naming import MtracecapNaming

T0 = 1_700_000_040 * S


def one_file(life: Life, *times: int) -> None:
    life.stream.open(T0)
    life.sources[0].packets_at(*(T0 + at for at in times))
    life.turn()
    life.finish()


def test_the_sidecar_tells_what_is_in_the_file(make: Make) -> None:
    life = make(["uplink"], compressor="lz4")
    one_file(life, 5, 9)
    (path,) = life.files()
    content = path.read_bytes()
    told = life.sidecar(path)
    assert told.pop("uncompressed_bytes") > 0
    assert told == {
        "file": path.name,
        "output": "main",
        "sequence": 0,
        "packets": 2,
        "bytes": len(content),
        "first_ns": T0 + 5,
        "last_ns": T0 + 9,
        "dropped": {"kernel": 0, "filter": 0, "ring": 0, "merge": 0, "writer": 0},
        "late": 0,
        "late_max_ns": 0,
        "sha256": hashlib.sha256(content).hexdigest(),
        "closed_because": "end",
        "recovered": False,
        "interfaces": {"uplink": 2},
    }
    page = life.page
    assert (page["segments_published"], page["published_packets"], page["published_bytes"]) == (1, 2, len(content))
    assert sum(page[f"publish_{ms}_ms"] for ms in PUBLISH_BUCKETS_MS) + page["publish_slower"] == 1
    assert page["queued_segments"] == 0
    assert life.staged() == []


@requires_tool("strace")
def test_everything_is_on_the_disk_before_the_name_is_and_the_name_before_it_counts(tmp_path: Path) -> None:
    tests = Path(__file__).parents[1]
    log = tmp_path / "trace"
    program = (
        "import sys, pathlib; sys.path.insert(0, sys.argv[1])\n"
        "from merge.outputs import Life\n"
        f"life = Life(pathlib.Path(sys.argv[2])); life.stream.open({T0})\n"
        f"life.sources[0].packets_at({T0}); life.turn(); life.finish()\n"
    )
    calls = "trace=openat,fsync,rename,renameat,renameat2,unlink,unlinkat"
    subprocess.run(
        ["strace", "-f", "-y", "-o", log, "-e", calls, sys.executable, "-c", program, tests, tmp_path / "out"],
        check=True,
    )
    staged = rf"/work/{Output().name}-00000000\.pcapng"
    shapes = {
        "data synced": rf"fsync\(\d+<.*{staged}>",
        "sidecar synced": r"fsync\(\d+<.*/meta/main-.*\.json\.tmp>",
        "sidecar named": r"rename\(\".*/meta/main-.*\.json\.tmp\"",
        "sidecar's name synced": r"fsync\(\d+<.*/out/meta>",
        "published": rf"renameat2\(.*{staged}\", .*/ready/main-.*RENAME_NOREPLACE",
        "name synced": r"fsync\(\d+<.*/out/ready>",
    }
    lines = log.read_text().splitlines()
    named = next(i for i, line in enumerate(lines) if re.search(shapes["sidecar named"], line))
    places = {}
    for what, shape in shapes.items():
        start = named if what == "sidecar's name synced" else 0  # the number's own file is synced there earlier
        places[what] = next(i for i, line in enumerate(lines) if i >= start and re.search(shape, line))
    assert sorted(places, key=lambda what: places[what]) == list(shapes)


def test_a_name_that_is_taken_is_left_alone_with_its_sidecar(make: Make) -> None:
    life = make()
    name = "main-20231114T221400Z-00000000.pcapng"
    (life.directory / "ready" / name).write_bytes(b"another's")
    (life.directory / "meta" / f"{name}.json").write_bytes(b"another's too")
    one_file(life, 1)
    assert (life.directory / "ready" / name).read_bytes() == b"another's"
    assert (life.directory / "meta" / f"{name}.json").read_bytes() == b"another's too"
    (ours,) = (path for path in life.files() if path.name != name)
    assert ours.name == "main-20231114T221400Z-00000001.pcapng"
    assert life.sidecar(ours)["sequence"] == 1


def test_where_the_kernel_cannot_refuse_to_replace_a_link_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Refusing:
        @staticmethod
        def renameat2(*_: Any) -> int:
            import ctypes
            import errno

            ctypes.set_errno(errno.EINVAL)
            return -1

    monkeypatch.setattr(disk, "libc", lambda: Refusing)
    source, target = tmp_path / "source", tmp_path / "target"
    source.write_bytes(b"new")
    publish.rename_without_replacing(str(source), str(target))
    assert (source.exists(), target.read_bytes()) == (False, b"new")
    source.write_bytes(b"newer")
    with pytest.raises(FileExistsError):
        publish.rename_without_replacing(str(source), str(target))
    assert (source.read_bytes(), target.read_bytes()) == (b"newer", b"new")


def fails(number: int) -> Callable[..., Any]:
    def fail(*_: Any) -> Any:
        raise OSError(number, os.strerror(number))

    return fail


@pytest.mark.parametrize("step", ["sync_and_hash", "write_durably", "rename_without_replacing"])
def test_a_step_that_fails_sends_the_file_to_quarantine_and_is_not_repeated(
    make: Make, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    calls = []
    original = getattr(publish, step)

    def fail_once(*arguments: Any) -> Any:
        calls.append(arguments)
        return fails(5)() if len(calls) == 1 else original(*arguments)

    monkeypatch.setattr(publish, step, fail_once)
    life = make()
    one_file(life, 1, 2)
    assert life.files() == []
    (path,) = life.files("quarantine")
    reason = json.loads(path.with_name(f"{path.name}.json").read_text())
    assert reason["packets"] == 2 and "Input/output error" in reason["reason"]
    assert life.publisher.failed
    assert (life.page["segments_quarantined"], life.page["quarantined_packets"]) == (1, 2)
    assert life.page["segments_published"] == 0
    assert life.source_pages[0]["closed_packets"] == 2
    assert [name for name in os.listdir(life.directory / "meta") if name != "sequence"] == []
    if step == "sync_and_hash":
        assert len(calls) == 1, "a second fsync would succeed, and prove nothing"


def test_a_directory_that_cannot_be_synced_takes_its_file_back(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    original = publish.sync_directory

    def fail_in_ready(path: str) -> None:
        if path.endswith("ready"):
            fails(5)()
        original(path)

    monkeypatch.setattr(publish, "sync_directory", fail_in_ready)
    life = make()
    one_file(life, 1)
    assert life.files() == []
    assert len(life.files("quarantine")) == 1
    assert life.source_pages[0]["closed_packets"] == 1


def test_without_a_quarantine_a_failed_file_keeps_its_staging_name(make: Make, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    life = make(naming=MtracecapNaming(tmp_path / "out", ".pcapng"), compressor=["sh", "-c", "cat; exit 3"])
    one_file(life, 1)
    (path,) = (tmp_path / "out").iterdir()
    assert path.name.startswith("tmp-")
    assert life.publisher.failed


def test_too_many_waiting_files_hold_the_writer_back_with_signs_of_life(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    may_go = threading.Event()
    original = publish.sync_and_hash

    def wait(path: str) -> tuple[str, int]:
        assert may_go.wait(20)
        return original(path)

    monkeypatch.setattr(publish, "sync_and_hash", wait)
    beats: list[int] = []
    life = make(beats=beats)

    def go_after_two_beats() -> None:
        wait_until(lambda: len(beats) >= 2, "two signs of life")
        may_go.set()

    threading.Thread(target=go_after_two_beats).start()
    for at in range(publish.Publisher.QUEUE_SEGMENTS + 2):
        life.stream.open(T0)
        life.sources[0].packets_at(T0 + at)
        life.turn()
        life.stream.close("request")
    assert may_go.is_set(), "it waited"
    life.finish()
    assert [s["packets"] for s in life.sidecars()] == [1] * 10
    assert life.page["queued_segments"] == 0


def test_a_full_disk_leaves_no_half_sidecar(tmp_path: Path) -> None:
    target = tmp_path / "note.json"
    shutil.copy("/dev/null", target)
    full = tmp_path / "note.json.tmp"
    full.symlink_to("/dev/full")
    with pytest.raises(OSError):
        publish.write_durably(str(target), "text", 0o640)
    assert target.read_bytes() == b""


def test_a_file_that_was_removed_while_it_was_written_is_neither_published_nor_in_quarantine(make: Make) -> None:
    life = make()
    life.stream.open(T0)
    life.sources[0].packets_at(T0 + 1, T0 + 2)
    life.turn()
    (staged,) = (life.directory / "work").iterdir()
    staged.unlink()
    life.finish()
    assert life.page["quarantined_packets"] == life.page["published_packets"] == life.page["written_packets"] == 0
    assert life.source_pages[0]["written_packets"] == 0
    assert life.source_pages[0]["ever_written_packets"] == life.source_pages[0]["taken_back_packets"] > 0
    assert life.source_pages[0]["dropped_writer_packets"] == 2


def test_what_cannot_be_set_aside_or_explained_is_tried_again(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(publish, "RETENTION_EVERY_S", 0.05)
    original = {name: getattr(publish, name) for name in ("rename_without_replacing", "write_durably")}
    for name in original:
        monkeypatch.setattr(publish, name, fails(28))
    life = make()
    life.stream.open(T0)
    life.sources[0].packets_at(T0 + 1)
    life.turn()
    life.rotate()
    wait_until(lambda: life.page["quarantined_packets"] == 1, "it is counted")
    assert life.files("quarantine") == []
    monkeypatch.setattr(publish, "rename_without_replacing", original["rename_without_replacing"])
    wait_until(lambda: len(life.files("quarantine")) == 1, "it is moved")
    monkeypatch.setattr(publish, "write_durably", original["write_durably"])
    life.finish()
    (path,) = life.files("quarantine")
    assert json.loads(path.with_name(f"{path.name}.json").read_text())["packets"] == 1
    assert (life.page["segments_quarantined"], life.page["quarantined_packets"]) == (1, 1)
