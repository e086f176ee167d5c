"""A snapshot as Prometheus metrics: one table says which, and a collector renders it at each scrape.

Names and units follow https://prometheus.io/docs/practices/naming/: base units (seconds, bytes), `_total` on counters.
The counters are those of the pages, so a restarted worker does not set them back; only CPU seconds are the process's.
"""

from __future__ import annotations

import platform
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import accumulate
from typing import Generic, TypeVar

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector

from appliance.monitor.view import (
    ExportView,
    InterfaceView,
    MeterView,
    OutputView,
    ServiceView,
    Snapshot,
    TraceflowView,
    WorkerView,
)

_NS = 1e9


class SnapshotCollector(Collector):
    """Yields every family of a fresh snapshot at each scrape."""

    def __init__(self, take: Callable[[], Snapshot]) -> None:
        self._take = take

    def collect(self) -> Iterator[Metric]:
        snapshot = self._take()
        for family in FAMILIES:
            yield family.metric(snapshot)
        yield _publish_durations(snapshot)
        yield _export_delays(snapshot)


@dataclass(frozen=True, slots=True)
class Family:
    """One metric family; `samples` finds its label values and values in a snapshot."""

    kind: type[CounterMetricFamily | GaugeMetricFamily]
    name: str
    help: str
    labels: tuple[str, ...]
    samples: Callable[[Snapshot], Iterable[tuple[tuple[str, ...], float]]]

    def metric(self, snapshot: Snapshot) -> Metric:
        metric = self.kind(self.name, self.help, labels=self.labels)
        for labels, value in self.samples(snapshot):
            metric.add_metric(labels, value)
        return metric


_Row = TypeVar("_Row")
# One number, a number for each value of a further label, or None where there is nothing to say.
_Value = float | int | Mapping[str, int] | None


class _Rows(Generic[_Row]):
    """The interfaces, the outputs, ... of a snapshot: what they are labelled with, and how their families are made."""

    def __init__(
        self,
        labels: tuple[str, ...],
        rows: Callable[[Snapshot], Iterable[_Row]],
        label_values: Callable[[_Row], tuple[str, ...]],
    ) -> None:
        self._labels = labels
        self._rows = rows
        self._label_values = label_values

    def counter(self, name: str, help: str, get: Callable[[_Row], _Value], by: str = "") -> Family:
        return self._family(CounterMetricFamily, name, help, get, by)

    def gauge(self, name: str, help: str, get: Callable[[_Row], _Value], by: str = "") -> Family:
        return self._family(GaugeMetricFamily, name, help, get, by)

    def _family(
        self,
        kind: type[CounterMetricFamily | GaugeMetricFamily],
        name: str,
        help: str,
        get: Callable[[_Row], _Value],
        by: str,
    ) -> Family:
        def samples(snapshot: Snapshot) -> Iterator[tuple[tuple[str, ...], float]]:
            for row in self._rows(snapshot):
                labels, value = self._label_values(row), get(row)
                if isinstance(value, Mapping):
                    for part, number in value.items():
                        yield (*labels, part), number
                elif value is not None:
                    yield labels, value

        return Family(kind, name, help, (*self._labels, by) if by else self._labels, samples)


_Moment = tuple[Snapshot, OutputView]  # what is relative to the time of the snapshot

