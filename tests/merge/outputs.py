"""One output with real files, a real compressor and rings in the test's hand: everything but the processes around."""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from merge.rings import Source

from appliance.config import Output
from appliance.counters import MERGE_FIELDS, MERGE_SOURCE_FIELDS, CounterPage, CounterPages
from appliance.formats.encode import InterfaceDescription
from appliance.merge import order
from appliance.merge.compressor import compressor_argv, compressor_suffix
from appliance.merge.ledger import Ledger
from appliance.merge.naming import ApplianceNaming, Naming, prepare_directories
from appliance.merge.publish import Publisher
from appliance.merge.recovery import Recovery
from appliance.merge.retention import Retention
from appliance.merge.rotation import END, REQUEST, TIME, RotationPolicy
from appliance.merge.segment import FileFormat, SegmentOpener
from appliance.merge.stream import OutputStream, StreamSettings
from appliance.ring.ring import Consumer

SINKS = {"pcapng": order.SINK_PCAPNG, "pcap": order.SINK_PCAP_NS, "pcap-us": order.SINK_PCAP_US}


def make_pages(labels: Sequence[str]) -> CounterPages:
    return CounterPages([("merge", MERGE_FIELDS), *((label, MERGE_SOURCE_FIELDS) for label in labels)])


class Life:
    """One life of a merge worker's inner parts. `pages`, `sources`: another life's, of the same run, to go on with."""

    def __init__(
        self,
        directory: Path,
        labels: Sequence[str] = ("a",),
        *,
        live: bool = True,
        naming: Naming | None = None,
        pages: CounterPages | None = None,
        sources: Sequence[Source] | None = None,
        recover: bool = False,
        retention: Retention | None = None,
        beats: list[int] | None = None,
        **settings: Any,
    ) -> None:
        self.directory = directory
        self.labels = list(labels)
        self.output = output = Output(
            directory=str(directory), **({"compressor": "none", "rotate_seconds": 0, "rotate_bytes": 0} | settings)
        )
        ending = (".pcapng" if output.format == "pcapng" else ".pcap") + compressor_suffix(output.compressor)
        self.naming = naming or ApplianceNaming(directory, output.name, ending)
        prepare_directories(self.naming)
        is_successor = pages is not None
        self.pages = pages or make_pages(labels)
        self.page = self.pages["merge"]
        self.source_pages = [self.pages[label] for label in labels]
        self.sources = list(sources or (Source(1 << 20) for _ in labels))
        consumers = [Consumer(source.fd, 11) for source in self.sources]
        self.merge = order.Merge(
            consumers, [live] * len(labels), sink=SINKS[output.format], max_wait_ms=3_600_000, out_bytes=1 << 16
        )
        ledger = Ledger(self.page, self.labels, self.source_pages)
        self.recovery = Recovery(
            self.naming,
            output,
            self.page,
            self.labels,
            self.source_pages,
            ledger,
            [consumer.mapping.occupancy() for consumer in consumers],
            is_successor,
        )
        for i, page in enumerate(self.source_pages):
            self.merge.resume(i, page["consumed_packets"], page["dropped_merge_packets"], page["late_packets"])
        mode = 0o640 if output.group_readable else 0o600
        self.publisher = Publisher(
            self.naming,
            output.name,
            self.page,
            mode,
            output.compressor_timeout_s,
            ledger,
            retention,
            self.recovery.run if recover or is_successor else None,
        )
        rotates = bool(output.rotate_seconds or output.rotate_bytes or output.rotate_packets)
        beats = [] if beats is None else beats
        self.stream = OutputStream(
            self.merge,
            StreamSettings(
                FileFormat(output.format == "pcapng", output.format == "pcap"),
                RotationPolicy(output.rotate_seconds, output.rotate_bytes, output.rotate_packets),
                live=live,
                skip_empty=output.empty_segments == "skip",
            ),
            SegmentOpener(
                self.naming, compressor_argv(output.compressor), output.compressor_timeout_s, mode, ahead=rotates
            ),
            self.publisher,
            self.page,
            self.labels,
            self.source_pages,
            lambda: beats.append(1),
            lambda: True,
            self.recovery.unsettled,
            is_successor,
        )
        for i, label in enumerate(labels):
            self.stream.add_interface(i, InterfaceDescription(1, name=label))

    # ---- as the worker's loop does ----

    def turn(self, *, start_ns: int | None = None) -> int:
        """Moves everything that may go; rotates where the merge says so. Returns the last status."""
        while True:
            status = self.merge.fill()
            self.merge.release()
            if self.merge.out_bytes:
                self.stream.write()
            if status in (order.BOUNDARY, order.LIMIT):
                if self.stream.segment is None:
                    if not self.stream.open(self.merge.next_ns if start_ns is None else start_ns):
                        return status
                else:
                    limit = self.stream._settings.rotation.limit_reason(self.merge.packets_left)
                    self.stream.rotate(TIME if status == order.BOUNDARY else limit)
            elif status != order.FULL:
                return status

    def rotate(self) -> None:
        self.stream.rotate(REQUEST)

    def finish(self, reason: str = END) -> None:
        self.stream.finish(reason)
        if self.recovery.is_done:
            self.recovery.settle()

    def die(self) -> None:
        """As SIGKILL does it: whatever was handed over before is done, nothing else; locks and pipes go."""
        self.publisher.finish(lambda: None)
        opener = self.stream._opener
        for sink in [self.stream.segment and self.stream.segment.sink, opener._spare and opener._spare[2]]:
            if sink is not None and (fd := getattr(sink, "_fd", -1)) >= 0:
                os.close(fd)
                sink._fd = -1
            elif sink is not None:
                sink.close_input()
                sink._child.wait(10)
        self.stream.segment = None

    def close(self) -> None:
        for source in self.sources:
            source.close()

    # ---- what is there ----

    def files(self, part: str = "ready") -> list[Path]:
        return sorted(path for path in (self.directory / part).iterdir() if path.suffix != ".json")

    def sidecar(self, path: Path) -> dict[str, Any]:
        loaded: dict[str, Any] = json.loads((self.directory / "meta" / f"{path.name}.json").read_text())
        return loaded

    def sidecars(self) -> list[dict[str, Any]]:
        return [self.sidecar(path) for path in self.files()]

    def staged(self) -> list[str]:
        return sorted(os.listdir(self.directory / "work"))


def balance_of(page: CounterPage, published: int) -> int:
    """Packets that nobody can account for: 0."""
    return (
        published
        - page["written_packets"]
        - page["held_packets"]
        - sum(page[f"{name}_packets"] for name in ("dropped_merge", "dropped_writer", "lost_unclean"))
    )


def statistics(data: bytes) -> list[tuple[int, dict[int, int]]]:
    """(interface, {option: number}) of each Interface Statistics Block; draft-ietf-opsawg-pcapng, section 4.6."""
    found = []
    offset = 0
    while offset < len(data):
        kind, length = struct.unpack_from("=II", data, offset)
        if kind == 5:
            (interface,) = struct.unpack_from("=I", data, offset + 8)
            at, end = offset + 20, offset + length - 4
            numbers: dict[int, int] = {}
            while at + 4 <= end:
                code, size = struct.unpack_from("=HH", data, at)
                if code == 0:
                    break
                words = struct.unpack_from("=II", data, at + 4)
                is_time = code in (2, 3)
                numbers[code] = words[0] << 32 | words[1] if is_time else words[1] << 32 | words[0]
                at += 4 + size + (-size % 4)
            found.append((interface, numbers))
        offset += length
    return found


Make = Callable[..., Life]  # what the fixture `make` gives: the arguments of Life behind its directory
