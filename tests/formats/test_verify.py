"""Published files recounted against their sidecars: what agrees, and each way of not agreeing."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import lz4.frame  # type: ignore[import-untyped]
import pytest
from formats.craft import Packet, pcap_file

from appliance.errors import MissingInputError
from appliance.formats.verify import VerifiedFile, verify_directory

S = 10**9


@pytest.fixture
def output(tmp_path: Path) -> Path:
    """The directory of an output with two published files."""
    for name in ("work", "ready", "meta"):
        (tmp_path / name).mkdir()
    publish(tmp_path, "20260101-000000-00000000.pcap", [S, 2 * S, 3 * S])
    publish(tmp_path, "20260101-000001-00000001.pcap.lz4", [3 * S, 4 * S])
    return tmp_path


def publish(directory: Path, name: str, times_ns: list[int], **changes: Any) -> None:
    data = pcap_file([Packet(at, b"data") for at in times_ns])
    content = lz4.frame.compress(data) if name.endswith(".lz4") else data
    (directory / "ready" / name).write_bytes(content)
    sidecar = {
        "file": name,
        "packets": len(times_ns),
        "bytes": len(content),
        "first_ns": min(times_ns, default=None),
        "last_ns": max(times_ns, default=None),
        "dropped": {"kernel": 3, "ring": 1},
        "late": 0,
        "sha256": hashlib.sha256(content).hexdigest(),
        "closed_because": "time",
    }
    sidecar.update(changes)
    (directory / "meta" / f"{name}.json").write_text(json.dumps(sidecar))


def problems(rows: list[VerifiedFile]) -> list[str]:
    return [problem for row in rows for problem in row.problems]


def test_files_that_agree_with_their_sidecars_are_well(output: Path) -> None:
    first, second = verify_directory(output)
    assert first.ok
    assert second.ok
    assert (first.packets, first.first_ns, first.last_ns) == (3, S, 3 * S)
    assert (second.packets, second.first_ns, second.last_ns) == (2, 3 * S, 4 * S)
    assert second.bytes == (output / "ready" / second.file).stat().st_size
    assert (first.dropped_packets, first.closed_because) == (4, "time")


def test_a_file_without_packets_is_well(output: Path) -> None:
    publish(output, "20260101-000002-00000002.pcap", [])
    assert problems(verify_directory(output)) == []


@pytest.mark.parametrize(("field", "wrong", "said"), [
    ("packets", 4, "packets: the sidecar says 4, the file has 3"),
    ("bytes", 1, "bytes: the sidecar says 1"),
    ("first_ns", 5, "first_ns: the sidecar says 5"),
    ("last_ns", None, "last_ns: the sidecar says None"),
    ("sha256", "00", "sha256: the sidecar says 00"),
    ("file", "other", "its sidecar is about 'other'"),
])  # fmt: skip
def test_every_field_that_disagrees_is_named_with_both_values(output: Path, field: str, wrong: Any, said: str) -> None:
    publish(output, "20260101-000000-00000000.pcap", [S, 2 * S, 3 * S], **{field: wrong})
    (problem,) = problems(verify_directory(output))
    assert problem.startswith(said)


def test_a_missing_sidecar_is_a_problem_and_the_file_is_counted_all_the_same(output: Path) -> None:
    (output / "meta" / "20260101-000000-00000000.pcap.json").unlink()
    first, _ = verify_directory(output)
    assert "no sidecar" in first.problems[0]
    assert (first.packets, first.dropped_packets) == (3, None)


def test_a_missing_file_is_a_row_of_its_own(output: Path) -> None:
    (output / "ready" / "20260101-000000-00000000.pcap").unlink()
    first, second = verify_directory(output)
    assert "is missing" in first.problems[0]
    assert second.ok


@pytest.mark.parametrize("content", ["{", "[]", "\udcff"])
def test_a_broken_sidecar_is_said(output: Path, content: str) -> None:
    path = output / "meta" / "20260101-000000-00000000.pcap.json"
    path.write_bytes(content.encode("utf-8", "surrogateescape"))
    first, _ = verify_directory(output)
    assert "not JSON" in first.problems[0] or "not a JSON object" in first.problems[0]


def test_a_cut_file_tells_where_and_its_digest_covers_all_of_it(output: Path) -> None:
    path = output / "ready" / "20260101-000000-00000000.pcap"
    path.write_bytes(path.read_bytes()[:-1])
    first, _ = verify_directory(output)
    assert "is damaged behind byte" in first.problems[0]
    assert first.packets == 2
    assert first.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()


def test_a_foreign_file_is_said_once(output: Path) -> None:
    (output / "ready" / "20260101-000000-00000000.pcap").write_bytes(b"something else" * 100)
    (problem,) = problems(verify_directory(output))
    assert "neither pcap nor pcapng" in problem


def test_disorder_that_the_sidecar_does_not_admit_is_a_problem(output: Path) -> None:
    times_ns = [3 * S, 5 * S, 4 * S, 6 * S]
    publish(output, "20260101-000002-00000002.pcap", times_ns, late=1)
    assert [row.ok for row in verify_directory(output)] == [True, True, True]
    publish(output, "20260101-000002-00000002.pcap", times_ns)
    *_, last = verify_directory(output)
    assert "1 packets come behind newer ones, the sidecar says 0" in last.problems


def test_disorder_across_files_is_a_problem_unless_the_clock_was_set(output: Path) -> None:
    publish(output, "20260101-000002-00000002.pcap", [2 * S])
    *_, last = verify_directory(output)
    assert last.problems == (f"it begins {2 * S} ns before the newest packet of the files before it",)
    publish(output, "20260101-000001-00000001.pcap.lz4", [3 * S, 4 * S], closed_because="clock_step")
    assert problems(verify_directory(output)) == []


def test_progress_counts_every_byte_once(output: Path) -> None:
    told: list[tuple[int, int]] = []
    verify_directory(output, lambda done, total: told.append((done, total)))
    sizes = sum(path.stat().st_size for path in (output / "ready").iterdir())
    assert told[-1] == (sizes, sizes)
    assert told == sorted(told)


def test_a_directory_that_is_no_output_is_refused(tmp_path: Path) -> None:
    with pytest.raises(MissingInputError, match="ready"):
        verify_directory(tmp_path)


def test_a_hostile_name_in_the_folder_does_no_harm(output: Path) -> None:
    (output / "ready" / "a folder").mkdir()
    (output / "ready" / "link").symlink_to("/nowhere/at/all")
    rows = {row.file: row for row in verify_directory(output)}
    assert "is a directory" in rows["a folder"].problems[0]
    assert "does not exist" in rows["link"].problems[0]
