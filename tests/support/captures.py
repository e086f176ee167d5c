"""Capture files for tests: written here as plain nanosecond pcap, made into other kinds by Wireshark's editcap."""

from __future__ import annotations

import struct
import subprocess
from collections.abc import Iterable
from pathlib import Path

START_NS = 1_700_000_000_000_000_000  # 2023-11-14 22:13:20 UTC

Timed = tuple[int, bytes]  # nanoseconds after START_NS, frame

_SUFFIXES = {"gzip": "gz", "bzip2": "bz2", "zstd": "zst"}


def write_pcap(path: Path, frames: Iterable[Timed], order: str = "<", captured_bytes: int = 262144) -> Path:
    """A nanosecond pcap of Ethernet frames. `order`: `<` or `>`; `captured_bytes` are kept of each frame."""
    out = bytearray(struct.pack(order + "IHHIIII", 0xA1B23C4D, 2, 4, 0, 0, 262144, 1))
    for after_ns, frame in frames:
        seconds, fraction = divmod(START_NS + after_ns, 1_000_000_000)
        kept = frame[:captured_bytes]
        out += struct.pack(order + "IIII", seconds, fraction, len(kept), len(frame)) + kept
    path.write_bytes(out)
    return path


def write_capture(path: Path, kind: str, frames: Iterable[Timed]) -> Path:
    """A capture file `path` + its suffixes. `kind`: a format of editcap's, and a compressor behind a dot if wanted:
    `pcap`, `nsecpcap`, `pcapng.lz4`, `pcap.gzip`."""
    file_format, _, program = kind.partition(".")
    source = write_pcap(path.with_name(f"{path.name}.source"), frames)
    plain = path.with_name(f"{path.name}.{file_format}")
    subprocess.run(["editcap", "-F", file_format, source, plain], check=True, capture_output=True)
    source.unlink()
    if not program:
        return plain
    packed = plain.with_name(f"{plain.name}.{_SUFFIXES.get(program, program)}")
    with plain.open("rb") as content, packed.open("wb") as target:
        subprocess.run([program, "-c"], stdin=content, stdout=target, stderr=subprocess.DEVNULL, check=True)
    plain.unlink()
    return packed