_INTERFACE = _Rows[InterfaceView](
    ("interface", "output"), lambda snapshot: snapshot.interfaces, lambda row: (row.label, row.output)
)
_LIVE_INTERFACE = _Rows[InterfaceView](
    ("interface", "output"),
    lambda snapshot: (row for row in snapshot.interfaces if row.is_live),
    lambda row: (row.label, row.output),
)
_OUTPUT = _Rows[OutputView](("output",), lambda snapshot: snapshot.outputs, lambda row: (row.name,))
_OUTPUT_NOW = _Rows[_Moment](
    ("output",), lambda snapshot: ((snapshot, row) for row in snapshot.outputs), lambda row: (row[1].name,)
)
_METER = _Rows[MeterView]((), lambda snapshot: [snapshot.meter] if snapshot.meter else [], lambda row: ())
_TRACEFLOW = _Rows[TraceflowView](
    (), lambda snapshot: [snapshot.traceflow] if snapshot.traceflow else [], lambda row: ()
)
_EXPORT = _Rows[ExportView](("collector",), lambda snapshot: snapshot.exports, lambda row: (row.uri,))
_WORKER = _Rows[WorkerView](("role", "worker"), lambda snapshot: snapshot.workers, lambda row: (row.role, row.name))
_SERVICE = _Rows[ServiceView]((), lambda snapshot: [snapshot.service], lambda row: ())
_BUILD = _Rows[ServiceView](
    ("version", "python"), lambda snapshot: [snapshot.service], lambda row: (row.version, platform.python_version())
)


def _time(timestamp_ns: int) -> float | None:
    return timestamp_ns / _NS if timestamp_ns else None


def _age(moment: _Moment, timestamp_ns: int) -> float | None:
    return max(0, moment[0].taken_ns - timestamp_ns) / _NS if timestamp_ns else None


