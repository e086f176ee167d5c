"""From a configuration to a plan: sizes, names, pages."""

from __future__ import annotations

from pathlib import Path

import pytest

from appliance.config import Config, Interface, Meter, Monitor, Output
from appliance.counters import PAGE_BYTES, CounterPages
from appliance.errors import ConfigError
from appliance.plan import (
    FILE_RING_BYTES,
    MEMORY_MAX_BYTES,
    MEMORY_SHARE,
    RECORD_MAX_BYTES,
    Plan,
    available_memory_bytes,
    default_memory_bytes,
    make_plan,
)

GIB = 1 << 30
MIB = 1 << 20


def config(*uris: str, **tables: object) -> Config:
    return Config(interfaces=tuple(Interface(uri=uri) for uri in uris), **tables)  # type: ignore[arg-type]


def is_power_of_two(value: int) -> bool:
    return value > 0 and value & (value - 1) == 0


@pytest.mark.parametrize("count", [1, 2, 3, 7, 16])
@pytest.mark.parametrize("machine_bytes", [4 * GIB, 16 * GIB, 1024 * GIB])
def test_all_rings_together_stay_within_the_share_of_the_machine(count: int, machine_bytes: int) -> None:
    plan = make_plan(config(*(f"ring:eth{i}" for i in range(count))), machine_bytes)
    assert plan.memory_bytes == sum(source.ring_bytes + source.digest_ring_bytes for source in plan.sources)
    assert plan.memory_bytes <= default_memory_bytes(machine_bytes)
    for source in plan.sources:
        assert is_power_of_two(source.ring_bytes)
        assert is_power_of_two(source.digest_ring_bytes)
        assert source.ring_bytes >= 2 * RECORD_MAX_BYTES  # the longest record must fit while another is read
        assert source.digest_ring_bytes >= RECORD_MAX_BYTES


def test_the_default_is_an_eighth_of_the_machine_and_at_most_one_gibibyte() -> None:
    assert default_memory_bytes(8 * GIB) == 8 * GIB // MEMORY_SHARE == GIB
    assert default_memory_bytes(1024 * GIB) == MEMORY_MAX_BYTES == GIB


def test_the_memory_that_is_given_is_a_limit_and_what_does_not_fit_is_refused() -> None:
    plan = make_plan(config("ring:a", "ring:b", memory_bytes=64 * MIB), 1024 * GIB)
    assert 32 * MIB <= plan.memory_bytes <= 64 * MIB
    large = Config(interfaces=(Interface(uri="ring:a", ring_bytes=64 * MIB),), memory_bytes=32 * MIB)
    with pytest.raises(ConfigError, match="memory_bytes"):
        make_plan(large, 1024 * GIB)
    with pytest.raises(ConfigError, match="memory_bytes"):
        make_plan(config(*(f"ring:eth{i}" for i in range(20)), memory_bytes=8 * MIB), 1024 * GIB)


def test_a_ring_of_a_given_size_has_the_power_of_two_below_it() -> None:
    plan = make_plan(Config(interfaces=(Interface(uri="ring:a", ring_bytes=100 * MIB),)), 64 * GIB)
    assert plan.sources[0].ring_bytes == 64 * MIB


def test_without_a_meter_there_are_no_digest_rings_and_no_meter() -> None:
    plan = make_plan(config("ring:a", meter=Meter(enabled=False)), 64 * GIB)
    assert plan.sources[0].digest_ring_bytes == 0
    assert plan.meter is None
    assert plan.workers == ("capture/a", "merge/main", "monitor")


def test_a_file_s_ring_stays_in_the_cache() -> None:
    plan = make_plan(config("pcapfile:a.pcap"), 64 * GIB)
    assert plan.sources[0].ring_bytes <= FILE_RING_BYTES
    assert plan.live_sources == ()


def wakes(plan: Plan) -> set[tuple[int, int]]:
    return {(source.interface.block_timeout_ms, source.turn_ms) for source in plan.sources}


@pytest.mark.parametrize(("count", "turn_ms"), [(1, 0), (2, 32), (16, 32)])
def test_workers_turn_together_and_more_rarely_but_not_one_that_is_alone(count: int, turn_ms: int) -> None:
    plan = make_plan(config(*(f"ring:eth{i}" for i in range(count))), 64 * GIB)
    assert wakes(plan) == {(8, turn_ms)}
    assert plan.outputs[0].turn_ms == turn_ms


