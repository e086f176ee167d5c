"""The meter worker: the digest rings of all sources, in the order of time, into the flow table and out as IPFIX.

It can fall behind, die or be restarted without costing a written packet. Flows expire by the merged stream's time
alone: the time of the packets, and where none come, the watermarks that idle live sources give when they are asked.
"""

from __future__ import annotations

import contextlib
import math
import os
import select
import time
from dataclasses import dataclass

from appliance.counters import IGNORED_REASONS
from appliance.merge import order
from appliance.meter.metering import CLOSE_S, Metering
from appliance.meter.settings import MeterSettings
from appliance.process import DRAIN, RELOAD, RENEW, WorkerContext
from appliance.ring.ring import Consumer

OUT_BYTES = 512 << 10  # 4,096 digests: more leave the cache, fewer cost turns
BATCHES_PER_TURN = 8  # then the exporters, the counters and the supervisor's words have their turn
HEARTBEAT_MS = 500
START_GRACE_MS = 2000  # packets wait so long for a capture worker that is only starting
# Under traffic: one look at many batches costs less than a wake for each, and no flow is in a hurry. Each look
# takes the capture workers' memory out of the cache.
REST_MS = 50
STREAM_TIME_EVERY_S = 1.0  # how often idle sources are asked, so that flows expire


@dataclass(frozen=True)
class MeterSource:
    """One digest ring. `page`: of the capture worker that fills it."""

    label: str
    page: str
    live: bool
    ring_fd: int
    wake_fd: int


@dataclass(frozen=True)
class MeterParts:
    """What the meter worker needs besides its context."""

    sources: tuple[MeterSource, ...]
    generation: int
    wake_fd: int
    settings: MeterSettings
    max_wait_ms: int
    export_pages: tuple[str, ...] = ()  # one for each of settings.export

    @property
    def descriptors(self) -> tuple[int, ...]:
        return (self.wake_fd, *(fd for source in self.sources for fd in (source.ring_fd, source.wake_fd)))


def main(context: WorkerContext) -> int:
    MeterWorker(context, context.parts).run()
    return 0


class MeterWorker:
    """See the module's text."""

    def __init__(self, context: WorkerContext, parts: MeterParts) -> None:
        self.context = context
        self.parts = parts
        self.max_wait_ms = parts.max_wait_ms
        self.live = all(source.live for source in parts.sources)
        consumers = [Consumer(source.ring_fd, parts.generation, source.wake_fd) for source in parts.sources]
        occupancies = [consumer.mapping.occupancy() for consumer in consumers]
        self.merge = order.Merge(
            consumers,
            [source.live for source in parts.sources],
            sink=order.SINK_DIGESTS,
            max_wait_ms=self.max_wait_ms,
            out_bytes=OUT_BYTES,
            start_grace_ms=START_GRACE_MS,
        )
        capture_pages = [context.pages[source.page] for source in parts.sources]
        ignored = [f"ignored_{reason}_packets" for reason in IGNORED_REASONS]
        self.metering = Metering(
            parts.settings,
            context.page,
            [context.pages[name] for name in parts.export_pages],
            taken_digests=sum(published - waiting for published, waiting in occupancies),
            live=self.live,
            ignored=lambda: (
                sum(page[name] for page in capture_pages for name in ignored),
                sum(page["ignored_octets"] for page in capture_pages),
            ),
        )
        self.was_crowded = False  # since the last rest or sleep
        self.next_ask = 0.0
        self.draining_since: float | None = None
        self.is_renewed = False
        self.clock_offset_ns = time.time_ns() - time.monotonic_ns()

    def run(self) -> None:
        while self.turn():
            self.context.beat()
        if self.is_renewed:
            # The rings fill meanwhile, and nobody beats: what collectors do not take soon is counted as not sent.
            self.metering.finish(min(CLOSE_S, self.context.config.service.heartbeat_timeout_s / 2))
        else:
            self.metering.finish()

    def turn(self) -> bool:
        status, fed = self.take_in()
        watermark = self.merge.watermark if status == order.IDLE else 0
        if watermark:
            self.metering.advance(watermark)
        else:
            self.metering.publish_counters()
        if status == order.EPOCH:
            self.step_clock()
        elif status == order.CONTROL:
            self.merge.control_done()  # interfaces are the packet ring's matter
        elif status == order.IDLE:
            return self.idle(may_rest=self.live and fed and not self.was_crowded)
        self.metering.service(time.monotonic())
        return status != order.ENDED

    def take_in(self) -> tuple[int, bool]:
        """Meters what waits, some batches of it; the counters are to be published then. Returns the merge's status, and
        whether there was anything."""
        status, fed = order.FULL, False
        for _ in range(BATCHES_PER_TURN):
            status = self.merge.fill()
            self.was_crowded |= self.merge.crowded
            self.merge.release()  # before they are metered: a successor must not meter them again
            if self.merge.out_bytes:
                self.metering.feed(self.merge.output_address, self.merge.out_bytes, more=True)
                self.merge.emptied()
                fed = True
            if status != order.FULL:
                break
        return status, fed

    def step_clock(self) -> None:
        offset_ns = time.time_ns() - time.monotonic_ns()
        self.metering.step(offset_ns - self.clock_offset_ns)
        self.clock_offset_ns = offset_ns
        self.merge.next_epoch()

    def idle(self, may_rest: bool) -> bool:
        """`may_rest`: there was traffic, and room for that of a rest."""
        self.was_crowded = False
        now = time.monotonic()
        self.metering.service(now)
        if not self.handle_messages(now):
            return False
        if self.live and now >= self.next_ask:
            self.next_ask = now + STREAM_TIME_EVERY_S
            self.merge.want_all_watermarks()
        holding = self.merge.want_watermarks()
        if may_rest:
            self.rest()
        else:
            self.sleep(max(1, self.max_wait_ms // 4) if holding else HEARTBEAT_MS, now)
        return True

    def poller(self) -> select.poll:
        poller = select.poll()
        poller.register(self.context.channel, select.POLLIN)
        for fd, events in self.metering.poll_events():
            poller.register(fd, events)
        return poller

    def rest(self) -> None:
        """Lets packets come together; no news ends it, but a ring that fills up."""
        self.merge.sleeps(True, resting=True)
        self.wait(REST_MS)

    def sleep(self, timeout_ms: int, now: float) -> None:
        deadline = self.metering.next_deadline_s()
        if deadline < math.inf:
            timeout_ms = min(timeout_ms, max(1, int((deadline - now) * 1000) + 1))
        self.merge.sleeps(True)
        self.wait(0 if self.merge.has_news else timeout_ms)

    def wait(self, timeout_ms: int) -> None:
        """A sleep that was announced to the capture workers."""
        poller = self.poller()
        poller.register(self.parts.wake_fd, select.POLLIN)
        poller.poll(timeout_ms)
        self.merge.sleeps(False)
        with contextlib.suppress(BlockingIOError):
            os.eventfd_read(self.parts.wake_fd)

    def handle_messages(self, now: float) -> bool:
        """False: a successor goes on; or drained for too long without an end, and the producers are gone."""
        said = self.context.messages()
        if RENEW in said:
            self.is_renewed = True
            return False
        for message in said:
            if message.startswith(RELOAD):
                self.max_wait_ms = int(message.removeprefix(RELOAD))
                self.merge.set_max_wait(self.max_wait_ms)
        if DRAIN in said and self.draining_since is None:
            self.draining_since = now
            self.context.set_state("draining")
        if self.draining_since is None:
            return True
        return now - self.draining_since < self.context.config.service.drain_timeout_s