FAMILIES: tuple[Family, ...] = (
    # The identity: received = written - taken back + dropped (all stages) + in flight (all places).
    _INTERFACE.counter(
        "appliance_packets_received_total",
        "Packets that reached the interface's capture point (the kernel's drops included) or were read from a file.",
        lambda row: row.received_packets,
    ),
    _INTERFACE.counter(
        "appliance_packets_written_total",
        "Packets handed to the output's file.",
        lambda row: row.ever_written_packets,
    ),
    _INTERFACE.counter(
        "appliance_packets_taken_back_total",
        "Packets that were written, and then lost with their file: it was removed from work/, or the merge was killed. "
        "They are among the dropped ones.",
        lambda row: row.taken_back_packets,
    ),
    _INTERFACE.counter(
        "appliance_packets_dropped_total",
        "Packets not written, by the stage that dropped them; foreign, filter, gate: as asked for; the others: losses.",
        lambda row: row.dropped,
        by="stage",
    ),
    _INTERFACE.gauge(
        "appliance_packets_in_flight",
        "Packets on their way: in the kernel's ring, held for reordering, in our ring, held by the merge.",
        lambda row: row.in_flight_packets,
    ),
    # Beside the identity.
    _LIVE_INTERFACE.counter(
        "appliance_nic_dropped_packets_total",
        "Packets dropped by the network card or its driver, before the capture point.",
        lambda row: row.nic_dropped_packets,
    ),
    _INTERFACE.counter(
        "appliance_meter_ignored_packets_total",
        "Packets that are written but not metered, by reason.",
        lambda row: row.ignored,
        by="reason",
    ),
    _INTERFACE.counter(
        "appliance_meter_ignored_bytes_total",
        "Original lengths of the packets that are written but not metered.",
        lambda row: row.ignored_octets,
    ),
    # Interfaces.
    _LIVE_INTERFACE.gauge("appliance_interface_up", "1 while the interface is up.", lambda row: row.is_up),
    _INTERFACE.gauge(
        "appliance_interface_last_packet_timestamp_seconds",
        "Timestamp of the newest packet.",
        lambda row: _time(row.last_packet_ns),
    ),
    _INTERFACE.counter(
        "appliance_received_bytes_total", "Original lengths of the packets read.", lambda row: row.read_bytes
    ),
    _INTERFACE.counter(
        "appliance_written_bytes_total", "Captured lengths of the packets written.", lambda row: row.written_bytes
    ),
    _INTERFACE.gauge("appliance_ring_size_bytes", "Capacity of the ring.", lambda row: row.ring_capacity_bytes),
    _INTERFACE.gauge("appliance_ring_used_bytes", "Bytes in the ring.", lambda row: row.ring_used_bytes),
    _LIVE_INTERFACE.counter(
        "appliance_kernel_ring_full_total", "Times the kernel's ring was full.", lambda row: row.kernel_freezes
    ),
    _LIVE_INTERFACE.counter(
        "appliance_interface_reopened_total",
        "Sockets opened again after the interface came back.",
        lambda row: row.reopened,
    ),
    _INTERFACE.counter(
        "appliance_packets_truncated_total",
        "Packets whose captured length is below their original length.",
        lambda row: row.truncated_packets,
    ),
    _INTERFACE.counter(
        "appliance_packets_reordered_total",
        "Packets put into order within the interface's reorder window.",
        lambda row: row.reordered_packets,
    ),
    _INTERFACE.counter(
        "appliance_packets_late_total",
        "Packets that came later than the reorder window allows; they are written all the same.",
        lambda row: row.late_packets,
    ),
    _INTERFACE.counter(
        "appliance_input_errors_total", "Damaged places in the input file.", lambda row: row.input_errors
    ),
    _INTERFACE.counter(
        "appliance_interface_clock_steps_total", "Steps of the clock that were noticed.", lambda row: row.clock_steps
    ),
    _INTERFACE.counter(
        "appliance_digests_published_total", "Packet headers handed to the meter.", lambda row: row.digests_published
    ),
    _INTERFACE.counter(
        "appliance_digests_dropped_total",
        "Packet headers that the meter missed because it was behind; the packets are written.",
        lambda row: row.digests_dropped,
    ),
    # Merge.
    _OUTPUT.counter("appliance_merge_packets_total", "Packets released by the merge.", lambda row: row.merged_packets),
    _OUTPUT.counter(
        "appliance_merge_late_packets_total",
        "Packets written after one with a later timestamp.",
        lambda row: row.late_packets,
    ),
    _OUTPUT.counter(
        "appliance_merge_forced_packets_total",
        "Packets released because max_wait_ms was over.",
        lambda row: row.forced_packets,
    ),
    _OUTPUT.gauge(
        "appliance_merge_max_lateness_seconds", "The largest lateness so far.", lambda row: row.late_max_ns / _NS
    ),
    _OUTPUT.gauge(
        "appliance_merge_window_seconds",
        "How long a packet may be held for the sake of order (max_wait_ms).",
        lambda row: row.max_wait_ms / 1000,
    ),
    _OUTPUT_NOW.gauge(
        "appliance_merge_lag_seconds",
        "Age of the moment up to which a live output is in order.",
        lambda row: _age(row, row[1].watermark_ns) if row[1].is_live else None,
    ),
    # Files.
    _OUTPUT.counter(
        "appliance_output_packets_total",
        "Packets of closed files, by where the file went.",
        lambda row: {
            "published": row.published_packets,
            "recovered": row.recovered_packets,
            "quarantined": row.quarantined_packets,
        },
        by="state",
    ),
    _OUTPUT.gauge("appliance_output_open_packets", "Packets in the open file.", lambda row: row.open_packets),
    _OUTPUT.counter(
        "appliance_output_uncompressed_bytes_total", "Bytes before compression.", lambda row: row.written_bytes
    ),
    _OUTPUT.counter(
        "appliance_output_direct_bytes_total",
        "Bytes that went to the disk past the page cache (direct_io).",
        lambda row: row.direct_bytes,
    ),
    _OUTPUT.counter(
        "appliance_output_published_bytes_total",
        "Bytes of published files, after compression.",
        lambda row: row.published_bytes,
    ),
    _OUTPUT.counter(
        "appliance_files_total",
        "Closed files, by what became of them (skipped: empty, and not wanted).",
        lambda row: {
            "published": row.files_published,
            "recovered": row.files_recovered,
            "quarantined": row.files_quarantined,
            "skipped": row.files_skipped,
        },
        by="state",
    ),
    _OUTPUT.counter("appliance_files_opened_total", "Files begun by the output.", lambda row: row.files_opened),
    _OUTPUT.counter("appliance_files_expired_total", "Files deleted by retention.", lambda row: row.files_expired),
    _OUTPUT.counter("appliance_expired_bytes_total", "Bytes deleted by retention.", lambda row: row.expired_bytes),
    _OUTPUT.counter(
        "appliance_file_errors_total",
        "Failed writes, compressors and hooks.",
        lambda row: {"write": row.write_errors, "compressor": row.compressor_failures, "hook": row.hook_failures},
        by="reason",
    ),
    _OUTPUT.gauge("appliance_files_queued", "Closed files that are not yet published.", lambda row: row.queued_files),
    _OUTPUT_NOW.gauge(
        "appliance_file_age_seconds", "Age of the open file.", lambda row: _age(row, row[1].file_opened_ns)
    ),
    _OUTPUT.gauge(
        "appliance_file_last_published_timestamp_seconds",
        "When a file was published last.",
        lambda row: _time(row.last_published_ns),
    ),
    _OUTPUT.gauge(
        "appliance_output_rotate_interval_seconds",
        "The configured rotate_seconds; absent when files do not close by time.",
        lambda row: row.rotate_seconds or None,
    ),
    _OUTPUT.counter(
        "appliance_output_clock_steps_total", "Files closed because the clock was set.", lambda row: row.clock_steps
    ),
    _OUTPUT.gauge(
        "appliance_storage_free_bytes",
        "Free bytes of the file system below the output's directory.",
        lambda row: row.storage.free_bytes if row.storage else None,
    ),
    _OUTPUT.gauge(
        "appliance_storage_size_bytes",
        "Size of that file system.",
        lambda row: row.storage.size_bytes if row.storage else None,
    ),
    _OUTPUT.gauge(
        "appliance_storage_oldest_file_timestamp_seconds",
        "Modification time of the oldest published file.",
        lambda row: row.storage.oldest_file_s if row.storage else None,
    ),
    # Meter: observed = metered + ignored + unsampled; metered = exported + active + lost_unclean; of each collector:
    # exported = before + sent + not sent + queued + lost_unclean.
    _METER.counter(
        "appliance_meter_observed_packets_total",
        "Packet headers that reached the meter.",
        lambda row: row.observed_packets,
    ),
    _METER.counter(
        "appliance_meter_metered_packets_total", "Packets counted in flows.", lambda row: row.metered_packets
    ),
    _METER.counter(
        "appliance_meter_metered_bytes_total", "IP octets counted in flows.", lambda row: row.metered_octets
    ),
    _METER.counter(
        "appliance_meter_unsampled_packets_total",
        "Packets passed over by packet or flow sampling.",
        lambda row: row.unsampled_packets,
    ),
    _METER.counter(
        "appliance_meter_late_packets_total",
        "Packets that reached the meter after later ones.",
        lambda row: row.late_packets,
    ),
    _METER.counter(
        "appliance_meter_later_fragments_total",
        "Fragments behind the first of protocols with ports: keyed by its ports, or unmatched and keyed without.",
        lambda row: {"keyed": row.fragments_keyed, "unmatched": row.fragments_unmatched},
        by="outcome",
    ),
    _METER.counter(
        "appliance_meter_overlapping_fragments_total",
        "Fragments that begin where others of their datagram have been: overlaps, repeats, disorder.",
        lambda row: row.fragments_overlapping,
    ),
    _METER.counter(
        "appliance_meter_fragment_evictions_total",
        "Datagrams in fragments that were forgotten before their end for want of room.",
        lambda row: row.fragment_evictions,
    ),
    _METER.gauge("appliance_meter_active_flows", "Flows in the table.", lambda row: row.active_flows),
    _METER.gauge(
        "appliance_meter_active_flow_packets", "Packets of the flows in the table.", lambda row: row.active_flow_packets
    ),
    _METER.gauge("appliance_meter_peak_flows", "Most flows in the table so far.", lambda row: row.peak_flows),
    _METER.gauge("appliance_meter_table_bytes", "Memory of the flow table.", lambda row: row.table_bytes),
    _METER.counter("appliance_meter_flows_created_total", "Flows begun.", lambda row: row.flows_created),
    _METER.counter(
        "appliance_meter_flows_ended_total",
        "Flow records made, by IPFIX flowEndReason; lack_of_resources: evicted from a full table.",
        lambda row: row.flows_ended,
        by="reason",
    ),
    _METER.counter(
        "appliance_meter_evicted_flows_total",
        "Flows that had to make room in a full table, by what they were.",
        lambda row: row.flows_evicted,
        by="kind",
    ),
    _METER.counter(
        "appliance_meter_tcp_segments_total",
        "TCP segments by what they were taken for, as in Wireshark's tcp.analysis.",
        lambda row: row.tcp_segments,
        by="kind",
    ),
    _METER.counter(
        "appliance_meter_applications_total",
        "Flows whose payload said what they are; 0 without applications.",
        lambda row: row.applications,
        by="application",
    ),
    _METER.counter(
        "appliance_meter_partial_names_total",
        "Flows whose first message was not seen to its end: names may be missing.",
        lambda row: row.partial_names,
    ),
    _METER.counter(
        "appliance_meter_dropped_names_total",
        "Names for which name_bytes had no room.",
        lambda row: row.dropped_names,
    ),
    _METER.counter("appliance_meter_exported_flows_total", "Flow records exported.", lambda row: row.exported_flows),
    _METER.counter(
        "appliance_meter_exported_packets_total", "Packets of exported flow records.", lambda row: row.exported_packets
    ),
    _METER.counter(
        "appliance_meter_exported_bytes_total", "IP octets of exported flow records.", lambda row: row.exported_octets
    ),
    _METER.counter(
        "appliance_meter_lost_unclean_flows_total",
        "Flows that went with a killed meter: they were in its table.",
        lambda row: row.lost_unclean_flows,
    ),
    _METER.counter(
        "appliance_meter_lost_unclean_packets_total",
        "Packets whose flows went with a killed meter.",
        lambda row: row.lost_unclean_packets,
    ),
    _METER.gauge(
        "appliance_meter_stream_timestamp_seconds",
        "The moment up to which the meter has seen the stream.",
        lambda row: _time(row.stream_time_ns),
    ),
    # Flow traces: tapped = observed; observed = other + published + left out + lost + held + queued.
    _TRACEFLOW.counter(
        "appliance_traceflow_tapped_packets_total",
        "Packets that the merges handed to the flow traces.",
        lambda row: row.tapped_packets,
    ),
    _TRACEFLOW.counter(
        "appliance_traceflow_missed_packets_total",
        "Packets that the flow traces missed because they were behind; the packets are written.",
        lambda row: row.missed_packets,
    ),
    _TRACEFLOW.counter(
        "appliance_traceflow_observed_packets_total",
        "Packets that reached the flow traces.",
        lambda row: row.observed_packets,
    ),
    _TRACEFLOW.counter(
        "appliance_traceflow_other_packets_total", "Packets that are no TCP.", lambda row: row.other_packets
    ),
    _TRACEFLOW.counter(
        "appliance_traceflow_published_packets_total",
        "Packets in published files of flows.",
        lambda row: row.published_packets,
    ),
    _TRACEFLOW.counter(
        "appliance_traceflow_left_out_packets_total",
        "Packets of flows that are in no file of theirs: cut (max_flow_bytes), refused (retain_bytes, min_free_bytes), "
        "failed (not written), unclean (gone with a killed worker).",
        lambda row: row.left_out | {"unclean": row.lost_unclean_packets},
        by="reason",
    ),
    _TRACEFLOW.gauge(
        "appliance_traceflow_waiting_packets",
        "Packets of flows that are not published: not over yet (held), over (queued).",
        lambda row: {"held": row.held_packets, "queued": row.queued_packets},
        by="place",
    ),
    _TRACEFLOW.counter(
        "appliance_traceflow_late_packets_total",
        "Packets that reached the flow traces after later ones.",
        lambda row: row.late_packets,
    ),
    _TRACEFLOW.gauge("appliance_traceflow_active_flows", "Flows in memory.", lambda row: row.active_flows),
    _TRACEFLOW.gauge(
        "appliance_traceflow_queued_flows", "Flows that are over and not yet published.", lambda row: row.queued_flows
    ),
    _TRACEFLOW.counter("appliance_traceflow_flows_total", "Flows begun.", lambda row: row.flows_created),
    _TRACEFLOW.counter(
        "appliance_traceflow_flows_ended_total",
        "Flows that are over, by why (evicted: max_flows; end: the service's, or the clock was set).",
        lambda row: row.flows_ended,
        by="reason",
    ),
    _TRACEFLOW.counter(
        "appliance_traceflow_published_files_total", "Files of flows published.", lambda row: row.published_files
    ),
    _TRACEFLOW.counter(
        "appliance_traceflow_published_bytes_total", "Bytes of those files.", lambda row: row.published_bytes
    ),
    _TRACEFLOW.gauge(
        "appliance_traceflow_stored_files", "Published files that are kept.", lambda row: row.stored_files
    ),
    _TRACEFLOW.gauge(
        "appliance_traceflow_stored_bytes",
        "Bytes on disk: of published files, of unfinished ones.",
        lambda row: {"published": row.stored_bytes, "unfinished": row.staged_bytes},
        by="state",
    ),
    _TRACEFLOW.gauge(
        "appliance_traceflow_buffered_bytes",
        "Memory of packets that wait to be written.",
        lambda row: row.buffered_bytes,
    ),
    _TRACEFLOW.counter(
        "appliance_traceflow_expired_files_total", "Files deleted by retention.", lambda row: row.expired_files
    ),
    _TRACEFLOW.counter(
        "appliance_traceflow_expired_bytes_total", "Bytes deleted by retention.", lambda row: row.expired_bytes
    ),
    _TRACEFLOW.counter(
        "appliance_traceflow_leftover_files_total",
        "Unfinished files of a killed worker, deleted at the next start.",
        lambda row: row.leftover_files,
    ),
    _TRACEFLOW.counter(
        "appliance_traceflow_write_errors_total", "Writes of flows' files that failed.", lambda row: row.write_errors
    ),
    _TRACEFLOW.gauge(
        "appliance_traceflow_stream_timestamp_seconds",
        "The moment up to which the flow traces have seen the stream.",
        lambda row: _time(row.stream_time_ns),
    ),
    # Collectors.
    _EXPORT.gauge("appliance_ipfix_collector_up", "1 while records can be sent.", lambda row: row.is_up),
    _EXPORT.counter(
        "appliance_ipfix_records_total", "IPFIX data records sent, options included.", lambda row: row.records
    ),
    _EXPORT.counter("appliance_ipfix_flow_records_total", "IPFIX flow records sent.", lambda row: row.flow_records),
    _EXPORT.counter("appliance_ipfix_messages_total", "IPFIX messages sent.", lambda row: row.messages),
    _EXPORT.counter("appliance_ipfix_sent_bytes_total", "Bytes of IPFIX messages sent.", lambda row: row.bytes),
    _EXPORT.counter(
        "appliance_ipfix_sent_packets_total", "Packets of flow records that were sent.", lambda row: row.sent_packets
    ),
    _EXPORT.counter("appliance_ipfix_send_errors_total", "IPFIX messages that failed.", lambda row: row.send_errors),
    _EXPORT.counter(
        "appliance_ipfix_tls_failures_total",
        "TLS sessions that were refused, by us or by the collector, or broke.",
        lambda row: row.tls_failures,
    ),
    _EXPORT.counter("appliance_ipfix_connects_total", "Connections made to the collector.", lambda row: row.connects),
    _EXPORT.counter(
        "appliance_ipfix_not_sent_flows_total", "Flow records that could not be sent.", lambda row: row.not_sent_flows
    ),
    _EXPORT.counter(
        "appliance_ipfix_not_sent_packets_total",
        "Packets of flow records that could not be sent.",
        lambda row: row.not_sent_packets,
    ),
    _EXPORT.counter(
        "appliance_ipfix_lost_unclean_packets_total",
        "Packets of flow records that went with the queue of a killed meter.",
        lambda row: row.lost_unclean_packets,
    ),
    _EXPORT.gauge(
        "appliance_ipfix_before_packets",
        "Packets of flow records from before a reload brought this collector.",
        lambda row: row.before_packets,
    ),
    _EXPORT.gauge("appliance_ipfix_queued_bytes", "Bytes waiting for the collector.", lambda row: row.queued_bytes),
    _EXPORT.gauge("appliance_ipfix_queued_packets", "Packets of flow records in them.", lambda row: row.queued_packets),
    # Processes.
    _WORKER.gauge("appliance_worker_up", "1 while the worker's heartbeat is fresh.", lambda row: row.is_fresh),
    _WORKER.gauge(
        "appliance_worker_heartbeat_age_seconds", "Time since the last sign of life.", lambda row: row.heartbeat_age_s
    ),
    _WORKER.counter("appliance_worker_restarts_total", "Restarts by the supervisor.", lambda row: row.restarts),
    _WORKER.counter(
        "appliance_worker_cpu_seconds_total",
        "User and system CPU time of the present process.",
        lambda row: row.process.cpu_seconds if row.process else None,
    ),
    _WORKER.gauge(
        "appliance_worker_resident_memory_bytes",
        "Resident memory, shared rings included.",
        lambda row: row.process.resident_bytes if row.process else None,
    ),
    _WORKER.gauge(
        "appliance_worker_open_fds",
        "Open file descriptors.",
        lambda row: row.process.open_descriptors if row.process else None,
    ),
    # Service.
    _BUILD.gauge("appliance_build_info", "Version of the appliance and of Python.", lambda row: 1),
    _SERVICE.gauge("appliance_uptime_seconds", "Time since the start of the service.", lambda row: row.uptime_s),
    _SERVICE.counter(
        "appliance_planned_restarts_total",
        "Workers that were ended and started again for new settings.",
        lambda row: row.planned_restarts,
    ),
    _SERVICE.counter(
        "appliance_config_reloads_total",
        "Reloads of the configuration, by result.",
        lambda row: {"success": row.reloads - row.reload_failures, "failure": row.reload_failures},
        by="result",
    ),
    _SERVICE.gauge(
        "appliance_config_last_reload_successful",
        "1 when the configuration was loaded at the last attempt.",
        lambda row: row.last_reload_ok,
    ),
    _SERVICE.counter("appliance_monitor_scrapes_total", "Scrapes of /metrics.", lambda row: row.scrapes),
    _SERVICE.counter(
        "appliance_monitor_control_requests_total", "Requests on the control socket.", lambda row: row.control_requests
    ),
    _SERVICE.counter(
        "appliance_monitor_rejected_connections_total",
        "Connections closed because they were too many or too slow.",
        lambda row: row.rejected_connections,
    ),
)


def _publish_durations(snapshot: Snapshot) -> Metric:
    histogram = HistogramMetricFamily(
        "appliance_file_publish_duration_seconds",
        "Time from a file's close to its appearance in ready/: end of compression, fsync, digest, rename.",
        labels=["output"],
    )
    for output in snapshot.outputs:
        histogram.add_metric([output.name], _cumulative(output.publish_counts), sum_value=output.publish_ns / _NS)
    return histogram


def _export_delays(snapshot: Snapshot) -> Metric:
    histogram = HistogramMetricFamily(
        "appliance_meter_export_delay_seconds",
        "Time from a flow's end, by its time-out, to its record; evicted and flushed flows are not counted.",
        labels=[],
    )
    if snapshot.meter:
        counts = _cumulative(snapshot.meter.export_delay_counts)
        histogram.add_metric([], counts, sum_value=snapshot.meter.export_delay_ns / _NS)
    return histogram


def _cumulative(counts: dict[str, int]) -> list[tuple[str, float]]:
    return list(zip(counts, accumulate(counts.values()), strict=True))
