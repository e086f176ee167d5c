"""The merge worker: the rings of one output's sources into one ordered stream of published files.

    look at the rings -> move what may go into the buffer -> give the rings back -> write -> rotate -> sleep

It is woken by the producers, and wakes an idle one only while it holds packets of others (a fresh watermark lets them
go) or when a file's time is over.
"""

from __future__ import annotations

import json
import logging
import os
import time
from dataclasses import dataclass
from typing import Any

from appliance.config import Output
from appliance.errors import EXIT_IO, ApplianceError, FormatError, InputOutputError
from appliance.formats.encode import InterfaceDescription
from appliance.merge import order
from appliance.merge.compressor import takes_by_reading
from appliance.merge.events import Announcer, Hook, Manifest
from appliance.merge.ledger import Ledger
from appliance.merge.naming import Naming
from appliance.merge.publish import Publisher
from appliance.merge.pump import Pump
from appliance.merge.recovery import Recovery
from appliance.merge.retention import Limits, Retention, published_name
from appliance.merge.rotation import CLOCK_STEP, END, REQUEST, TIME, WRITE_ERROR, RotationPolicy
from appliance.merge.segment import FileFormat, SegmentOpener
from appliance.merge.stream import OutputStream, StreamSettings
from appliance.merge.tap import Tap
from appliance.process import DRAIN, RELOAD, ROTATE, WorkerContext
from appliance.ring.ring import Consumer

log = logging.getLogger(__name__)

OUT_BYTES = 512 << 10  # larger writes leave the cache, smaller ones cost system calls
PIPED_OUT_BYTES = 128 << 10  # a compressor takes about as much at once; what it has not taken yet stays in the cache
DIRECT_OUT_BYTES = 2 << 20  # where the disk takes them, only the number of writes matters
SERVE_MS = 1000  # Python looks after the compiled loop at least this often
START_GRACE_MS = 2000  # packets wait so long for a capture worker that is only starting
HELD_BACK_MS = 100
DRAIN_QUIET_S = 1.0  # while draining: a ring that brings nothing for so long, and does not end, has lost its producer

SINKS = {"pcapng": order.SINK_PCAPNG, "pcap": order.SINK_PCAP_NS, "pcap-us": order.SINK_PCAP_US, "erf": order.SINK_ERF}


@dataclass(frozen=True)
class MergeSource:
    """One ring to read. `interfaces`: known for live sources; files announce theirs in the ring."""

    label: str
    page: str
    live: bool
    ring_fd: int
    wake_fd: int  # the producer's eventfd
    interfaces: tuple[InterfaceDescription, ...]
    traced: bool = False  # its packets go into flow traces too


@dataclass(frozen=True)
class MergeParts:
    """What the merge worker needs besides its context."""

    output: Output
    sources: tuple[MergeSource, ...]
    generation: int
    wake_fd: int  # our own eventfd
    naming: Naming
    compressor: tuple[str, ...] | None
    is_successor: bool
    hook: tuple[str, ...] = ()  # its argv, or nothing
    count_captured_bytes: bool = False
    watch_file: str = ""
    strict: bool = False  # an output that failed is an exit status
    resolution_of_inputs: bool = False  # pcap: microseconds unless an input has nanoseconds
    tap_fd: int = -1  # a ring to the flow traces
    tap_wake_fd: int = -1
    turn_ms: int = 0  # the capture workers turn together, at multiples of this; 0: they do not

    @property
    def descriptors(self) -> tuple[int, ...]:
        taps = (fd for fd in (self.tap_fd, self.tap_wake_fd) if fd >= 0)
        return (self.wake_fd, *taps, *(fd for source in self.sources for fd in (source.ring_fd, source.wake_fd)))


def main(context: WorkerContext) -> int:
    return MergeWorker(context, context.parts).run()


