"""Capture files for the offline rows: made fast, always the same, and not kinder to us than a network would be.

A file is microsecond pcap of Ethernet frames. Sizes repeat in a fixed shuffled pattern, so that all frames of one place
in the pattern can be written at once. Which flow a packet belongs to is drawn at random, evenly or with a few flows
that have most of the packets; a flow's addresses have nothing to do with its number.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from support.frames import IMIX_SIZES

START_S = 1_700_000_000
RECORD_HEADER_BYTES = 16
HEADERS_BYTES = 54  # Ethernet, IPv4, TCP
PATTERN_REPEATS = 4
CHUNK_PATTERNS = 2000  # bounds the memory of a generator
INTERVAL_US = 4.0  # between two packets of one file, on average
NAMED_SIZES = {"60 B": (60,), "IMIX": IMIX_SIZES}

Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class Mix:
    """What the packets are. `skew` 0: every flow has its fair share of the packets; above, flow n has a share of
    n^-skew (1 is much like real links). `tcp_share` of the flows are TCP, the others UDP."""

    sizes: tuple[int, ...] = (60,)
    flows: int = 1000
    skew: float = 0.0
    tcp_share: float = 0.8
    seed: int = 1

    def __post_init__(self) -> None:
        if min(self.sizes) < HEADERS_BYTES or self.flows < 1 or self.skew < 0:
            raise ValueError(f"frames of at least {HEADERS_BYTES} bytes, at least one flow, no negative skew")

    def pattern(self) -> Array:
        """The sizes in the order in which they repeat."""
        if len(self.sizes) == 1:
            return np.array(self.sizes)
        return np.random.default_rng(self.seed).permutation(np.repeat(self.sizes, PATTERN_REPEATS))


def write_capture(path: Path, packets: int, mix: Mix, source: int = 0) -> Path:
    """Writes `packets` (rounded down to whole patterns) to `path`.

    Files with different `source` and the same mix have different packets of the same flows at interleaved times.
    A shorter file is the beginning of a longer one.
    """
    rng = np.random.default_rng((mix.seed, source))
    pattern = mix.pattern()
    patterns = packets // len(pattern)
    seen = np.zeros(mix.flows, bool)
    sent = np.zeros(mix.flows, np.uint32)
    cumulative = None if mix.skew == 0 else np.cumsum(np.arange(1, mix.flows + 1, dtype=float) ** -mix.skew)
    with path.open("wb") as file:
        file.write(struct.pack("<IHHIIII", 0xA1B2C3D4, 2, 4, 0, 0, 262144, 1))
        for start in range(0, patterns, CHUNK_PATTERNS):
            # Always a whole chunk's worth of random numbers, or a shorter file would not be a beginning.
            drawn = CHUNK_PATTERNS * len(pattern)
            flows = _draw(rng, drawn, mix.flows, cumulative)
            jitter = rng.random(drawn)
            count = min(CHUNK_PATTERNS, patterns - start) * len(pattern)
            numbers = start * len(pattern) + np.arange(count)
            times = ((numbers + jitter[:count]) * INTERVAL_US).astype(np.uint64)
            first = _first_of_flow(flows[:count], seen)
            sizes = np.tile(pattern, count // len(pattern))
            sequences = _sequences(flows[:count], (sizes - HEADERS_BYTES + first).astype(np.uint32), sent)
            _chunk(pattern, times, flows[:count], first, sequences, mix).tofile(file)
    return path


def packets_of(packets: int, mix: Mix) -> int:
    """How many packets `write_capture` really writes."""
    return packets // len(mix.pattern()) * len(mix.pattern())


def _draw(rng: np.random.Generator, count: int, flows: int, cumulative: Array | None) -> Array:
    if cumulative is None:
        return rng.integers(0, flows, count)
    return np.searchsorted(cumulative, rng.random(count) * cumulative[-1])


def _first_of_flow(flows: Array, seen: Array) -> Array:
    """Which of these packets begin their flow; `seen` is brought up to date."""
    unique, places = np.unique(flows, return_index=True)
    first = np.zeros(len(flows), bool)
    first[places[~seen[unique]]] = True
    seen[unique] = True
    return first


def _sequences(flows: Array, octets: Array, sent: Array) -> Array:
    """TCP sequence numbers of flows that send in order and lose nothing; `sent` is brought up to date."""
    order = np.argsort(flows, kind="stable")
    before = np.cumsum(octets[order], dtype=np.uint32) - octets[order]
    begins = np.flatnonzero(np.r_[True, np.diff(flows[order]) != 0])
    lengths = np.diff(np.r_[begins, len(flows)])
    sequences = np.empty(len(flows), np.uint32)
    sequences[order] = before - np.repeat(before[begins], lengths) + sent[flows[order]]
    np.add.at(sent, flows, octets)
    return sequences


def _chunk(pattern: Array, times_us: Array, flows: Array, first: Array, sequences: Array, mix: Mix) -> Array:
    """The records of whole patterns, as one array of octets."""
    rows = len(flows) // len(pattern)
    out = np.zeros((rows, int(pattern.sum()) + RECORD_HEADER_BYTES * len(pattern)), np.uint8)
    column = 0
    for place, size in enumerate(pattern.tolist()):
        end = column + RECORD_HEADER_BYTES + size
        _records(out[:, column:end], size, times_us[place :: len(pattern)], flows[place :: len(pattern)], mix)
        syn = first[place :: len(pattern)]
        flags = column + RECORD_HEADER_BYTES + 47
        is_tcp = out[:, column + RECORD_HEADER_BYTES + 23] == 6
        out[:, flags] = np.where(is_tcp, np.where(syn, 0x02, 0x10), out[:, flags])
        sequence = out[:, flags - 9 : flags - 5]
        sequence[is_tcp] = _octets((sequences[place :: len(pattern)], ">u4"), like=syn)[is_tcp]
        column = end
    return out


def _records(out: Array, size: int, times_us: Array, flows: Array, mix: Mix) -> None:
    """Packets of one size: record header, Ethernet, IPv4, TCP or UDP, filling. `out`: packets x octets, zeroed."""
    out[:, 0:16] = _octets(
        (START_S + times_us // 1_000_000, "<u4"),
        (times_us % 1_000_000, "<u4"),
        (size, "<u4"),
        (size, "<u4"),
        like=flows,
    )
    frame = out[:, RECORD_HEADER_BYTES:]
    frame[:, HEADERS_BYTES:] = np.arange(size - HEADERS_BYTES) & 0xFF
    frame[:, 0:14] = np.frombuffer(bytes.fromhex("020000000002020000000001") + b"\x08\x00", np.uint8)
    # Odd multipliers permute the 32-bit numbers: each flow its own addresses, far apart.
    mixed = (flows.astype(np.uint64) * 2654435761) & 0xFFFFFFFF
    protocol = np.where((mixed >> 7) % 1000 < mix.tcp_share * 1000, 6, 17)
    low, high = flows % 40_000, flows // 40_000
    source = 0x0A000000 | (mixed & 0x00FFFFFF)
    frame[:, 14:34] = _octets(
        (0x4500, ">u2"), (size - 14, ">u2"), (0, ">u4"), (64 << 8, ">u2"), (0, ">u2"), (source, ">u4"),
        (0xAC100000 | high, ">u4"), like=flows,
    )  # fmt: skip
    frame[:, 23] = protocol
    frame[:, 24:26] = _internet_checksum(frame[:, 14:34])
    frame[:, 34:38] = _octets((20_000 + low, ">u2"), (443, ">u2"), like=flows)
    tcp = protocol == 6
    frame[tcp, 46] = 0x50
    frame[tcp, 48:50] = 0xFF
    frame[~tcp, 38:40] = np.frombuffer(struct.pack(">H", size - 34), np.uint8)


def _octets(*fields: tuple[Any, str], like: Array) -> Array:
    """Columns of numbers, or one number for all, packed one behind the other: packets x octets."""
    packed = np.zeros(len(like), [(f"f{i}", kind) for i, (_, kind) in enumerate(fields)])
    for i, (value, _) in enumerate(fields):
        packed[f"f{i}"] = value
    return packed.view(np.uint8).reshape(len(like), -1)


def _internet_checksum(headers: Array) -> Array:
    """RFC 1071, of each row of octets whose checksum field is zero."""
    words = np.ascontiguousarray(headers).view(">u2").astype(np.uint32)
    total = words.sum(axis=1)
    for _ in range(2):
        total = (total & 0xFFFF) + (total >> 16)
    return (~total & 0xFFFF).astype(">u2").view(np.uint8).reshape(-1, 2)
