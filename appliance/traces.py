"""TCP flow traces of capture files, without a service: every flow into a file of its own.

file -> CaptureReader -> records -> DigestPairs -> FlowFiles -> a flow's file
"""

from __future__ import annotations

import ctypes
import json
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, TextIO

from appliance.capture.pairs import DIGEST_BYTES, DigestPairs
from appliance.capture.uri import file_of
from appliance.errors import CannotCreateError, FormatError, InputOutputError, UsageError
from appliance.formats.reader import BATCH_BYTES, CaptureReader
from appliance.meter.traceflow import FlowDirectory, text_encoder
from appliance.meter.traceflow_formats import FORMATS
from appliance.meter.traceflow_table import PCAP_NS, PCAP_US, TEXT, FlowFiles

INDEX_NAME = "flows.jsonl"
NANOSECONDS = 1_000_000_000


@dataclass(frozen=True)
class TraceSettings:
    """See `appliance trace --help`."""

    format: str = "pcap"
    bidirectional: bool = False
    idle_timeout_s: float = 300.0
    linger_s: float = 60.0
    max_flows: int = 1_000_000
    buffer_bytes: int = 64 << 20
    nanoseconds: bool = True
    frames: bool = False
    inner: bool = False


@dataclass
class TraceCounts:
    """What became of the packets: read = TCP packets in flows + others. `damage` names damaged files."""

    packets: int = 0
    tcp_packets: int = 0
    other_packets: int = 0
    flows: int = 0
    evicted_flows: int = 0
    damage: list[str] = field(default_factory=list)


def trace_files(
    paths: Sequence[str],
    directory: str,
    settings: TraceSettings,
    progress: Callable[[int], None] = lambda packets: None,
) -> TraceCounts:
    """Writes the TCP flows of `paths`, one file after the other, into new files in `directory`, with an index.

    A damaged file counts with its whole packets. Raises CannotCreateError when the directory or its index cannot be
    made, InputOutputError when a file cannot be written, and what CaptureReader raises for files that cannot be opened.
    """
    format = FORMATS.get(settings.format)
    if format is None:
        raise UsageError(f"--format {settings.format!r}: must be one of {' '.join(FORMATS)}")
    for path in paths:  # all of them are there, before anything is made
        name, told_format = file_of(path)
        if name != "-":
            CaptureReader(name, format=told_format).close()
    counts = TraceCounts()
    with _new_index(directory) as index:
        files = FlowDirectory(directory, format, settings.nanoseconds, _writer(index))
        encode = text_encoder(format)
        table = FlowFiles(
            write=files.write,
            ended=files.ended,
            content=TEXT if encode else PCAP_NS if settings.nanoseconds else PCAP_US,
            encode=encode,
            bidirectional=settings.bidirectional,
            idle_timeout_ns=int(settings.idle_timeout_s * NANOSECONDS),
            linger_ns=int(settings.linger_s * NANOSECONDS),
            max_flows=settings.max_flows,
            buffer_bytes=settings.buffer_bytes,
            keep_frames=settings.frames,
        )
        _trace(paths, table, counts, progress, settings.inner)
        table.finish_all()
    counts.tcp_packets = table.tcp_packets
    counts.other_packets = counts.packets - table.tcp_packets
    counts.flows = table.total_flows
    counts.evicted_flows = table.evicted_flows
    return counts


def _trace(
    paths: Sequence[str], table: FlowFiles, counts: TraceCounts, progress: Callable[[int], None], inner: bool
) -> None:
    batch = bytearray(BATCH_BYTES)
    address = ctypes.addressof(ctypes.c_char.from_buffer(batch))
    for path in paths:
        pairs = DigestPairs(counts.packets, inner=inner)
        name, told_format = file_of(path)
        with CaptureReader(name, format=told_format) as reader:
            try:
                while not (filled := reader.fill(address, BATCH_BYTES)).end:
                    _feed(table, pairs, reader, address, filled.produced_bytes)
                    progress(pairs.packets)
            except FormatError as error:
                counts.damage.append(str(error))
        counts.packets = pairs.packets


def _feed(table: FlowFiles, pairs: DigestPairs, reader: CaptureReader, address: int, length: int) -> None:
    done = 0
    more = length > 0
    while more:
        more = pairs.pair(address + done, length - done, reader.interfaces)
        table.feed(address + done, pairs.digests_address, DIGEST_BYTES, pairs.origins_address, pairs.count)
        done += pairs.consumed_bytes


def _new_index(directory: str) -> TextIO:
    path = os.path.join(directory, INDEX_NAME)
    try:
        os.makedirs(directory, exist_ok=True)
        return open(path, "x", encoding="ascii")
    except FileExistsError:
        raise CannotCreateError(
            f"{path} is there already, of an earlier trace, and is not overwritten; name another directory"
        ) from None
    except OSError as error:
        raise CannotCreateError(f"{path} cannot be created: {error.strerror}") from error


def _writer(index: TextIO) -> Callable[[dict[str, Any]], None]:
    def note(entry: dict[str, Any]) -> None:
        try:
            index.write(json.dumps(entry) + "\n")
        except OSError as error:
            raise InputOutputError(f"{index.name}: {error.strerror}") from error

    return note
