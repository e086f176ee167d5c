"""Metering of capture files, without a service: the files' packets in the order of time, into one IPFIX file.

    each file -> DigestFile [-> digest ring -> Merge (by time)] -> batches of digests -> Metering -> IPFIX

One file needs no merge. A thread makes the next batches while the last one is metered: both work without the GIL.
"""

from __future__ import annotations

import ctypes
import os
import threading
import time
from collections.abc import Callable, Generator, Sequence
from contextlib import closing
from dataclasses import dataclass, field, replace
from queue import SimpleQueue

from appliance.capture.application import Inspector
from appliance.capture.digestfile import DigestFile
from appliance.counters import EXPORT_FIELDS, IGNORED_REASONS, METER_FIELDS, CounterPages
from appliance.errors import FormatError, UsageError
from appliance.merge import order
from appliance.meter.metering import Metering
from appliance.meter.settings import ExportSettings, InterfaceName, MeterSettings
from appliance.ring.memory import allocate
from appliance.ring.ring import Consumer, Producer, initialise

DIGEST_RING_BYTES = 1 << 20
BATCH_BYTES = 256 << 10  # of digests: stays in the cache between the two threads
BATCHES = 4
MAX_FILES = 256  # all are open at once, with their rings


@dataclass
class FlowCounts:
    """What became of the packets: read = metered + ignored (by reason). `damage` names damaged files."""

    packets: int = 0
    metered_packets: int = 0
    metered_octets: int = 0
    ignored: dict[str, int] = field(default_factory=dict)
    ignored_octets: int = 0  # of frames, as they were on the wire
    late_packets: int = 0
    flows: int = 0
    damage: list[str] = field(default_factory=list)


def meter_files(
    paths: Sequence[str],
    destination: str,
    settings: MeterSettings,
    progress: Callable[[int], None] = lambda packets: None,
    export: ExportSettings | None = None,
) -> FlowCounts:
    """Meters `paths` together, in the order of time, into the new file `destination`, whose format and records
    `export` describes (None: IPFIX, with everything).

    `settings.export` is replaced. `progress` is told the packets read so far. A damaged file counts with its whole
    packets, and is named in `damage`. Raises MissingInputError and the like for a file that cannot be opened,
    CannotCreateError when the destination cannot be made: then nothing is left behind.
    """
    if not 0 < len(paths) <= MAX_FILES:
        raise UsageError(f"{len(paths)} files; between 1 and {MAX_FILES} are metered together")
    inputs: list[_Input] = []
    try:
        inputs += (_Input(path, i, settings) for i, path in enumerate(paths))
        names = tuple(InterfaceName(i, os.path.basename(path), path) for i, path in enumerate(paths))
        uri = f"file:{os.path.abspath(destination)}"
        exporting = (replace(export or ExportSettings("file:"), uri=uri, single_file=True, statistics_interval_s=0),)
        return _meter(inputs, replace(settings, interfaces=names, export=exporting), progress)
    finally:
        for one in inputs:
            one.close()


def _meter(inputs: Sequence[_Input], settings: MeterSettings, progress: Callable[[int], None]) -> FlowCounts:
    pages = CounterPages([("meter", METER_FIELDS), ("export", EXPORT_FIELDS)])
    page = pages["meter"]
    metering = Metering(
        settings,
        page,
        [pages["export"]],
        ignored=lambda: (sum(one.ignored_packets for one in inputs), sum(one.ignored_octets for one in inputs)),
    )
    fill = inputs[0].fill if len(inputs) == 1 else _Merged(inputs).fill
    with closing(_ahead(fill)) as batches:
        for batch in batches:
            metering.feed(batch.address, batch.length)
            metering.service(time.monotonic())
            progress(page["observed_packets"])
    metering.finish()
    ignored = [sum(counts) for counts in zip(*(one.ignored for one in inputs), strict=True)]
    return FlowCounts(
        packets=sum(one.packets for one in inputs),
        metered_packets=page["metered_packets"],
        metered_octets=page["metered_octets"],
        ignored=dict(zip(IGNORED_REASONS, ignored, strict=False)),
        ignored_octets=ignored[-1],
        late_packets=page["late_packets"],
        flows=pages["export"]["flow_records"],
        damage=[one.damage for one in inputs if one.damage],
    )


