"""The quick count of numbered frames says the same as the judges' slow one."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

pytest.importorskip("numpy", reason="an extra of the benchmark")

from support.captures import write_pcap
from support.frames import IMIX_SIZES, Shape, numbered_frame
from support.judges import check_numbered
from support.lab import requires_tool

from bench.scan import count_numbered

SMALLEST = Shape()


def capture(path: Path, numbers: list[tuple[int, int]], times: list[int], shape: Shape = SMALLEST) -> Path:
    """Frames (interface, number) at these times."""
    frames = (numbered_frame(interface, number, shape) for interface, number in numbers)
    return write_pcap(path, zip(times, frames, strict=True))


@pytest.mark.parametrize("shape", [Shape(), Shape(IMIX_SIZES)])
def test_whole_captures_are_whole(tmp_path: Path, shape: Shape) -> None:
    numbers = [(i % 2, i // 2) for i in range(500)]
    path = capture(tmp_path / "a.pcap", numbers, list(range(500)), shape)
    count = count_numbered([path])
    assert (count.packets, count.inversions, count.foreign, count.duplicates, count.disordered) == (500, 0, 0, 0, 0)
    assert count.missing({0: 250, 1: 250}) == 0
    assert count.missing({0: 300, 1: 250}) == 50


def test_every_fault_is_seen(tmp_path: Path) -> None:
    numbers = [(0, 0), (0, 2), (0, 1), (0, 1), (1, 7)]
    path = capture(tmp_path / "a.pcap", numbers, [10, 30, 20, 29, 40])
    count = count_numbered([path])
    slow = check_numbered([path])
    assert (count.inversions, count.worst_inversion_ns) == (slow.inversions, slow.worst_inversion_ns) == (2, 10)
    assert count.duplicates == slow[0].duplicates == 1
    assert count.disordered == slow[0].disordered == 1
    assert count.missing({0: 3, 1: 8}) == 7


def test_frames_of_others_are_foreign(tmp_path: Path) -> None:
    path = write_pcap(tmp_path / "a.pcap", [(0, bytes(60)), (1, numbered_frame(0, 0))])
    count = count_numbered([path])
    assert (count.packets, count.foreign) == (2, 1)


@requires_tool("editcap")
@pytest.mark.parametrize("file_format", ["pcapng", "pcap", "nsecpcap"])
def test_every_plain_format_is_read(tmp_path: Path, file_format: str) -> None:
    numbers = [(0, i) for i in range(100)]
    source = capture(tmp_path / "a.pcap", numbers, [1000 * i for i in [*range(50), 20, *range(51, 100)]])
    path = tmp_path / "b"
    subprocess.run(["editcap", "-F", file_format, source, path], check=True, capture_output=True)
    count = count_numbered([path])
    assert (count.packets, count.inversions, count.worst_inversion_ns) == (100, 1, 29_000)
    assert count.missing({0: 100}) == 0


def test_a_file_that_ends_inside_a_packet_is_refused(tmp_path: Path) -> None:
    path = capture(tmp_path / "a.pcap", [(0, 0), (0, 1)], [0, 1])
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ValueError, match="ends inside a record"):
        count_numbered([path])


def test_an_empty_file_holds_nothing(tmp_path: Path) -> None:
    path = tmp_path / "empty.pcap"
    path.write_bytes(b"")
    assert count_numbered([path]).packets == 0
