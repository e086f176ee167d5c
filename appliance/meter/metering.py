"""Metering: digests in time order go in, flow records go out to every exporter. A meter worker drives it.

    feed, advance -> FlowTable -> rows -> every Exporter

It keeps no time of its own: flows expire by stream time (the digests' time stamps, and `advance` where none come),
exporters work by the monotonic clock that `service` is told.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Sequence

from appliance.counters import METER_FIELDS, PAGE_BYTES, CounterPage
from appliance.errors import ApplianceError, ConfigError
from appliance.meter.export_tcp import TcpExporter
from appliance.meter.exporter import Exporter
from appliance.meter.exporters import make_exporter
from appliance.meter.fragments import FragmentTable
from appliance.meter.settings import MeterSettings
from appliance.meter.table import FlowTable

logger = logging.getLogger(__name__)

NS_PER_S = 1_000_000_000
CLOSE_S = 5.0  # for the last records, when nobody says otherwise


class Metering:
    """The flow table and its exporters, and their counters.

    The identities that hold after every call, in packets and from the start of this object:
    observed = metered + ignored + unsampled, and metered = exported + active + lost_unclean. `exported` have left the
    table: for each exporter they are sent + not_sent + queued + lost_unclean + before, by its own page. What is
    lost_unclean went with a killed predecessor; its successor counts it, before anything else. What is before was
    exported when there was no such exporter yet.
    """

    def __init__(
        self,
        settings: MeterSettings,
        page: CounterPage | None = None,
        export_pages: Sequence[CounterPage] | None = None,
        *,
        ignored: Callable[[], tuple[int, int]] = lambda: (0, 0),
        taken_digests: int = 0,
        live: bool = False,
        clock: Callable[[], float] = time.time,
    ) -> None:
        """`page` of METER_FIELDS; `export_pages` of EXPORT_FIELDS, one for each of `settings.export`. Counters are
        added to what the pages hold, so that they outlive a restart. `ignored`: how many packets the capture side
        could not turn into digests, and their octets on the wire, for the options data. `taken_digests`: by
        predecessors, out of their rings. `clock`: seconds since 1970.

        Raises ConfigError, MissingInputError or CannotCreateError for an exporter that cannot work.
        """
        if export_pages is not None and len(export_pages) != len(settings.export):
            raise ConfigError(f"{len(settings.export)} exporters, but {len(export_pages)} counter pages for them")
        self.settings = settings
        self._live, self._clock = live, clock
        self.page = page or CounterPage(memoryview(bytearray(PAGE_BYTES)), METER_FIELDS, 0)
        self._ignored_by_capture = ignored
        self.table = FlowTable(
            max_flows=settings.max_flows,
            idle_timeout_ns=int(settings.idle_timeout_s * NS_PER_S),
            active_timeout_ns=int(settings.active_timeout_s * NS_PER_S),
            tcp_linger_ns=int(min(settings.tcp_linger_s, settings.idle_timeout_s) * NS_PER_S),
            vlan_in_key=settings.vlan_in_key,
            interface_in_key=settings.interface_in_key,
            tcp_analysis=settings.analyses_tcp,
            packet_sampling=settings.packet_sampling,
            flow_sampling=settings.flow_sampling,
            packet_sequence=settings.packet_sequence,
            fragments=fragment_table(settings),
            frame_octets=settings.zero_length == "frame",
            entropy=settings.entropy,
            name_bytes=settings.name_bytes if settings.applications else 0,
        )
        pages: Sequence[CounterPage | None] = export_pages or [None] * len(settings.export)
        self.exporters: list[Exporter] = [
            make_exporter(settings, export, export_page, clock)
            for export, export_page in zip(settings.export, pages, strict=True)
        ]
        self._counted = self.table.counters()
        self._take_over(taken_digests)

    def feed(self, address: int, length: int, *, more: bool = False) -> None:
        """Meters `length` octets of records at `address` (aligned to 4), in time order; other records than digests
        are passed over. `more`: the caller feeds more at once, or calls `publish_counters`. ValueError names the offset
        of a damaged record; what stood before it is metered."""
        done = 0
        try:
            while done < length:
                done += self.table.update(address + done, length - done)
                if done < length:
                    self._hand_over()
        finally:
            if done < length or not more:
                self.publish_counters()

    def advance(self, stream_time_ns: int) -> None:
        """No later digest is older than this: expires what is due, also when no packet comes."""
        while not self.table.advance(stream_time_ns):
            self._hand_over()
        self._hand_over()
        self.publish_counters()

    def step(self, delta_ns: int) -> None:
        """The clock was set forward by `delta_ns` (negative: back). Later digests have the new time; flows go on."""
        self.table.step(delta_ns)
        self.publish_counters()

    def service(self, now_s: float) -> None:
        """The exporters' timers, connections and queues; also hands over what has expired. `now_s`: CLOCK_MONOTONIC."""
        self._hand_over()
        counts = self._ignored()
        for exporter in self.exporters:
            exporter.service(now_s, counts)

    def next_deadline_s(self) -> float:
        """When `service` is wanted again at the latest (CLOCK_MONOTONIC); infinity: not before something happens."""
        deadlines = [exporter.next_deadline_s() for exporter in self.exporters]
        return min((deadline for deadline in deadlines if deadline > 0), default=math.inf)

    def poll_events(self) -> list[tuple[int, int]]:
        """(file descriptor, poll events) of the exporters: when one is ready, call `service`."""
        return [event for exporter in self.exporters for event in exporter.poll_events()]

    def finish(self, close_s: float = CLOSE_S) -> None:
        """Ends all flows (flowEndReason 4), sends the last statistics, and closes the exporters: files are published,
        collectors get `close_s` seconds together. What remains is counted as not sent. Raises, when all is closed,
        the first ApplianceError of a file that could not be written."""
        while not self.table.flush():
            self._hand_over()
        self._hand_over()
        self.publish_counters()
        counts = self._ignored()
        deadline_s = time.monotonic() + close_s
        failed: ApplianceError | None = None
        for exporter in self.exporters:
            exporter.statistics(counts)
            exporter.drain()
        # A collector that stalls may use up the time: whoever cannot stall goes first.
        for exporter in sorted(self.exporters, key=lambda exporter: isinstance(exporter, TcpExporter)):
            try:
                exporter.close(deadline_s)
            except ApplianceError as error:
                failed = failed or error
        if failed is not None:
            raise failed

    def _ignored(self) -> dict[str, int]:
        """Of digests that the table does not know the length is not known either."""
        packets, octets = self._ignored_by_capture()
        return {"ignored_packets": packets + self.page["ignored_packets"], "ignored_octets": octets}

    def _hand_over(self) -> None:
        count = self.table.row_count
        if count:
            self.table.count_delays(int(self._clock() * NS_PER_S) if self._live else self.table.stream_time_ns)
            self.publish_counters()  # first: what a death interrupts is exported, but not sent, and that can be told
            for exporter in self.exporters:
                exporter.export(self.table.rows_address, count)
            self.table.clear_rows()

    def _take_over(self, taken_digests: int) -> None:
        """The balance of a predecessor that was killed. What it took and had not counted yet counts as metered: whether
        sampling would have passed it over, nobody knows. Nothing after an orderly end."""
        page = self.page
        page.add("observed_packets", max(0, taken_digests - page["observed_packets"]))
        counted = page["metered_packets"] + page["ignored_packets"] + page["unsampled_packets"]
        page.add("metered_packets", max(0, page["observed_packets"] - counted))
        for unit in ("packets", "octets"):
            gone = page[f"exported_{unit}"] + page[f"lost_unclean_{unit}"]
            page.add(f"lost_unclean_{unit}", max(0, page[f"metered_{unit}"] - gone))
        if flows := page["active_flows"]:
            logger.error("%d flows were lost with the meter worker that died", flows)
            page.add("lost_unclean_flows", flows)
        for exporter in self.exporters:
            own = exporter.page
            if not own["begun"]:
                own["before_packets"] = page["exported_packets"]
                own["begun"] = 1
            gone = sum(own[name] for name in ("sent_packets", "not_sent_packets", "lost_unclean_packets"))
            own.add("lost_unclean_packets", max(0, page["exported_packets"] - own["before_packets"] - gone))
        self.publish_counters()

    def publish_counters(self) -> None:
        """What the table counted, into the page."""
        counters = self.table.counters()
        for name, value in counters.items():
            if value != self._counted[name]:
                self.page.add(name, value - self._counted[name])
        self._counted = counters
        for name, value in self.table.gauges().items():
            self.page[name] = value


def fragment_table(settings: MeterSettings) -> FragmentTable | None:
    if settings.max_fragmented == 0:
        return None
    timeout_ns = int(settings.fragment_timeout_s * NS_PER_S)
    return FragmentTable(max_datagrams=settings.max_fragmented, timeout_ns=timeout_ns)