class MergeWorker:
    """See the module's text."""

    def __init__(self, context: WorkerContext, parts: MergeParts) -> None:
        self.context = context
        self.parts = parts
        if parts.is_successor and parts.naming.stream is not None:
            raise InputOutputError(
                f"{parts.naming.stream}: the process that wrote it died, maybe in the middle of a packet; what would "
                "follow could not be read"
            )
        self.draining_since: float | None = None
        self.last_news = time.monotonic()
        self.live = all(source.live for source in parts.sources)
        self.labels = [source.label for source in parts.sources]
        self.source_pages = [context.pages[source.page] for source in parts.sources]
        self.output = output = parts.output
        mode = 0o640 if output.group_readable else 0o600
        self.policy = RotationPolicy(output.rotate_seconds, output.rotate_bytes, output.rotate_packets)
        self.consumers = [Consumer(source.ring_fd, parts.generation, source.wake_fd) for source in parts.sources]
        self.merge = order.Merge(
            self.consumers,
            [source.live for source in parts.sources],
            sink=SINKS["pcap-us" if parts.resolution_of_inputs else output.format],
            max_wait_ms=output.max_wait_ms,
            out_bytes=self.batch_bytes,
            start_grace_ms=START_GRACE_MS,
            lends=parts.compressor is not None and takes_by_reading(parts.compressor),
        )
        self.tap = self.make_tap()
        ledger = Ledger(context.page, self.labels, self.source_pages)
        self.hook = Hook(parts.hook, output.hook_timeout_s, lambda: context.page.add("hook_failures"))
        self.announcer = self.make_announcer(mode)
        self.retention = self.make_retention()
        self.recovery = Recovery(
            parts.naming,
            output,
            context.page,
            self.labels,
            self.source_pages,
            ledger,
            [consumer.mapping.occupancy() for consumer in self.consumers],
            parts.is_successor,
            started_ns(context),
            self.announcer,
        )
        for i, page in enumerate(self.source_pages):
            self.merge.resume(i, page["consumed_packets"], page["dropped_merge_packets"], page["late_packets"])
        self.publisher = Publisher(
            parts.naming,
            output.name,
            context.page,
            mode,
            output.compressor_timeout_s,
            ledger,
            self.retention,
            self.recovery.run,
            self.announcer,
        )
        self.stream = OutputStream(
            self.merge,
            StreamSettings(
                FileFormat(
                    is_pcapng=output.format == "pcapng",
                    nanoseconds=output.format == "pcap" and not parts.resolution_of_inputs,
                    is_erf=output.format == "erf",
                ),
                self.policy,
                live=self.live,
                skip_empty=output.empty_segments == "skip",
                count_captured_bytes=parts.count_captured_bytes,
            ),
            SegmentOpener(parts.naming, parts.compressor, output.compressor_timeout_s, mode, ahead=self.rotates),
            self.publisher,
            context.page,
            self.labels,
            self.source_pages,
            context.beat,
            self.may_open,
            self.recovery.unsettled,
            parts.is_successor,
            [source.traced for source in parts.sources],
        )
        self.pump = Pump(
            self.merge,
            self.stream.books,
            live=self.live,
            wake_fd=parts.wake_fd,
            channel_fd=context.channel.fileno(),
            max_wait_ms=output.max_wait_ms,
            turn_ms=parts.turn_ms,
        )
        self.is_recovering = True

    def make_tap(self) -> Tap | None:
        if self.parts.tap_fd < 0:
            return None
        tap = Tap(self.parts.tap_fd, self.parts.generation, self.parts.tap_wake_fd, self.context.page)
        self.merge.use_tap(tap)
        return tap

    def make_retention(self) -> Retention | None:
        """Only for files that have sidecars: others are the user's own, under names of the user's own."""
        if self.parts.naming.sidecar_path(0, 0) is None:
            return None
        return Retention(Limits.of(self.output, self.live), self.parts.naming, self.output.name, self.context.page)

    def make_announcer(self, mode: int) -> Announcer:
        """Like the retention, the manifest knows files by their sidecars."""
        sidecar = self.parts.naming.sidecar_path(0, 0)
        manifest = None if sidecar is None else Manifest(os.path.dirname(sidecar), mode)
        ready = os.path.dirname(self.parts.naming.final_path(0, 0)) if manifest is not None else ""
        return Announcer(
            manifest,
            self.hook,
            close_write=self.output.close_write,
            mend=lambda manifest: manifest.complete(ready, published_name(self.output.name)),
        )

    @property
    def rotates(self) -> bool:
        output = self.output
        return bool(output.rotate_seconds or output.rotate_bytes or output.rotate_packets)

    # ---- the loop ----

    def run(self) -> int:
        try:
            self.begin()
            while self.turn():
                self.context.beat()
            if self.stream.segment is None and not self.stream.has_opened:
                self.open(time.time_ns())  # a run without a single packet still leaves a valid file
        except ApplianceError:
            self.finish(WRITE_ERROR)  # what is whole is published all the same
            raise
        self.finish(END)
        failed = self.stream.failed or self.publisher.failed
        return EXIT_IO if failed and (self.parts.strict or not self.live) else 0

    def begin(self) -> None:
        for i, source in enumerate(self.parts.sources):
            for interface in source.interfaces:
                self.stream.add_interface(i, interface)
        if self.live and self.may_open():
            self.open(time.time_ns())

    def finish(self, reason: str) -> None:
        if self.tap is not None:
            self.tap.end()  # first: the files may take a while
        self.stream.finish(reason)
        self.stream.books.note_consumed()

    def turn(self) -> bool:
        """One step; False at the end of the stream."""
        fd = -1 if self.is_recovering or self.draining_since is not None else self.stream.plain_fd
        status = self.pump.fill() if fd < 0 else self.serve(fd)
        self.stream.absorb()
        has_batch = self.merge.out_bytes > 0
        if has_batch:
            self.last_news = time.monotonic()
            self.stream.write(self.pump.done)
        if self.recovery.is_done:
            self.recovery.settle()
            self.is_recovering = False
        self.stream.take_back()
        if status != order.IDLE:
            self.act(status)
        elif fd < 0 or self.stream.segment is None:
            self.rest(has_batch)
        self.handle_messages()
        return status != order.ENDED

    def serve(self, fd: int) -> int:
        was_refused = self.pump.direct_refused
        status = self.pump.serve(fd, SERVE_MS, direct=self.may_write_directly)
        if self.pump.direct_refused and not was_refused:
            self.merge.shorten_batches(OUT_BYTES)
            log.info("%s: its file system has no direct I/O; the page cache is used", self.output.directory)
        return status

    @property
    def may_write_directly(self) -> bool:
        """Only live packets, at the rate of their arrival: who merges files is faster with the page cache."""
        is_plain_file = self.parts.compressor is None and self.parts.naming.stream is None
        return self.live and self.output.direct_io and is_plain_file

    @property
    def batch_bytes(self) -> int:
        if self.may_write_directly:
            return DIRECT_OUT_BYTES
        return OUT_BYTES if self.parts.compressor is None else PIPED_OUT_BYTES

    def act(self, status: int) -> None:
        if status in (order.BOUNDARY, order.LIMIT):
            self.end_segment(status)
        elif status == order.CONTROL:
            self.announce()
        elif status == order.EPOCH:
            self.step_clock()

    def rest(self, has_written: bool) -> None:
        if has_written and self.live and self.draining_since is None:
            self.pump.gather()
            return
        if self.live and self.stream.segment is None and self.may_open():
            self.open(time.time_ns())
        self.pump.idle()

    def announce(self) -> None:
        """A file source names an interface, before its first packet."""
        source = self.merge.control_source
        try:
            self.stream.add_interface(source, InterfaceDescription.parse(self.merge.control_record()))
        except FormatError as error:
            log.error(
                "%s: an interface's description is damaged, its packets are dropped: %s", self.labels[source], error
            )
            self.stream.skip_interface(source)
        self.merge.control_done()

    def end_segment(self, status: int) -> None:
        if self.stream.segment is not None:
            self.stream.rotate(TIME if status == order.BOUNDARY else self.policy.limit_reason(self.merge.packets_left))
        if self.stream.segment is None and not (self.may_open() and self.open(self.merge.next_ns or time.time_ns())):
            if self.draining_since is not None:
                self.stream.drop_what_waits()
            else:
                self.pump.sleep(HELD_BACK_MS)

    def open(self, start_ns: int) -> bool:
        """The first segment, or one that was held back, or that could not be had."""
        if self.parts.resolution_of_inputs and not self.stream.has_opened and self.stream.needs_nanoseconds:
            # Recorded files: nanoseconds as soon as one input has them, microseconds as long as none has.
            self.merge.sink = order.SINK_PCAP_NS
            self.stream.use_format(FileFormat(is_pcapng=False, nanoseconds=True))
        return self.stream.open(start_ns)

    def may_open(self) -> bool:
        """A watch file that is missing holds the next segment back: the rings fill, and count what they drop."""
        watch_file = self.parts.watch_file
        return not watch_file or self.draining_since is not None or os.path.exists(watch_file)

    def step_clock(self) -> None:
        """The clock was set: the files of the old time end here."""
        self.context.page.add("clock_steps")
        log.warning("the clock was set; a new file begins")
        if self.stream.segment is not None:
            self.stream.close(CLOCK_STEP)
        self.merge.next_epoch()

    def reload(self, changes: dict[str, Any]) -> None:
        """New settings from the configuration (reload.settings_text); those of files count from the next one on."""
        output = self.output = self.output.model_copy(update=changes["output"])
        self.hook.use(changes["hook"], output.hook_timeout_s)
        self.announcer.close_write = output.close_write
        if self.retention is not None:
            self.retention.use(Limits.of(output, self.live))
        self.policy = RotationPolicy(output.rotate_seconds, output.rotate_bytes, output.rotate_packets)
        self.stream.use_rotation(self.policy, skip_empty=output.empty_segments == "skip")
        self.merge.set_max_wait(output.max_wait_ms)
        self.pump.max_wait_ms = output.max_wait_ms
        self.pump.turn_ms = changes["turn_ms"]
        for i, label in enumerate(self.labels):
            if label in changes["filters"]:
                self.stream.describe_filter(i, changes["filters"][label])
        if changes["filters"] and output.format == "pcapng" and self.stream.segment is not None:
            self.stream.rotate(REQUEST)  # a file says which filter its packets passed
        log.info("output %s: new settings are in force", output.name)

    def handle_messages(self) -> None:
        for message in self.context.messages():
            if message == DRAIN and self.draining_since is None:
                self.draining_since = self.last_news = time.monotonic()
                self.context.set_state("draining")
                self.pump.hang_up()
            elif message == ROTATE and self.stream.segment is not None:
                self.stream.rotate(REQUEST)
            elif message.startswith(RELOAD):
                self.reload(json.loads(message.removeprefix(RELOAD)))
        if self.draining_since is not None and self.has_lost_its_producers():
            self.merge.finish()

    def has_lost_its_producers(self) -> bool:
        """The end of the rings ends the loop; this is for producers that died or hang, and cannot end theirs."""
        assert self.draining_since is not None
        now = time.monotonic()
        return (
            now - self.last_news > DRAIN_QUIET_S
            or now - self.draining_since > self.context.config.service.drain_timeout_s
        )


def started_ns(context: WorkerContext) -> int:
    """CLOCK_REALTIME of the run's start."""
    return time.time_ns() - time.monotonic_ns() + context.pages["supervisor"]["started_ns"]
