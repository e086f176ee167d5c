from __future__ import annotations

import re
import shutil
import subprocess

import psutil
import pytest
from monitor.pages import Appliance
from prometheus_client import CollectorRegistry
from prometheus_client.exposition import generate_latest
from prometheus_client.openmetrics.exposition import generate_latest as generate_openmetrics
from prometheus_client.openmetrics.parser import text_string_to_metric_families

from appliance.monitor.host import sample
from appliance.monitor.metrics import FAMILIES, SnapshotCollector


def registry(appliance: Appliance) -> CollectorRegistry:
    host = sample(appliance.pages, appliance.topology)
    made = CollectorRegistry(auto_describe=False)
    made.register(SnapshotCollector(lambda: appliance.snapshot(host=host)))
    return made


def test_the_identity_can_be_read_off_the_metrics(running: Appliance) -> None:
    metrics = registry(running)

    def total(name: str, interface: str) -> float:
        return sum(
            one.value
            for family in metrics.collect()
            for one in family.samples
            if one.name == name and one.labels["interface"] == interface
        )

    for interface in ("uplink", "lo"):
        received = total("appliance_packets_received_total", interface)
        accounted = sum(
            total(name, interface)
            for name in (
                "appliance_packets_written_total",
                "appliance_packets_dropped_total",
                "appliance_packets_in_flight",
            )
        )
        assert received == accounted - total("appliance_packets_taken_back_total", interface) > 0


@pytest.mark.parametrize(
    ("name", "labels", "value"),
    [
        ("appliance_packets_received_total", {"interface": "uplink", "output": "main"}, 1000),
        ("appliance_packets_written_total", {"interface": "uplink", "output": "main"}, 703),
        ("appliance_packets_taken_back_total", {"interface": "uplink", "output": "main"}, 3),
        ("appliance_packets_dropped_total", {"interface": "uplink", "output": "main", "stage": "kernel"}, 100),
        ("appliance_meter_ignored_packets_total", {"interface": "uplink", "output": "main", "reason": "not_ip"}, 4),
        ("appliance_meter_ignored_bytes_total", {"interface": "uplink", "output": "main"}, 240),
        ("appliance_worker_restarts_total", {"role": "merge", "worker": "merge/main"}, 2),
        ("appliance_worker_up", {"role": "meter", "worker": "meter"}, 1),
        ("appliance_files_total", {"output": "main", "state": "published"}, 3),
        ("appliance_file_publish_duration_seconds_bucket", {"output": "main", "le": "0.05"}, 1),
        ("appliance_file_publish_duration_seconds_bucket", {"output": "main", "le": "0.25"}, 3),
        ("appliance_file_publish_duration_seconds_bucket", {"output": "main", "le": "+Inf"}, 3),
        ("appliance_file_publish_duration_seconds_sum", {"output": "main"}, 0.3),
        ("appliance_merge_window_seconds", {"output": "main"}, 0.05),
        ("appliance_merge_lag_seconds", {"output": "main"}, 0.05),
        ("appliance_output_rotate_interval_seconds", {"output": "main"}, 10),
        ("appliance_meter_evicted_flows_total", {"kind": "half_open"}, 3),
        ("appliance_meter_tcp_segments_total", {"kind": "lost_segment"}, 9),
        ("appliance_meter_applications_total", {"application": "quic"}, 4),
        ("appliance_meter_dropped_names_total", {}, 2),
        ("appliance_meter_export_delay_seconds_bucket", {"le": "0.05"}, 5),
        ("appliance_meter_export_delay_seconds_bucket", {"le": "+Inf"}, 7),
        ("appliance_meter_export_delay_seconds_sum", {}, 1),
        ("appliance_ipfix_records_total", {"collector": "udp://127.0.0.1:4739"}, 33),
        ("appliance_config_last_reload_successful", {}, 1),
    ],
)
def test_a_counter_becomes_a_sample(running: Appliance, name: str, labels: dict[str, str], value: float) -> None:
    assert registry(running).get_sample_value(name, labels) == pytest.approx(value)


@pytest.mark.parametrize(
    ("name", "least"),
    [
        ("appliance_worker_resident_memory_bytes", 1 << 20),
        ("appliance_worker_cpu_seconds_total", 0.01),
        ("appliance_worker_open_fds", 3),
    ],
)
def test_a_process_is_measured(running: Appliance, name: str, least: float) -> None:
    # The page's pid is that of this very process.
    value = registry(running).get_sample_value(name, {"role": "meter", "worker": "meter"})
    assert value is not None and value >= least


def test_what_is_not_known_is_absent_and_not_zero(running: Appliance) -> None:
    running.pages["capture/lo"]["last_packet_ns"] = 0
    running.pages["meter"]["pid"] = 0
    metrics = registry(running)
    labels = {"interface": "lo", "output": "main"}
    assert metrics.get_sample_value("appliance_interface_last_packet_timestamp_seconds", labels) is None
    assert metrics.get_sample_value("appliance_worker_open_fds", {"role": "meter", "worker": "meter"}) is None


def test_loopback_drops_of_the_driver_are_those_of_the_host(running: Appliance) -> None:
    value = registry(running).get_sample_value(
        "appliance_nic_dropped_packets_total", {"interface": "lo", "output": "main"}
    )
    assert value == psutil.net_io_counters(pernic=True)["lo"].dropin


def test_names_are_unique_and_in_base_units() -> None:
    names = [family.name for family in FAMILIES]
    assert len(set(names)) == len(names)
    for family in FAMILIES:
        assert re.fullmatch(r"appliance_[a-z_]+", family.name)
        assert not re.search(r"_(ms|us|ns|kib|octets)(_|$)", family.name)
        assert family.help.endswith(".")
        assert family.name.endswith("_total") == (family.kind.__name__ == "CounterMetricFamily"), family.name


def test_promtool_has_nothing_to_say(running: Appliance) -> None:
    promtool = shutil.which("promtool")
    if promtool is None:
        pytest.skip("promtool is not installed (package prometheus)")
    text = generate_latest(registry(running))
    done = subprocess.run([promtool, "check", "metrics"], input=text, capture_output=True, timeout=30, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, b"", b"")


def test_the_openmetrics_form_parses(running: Appliance) -> None:
    text = generate_openmetrics(registry(running)).decode()
    families = {family.name for family in text_string_to_metric_families(text)}
    assert {"appliance_packets_received", "appliance_file_publish_duration_seconds"} <= families
