"""Exporters: one for each collector or file, each with its own templates, session, sequence numbers and counters.

    rows of the flow table -> Packer -> messages -> bounded queue -> socket or file

A message gets its sequence number and export time when it leaves, so that the numbers count what was sent (RFC 7011,
3.1), whatever the queue had to drop. Nothing blocks but `close`, which has a deadline, and a file's writes. Whatever
is not sent is counted, in flows, packets and octets.

The transports: export_udp.py, export_tcp.py and tls.py over export_socket.py; export_file.py, and records.py for other
formats than IPFIX. exporters.py picks one by its URI.
"""

from __future__ import annotations

import logging
import math
import time
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from appliance.counters import EXPORT_FIELDS, PAGE_BYTES, CounterPage
from appliance.meter.pack import Message, Packer
from appliance.meter.settings import ExportSettings, MeterSettings
from appliance.meter.templates import TemplateSet

logger = logging.getLogger(__name__)

LOG_PAUSE_S = 30.0  # between two lines about one collector

Counts = Mapping[str, int]


def private_page() -> CounterPage:
    """A counter page of this process alone, for exporters that nobody watches."""
    return CounterPage(memoryview(bytearray(PAGE_BYTES)), EXPORT_FIELDS, 0)


@dataclass(frozen=True, slots=True)
class ExporterParts:
    """What every exporter is made of. `clock`: seconds since 1970, for export times and rotation. `first_sequence`: of
    each session's messages."""

    meter: MeterSettings
    settings: ExportSettings
    page: CounterPage | None = None
    clock: Callable[[], float] = time.time
    first_sequence: int = 0


class Exporter(ABC):
    """The queue, the numbers and the counters that all transports share."""

    def __init__(self, parts: ExporterParts) -> None:
        self.settings = parts.settings
        self.page = parts.page or private_page()
        self.clock = parts.clock
        self.first_sequence = self.sequence = parts.first_sequence
        self.templates = TemplateSet(parts.meter, parts.settings)
        self.message_bytes = self.settings.message_bytes or self.default_message_bytes
        self.packer = self.make_packer()
        self.queue: deque[Message] = deque()
        self.queued_bytes = self.queued_packets = 0
        self.show_queue()
        self.started_ms = int(self.clock() * 1000)
        self.statistics_due_s: float | None = None
        self.logged_at_s = -math.inf

    def make_packer(self) -> Packer:
        return Packer(
            self.templates.plans,
            biflow=self.settings.biflow,
            observation_domain=self.settings.domain,
            message_bytes=self.message_bytes,
            constants=self.templates.constants,
        )

    @property
    @abstractmethod
    def default_message_bytes(self) -> int: ...

    @abstractmethod
    def drain(self) -> None:
        """Sends from the queue what can be sent without waiting."""

    @abstractmethod
    def close(self, deadline_s: float) -> None:
        """Sends what can be sent until `deadline_s` (CLOCK_MONOTONIC), counts the rest as not sent, and ends."""

    def service(self, now_s: float, counts: Counts) -> None:
        """Timers and the queue. `now_s`: CLOCK_MONOTONIC; `counts`: see `statistics`."""
        interval = self.settings.statistics_interval_s
        if interval:
            if self.statistics_due_s is None:
                self.statistics_due_s = now_s + interval
            elif now_s >= self.statistics_due_s:
                self.statistics_due_s = now_s + interval
                self.statistics(counts)
        self.drain()

    def next_deadline_s(self) -> float:
        """When `service` is wanted again at the latest (CLOCK_MONOTONIC)."""
        return self.statistics_due_s if self.statistics_due_s is not None else 0.0

    def poll_events(self) -> list[tuple[int, int]]:
        """(file descriptor, poll events) that should lead to `service`."""
        return []

    def export(self, rows_address: int, row_count: int) -> None:
        """Takes rows of the flow table; they may be overwritten when this returns."""
        for message in self.packer.pack(rows_address, row_count):
            self.submit(message)
        self.drain()

    def statistics(self, counts: Counts) -> None:
        """Options data: what was exported, ignored, and not sent, so far. `counts` must have `ignored_packets` and
        `ignored_octets`."""
        page = self.page
        figures = {name: page[name] for name in ("messages", "flow_records", "bytes")}
        figures |= {name: page[name] for name in ("not_sent_flows", "not_sent_packets", "not_sent_octets")}
        figures |= {name: counts[name] for name in ("ignored_packets", "ignored_octets")}
        figures |= {"first_ms": self.started_ms, "last_ms": int(self.clock() * 1000)}
        for message in self.templates.statistics(figures, self.message_bytes):
            self.submit(message)

    def submit(self, message: Message) -> None:
        """The queue drops the newest: a gap in the records is then one gap."""
        if self.queued_bytes + len(message.data) > self.settings.queue_bytes:
            self.drain()
        if self.queued_bytes + len(message.data) > self.settings.queue_bytes:
            self.count_not_sent(message)
            return
        self.queue.append(message)
        self.queued_bytes += len(message.data)
        self.queued_packets += message.packets
        self.show_queue()

    def taken(self) -> Message:
        """Removes the first message of the queue."""
        message = self.queue.popleft()
        self.queued_bytes -= len(message.data)
        self.queued_packets -= message.packets
        self.show_queue()
        return message

    def show_queue(self) -> None:
        self.page["queued_bytes"] = self.queued_bytes
        self.page["queued_packets"] = self.queued_packets

    def stamp(self, message: Message) -> None:
        message.stamp(int(self.clock()), self.sequence)

    def count_sent(self, message: Message) -> None:
        self.sequence = (self.sequence + message.records) & 0xFFFFFFFF
        self.page.add("messages")
        self.page.add("records", message.records)
        self.page.add("flow_records", message.flows)
        self.page.add("sent_packets", message.packets)
        self.page.add("bytes", len(message.data))

    def count_not_sent(self, message: Message) -> None:
        self.page.add("not_sent_flows", message.flows)
        self.page.add("not_sent_packets", message.packets)
        self.page.add("not_sent_octets", message.octets)

    def abandon_queue(self) -> None:
        while self.queue:
            self.count_not_sent(self.taken())

    def set_up(self, up: bool, why: str = "") -> None:
        """The gauge, and a log line for a change, unless it changes all the time."""
        now_s = time.monotonic()
        if bool(self.page["up"]) != up and now_s - self.logged_at_s >= LOG_PAUSE_S:
            self.logged_at_s = now_s
            if up:
                logger.info("collector %s: connected", self.settings.uri)
            else:
                logger.warning("collector %s: %s", self.settings.uri, why)
        self.page["up"] = int(up)