@pytest.mark.parametrize(("max_wait_ms", "turn_ms"), [(2, 0), (20, 0), (24, 11), (30, 16), (50, 32), (1000, 32)])
def test_no_packet_waits_four_fifths_of_max_wait_for_a_turn(max_wait_ms: int, turn_ms: int) -> None:
    uris = [f"ring:eth{i}" for i in range(16)]
    outputs = (Output(directory="x", max_wait_ms=max_wait_ms),)
    assert wakes(make_plan(config(*uris, outputs=outputs), 64 * GIB)) == {(8, turn_ms)}


def test_an_interface_whose_block_time_out_is_given_is_woken_by_the_kernel_alone() -> None:
    interfaces = [Interface(uri=f"ring:eth{i}", block_timeout_ms=2 if i == 3 else 0) for i in range(16)]
    plan = make_plan(Config(interfaces=tuple(interfaces)), 64 * GIB)
    assert wakes(plan) == {(8, 32), (2, 0)}
    assert plan.outputs[0].turn_ms == 0


def test_beside_what_has_no_kernel_ring_a_worker_is_alone() -> None:
    plan = make_plan(config("ring:eth0", "pcap:eth1"), 64 * GIB)
    assert {source.turn_ms for source in plan.sources} == {0}


def test_what_has_no_kernel_ring_has_no_turn() -> None:
    plan = make_plan(config(*(f"pcapfile:{i}.pcap" for i in range(16))), 64 * GIB)
    assert {source.turn_ms for source in plan.sources} == {0}


def test_fanout_members_are_sources_of_their_own_in_one_group() -> None:
    interfaces = (Interface(uri="ring:a", fanout=3), Interface(uri="ring:b", fanout=2), Interface(uri="ring:c"))
    plan = make_plan(Config(interfaces=interfaces), 64 * GIB)
    assert [source.label for source in plan.sources] == ["a", "a.1", "a.2", "b", "b.1", "c"]
    assert [source.index for source in plan.sources] == list(range(6))
    groups = [source.fanout_group for source in plan.sources]
    assert len(set(groups[:3])) == len(set(groups[3:5])) == 1
    assert groups[0] != groups[3]
    assert all(0 < group < 65536 for group in groups[:5])
    assert groups[5] == 0


def test_each_output_gets_its_own_sources_and_each_worker_its_page() -> None:
    interfaces = (Interface(uri="ring:a"), Interface(uri="ring:b", output="second"), Interface(uri="ring:c"))
    outputs = (Output(), Output(name="second", directory=Path("/var/lib/second")))
    plan = make_plan(Config(interfaces=interfaces, outputs=outputs), 64 * GIB)
    assert [[source.label for source in planned.sources] for planned in plan.outputs] == [["a", "c"], ["b"]]
    expected = ("capture/a", "capture/b", "capture/c", "merge/main", "merge/second", "meter", "monitor")
    assert plan.workers == expected
    names = [name for name, _ in plan.pages]
    assert set(plan.workers) | {"supervisor", "opener"} <= set(names)
    assert {"merge/main/a", "merge/main/c", "merge/second/b"} <= set(names)
    pages = CounterPages(plan.pages)
    assert pages["supervisor"]["restarts/merge/second"] == 0
    assert all(len(fields) * 8 <= PAGE_BYTES for _, fields in plan.pages)


def test_without_metrics_and_socket_there_is_no_monitor() -> None:
    plan = make_plan(config("ring:a", monitor=Monitor(listen="", control_socket=None)), 64 * GIB)
    assert not plan.monitor
    assert "monitor" not in plan.workers


def test_the_plan_of_one_configuration_is_always_the_same() -> None:
    made = config("ring:a", "ring:b")
    assert make_plan(made, 8 * GIB) == make_plan(made, 8 * GIB)


def test_the_limit_of_a_control_group_above_ours_counts(tmp_path: Path) -> None:
    unlimited = available_memory_bytes(tmp_path)
    (tmp_path / "memory.max").write_text("max\n")
    assert available_memory_bytes(tmp_path) == unlimited
    if "0::" not in Path("/proc/self/cgroup").read_text():
        pytest.skip("no cgroup version 2 here")
    (tmp_path / "memory.max").write_text(f"{64 * MIB}\n")
    assert available_memory_bytes(tmp_path) == 64 * MIB
