"""What interfaces do while they are recorded, and what is special about their packets."""

from __future__ import annotations

import os
import signal
import struct
import sys
import time
from pathlib import Path

import pytest
from support.frames import numbered_frame
from support.judges import check_numbered, packets, tshark_fields
from support.lab import Lab, requires_root, requires_tool
from support.replay import send_frames
from support.service import Service, lost

pytestmark = [requires_root, requires_tool("capinfos", "lz4")]

COUNT = 1000


def send(lab: Lab, peer: str, first: int, count: int = COUNT) -> None:
    lab.send([peer], frames=count, rate=20_000, first_sequence=first)


# ---- interfaces that go and come -------------------------------------------------------------------------------------


def test_an_interface_that_was_down_is_recorded_again_as_soon_as_it_is_up(lab: Lab, directory: Path) -> None:
    a, pa = lab.veth("a")
    service = Service(lab, directory, [{"uri": f"ring:{a}"}])
    send(lab, pa, 0)
    service.wait_at_rest({"a": COUNT})
    for round_number in (1, 2):
        lab.down(a)
        service.wait_until(lambda: not service.interface("a").is_up, "it is seen to be down")
        lab.up(a)
        service.wait_until(lambda: lab.carrier(pa), "the carrier")
        send(lab, pa, round_number * COUNT)
        service.wait_at_rest({"a": (round_number + 1) * COUNT})
    service.wait_until(lambda: service.interface("a").is_up, "it is seen to be up")
    assert service.interface("a").reopened == 0
    assert service.stop() == 0
    service.check({0: 3 * COUNT})
    service.assert_nothing_left()


def test_an_interface_that_was_deleted_is_recorded_again_two_seconds_after_it_is_back(
    lab: Lab, directory: Path
) -> None:
    a, pa = lab.veth("a")
    b, pb = lab.veth("b")
    service = Service(lab, directory, [{"uri": f"ring:{a}"}, {"uri": f"ring:{b}"}])
    send(lab, pa, 0)
    service.wait_at_rest({"a": COUNT})
    pids = service.pids()
    for round_number in (1, 2):
        lab.delete(a)
        service.wait_until(lambda: not service.interface("a").is_up, "it is seen to be gone")
        time.sleep(0.5)  # a while without it: requests for it are refused meanwhile
        lab.veth("a")
        back = time.monotonic()
        service.wait_until(lambda n=round_number: service.interface("a").reopened == n, "it is open again", 3.0)
        assert time.monotonic() - back < 2
        send(lab, pa, round_number * COUNT)
        service.wait_at_rest({"a": (round_number + 1) * COUNT})
    assert service.pids() == pids
    lab.send([pb], frames=COUNT, rate=20_000, first_id=1)
    service.wait_at_rest({"a": 3 * COUNT, "b": COUNT})
    assert service.stop() == 0
    service.check({0: 3 * COUNT, 1: COUNT})
    service.assert_nothing_left()


def test_after_the_kill_of_its_worker_an_interface_that_came_back_is_still_recorded(lab: Lab, directory: Path) -> None:
    a, pa = lab.veth("a")
    service = Service(lab, directory, [{"uri": f"ring:{a}"}])
    send(lab, pa, 0)
    service.wait_at_rest({"a": COUNT})
    lab.recreate(a)
    service.wait_until(lambda: service.interface("a").reopened == 1, "it is open again")
    send(lab, pa, COUNT)
    service.wait_at_rest({"a": 2 * COUNT})
    pid = service.pids()["capture/a"]
    os.kill(pid, signal.SIGKILL)
    send(lab, pa, 2 * COUNT)
    service.wait_for_start("capture/a", pid)
    send(lab, pa, 3 * COUNT)
    service.wait_at_rest({"a": 4 * COUNT})
    assert service.stop() == 0
    service.check({0: 4 * COUNT})


def test_a_service_whose_interface_is_gone_stops_in_order(lab: Lab, directory: Path) -> None:
    a, pa = lab.veth("a")
    service = Service(lab, directory, [{"uri": f"ring:{a}"}])
    send(lab, pa, 0)
    service.wait_at_rest({"a": COUNT})
    lab.delete(a)
    service.wait_until(lambda: "is gone" in service.log, "it is seen to be gone")
    started = time.monotonic()
    assert service.stop() == 0
    assert time.monotonic() - started < 3
    service.check({0: COUNT})
    service.assert_nothing_left()


def test_a_renamed_interface_goes_on_under_its_label(lab: Lab, directory: Path) -> None:
    a, pa = lab.veth("a")
    service = Service(lab, directory, [{"uri": f"ring:{a}", "label": "uplink"}])
    send(lab, pa, 0)
    service.wait_at_rest({"uplink": COUNT})
    lab.rename(a, "renamed")
    service.wait_until(lambda: lab.carrier(pa), "the carrier")
    send(lab, pa, COUNT)
    service.wait_at_rest({"uplink": 2 * COUNT})
    assert service.interface("uplink").reopened == 0
    assert service.stop() == 0
    service.check({0: 2 * COUNT})
    assert all(sidecar["interfaces"].keys() <= {"uplink"} for sidecar in service.sidecars())


