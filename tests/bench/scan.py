"""A quick count of numbered frames of one size in plain pcap and pcapng: millions of packets in a second.

support/judges.py does the same for any frames, and checks their checksums, at the pace of Python.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from support.frames import ETHERNET_BYTES, INTERFACE_OFFSET, MAGIC, PATCH_OFFSET

RUN_PACKETS = 1 << 20
_PCAP_UNITS_NS = {0xA1B2C3D4: 1000, 0xA1B23C4D: 1}
_PCAPNG_MAGIC = 0x0A0D0D0A
_HEADER_BYTES = ETHERNET_BYTES + PATCH_OFFSET + 8  # up to the end of the number

Array = np.ndarray[Any, Any]


@dataclass
class Count:
    """What some files hold together. An inversion is a packet older than one before it in its file."""

    packets: int = 0
    foreign: int = 0
    inversions: int = 0
    worst_inversion_ns: int = 0
    numbers: dict[int, list[Array]] = field(default_factory=dict)  # by interface

    def missing(self, sent: Mapping[int, int]) -> int:
        """Numbers below `sent` (by interface) that are not there."""
        return sum(count - self._distinct(interface, count) for interface, count in sent.items())

    @property
    def duplicates(self) -> int:
        return sum(sum(map(len, found)) - self._distinct(interface, None) for interface, found in self.numbers.items())

    @property
    def disordered(self) -> int:
        """Numbers below the one before them on the same interface."""
        return sum(int((np.diff(one.astype(np.int64)) < 0).sum()) for found in self.numbers.values() for one in found)

    def _distinct(self, interface: int, below: int | None) -> int:
        found = self.numbers.get(interface, [])
        if not found:
            return 0
        unique = np.unique(np.concatenate(found))
        return int(len(unique) if below is None else (unique < below).sum())


def count_numbered(paths: Iterable[Path]) -> Count:
    """ValueError: a file is neither pcap nor pcapng of this machine's byte order, or is damaged."""
    count = Count()
    for path in paths:
        runs = list(_runs(path))
        times = np.concatenate([run[0] for run in runs]) if runs else np.zeros(0, np.int64)
        _count_order(count, times)
        if not runs:
            continue
        frames = [frame for _, frame in runs]
        interfaces = np.concatenate([_number(frame, INTERFACE_OFFSET, ">u2") for frame in frames])
        numbers = np.concatenate([_number(frame, PATCH_OFFSET, ">u8") for frame in frames])
        magics = np.concatenate([_number(frame, 0, ">u4") for frame in frames])
        ours = magics == int.from_bytes(MAGIC, "big")
        count.foreign += int((~ours).sum())
        for interface in np.unique(interfaces[ours]).tolist():
            count.numbers.setdefault(interface, []).append(numbers[ours & (interfaces == interface)])
    return count


def _count_order(count: Count, times_ns: Array) -> None:
    count.packets += len(times_ns)
    if len(times_ns):
        back = np.maximum.accumulate(times_ns) - times_ns
        count.inversions += int((back > 0).sum())
        count.worst_inversion_ns = max(count.worst_inversion_ns, int(back.max()))


def _number(frames: Array, offset: int, kind: str) -> Array:
    at = ETHERNET_BYTES + offset
    return np.ascontiguousarray(frames[:, at : at + np.dtype(kind).itemsize]).view(kind)[:, 0]


def _runs(path: Path) -> Iterator[tuple[Array, Array]]:
    """Packets of the same length that stand one behind the other: times in ns, and the frames' first octets."""
    if path.stat().st_size < 24:
        return
    content = np.memmap(path, np.uint8, "r")
    magic = int(content[:4].view("<u4")[0])
    if magic in _PCAP_UNITS_NS:
        yield from _pcap(content, _PCAP_UNITS_NS[magic], path)
    elif magic == _PCAPNG_MAGIC:
        yield from _pcapng(content, path)
    else:
        raise ValueError(f"{path}: neither pcap nor pcapng of this byte order")


def _pcap(content: Array, unit_ns: int, path: Path) -> Iterator[tuple[Array, Array]]:
    position = 24
    while position + 16 <= len(content):
        captured = int.from_bytes(content[position + 8 : position + 12].tobytes(), "little")
        rows = _rows(content, position, 16 + captured, path)
        words = np.ascontiguousarray(rows[:, :16]).view("<u4")
        same = _leading(words[:, 2] == captured)
        times = words[:same, 0].astype(np.int64) * 1_000_000_000 + words[:same, 1].astype(np.int64) * unit_ns
        yield times, _frames(rows[:same, 16:])
        position += same * (16 + captured)


def _pcapng(content: Array, path: Path) -> Iterator[tuple[Array, Array]]:
    position = 0
    unit_ns = 1000
    while position + 12 <= len(content):
        kind, length = struct.unpack("<II", content[position : position + 8].tobytes())
        if length < 12 or length % 4:
            raise ValueError(f"{path}: damaged at {position}")
        if kind == 1:
            unit_ns = _unit_ns(content[position + 16 : position + length - 4].tobytes())
        if kind != 6:
            position += length
            continue
        rows = _rows(content, position, length, path)
        words = np.ascontiguousarray(rows[:, :28]).view("<u4")
        same = _leading((words[:, 0] == 6) & (words[:, 1] == length) & (words[:, 5] == words[0, 5]))
        times = (words[:same, 3].astype(np.int64) << 32 | words[:same, 4].astype(np.int64)) * unit_ns
        yield times, _frames(rows[:same, 28:])
        position += same * length


def _unit_ns(options: bytes) -> int:
    """if_tsresol (9) of an interface block; microseconds without it."""
    position = 0
    while position + 4 <= len(options):
        code, length = struct.unpack_from("<HH", options, position)
        if code == 9:
            return {6: 1000, 9: 1}[options[position + 4]]
        if code == 0:
            break
        position += 4 + (length + 3) // 4 * 4
    return 1000


def _rows(content: Array, position: int, stride: int, path: Path) -> Array:
    """The file from `position` on as if all were records of `stride` octets: at least one row."""
    count = min((len(content) - position) // stride, RUN_PACKETS)
    if count == 0:
        raise ValueError(f"{path}: ends inside a record at {position}")
    return content[position : position + count * stride].reshape(count, stride)


def _leading(same: Array) -> int:
    """How many are true before the first that is not."""
    different = np.flatnonzero(~same)
    return int(different[0]) if len(different) else len(same)


def _frames(rows: Array) -> Array:
    if rows.shape[1] < _HEADER_BYTES:
        return np.zeros((len(rows), _HEADER_BYTES), np.uint8)
    return np.array(rows[:, :_HEADER_BYTES])
