"""Recounts published capture files against the sidecars that were written with them."""

from __future__ import annotations

import ctypes
import hashlib
import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from appliance.errors import ApplianceError, FormatError, MissingInputError
from appliance.formats.reader import BATCH_BYTES, CaptureReader

READY, META = "ready", "meta"
SIDECAR_SUFFIX = ".json"
# What a sidecar says that can be counted again in the file.
RECOUNTED_FIELDS = ("packets", "bytes", "first_ns", "last_ns", "sha256")
# The clock was set back on purpose: what follows such a file may be older.
CLOSED_BY_CLOCK_STEP = "clock_step"

Progress = Callable[[int, int], None]


@dataclass(frozen=True, slots=True)
class VerifiedFile:
    """One published file, or one sidecar without its file, recounted. `problems` is empty when all is well."""

    file: str  # name in ready/
    problems: tuple[str, ...] = ()
    packets: int = 0
    bytes: int = 0  # of the file on disk
    first_ns: int | None = None  # oldest time stamp; None: no packets
    last_ns: int | None = None  # newest
    late_packets: int = 0  # packets behind a newer one in the same file
    sha256: str = ""
    dropped_packets: int | None = None  # of all stages together, as the sidecar says; None: no sidecar
    closed_because: str = ""

    @property
    def ok(self) -> bool:
        return not self.problems


def verify_directory(directory: str | os.PathLike[str], progress: Progress | None = None) -> list[VerifiedFile]:
    """Reads every file in `ready/` below `directory` and compares it with its sidecar `meta/<file>.json`.

    Compared are packets, bytes on disk, first and last time, and the SHA-256; the order of times is checked inside of
    each file and across the files in the order of their names. A sidecar's late packets explain that many inversions.
    Missing sidecars, sidecars without a file and damaged files are problems of their rows. `progress(done, total)` is
    called with bytes on disk, at most once per quarter MiB.

    Raises MissingInputError when there is no `ready/`.
    """
    root = Path(directory)
    if not (root / READY).is_dir():
        raise MissingInputError(f"{root} has no folder {READY}/: name the directory of an output")
    names = {entry.name for entry in os.scandir(root / READY) if not entry.name.startswith(".")}
    orphans = _sidecar_names(root / META) - names
    meter = _Meter(progress, sum((root / READY / name).lstat().st_size for name in names))
    rows = []
    newest_ns: int | None = None
    for name in sorted(names | orphans):
        sidecar, problem = _read_sidecar(root / META / (name + SIDECAR_SUFFIX))
        if name in orphans:
            rows.append(VerifiedFile(name, (f"{READY}/{name} is missing, its sidecar is there",)))
            continue
        row = _verify_file(root / READY / name, sidecar, problem, newest_ns, meter)
        rows.append(row)
        if row.last_ns is not None:
            newest_ns = max(newest_ns or 0, row.last_ns)
        if row.closed_because == CLOSED_BY_CLOCK_STEP:
            newest_ns = None
    return rows


class _Meter:
    """Adds up the bytes read for `progress`."""

    def __init__(self, progress: Progress | None, total: int) -> None:
        self._progress = progress
        self._done = 0
        self._total = total

    def add(self, count: int) -> None:
        self._done += count
        if self._progress is not None:
            self._progress(self._done, max(self._done, self._total))


def _verify_file(
    path: Path, sidecar: dict[str, Any] | None, problem: str, newest_before_ns: int | None, meter: _Meter
) -> VerifiedFile:
    found, problems, readable = _recount(path, meter)
    if problem:
        problems.append(problem)
    if sidecar is not None and readable:
        if sidecar.get("file") != path.name:
            problems.append(f"its sidecar is about {sidecar.get('file')!r}")
        for field in RECOUNTED_FIELDS:
            if sidecar.get(field, "nothing") != found[field]:
                problems.append(
                    f"{field}: the sidecar says {sidecar.get(field, 'nothing')}, the file has {found[field]}"
                )
    explained = _count(sidecar, "late")
    if found["late_packets"] > explained:
        problems.append(f"{found['late_packets']} packets come behind newer ones, the sidecar says {explained}")
    first_ns = found["first_ns"]
    if newest_before_ns is not None and first_ns is not None and first_ns < newest_before_ns and explained == 0:
        problems.append(f"it begins {newest_before_ns - first_ns} ns before the newest packet of the files before it")
    return VerifiedFile(
        file=path.name,
        problems=tuple(problems),
        dropped_packets=_dropped(sidecar),
        closed_because=str(sidecar.get("closed_because", "")) if sidecar else "",
        **found,
    )


def _recount(path: Path, meter: _Meter) -> tuple[dict[str, Any], list[str], bool]:
    """What the file itself says, what is wrong with it, and whether it could be read at all."""
    digest = hashlib.sha256()
    found: dict[str, Any] = {"packets": 0, "bytes": 0, "first_ns": None, "last_ns": None, "late_packets": 0}
    problems: list[str] = []

    def observe(piece: memoryview) -> None:
        digest.update(piece)
        found["bytes"] += len(piece)
        meter.add(len(piece))

    batch = bytearray(BATCH_BYTES)
    address = ctypes.addressof(ctypes.c_char.from_buffer(batch))
    try:
        with CaptureReader(path, observe, format="erf" if ".erf" in path.suffixes else "") as reader:
            try:
                while not reader.fill(address, BATCH_BYTES).end:
                    pass
            except FormatError as error:
                problems.append(str(error))
            reader.stream.drain()
            counts = reader.counts
            found.update(packets=counts.packets, first_ns=counts.first_ns, last_ns=counts.last_ns)
            found["late_packets"] = counts.late_packets
    except ApplianceError as error:
        return found, [str(error)], False
    found["sha256"] = digest.hexdigest()
    return found, problems, True


def _read_sidecar(path: Path) -> tuple[dict[str, Any] | None, str]:
    """The sidecar's fields, or what is wrong with it."""
    try:
        fields = json.loads(path.read_bytes())
    except FileNotFoundError:
        return None, f"it has no sidecar {META}/{path.name}"
    except OSError as error:
        return None, f"its sidecar {META}/{path.name} cannot be read: {error.strerror}"
    except ValueError as error:
        return None, f"its sidecar {META}/{path.name} is not JSON: {error}"
    if not isinstance(fields, dict):
        return None, f"its sidecar {META}/{path.name} is not a JSON object"
    return fields, ""


def _sidecar_names(meta: Path) -> set[str]:
    """The names of the files that have a sidecar."""
    if not meta.is_dir():
        return set()
    return {
        entry.name.removesuffix(SIDECAR_SUFFIX)
        for entry in os.scandir(meta)
        if entry.name.endswith(SIDECAR_SUFFIX) and not entry.name.startswith(".")
    }


def _dropped(sidecar: dict[str, Any] | None) -> int | None:
    if sidecar is None or not isinstance(sidecar.get("dropped"), dict):
        return None
    return sum(count for count in sidecar["dropped"].values() if isinstance(count, int))


def _count(sidecar: dict[str, Any] | None, field: str) -> int:
    count = sidecar.get(field, 0) if sidecar else 0
    return count if isinstance(count, int) else 0
