"""Real counter pages of a small appliance: two interfaces, one output, a meter with one collector."""

from __future__ import annotations

import os
from dataclasses import dataclass

from appliance.counters import (
    CAPTURE_FIELDS,
    EXPORT_FIELDS,
    MERGE_FIELDS,
    MERGE_SOURCE_FIELDS,
    METER_FIELDS,
    MONITOR_FIELDS,
    OPENER_FIELDS,
    STATES,
    CounterPages,
    restarts_field,
    supervisor_fields,
)
from appliance.monitor.view import (
    ExportInfo,
    HostFigures,
    OutputInfo,
    Snapshot,
    SourceInfo,
    Topology,
    WorkerInfo,
    take_snapshot,
)

SECOND = 1_000_000_000
WORKERS = ("capture/uplink", "capture/lo", "merge/main", "meter", "monitor", "opener")


@dataclass
class Appliance:
    """The pages, the topology and the two clocks of a snapshot; `beat` makes every worker a live one."""

    pages: CounterPages
    topology: Topology
    monotonic_ns: int = 1000 * SECOND
    realtime_ns: int = 1_700_000_000 * SECOND

    def beat(self, now_ns: int | None = None) -> None:
        now_ns = self.monotonic_ns if now_ns is None else now_ns
        for name in (*WORKERS, "supervisor"):
            self.pages[name]["heartbeat_ns"] = now_ns
            self.pages[name]["started_ns"] = max(1, now_ns - 60 * SECOND)
            self.pages[name]["pid"] = os.getpid()
            self.pages[name]["state"] = STATES.index("running")

    def snapshot(self, ring_used_bytes: dict[str, int] | None = None, host: HostFigures | None = None) -> Snapshot:
        return take_snapshot(
            self.pages,
            self.topology,
            ring_used_bytes=ring_used_bytes or {},
            host=host or HostFigures(),
            monotonic_ns=self.monotonic_ns,
            realtime_ns=self.realtime_ns,
        )

    def traffic(self) -> None:
        """On `uplink`: 1000 received = 700 written + 205 dropped (195 lost) + 95 in flight; on `lo`: 40 of 40."""
        set_fields(
            self.pages["capture/uplink"],
            received_packets=1000,
            foreign_packets=3,
            dropped_filter_packets=7,
            dropped_kernel_packets=100,
            dropped_ring_packets=50,
            kernel_queued_packets=20,
            unpublished_packets=5,
            read_packets=875,
            read_bytes=875 * 100,
            published_packets=815,
            interface_up=1,
            last_packet_ns=self.realtime_ns - SECOND,
            ignored_not_ip_packets=4,
            ignored_octets=240,
        )
        set_fields(
            self.pages["merge/main/uplink"],
            consumed_packets=775,
            written_packets=700,
            ever_written_packets=703,
            taken_back_packets=3,
            written_bytes=700 * 100,
            dropped_merge_packets=10,
            dropped_writer_packets=30,
            lost_unclean_packets=5,
            held_packets=30,
        )
        set_fields(self.pages["capture/lo"], received_packets=40, read_packets=40, published_packets=40, interface_up=1)
        set_fields(self.pages["merge/main/lo"], consumed_packets=40, written_packets=40, ever_written_packets=40)
        set_fields(
            self.pages["merge/main"],
            merged_packets=780,
            written_packets=740,
            watermark_ns=self.realtime_ns - SECOND // 20,
            segments_opened=4,
            segments_published=3,
            published_packets=600,
            open_packets=140,
            segment_opened_ns=self.realtime_ns - 5 * SECOND,
            last_published_ns=self.realtime_ns - 5 * SECOND,
            publish_10_ms=1,
            publish_250_ms=2,
            publish_ns=3 * SECOND // 10,
        )
        set_fields(self.pages["meter"], observed_packets=815, metered_packets=811, ignored_packets=4, active_flows=12)
        set_fields(self.pages["meter"], evicted_half_open_flows=3, tcp_lost_segments=9, flows_quic=4)
        set_fields(self.pages["meter"], dropped_names=2)
        set_fields(self.pages["meter"], export_delay_10_ms=5, export_delay_1000_ms=2, export_delay_ns=SECOND)
        set_fields(self.pages["export/0"], up=1, records=33, flow_records=30, messages=3)
        self.pages["supervisor"][restarts_field("merge/main")] = 2
        self.pages["supervisor"]["restarts"] = 2


def set_fields(page: object, **values: int) -> None:
    for name, value in values.items():
        page[name] = value  # type: ignore[index]


def make_appliance(directory: str) -> Appliance:
    pages = CounterPages(
        [
            ("supervisor", supervisor_fields(WORKERS)),
            ("opener", OPENER_FIELDS),
            ("capture/uplink", CAPTURE_FIELDS),
            ("capture/lo", CAPTURE_FIELDS),
            ("merge/main", MERGE_FIELDS),
            ("merge/main/uplink", MERGE_SOURCE_FIELDS),
            ("merge/main/lo", MERGE_SOURCE_FIELDS),
            ("meter", METER_FIELDS),
            ("export/0", EXPORT_FIELDS),
            ("monitor", MONITOR_FIELDS),
        ]
    )
    topology = Topology(
        version="1.2.3",
        sources=(
            SourceInfo("uplink", "ring:eth0", "eth0", "main", 1 << 20),
            SourceInfo("lo", "ring:lo", "lo", "main", 1 << 20),
        ),
        outputs=(OutputInfo("main", directory, "pcapng", max_wait_ms=50, rotate_seconds=10),),
        exports=(ExportInfo("udp://127.0.0.1:4739"),),
        workers=tuple(WorkerInfo(name.partition("/")[0], name) for name in WORKERS),
    )
    return Appliance(pages, topology)