# ---- packets ---------------------------------------------------------------------------------------------------------


def tagged(frame: bytes, *tags: tuple[int, int]) -> bytes:
    """The frame with VLAN tags (TPID, TCI) behind its addresses, the outermost first."""
    return frame[:12] + b"".join(struct.pack("!HH", tpid, tci) for tpid, tci in tags) + frame[12:]


@pytest.mark.parametrize(
    "tags",
    [((0x8100, 5),), ((0x88A8, 7 | 3 << 13),), ((0x88A8, 100), (0x8100, 5)), ((0x8100, 9), (0x8100, 5))],
    ids=["802.1Q", "802.1ad", "QinQ", "802.1Q twice"],
)
def test_vlan_tags_are_back_in_their_place(lab: Lab, directory: Path, tags: tuple[tuple[int, int], ...]) -> None:
    a, pa = lab.veth("a")
    service = Service(lab, directory, [{"uri": f"ring:{a}"}])
    frames = [tagged(numbered_frame(0, sequence), *tags) for sequence in range(50)]
    send_frames(lab, pa, frames, directory)
    service.wait_at_rest({"a": 50})
    assert service.stop() == 0
    recorded = [bytes(packet.data) for path in service.ready() for packet in packets(path)]
    assert recorded == frames
    service.check({0: 50})


def test_snaplen_counts_the_vlan_tag(lab: Lab, directory: Path) -> None:
    a, pa = lab.veth("a")
    service = Service(lab, directory, [{"uri": f"ring:{a}", "snaplen": 70}])
    lab.send([pa], frames=100, rate=10_000, sizes=(200,), vlan=42)
    service.wait_at_rest({"a": 100})
    assert service.stop() == 0
    for path in service.ready():
        for packet in packets(path):
            assert bytes(packet.data[12:18]) == bytes.fromhex("8100002a88b5")
            assert (len(packet.data), packet.original_length) == (70, 200)
    assert check_numbered(service.ready()).packets == 100


def test_a_filter_knows_vlan_tags_and_rejects_in_the_kernel(lab: Lab, directory: Path) -> None:
    a, pa = lab.veth("a")
    b, pb = lab.veth("b")
    interfaces = [{"uri": f"ring:{a}", "filter": "vlan 5"}, {"uri": f"ring:{b}", "filter": "not vlan"}]
    service = Service(lab, directory, interfaces)
    for peer in (pa, pb):
        lab.send([peer], frames=100, rate=10_000, vlan=5, first_sequence=0, first_id=int(peer == pb))
        lab.send([peer], frames=100, rate=10_000, vlan=6, first_sequence=100, first_id=int(peer == pb))
        lab.send([peer], frames=100, rate=10_000, first_sequence=200, first_id=int(peer == pb))
    last = service.wait_at_rest({"a": 100, "b": 100})
    assert service.stop() == 0
    report = check_numbered(service.ready())
    assert report[0].sequences == set(range(100))
    assert report[1].sequences == set(range(200, 300))
    assert [view.dropped_packets for view in last.interfaces] == [0, 0]


def test_snaplen_cuts_packets_and_keeps_their_original_length(lab: Lab, directory: Path) -> None:
    a, pa = lab.veth("a")
    service = Service(lab, directory, [{"uri": f"ring:{a}", "snaplen": 96}])
    lab.send([pa], frames=120, rate=10_000, sizes=(60, 96, 97, 1514))
    last = service.wait_at_rest({"a": 120})
    assert service.stop() == 0
    lengths = [(len(packet.data), packet.original_length) for path in service.ready() for packet in packets(path)]
    assert lengths == [(60, 60), (96, 96), (96, 97), (96, 1514)] * 30
    assert last.interfaces[0].truncated_packets == 60


def test_loopback_counts_each_packet_once(lab: Lab, directory: Path) -> None:
    service = Service(lab, directory, [{"uri": "ring:lo"}])
    sent = lab.send(["lo"], frames=COUNT, rate=10_000)
    service.wait_at_rest({"lo": COUNT})
    assert service.stop() == 0
    service.check(sent.sent_by_id)


def test_outgoing_packets_are_recorded_with_their_direction(lab: Lab, directory: Path) -> None:
    a, pa = lab.veth("a")
    service = Service(lab, directory, [{"uri": f"ring:{a}"}], output={"compressor": "none"})
    lab.send([a], frames=50, rate=10_000)
    lab.send([pa], frames=30, rate=10_000, first_id=1)
    service.wait_at_rest({"a": 80})
    assert service.stop() == 0
    service.check({0: 50, 1: 30})
    directions = [row[0] for path in service.ready() for row in tshark_fields(path, "frame.packet_flags_direction")]
    assert directions.count("0x00000002") == 50


