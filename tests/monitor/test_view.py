from __future__ import annotations

import json

import pytest
from monitor.pages import SECOND, Appliance

from appliance.counters import STATES
from appliance.monitor.view import LOSS_STAGES, PLACES, STAGES, Snapshot


def test_the_identity_holds_when_every_term_is_counted(appliance: Appliance) -> None:
    appliance.traffic()
    uplink, lo = appliance.snapshot().interfaces
    assert uplink.received_packets == 1000
    assert uplink.written_packets == 700
    assert uplink.dropped == {
        "foreign": 3, "filter": 7, "gate": 0, "kernel": 100, "ring": 50, "merge": 10, "writer": 30, "unclean": 5,
    }  # fmt: skip
    assert uplink.in_flight == {"kernel": 20, "reorder": 5, "ring": 40, "merge": 30}
    assert uplink.dropped_packets == 205
    assert uplink.lost_packets == 195
    assert uplink.in_flight_packets == 95
    assert uplink.unaccounted_packets == 0
    assert (lo.received_packets, lo.written_packets, lo.unaccounted_packets) == (40, 40, 0)


def test_a_packet_that_nobody_counted_shows_as_unaccounted(appliance: Appliance) -> None:
    appliance.traffic()
    appliance.pages["merge/main/uplink"]["held_packets"] -= 1
    assert appliance.snapshot().interfaces[0].unaccounted_packets == 1


def test_a_packet_counted_twice_shows_as_negative_unaccounted(appliance: Appliance) -> None:
    appliance.traffic()
    appliance.pages["merge/main/uplink"]["written_packets"] += 2
    assert appliance.snapshot().interfaces[0].unaccounted_packets == -2


def test_all_stages_and_places_are_always_there(appliance: Appliance) -> None:
    interface = appliance.snapshot().interfaces[0]
    assert tuple(interface.dropped) == STAGES
    assert tuple(interface.in_flight) == PLACES
    assert set(STAGES) - set(LOSS_STAGES) == {"filter", "foreign", "gate"}


def test_ring_use_is_taken_from_the_rings(appliance: Appliance) -> None:
    uplink, lo = appliance.snapshot(ring_used_bytes={"uplink": 4096}).interfaces
    assert (uplink.ring_used_bytes, uplink.ring_capacity_bytes) == (4096, 1 << 20)
    assert lo.ring_used_bytes == 0


def test_a_service_at_work_has_no_problems(appliance: Appliance) -> None:
    appliance.traffic()
    assert appliance.snapshot().problems == []


def test_a_worker_without_a_fresh_heartbeat_is_a_problem(appliance: Appliance) -> None:
    appliance.pages["capture/lo"]["heartbeat_ns"] = appliance.monotonic_ns - 7 * SECOND
    snapshot = appliance.snapshot()
    assert snapshot.problems == ["worker capture/lo gave its last sign of life 7 s ago, 5 s are allowed"]
    assert [worker.name for worker in snapshot.workers if not worker.is_fresh] == ["capture/lo"]


def test_a_worker_that_has_not_started_is_a_problem(appliance: Appliance) -> None:
    appliance.pages["meter"]["heartbeat_ns"] = 0
    assert appliance.snapshot().problems == ["worker meter has not started yet"]


def test_a_worker_that_ended_in_order_is_no_problem(appliance: Appliance) -> None:
    appliance.pages["capture/lo"]["heartbeat_ns"] = appliance.monotonic_ns - 700 * SECOND
    appliance.pages["capture/lo"]["state"] = STATES.index("ended")
    assert appliance.snapshot().problems == []


def test_a_file_open_far_beyond_its_interval_is_a_problem(appliance: Appliance) -> None:
    appliance.traffic()
    appliance.pages["merge/main"]["segment_opened_ns"] = appliance.realtime_ns - 29 * SECOND
    assert appliance.snapshot().problems == []
    appliance.pages["merge/main"]["segment_opened_ns"] = appliance.realtime_ns - 31 * SECOND
    assert appliance.snapshot().problems == ["output main: its file is open for 31 s, and should be closed every 10 s"]


def test_closed_files_that_are_not_published_are_a_problem(appliance: Appliance) -> None:
    appliance.traffic()
    appliance.pages["merge/main"]["queued_segments"] = 4
    appliance.pages["merge/main"]["last_published_ns"] = appliance.realtime_ns - 45 * SECOND
    assert appliance.snapshot().problems == [
        "output main: 4 closed files wait, and the last one was published 45 s ago"
    ]


def test_restarts_are_told_by_worker(appliance: Appliance) -> None:
    appliance.traffic()
    restarts = {worker.name: worker.restarts for worker in appliance.snapshot().workers}
    assert restarts == dict.fromkeys(restarts, 0) | {"merge/main": 2}


def test_a_snapshot_survives_the_way_through_json(appliance: Appliance) -> None:
    appliance.traffic()
    snapshot = appliance.snapshot()
    assert Snapshot.from_json(json.loads(json.dumps(snapshot.as_json()))) == snapshot


@pytest.mark.parametrize("value", [None, [], {}, {"taken_ns": "x"}])
def test_what_is_no_snapshot_is_refused(value: object) -> None:
    with pytest.raises(ValueError, match="Snapshot"):
        Snapshot.from_json(value)


def test_a_state_that_does_not_exist_is_unknown(appliance: Appliance) -> None:
    appliance.pages["meter"]["state"] = 77
    assert {worker.name: worker.state for worker in appliance.snapshot().workers}["meter"] == "unknown"