class _Batch:
    """Memory for digests, aligned as a ring's records are. `length` octets of it are full."""

    def __init__(self) -> None:
        self._memory = (ctypes.c_uint64 * (BATCH_BYTES // 8))()
        self.address = ctypes.addressof(self._memory)
        self.length = 0


def _ahead(fill: Callable[[int, int], int]) -> Generator[_Batch, None, None]:
    """The batches that `fill(address, room)` makes on a thread of its own, until one is empty. Each is valid until the
    next one is asked for. What `fill` raises, this raises."""
    free: SimpleQueue[_Batch | None] = SimpleQueue()  # None: nobody wants more
    full: SimpleQueue[_Batch | BaseException | None] = SimpleQueue()  # None: there is no more

    def work() -> None:
        try:
            while (batch := free.get()) and (length := fill(batch.address, BATCH_BYTES)):
                batch.length = length
                full.put(batch)
            full.put(None)
        except BaseException as error:
            full.put(error)

    for _ in range(BATCHES):
        free.put(_Batch())
    # A daemon: an interrupt must not wait for a pipe that gives nothing.
    threading.Thread(target=work, name="digests", daemon=True).start()
    try:
        while (batch := full.get()) is not None:
            if isinstance(batch, BaseException):
                raise batch
            yield batch
            free.put(batch)
    finally:
        free.put(None)


class _Input:
    """One capture file as digests."""

    def __init__(self, path: str, number: int, settings: MeterSettings) -> None:
        self.path = path
        self.damage = ""
        inspector = None
        if settings.applications or settings.entropy:
            inspector = Inspector(applications=settings.applications, entropy=settings.entropy)
        self._file = DigestFile(path, number, inner=settings.tunnels == "inner", inspector=inspector)

    @property
    def packets(self) -> int:
        return self._file.read_packets

    @property
    def ignored(self) -> list[int]:
        """By IGNORED_FIELDS."""
        return self._file.ignored

    @property
    def ignored_packets(self) -> int:
        return sum(self.ignored) - self.ignored_octets

    @property
    def ignored_octets(self) -> int:
        return self.ignored[-1]

    def fill(self, address: int, room: int) -> int:
        """Digests for at most `room` octets at `address`; 0: the file is over, whole or damaged."""
        if self.damage:
            return 0
        try:
            return self._file.fill(address, room)
        except FormatError as error:
            self.damage = str(error)
            return 0

    def close(self) -> None:
        self._file.close()


class _Merged:
    """Several files' digests in the order of time, each through a ring of its own."""

    def __init__(self, inputs: Sequence[_Input]) -> None:
        self._sources = [(one, *_ring(one.path)) for one in inputs]
        self._merge = order.Merge(
            [consumer for _, _, consumer in self._sources],
            [False] * len(inputs),
            sink=order.SINK_DIGESTS,
            max_wait_ms=1,
            out_bytes=BATCH_BYTES // 2,
        )

    def fill(self, address: int, room: int) -> int:
        """As DigestFile.fill, over all files."""
        merge = self._merge
        status = order.IDLE
        while status != order.ENDED:
            status = merge.fill()
            if status == order.IDLE:
                self._refill()
            if length := merge.out_bytes:
                if length > room:
                    raise ValueError(f"{length} octets of digests, and room for {room}")
                ctypes.memmove(address, merge.output_address, length)
                merge.emptied()
                merge.release()
                return length
        return 0

    def _refill(self) -> None:
        """Into every ring that has room for half of it: a file that others wait for has."""
        for one, producer, _ in self._sources:
            room = producer.free_bytes
            if room >= DIGEST_RING_BYTES // 2:
                length = one.fill(producer.reserve(room), room)
                producer.advance(length)
                producer.publish(0)
                if not length:
                    producer.end()


def _ring(name: str) -> tuple[Producer, Consumer]:
    generation = int.from_bytes(os.urandom(7))
    fd = allocate(DIGEST_RING_BYTES, os.path.basename(name))
    try:
        initialise(fd, DIGEST_RING_BYTES, generation)
        return Producer(fd, generation), Consumer(fd, generation)
    finally:
        os.close(fd)