def test_no_packet_of_another_interface_gets_in_at_the_start(lab: Lab, directory: Path) -> None:
    a, pa = lab.veth("a")
    noise = lab.start_sender(["lo"], rate=20_000, first_id=9)
    service = Service(lab, directory, [{"uri": f"ring:{a}"}])
    send(lab, pa, 0)
    last = service.wait_at_rest({"a": COUNT})
    noise.stop()
    assert service.stop() == 0
    assert service.check({0: COUNT}).packets == COUNT
    assert last.interfaces[0].dropped["foreign"] == 0


def test_jumbo_frames_are_whole(lab: Lab, directory: Path) -> None:
    a, pa = lab.veth("a")
    for name in (a, pa):
        lab.mtu(name, 9000)
    service = Service(lab, directory, [{"uri": f"ring:{a}"}])
    sent = lab.send([pa], frames=300, rate=5_000, sizes=(9014, 60, 4000))
    service.wait_at_rest({"a": 300})
    assert service.stop() == 0
    service.check(sent.sent_by_id)


SERVE = """
import socket
listener = socket.create_server(("10.9.0.1", 9000))
connection, _ = listener.accept()
while connection.recv(1 << 20):
    pass
"""
TALK = """
import socket
with socket.create_connection(("10.9.0.1", 9000)) as connection:
    connection.sendall(bytes(4 << 20))
"""


def test_super_frames_of_segmentation_offload_keep_their_length(lab: Lab, directory: Path) -> None:
    other = lab.add_namespace("other")
    a, pa = lab.veth("a", peer_namespace=other, arp=True)
    lab.address(a, "10.9.0.1/24")
    lab.address(pa, "10.9.0.2/24", other)
    service = Service(lab, directory, [{"uri": f"ring:{a}", "filter": "tcp dst port 9000"}])
    server = lab.popen([sys.executable, "-c", SERVE])
    service.wait_until(lambda: "10.9.0.1:9000" in lab.run(["ss", "-Hltn"]).stdout, "the server listens")
    lab.run([sys.executable, "-c", TALK], namespace=other)
    assert server.wait(10) == 0
    service.wait_until(lambda: service.interface("a").in_flight_packets == 0, "rest")
    assert service.stop() == 0
    fields = ("frame.len", "frame.cap_len", "tcp.seq", "tcp.len")
    rows = [row for path in service.ready() for row in tshark_fields(path, *fields)]
    assert max(int(length) for length, _, _, _ in rows) > 9000
    assert all(length == captured for length, captured, _, _ in rows)
    # TCP may send a part twice: what counts is that the whole stream is there, without a gap.
    end = 1
    for start, payload in sorted((int(start), int(payload)) for _, _, start, payload in rows if int(payload)):
        assert start <= end
        end = max(end, start + payload)
    assert end == 1 + (4 << 20)


def test_several_workers_share_one_interface_by_fanout(lab: Lab, directory: Path) -> None:
    a, pa = lab.veth("a")
    service = Service(lab, directory, [{"uri": f"ring:{a}", "fanout": 2}])
    sent = lab.send([pa], frames=5 * COUNT, rate=20_000, flows=100)
    service.wait_until(
        lambda: sum(view.written_packets for view in service.snapshot().interfaces) == 5 * COUNT, "every packet"
    )
    views = service.snapshot().interfaces
    assert [view.label for view in views] == ["a", "a.1"]
    assert all(view.received_packets == view.written_packets > 0 for view in views)
    assert service.stop() == 0
    report = check_numbered(service.ready())
    assert report[0].sequences == set(range(5 * COUNT))
    assert report[0].duplicates == 0
    assert sent.total == 5 * COUNT


# ---- a consumer that stands still ------------------------------------------------------------------------------------


def test_a_full_ring_drops_the_newest_and_counts_them_exactly(lab: Lab, directory: Path) -> None:
    a, pa = lab.veth("a")
    interface = {"uri": f"ring:{a}", "ring_bytes": 1 << 20}
    service = Service(lab, directory, [interface], service={"heartbeat_timeout_s": 60})
    send(lab, pa, 0)
    service.wait_at_rest({"a": COUNT})
    pids = service.pids()
    os.kill(pids["merge/main"], signal.SIGSTOP)
    try:
        send(lab, pa, COUNT, 40_000)
        service.wait_until(lambda: service.interface("a").dropped["ring"] > 0, "a full ring")
    finally:
        os.kill(pids["merge/main"], signal.SIGCONT)
    service.wait_until(lambda: service.interface("a").in_flight["ring"] == 0, "an empty ring")
    send(lab, pa, 41_000)
    last = service.wait_at_rest({"a": 42_000})
    assert service.pids() == pids
    assert service.stop() == 0
    view = last.interfaces[0]
    report = check_numbered(service.ready())[0]
    assert view.dropped == dict.fromkeys(view.dropped, 0) | {"ring": lost(view)}
    assert report.received == view.written_packets == 42_000 - view.dropped["ring"]
    assert (report.duplicates, report.corrupt, report.disordered) == (0, 0, 0)
    # The newest were dropped: what was before and what came after is complete.
    assert not report.missing(COUNT + 1000)
    assert not report.missing(1000, 41_000)
    assert sum(sidecar["dropped"].get("ring", 0) for sidecar in service.sidecars()) == view.dropped["ring"]
