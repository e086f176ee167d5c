"""Metering of capture files, without a service: the files' packets in the order of time, into one IPFIX file.

    each file -> FileCapture -> digest ring -> Merge (by time) -> Metering -> IPFIX

The parts are those of the live path, in one process; packets themselves are only looked at, never copied on.
"""

from __future__ import annotations

import os
import secrets
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from appliance.capture.filesource import FileCapture
from appliance.config import Interface
from appliance.counters import CAPTURE_FIELDS, EXPORT_FIELDS, IGNORED_REASONS, METER_FIELDS, CounterPages
from appliance.errors import FormatError, UsageError
from appliance.merge import order
from appliance.meter.metering import Metering
from appliance.meter.settings import ExportSettings, MeterSettings
from appliance.ring.memory import allocate
from appliance.ring.ring import Consumer, Producer, initialise

PACKET_RING_BYTES = 2 << 20  # the longest record and a batch
DIGEST_RING_BYTES = 1 << 20
OUT_BYTES = 256 << 10
MAX_FILES = 256  # all are open at once, with their rings


@dataclass
class FlowCounts:
    """What became of the packets: read = metered + ignored (by reason). `damage` names damaged files."""

    packets: int = 0
    metered_packets: int = 0
    metered_octets: int = 0
    ignored: dict[str, int] = field(default_factory=dict)
    late_packets: int = 0
    flows: int = 0
    damage: list[str] = field(default_factory=list)


def meter_files(
    paths: Sequence[str],
    destination: str,
    settings: MeterSettings,
    progress: Callable[[int], None] = lambda packets: None,
) -> FlowCounts:
    """Meters `paths` together, in the order of time, into the new IPFIX file `destination`.

    `settings.export` is replaced. `progress` is told the packets read so far. A damaged file counts with its whole
    packets, and is named in `damage`. Raises MissingInputError and the like for a file that cannot be opened,
    CannotCreateError when the destination cannot be made: then nothing is left behind.
    """
    if not 0 < len(paths) <= MAX_FILES:
        raise UsageError(f"{len(paths)} files; between 1 and {MAX_FILES} are metered together")
    pages = CounterPages(
        [(f"file/{i}", CAPTURE_FIELDS) for i in range(len(paths))]
        + [("meter", METER_FIELDS), ("export", EXPORT_FIELDS)]
    )
    inputs: list[_Input] = []
    try:
        inputs += (_Input(path, pages, i) for i, path in enumerate(paths))
        return _meter(inputs, pages, destination, settings, progress)
    finally:
        for one in inputs:
            one.close()


def _meter(
    inputs: Sequence[_Input],
    pages: CounterPages,
    destination: str,
    settings: MeterSettings,
    progress: Callable[[int], None],
) -> FlowCounts:
    merge = order.Merge(
        [one.digest_consumer for one in inputs],
        [False] * len(inputs),
        sink=order.SINK_DIGESTS,
        max_wait_ms=1,
        out_bytes=OUT_BYTES,
    )
    metering = Metering(
        with_export(settings, destination),
        pages["meter"],
        [pages["export"]],
        ignored_packets=lambda: sum(sum(one.ignored().values()) for one in inputs),
    )
    while (status := merge.fill()) != order.ENDED or merge.out_bytes:
        if merge.out_bytes:
            metering.feed(merge.output_address, merge.out_bytes)
            merge.emptied()
        merge.release()
        if status == order.CONTROL:
            merge.control_done()
        elif status == order.IDLE:
            for one in inputs:
                one.step()
            progress(sum(one.packets for one in inputs))
        metering.service(time.monotonic())
    metering.finish()
    page = pages["meter"]
    return FlowCounts(
        packets=sum(one.packets for one in inputs),
        metered_packets=page["metered_packets"],
        metered_octets=page["metered_octets"],
        ignored={reason: sum(one.ignored()[reason] for one in inputs) for reason in IGNORED_REASONS},
        late_packets=merge.late,
        flows=pages["export"]["flow_records"],
        damage=[one.damage for one in inputs if one.damage],
    )


def with_export(settings: MeterSettings, destination: str) -> MeterSettings:
    export = ExportSettings(f"file:{os.path.abspath(destination)}", single_file=True, statistics_interval_s=0)
    return MeterSettings(
        idle_timeout_s=settings.idle_timeout_s,
        active_timeout_s=settings.active_timeout_s,
        tcp_linger_s=settings.tcp_linger_s,
        max_flows=settings.max_flows,
        vlan_in_key=settings.vlan_in_key,
        interface_in_key=settings.interface_in_key,
        export=(export,),
    )


class _Input:
    """One capture file and the ring of its digests."""

    def __init__(self, path: str, pages: CounterPages, index: int) -> None:
        self._page = pages[f"file/{index}"]
        self._descriptors: list[int] = []
        self.damage = ""
        self._ended = False
        try:
            packet_fd, generation = self._ring(PACKET_RING_BYTES, path)
            digest_fd, digest_generation = self._ring(DIGEST_RING_BYTES, path)
            self._packets = Producer(packet_fd, generation)
            self._packet_consumer = Consumer(packet_fd, generation)
            self._digests = Producer(digest_fd, digest_generation)
            self.digest_consumer = Consumer(digest_fd, digest_generation)
            # The file's first bytes decide what it is, whatever the scheme says.
            self._capture = FileCapture(Interface(uri=f"pcapfile:{path}"), self._packets, self._digests, self._page)
        except BaseException:
            self._close_descriptors()
            raise

    def _ring(self, capacity: int, path: str) -> tuple[int, int]:
        fd, generation = allocate(capacity, os.path.basename(path)), secrets.randbits(63)
        self._descriptors.append(fd)
        initialise(fd, capacity, generation)
        return fd, generation

    @property
    def packets(self) -> int:
        return self._page["read_packets"]

    def ignored(self) -> dict[str, int]:
        return {reason: self._page[f"ignored_{reason}_packets"] for reason in IGNORED_REASONS}

    def step(self) -> None:
        """One batch further, if there is room for its digests."""
        if self._ended:
            return
        try:
            self._capture.step()
        except FormatError as error:
            self.damage = str(error)
            self._end()
            return
        self._packet_consumer.refresh()
        self._packet_consumer.skip_to_head()
        if self._capture.ended:
            self._end()

    def _end(self) -> None:
        self._ended = True
        self._digests.end()

    def close(self) -> None:
        self._capture.close()
        self._close_descriptors()

    def _close_descriptors(self) -> None:
        for fd in self._descriptors:
            os.close(fd)
        self._descriptors.clear()
