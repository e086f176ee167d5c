"""The traceflow worker: packets that the merges have put in order, each TCP flow into a file of its own.

It reads what the merges leave it in a ring for each output (appliance/merge/tap.pyx). It can fall behind, die or be
gone for good without costing a written packet: what its ring has no room for is counted there, and left out here.
Flows end by the time of the packets, and where none come, by the watermarks that the merges promise.
"""

from __future__ import annotations

import contextlib
import logging
import os
import select
import time
from dataclasses import dataclass
from pathlib import Path

from appliance.capture.pairs import DIGEST_BYTES, DigestPairs
from appliance.config import Traceflow
from appliance.merge import order
from appliance.meter.trace_files import TraceFiles, remove_leftovers
from appliance.meter.trace_publisher import settle_with_the_dead
from appliance.meter.traceflow import text_encoder
from appliance.meter.traceflow_formats import FORMATS
from appliance.meter.traceflow_table import PCAP_NS, TEXT, FlowFiles
from appliance.process import DRAIN, WorkerContext
from appliance.ring.ring import Consumer

log = logging.getLogger(__name__)

OUT_BYTES = 256 << 10
MAX_WAIT_MS = 2000  # several outputs: an idle merge promises a watermark about twice a second
START_GRACE_MS = 2000
HEARTBEAT_MS = 500
REST_MS = 10  # under traffic: one look at many batches costs less than a wake for each
NANOSECONDS = 1_000_000_000


@dataclass(frozen=True)
class TraceflowParts:
    """What the worker needs besides its context. `ring_fds`: one for each traced output."""

    settings: Traceflow
    directory: Path
    ring_fds: tuple[int, ...]
    live: bool
    generation: int
    wake_fd: int

    @property
    def descriptors(self) -> tuple[int, ...]:
        return (self.wake_fd, *self.ring_fds)


def main(context: WorkerContext) -> int:
    TraceflowWorker(context, context.parts).run()
    return 0


class TraceflowWorker:
    """See the module's text."""

    def __init__(self, context: WorkerContext, parts: TraceflowParts) -> None:
        self.context = context
        self.page = context.page
        self.parts = parts
        settings = parts.settings
        consumers = [Consumer(fd, parts.generation) for fd in parts.ring_fds]
        self.take_over([consumer.mapping.occupancy() for consumer in consumers])
        self.merge = order.Merge(
            consumers,
            [True] * len(consumers),  # also of recorded files: a tap does not wait, so none may hold another one up
            sink=order.SINK_RECORDS,
            max_wait_ms=MAX_WAIT_MS,
            out_bytes=OUT_BYTES,
            start_grace_ms=START_GRACE_MS,
        )
        self.pairs = DigestPairs(self.page["observed_packets"], inner=settings.tunnels == "inner", by_linktype=True)
        format = FORMATS[settings.format]
        self.files = TraceFiles(parts.directory, settings, format, self.page, context.beat)
        encode = text_encoder(format)
        self.table = FlowFiles(
            write=self.files.write,
            ended=self.files.ended,
            content=TEXT if encode else PCAP_NS,
            encode=encode,
            bidirectional=settings.bidirectional,
            idle_timeout_ns=settings.idle_timeout_s * NANOSECONDS,
            linger_ns=settings.linger_s * NANOSECONDS,
            max_flows=settings.max_flows,
            buffer_bytes=settings.buffer_bytes,
            flow_bytes=settings.max_flow_bytes,
        )
        self.flows_before = self.page["flows_created"]
        self.late_before = self.page["late_packets"]
        self.draining_since: float | None = None

    def take_over(self, occupancies: list[tuple[int, int]]) -> None:
        """A predecessor's flows went with it: every packet that it took and did not publish is lost, and counted."""
        page = self.page
        settle_with_the_dead(page, str(self.parts.directory / "work"))
        remove_leftovers(self.parts.directory / "work", page)
        page["observed_packets"] = sum(published - waiting for published, waiting in occupancies)
        known = ("other", "published", "unpublished", "cut", "refused", "failed", "lost_unclean")
        lost = page["observed_packets"] - sum(page[f"{name}_packets"] for name in known)
        if lost:
            log.warning("the flow traces have lost %d packets with the worker that ended; they are recorded", lost)
            page.add("lost_unclean_packets", lost)
        for name in ("held_packets", "queued_packets", "queued_flows", "active_flows", "staged_bytes"):
            page[name] = 0

    # ---- the loop ----

    def run(self) -> None:
        while self.turn():
            self.context.beat()
        self.table.finish_all()
        self.settle()
        self.files.close()

    def turn(self) -> bool:
        status = self.merge.fill()
        self.merge.release()  # before it is traced: a packet may be lost with us, but is never traced twice
        fed = self.merge.out_bytes > 0
        if fed:
            self.feed()
            self.merge.emptied()
        if status == order.EPOCH:
            log.warning("the clock was set: all traced flows end here")
            self.table.begin_anew()
            self.merge.next_epoch()
        elif status == order.CONTROL:
            self.merge.control_done()
        elif status == order.IDLE:
            return self.idle(may_rest=self.parts.live and fed and not self.merge.crowded)
        self.settle()
        return status != order.ENDED

    def feed(self) -> None:
        """A batch; compiled code does what is done for a packet."""
        address, length, packets = self.merge.output_address, self.merge.out_bytes, self.merge.out_packets
        tcp_before = self.table.tcp_packets
        done, more = 0, True
        while more:
            more = self.pairs.pair(address + done, length - done, [])
            self.table.feed(address + done, self.pairs.digests_address, DIGEST_BYTES, self.pairs.origins_address,
                            self.pairs.count)  # fmt: skip
            done += self.pairs.consumed_bytes
        self.page.add("observed_packets", packets)
        self.page.add("other_packets", packets - (self.table.tcp_packets - tcp_before))

    def settle(self) -> None:
        page, table = self.page, self.table
        page["late_packets"] = self.late_before + self.merge.late
        page["flows_created"] = self.flows_before + table.total_flows
        page["active_flows"] = table.flow_count
        page["held_packets"] = table.held_packets
        page["buffered_bytes"] = table.buffered_bytes
        page["stream_time_ns"] = self.merge.watermark
        self.files.settle()

    def idle(self, may_rest: bool) -> bool:
        """`may_rest`: there was traffic, and room for that of a rest."""
        if self.parts.live and (watermark := self.merge.watermark):
            self.table.advance(watermark)
        self.settle()
        if not self.handle_messages():
            return False
        poller = select.poll()
        poller.register(self.context.channel, select.POLLIN)
        if may_rest:
            poller.poll(REST_MS)
            return True
        poller.register(self.parts.wake_fd, select.POLLIN)
        self.merge.sleeps(True)
        if not self.merge.has_news:
            poller.poll(HEARTBEAT_MS)
        self.merge.sleeps(False)
        with contextlib.suppress(BlockingIOError):
            os.eventfd_read(self.parts.wake_fd)
        return True

    def handle_messages(self) -> bool:
        """False: drained for too long without an end; the producers are gone."""
        now = time.monotonic()
        if DRAIN in self.context.messages() and self.draining_since is None:
            self.draining_since = now
            self.context.set_state("draining")
        if self.draining_since is None:
            return True
        return now - self.draining_since < self.context.config.service.drain_timeout_s
