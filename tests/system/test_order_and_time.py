"""One busy and one silent interface: what is recorded, in which order, and when files close."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
from support.judges import capinfos, check_numbered
from support.lab import Lab, requires_root, requires_tool
from support.service import Service

pytestmark = [requires_root, requires_tool("capinfos", "lz4")]


def test_a_silent_interface_costs_the_busy_one_nothing(lab: Lab, directory: Path) -> None:
    a, pa = lab.veth("a")
    b, _ = lab.veth("b")
    service = Service(lab, directory, [{"uri": f"ring:{a}"}, {"uri": f"ring:{b}"}])
    sent = lab.send([pa], frames=30_000, rate=20_000)
    rest = service.wait_at_rest({"a": 30_000, "b": 0})
    assert service.stop() == 0
    assert all(view.written_packets == view.received_packets for view in rest.interfaces)
    service.check(sent.sent_by_id)
    service.assert_nothing_left()


def test_both_interfaces_are_one_stream_in_the_order_of_time(lab: Lab, directory: Path) -> None:
    a, pa = lab.veth("a")
    b, pb = lab.veth("b")
    service = Service(lab, directory, [{"uri": f"ring:{a}"}, {"uri": f"ring:{b}"}])
    sent = lab.send([pa, pb], frames=20_000, rate=20_000)
    service.wait_at_rest({"a": 20_000, "b": 20_000})
    assert service.stop() == 0
    service.check(sent.sent_by_id)


def test_many_interfaces_whose_workers_turn_together_are_one_stream_in_the_order_of_time(
    lab: Lab, directory: Path
) -> None:
    pairs = [lab.veth(f"b{i}") for i in range(8)]
    service = Service(lab, directory, [{"uri": f"ring:{name}"} for name, _ in pairs])
    sent = lab.send([peer for _, peer in pairs[:7]], frames=5_000, rate=5_000)  # the last one is silent
    rest = service.wait_at_rest({name: 5_000 for name, _ in pairs[:7]} | {pairs[7][0]: 0})
    assert service.stop() == 0
    assert all(output.late_packets == output.forced_packets == 0 for output in rest.outputs)
    report = service.check(sent.sent_by_id)
    assert report.inversions == 0


def test_files_close_at_every_full_second_idle_or_not(lab: Lab, directory: Path) -> None:
    a, pa = lab.veth("a")
    b, _ = lab.veth("b")
    service = Service(lab, directory, [{"uri": f"ring:{a}"}, {"uri": f"ring:{b}"}])
    sent = lab.send([pa], frames=3_000, rate=2_000)
    idle_from = len(service.ready())
    service.wait_until(lambda: len(service.ready()) >= idle_from + 3, "three files without traffic", 5.0)
    assert service.stop() == 0
    report = service.check(sent.sent_by_id)
    assert report.packets == 3_000
    timed = [sidecar for sidecar in service.sidecars() if sidecar["closed_because"] == "time"]
    assert len(timed) == len(service.ready()) - 1
    for sidecar in timed:
        if sidecar["packets"]:
            # All of one second, and of one second only.
            assert sidecar["first_ns"] // 10**9 == sidecar["last_ns"] // 10**9, sidecar


def test_an_idle_file_is_published_soon_after_its_second(lab: Lab, directory: Path) -> None:
    a, _ = lab.veth("a")
    service = Service(lab, directory, [{"uri": f"ring:{a}"}])
    service.wait_until(lambda: len(service.ready()) >= 2, "two files")
    count = len(service.ready())
    service.wait_until(lambda: len(service.ready()) > count, "one more file")
    late_s = time.time() % 1
    assert service.stop() == 0
    assert late_s < 0.7
    assert all(capinfos(path).packets == 0 for path in service.ready())
    assert check_numbered(service.ready()).packets == 0


def test_what_goes_to_the_disk_past_the_page_cache_is_whole_and_in_order(lab: Lab, directory: Path) -> None:
    a, pa = lab.veth("a")
    b, pb = lab.veth("b")
    output = {"compressor": "none", "rotate_seconds": 0, "rotate_bytes": 16 << 20}
    interfaces = [{"uri": f"ring:{name}", "ring_bytes": 64 << 20} for name in (a, b)]  # never crowded
    service = Service(lab, directory, interfaces, output=output)
    sent = lab.send([pa, pb], frames=20_000, rate=30_000, sizes=[1514])
    rest = service.wait_at_rest({"a": 20_000, "b": 20_000})
    if "no direct I/O" in service.log:
        pytest.skip(f"the file system of {directory} has no direct I/O")
    assert rest.outputs[0].direct_bytes > 0
    assert service.stop() == 0
    assert service.check(sent.sent_by_id).packets == 40_000
    assert len(service.ready()) == 4
