"""Port capture on a running service: exact triggers on live numbered frames, over the control socket."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
from collections.abc import Coroutine
from pathlib import Path
from typing import Any

import pytest
from support.frames import ETHERNET_BYTES, HEADER
from support.judges import check_numbered
from support.lab import Lab, requires_root, requires_tool
from support.service import APPLIANCE, Service, configuration, refused, toml

from appliance.capturer import CapturedPacket, CaptureError, Port, StreamStats, connect, enums

pytestmark = [requires_root, requires_tool("lz4", "capinfos")]

START, STOP, KEEP = enums.StartTrigger, enums.StopTrigger, enums.PacketType
SEQUENCE_OFFSET = ETHERNET_BYTES + 6 + 4  # the lower half of the number of an untagged frame


def run(coroutine: Coroutine[Any, Any, Any]) -> Any:
    return asyncio.run(coroutine)


def number_is(sequence: int) -> str:
    """BPF: the frame with this number."""
    return f"ether proto 0x88b5 and ether[{SEQUENCE_OFFSET}:4] = {sequence}"


def numbers(captured: list[CapturedPacket], offset: int = ETHERNET_BYTES) -> list[int]:
    return [HEADER.unpack_from(one.data, offset)[2] for one in captured]


class OnePort:
    """A service on one veth with port capture, and its other end."""

    def __init__(self, lab: Lab, directory: Path, *, gate: Any = None, meter: Any = None, **interface: Any) -> None:
        self.lab = lab
        self.name, self.peer = lab.veth("a")
        source = {"uri": f"ring:{self.name}", "label": "uplink"} | interface | (gate or {})
        self.service = Service(lab, directory, [source], meter=meter or {})
        self.socket = self.service.config["monitor"]["control_socket"]
        self.sent = 0  # numbered frames
        self.generated = 0

    def send(self, frames: int, rate: float = 20_000, **options: Any) -> None:
        report = self.lab.send([self.peer], frames=frames, rate=rate, first_sequence=self.sent, **options)
        assert report.total == frames
        self.sent += frames

    async def connect(self) -> Port:
        return await connect("uplink", self.socket)

    def end_unnumbered(self) -> None:
        """The same where other frames were sent as well."""
        self.service.wait_at_rest({"uplink": self.sent + self.generated})
        assert self.service.stop() == 0, self.service.log
        assert sum(sidecar["packets"] for sidecar in self.service.sidecars()) == self.sent + self.generated
        self.service.assert_nothing_left()

    def end(self) -> None:
        """The recording must not have noticed anything."""
        self.service.wait_at_rest({"uplink": self.sent})
        assert self.service.stop() == 0, self.service.log
        self.service.check({0: self.sent})
        self.service.assert_nothing_left()


async def stopped(port: Port) -> None:
    for _ in range(1000):
        if (await port.capturer.stats.get()).state == "stopped":
            return
        await asyncio.sleep(0.01)
    raise AssertionError(await port.capturer.stats.get())


def test_a_capture_holds_what_came_between_start_and_stop_and_nothing_else(lab: Lab, directory: Path) -> None:
    one = OnePort(lab, directory)

    async def captured() -> tuple[Any, Any, list[CapturedPacket]]:
        port = await one.connect()
        await port.capturer.trigger.set(START.ON, 0, STOP.USERSTOP, 0)
        await port.capturer.keep.set_all()
        one.send(100)
        await port.capturer.state.set_start()
        running = await port.capturer.state.get()
        one.send(500)
        await port.capturer.state.set_stop()
        one.send(100)
        return running, await port.capturer.stats.get(), await port.capturer.obtain_captured()

    running, stats, packets = run(captured())
    assert running.on_off == enums.StartOrStop.START
    assert numbers(packets) == list(range(100, 600))
    assert (stats.status, stats.packets, stats.seen_packets, stats.stopped_because) == (0, 500, 500, "user")
    one.end()


def test_a_saved_capture_is_read_by_other_programs(lab: Lab, directory: Path) -> None:
    one = OnePort(lab, directory)

    async def save() -> list[int]:
        port = await one.connect()
        await port.capturer.trigger.set(START.ON, 0, STOP.USERSTOP, 0)
        await port.capturer.state.set_start()
        one.send(300, sizes=(60, 61, 62, 63, 1514))
        await port.capturer.state.set_stop()
        return [
            await port.capturer.save(directory / "port.pcapng"),
            await port.capturer.save(directory / "port.pcap", "pcap"),
        ]

    assert run(save()) == [300, 300]
    for name in ("port.pcapng", "port.pcap"):
        report = check_numbered([directory / name])
        assert report.faults({0: 300}) == []
    one.end()


async def armed(port: Port, start: str, stop: str, pretrigger: int = 0) -> None:
    """A capture from the frame that `start` describes to the one that `stop` does."""
    await port.filters.set(0, start)
    await port.filters.set(1, stop)
    await port.capturer.trigger.set(START.FILTER, 0, STOP.FILTER, 1)
    await port.capturer.pretrigger.set(pretrigger)
    await port.capturer.keep.set_all()
    await port.capturer.state.set_start()


def test_filters_start_and_stop_at_the_very_frames_that_they_describe(lab: Lab, directory: Path) -> None:
    one = OnePort(lab, directory)

    async def captured() -> list[CapturedPacket]:
        port = await one.connect()
        await armed(port, number_is(12_345), number_is(17_777))
        one.send(20_000, rate=0)
        await stopped(port)
        assert (await port.capturer.stats.get()).stopped_because == "trigger"
        return await port.capturer.obtain_captured()

    packets = run(captured())
    assert numbers(packets) == list(range(12_345, 17_778))
    assert packets[0].met_start and packets[-1].met_stop
    one.end()


def test_the_frames_before_the_start_criterion_are_the_ones_that_came_before_it(lab: Lab, directory: Path) -> None:
    one = OnePort(lab, directory)

    async def captured() -> list[CapturedPacket]:
        port = await one.connect()
        await armed(port, number_is(5000), number_is(6000), pretrigger=250)
        one.send(10_000, rate=0)
        await stopped(port)
        return await port.capturer.obtain_captured()

    packets = run(captured())
    assert numbers(packets) == list(range(4750, 6001))
    assert [packet.is_pretrigger for packet in packets] == [True] * 250 + [False] * 1001
    one.end()


def test_the_circle_holds_the_frames_up_to_the_stop_criterion(lab: Lab, directory: Path) -> None:
    one = OnePort(lab, directory, capture_buffer_bytes=1 << 16)

    async def captured() -> tuple[Any, list[CapturedPacket]]:
        port = await one.connect()
        await port.filters.set(3, number_is(8000))
        await port.capturer.trigger.set(START.ON, 0, STOP.FILTER, 3)
        await port.capturer.state.set_start()
        one.send(10_000, rate=0)
        await stopped(port)
        return await port.capturer.stats.get(), await port.capturer.obtain_captured()

    stats, packets = run(captured())
    assert numbers(packets) == list(range(8001 - len(packets), 8001))
    assert 400 < len(packets) == stats.packets
    assert (stats.overwritten_packets, stats.seen_packets) == (8001 - len(packets), 8001)
    one.end()


def test_full_keeps_the_earliest_frames_and_says_so(lab: Lab, directory: Path) -> None:
    one = OnePort(lab, directory, capture_buffer_bytes=1 << 16)

    async def captured() -> tuple[Any, list[CapturedPacket]]:
        port = await one.connect()
        await port.capturer.trigger.set(START.ON, 0, STOP.FULL, 0)
        await port.capturer.state.set_start()
        one.send(10_000, rate=0)
        await stopped(port)
        return await port.capturer.stats.get(), await port.capturer.obtain_captured()

    stats, packets = run(captured())
    assert stats.status == 1
    assert numbers(packets) == list(range(len(packets)))
    assert 400 < len(packets) == stats.packets
    one.end()


def test_a_filter_sees_the_vlan_tag_that_the_card_had_taken_out(lab: Lab, directory: Path) -> None:
    one = OnePort(lab, directory)

    async def captured() -> list[CapturedPacket]:
        port = await one.connect()
        await port.filters.set(0, "vlan 7")
        await port.capturer.trigger.set(START.ON, 0, STOP.USERSTOP, 0)
        await port.capturer.keep.set_filter(0, 46)
        await port.capturer.state.set_start()
        one.send(100)
        one.send(100, vlan=7)
        one.send(100, vlan=8)
        await port.capturer.state.set_stop()
        return await port.capturer.obtain_captured()

    packets = run(captured())
    assert numbers(packets, ETHERNET_BYTES + 4) == list(range(100, 200))
    assert {(len(packet.data), packet.original_length) for packet in packets} == {(46, 60)}
    one.end()


def test_what_the_interface_cannot_do_is_refused_with_the_reason(lab: Lab, directory: Path) -> None:
    one = OnePort(lab, directory)

    async def refusals() -> list[str]:
        port = await one.connect()
        said = []
        for start, stop in ((START.FCSERR, STOP.USERSTOP), (START.ON, STOP.FCSERR), (START.FILTER, STOP.FULL)):
            await port.capturer.trigger.set(start, 0, stop, 0)
            with pytest.raises(CaptureError) as caught:
                await port.capturer.state.set_start()
            said.append(str(caught.value))
        assert (await port.capturer.state.get()).on_off == enums.StartOrStop.STOP
        return said

    fcs, again, no_filter = run(refusals())
    assert fcs == again
    assert "check sequence, which a does not hand up" in fcs and "ethtool -K a rx-fcs on rx-all on" in fcs
    assert "there is no filter 0" in no_filter
    one.end()


def test_rules_do_not_change_while_it_captures(lab: Lab, directory: Path) -> None:
    one = OnePort(lab, directory)

    async def refused() -> None:
        port = await one.connect()
        await port.capturer.trigger.set(START.ON, 0, STOP.USERSTOP, 0)
        await port.capturer.state.set_start()
        for attempt in (
            port.capturer.trigger.set(START.ON, 0, STOP.FULL, 0),
            port.capturer.keep.set_tpld(),
            port.capturer.pretrigger.set(5),
            port.filters.set(0, "tcp"),
            port.capturer.state.set_start(),
        ):
            with pytest.raises(CaptureError, match="uplink is capturing: stop it"):
                await attempt
        await port.capturer.state.set_stop()
        await port.capturer.keep.set_tpld(index=4)
        assert (await port.capturer.keep.get()).index == 4

    run(refused())
    one.end()


def test_a_capture_outlives_its_worker_and_the_monitor(lab: Lab, directory: Path) -> None:
    one = OnePort(lab, directory)

    async def begin() -> None:
        port = await one.connect()
        await port.filters.set(1, number_is(799))
        await port.capturer.trigger.set(START.ON, 0, STOP.FILTER, 1)
        await port.capturer.state.set_start()

    run(begin())
    one.send(400)
    one.service.wait_at_rest({"uplink": 400})
    for worker in ("capture/uplink", "monitor"):
        pid = one.service.pids()[worker]
        os.kill(pid, signal.SIGKILL)
        one.service.wait_for_start(worker, pid)
    one.send(600)

    async def end() -> list[CapturedPacket]:
        port = await one.connect()
        await stopped(port)
        assert (await port.filters.get()) == {1: number_is(799)}
        return await port.capturer.obtain_captured()

    assert numbers(run(end())) == list(range(800))
    one.end()


def test_a_capture_goes_on_when_the_interface_comes_back(lab: Lab, directory: Path) -> None:
    one = OnePort(lab, directory)

    async def set_up() -> None:
        port = await one.connect()
        await port.capturer.trigger.set(START.ON, 0, STOP.USERSTOP, 0)
        await port.capturer.state.set_start()

    run(set_up())
    one.send(300)
    one.service.wait_at_rest({"uplink": 300})
    lab.recreate("a")
    one.service.wait_until(lambda: one.service.interface("uplink").reopened == 1, "it is open again")
    one.send(300)
    one.service.wait_at_rest({"uplink": 600})

    async def end() -> list[CapturedPacket]:
        port = await one.connect()
        await port.capturer.state.set_stop()
        return await port.capturer.obtain_captured()

    assert numbers(run(end())) == list(range(600))
    one.end()


def test_reading_while_it_captures_gives_whole_packets_in_a_row(lab: Lab, directory: Path) -> None:
    one = OnePort(lab, directory, capture_buffer_bytes=1 << 17)

    async def captured() -> list[list[int]]:
        port = await one.connect()
        await port.capturer.trigger.set(START.ON, 0, STOP.USERSTOP, 0)
        await port.capturer.state.set_start()
        sender = lab.start_sender([one.peer], frames=60_000, rate=30_000)
        looks = []
        while sender.process.poll() is None:
            looks.append(numbers(await port.capturer.obtain_captured()))
        one.sent = sender.report().total
        await port.capturer.state.set_stop()
        return looks

    looks = run(captured())
    assert sum(1 for look in looks if look) > 3
    for look in looks:
        assert look == list(range(look[0], look[0] + len(look))) if look else True
    one.end()


def test_sources_that_cannot_capture_say_why(lab: Lab, directory: Path) -> None:
    names = [lab.veth(name)[0] for name in ("a", "b", "c")]
    service = Service(
        lab,
        directory,
        [
            {"uri": f"ring:{names[0]}", "fanout": 2},
            {"uri": f"ring:{names[1]}", "capture_buffer_bytes": 0},
            {"uri": f"ring:{names[2]}"},
        ],
    )

    async def refusal(label: str) -> str:
        with pytest.raises(CaptureError) as caught:
            await connect(label, service.config["monitor"]["control_socket"])
        return str(caught.value)

    assert "fanout is 2" in run(refusal("a"))
    assert "capture_buffer_bytes = 0" in run(refusal("b"))
    assert "there is no interface 'x' with port capture; there is c" in run(refusal("x"))
    assert service.stop() == 0


def test_the_command_line_captures_saves_and_says_what_it_did(lab: Lab, directory: Path) -> None:
    one = OnePort(lab, directory)

    def command(*words: str, status: int = 0) -> str:
        done = lab.run([*APPLIANCE, *words], check=False)
        assert done.returncode == status, done
        return done.stdout + done.stderr

    at = ["uplink", "--socket", one.socket]
    started = [
        "--start",
        "filter",
        "--start-filter",
        number_is(100),
        "--stop",
        "filter",
        "--stop-filter",
        number_is(300),
    ]
    assert command("capture", "start", *at, *started, "--pretrigger", "10") == "uplink: waits for its start criterion\n"
    one.send(500)
    one.service.wait_at_rest({"uplink": 500})
    told = command("capture", "status", *at)
    assert "stopped because its stop criterion was met; 211 packets kept of 301 seen, 0 overwritten" in told
    assert "start FILTER 13, stop FILTER 14" in told and f"filter 13: {number_is(100)}" in told
    assert command("capture", "stop", *at).startswith("uplink: stopped because its stop criterion was met")
    saved = directory / "saved.pcapng"
    assert command("capture", "save", *at, "-o", str(saved)) == f"{saved}: 211 packets\n"
    assert check_numbered([saved]).faults({0: 211}, 90) == []
    assert "cannot be written: File exists" in command("capture", "save", *at, "-o", str(saved), status=73)
    assert "--start is one of on" in command("capture", "start", *at, "--start", "never", status=64)
    assert "rx-fcs" in command("capture", "start", *at, "--start", "fcserr", status=74)
    assert "no service listens" in command("capture", "status", "uplink", "--socket", "/nonexistent", status=69)
    one.end()


def generate(one: OnePort, *words: str) -> int:
    """Test frames from the other end; how many."""
    said = one.lab.run([*APPLIANCE, "generate", one.peer, *words]).stdout
    one.generated += int(said.split()[1])
    return int(said.split()[1])


def test_loss_errors_and_latency_of_generated_streams_are_measured(lab: Lab, directory: Path) -> None:
    one = OnePort(lab, directory)

    async def measured() -> tuple[list[StreamStats], list[CapturedPacket]]:
        port = await one.connect()
        await port.capturer.trigger.set(START.ON, 0, STOP.USERSTOP, 0)
        await port.capturer.keep.set_tpld(index=7)
        await port.capturer.state.set_start()
        one.send(50)
        generate(one, "--stream", "7", "--count", "100", "--rate", "2000")
        generate(one, "--stream", "7", "--count", "100", "--rate", "2000", "--first-sequence", "120")
        generate(
            one, "--stream", "8", "--count", "90", "--rate", "2000", "--damage-every", "30", "--frame-bytes", "1514"
        )
        await port.capturer.state.set_stop()
        return await port.capturer.streams.get(), await port.capturer.obtain_captured()

    (seven, eight), packets = run(measured())
    assert (seven.stream, seven.packets, seven.lost, seven.misordered, seven.payload_errors) == (7, 200, 20, 0, 0)
    assert (eight.stream, eight.packets, eight.lost, eight.misordered, eight.payload_errors) == (8, 90, 0, 0, 3)
    assert seven.bytes == 200 * 128 and eight.bytes == 90 * 1514
    assert seven.latency_min_ns is not None and seven.latency_max_ns is not None
    assert 0 < seven.latency_min_ns <= seven.latency_mean_ns <= seven.latency_max_ns < 10_000_000_000
    assert [packet.sequence for packet in packets] == [*range(100), *range(120, 220)]
    extras = [run(packet.extra.get()) for packet in packets]
    assert all(extra.latency is not None and extra.length == 128 for extra in extras)
    assert [extra.time_captured for extra in extras] == sorted(extra.time_captured for extra in extras)
    one.end_unnumbered()


def test_damaged_payloads_start_and_stop_a_capture(lab: Lab, directory: Path) -> None:
    one = OnePort(lab, directory)

    async def captured() -> list[CapturedPacket]:
        port = await one.connect()
        await port.capturer.trigger.set(START.PLDERR, 0, STOP.PLDERR, 0)
        await port.capturer.keep.set_all()
        await port.capturer.state.set_start()
        generate(one, "--count", "100", "--damage-every", "40")
        await stopped(port)
        first = await port.capturer.obtain_captured()
        await port.capturer.trigger.set(START.ON, 0, STOP.USERSTOP, 0)
        await port.capturer.keep.set_plderr()
        await port.capturer.state.set_start()
        generate(one, "--count", "100", "--damage-every", "40")
        await port.capturer.state.set_stop()
        assert [packet.sequence for packet in await port.capturer.obtain_captured()] == [39, 79]
        return first

    assert [packet.sequence for packet in run(captured())] == list(range(39, 80))
    one.end_unnumbered()


def test_generated_frames_are_whole_for_other_programs(lab: Lab, directory: Path) -> None:
    one = OnePort(lab, directory)
    generate(one, "--count", "20", "--frame-bytes", "81")
    one.end_unnumbered()
    switches = ["-o", "ip.check_checksum:TRUE", "-o", "udp.check_checksum:TRUE"]
    fields = ["-T", "fields", "-e", "ip.checksum.status", "-e", "udp.checksum.status", "-e", "udp.dstport"]
    told = []
    for path in one.service.ready():
        command = ["tshark", "-n", "-r", str(path), *switches, *fields]
        told += subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    assert told == ["1\t1\t9"] * 20


def test_a_recording_begins_and_ends_at_the_frames_that_its_triggers_describe(lab: Lab, directory: Path) -> None:
    filters = {"start_filter": number_is(1000), "stop_filter": number_is(1999)}
    trigger = {"trigger": {"start": "filter", "stop": "filter", **filters}}
    one = OnePort(lab, directory, meter={"enabled": True}, gate=trigger)
    one.send(5000, rate=0)
    snapshot = one.service.wait_at_rest({"uplink": 5000})
    (view,) = snapshot.interfaces
    assert (view.written_packets, view.dropped["gate"], view.lost_packets) == (1000, 4000, 0)
    assert snapshot.meter is not None and snapshot.meter.observed_packets + view.ignored["not_ip"] == 5000
    assert one.service.stop() == 0, one.service.log
    one.service.check({0: 1000}, 1000)
    assert sum(sidecar["dropped"]["filter"] for sidecar in one.service.sidecars()) == 4000


def test_a_recording_begins_again_when_it_repeats_and_goes_on_after_a_kill(lab: Lab, directory: Path) -> None:
    """Two windows of a hundred frames in each thousand; the worker dies inside of one and outside of one."""
    at = f"ether[{SEQUENCE_OFFSET}:4]"
    filters = {"start_filter": f"{at} = 500 or {at} = 700", "stop_filter": f"{at} = 599 or {at} = 799"}
    one = OnePort(lab, directory, gate={"trigger": {"start": "filter", "stop": "filter", **filters}})
    for frames in (550, 100, 100):
        one.send(frames)
        one.service.wait_at_rest({"uplink": one.sent})
        pid = one.service.pids()["capture/uplink"]
        os.kill(pid, signal.SIGKILL)
        one.service.wait_for_start("capture/uplink", pid)
    one.send(250)
    (view,) = one.service.wait_at_rest({"uplink": 1000}).interfaces
    assert (view.written_packets, view.dropped["gate"]) == (200, 800)
    assert one.service.stop() == 0, one.service.log
    report = check_numbered(one.service.ready())
    assert report[0].missing(1000) == [(0, 499), (600, 699), (800, 999)]


def test_only_the_kind_that_is_kept_is_recorded(lab: Lab, directory: Path) -> None:
    one = OnePort(lab, directory, gate={"keep": {"kind": "tpld", "stream": 7}})
    one.send(100)
    generate(one, "--stream", "7", "--count", "60")
    generate(one, "--stream", "8", "--count", "50")
    (view,) = one.service.wait_at_rest({"uplink": 210}).interfaces
    assert (view.written_packets, view.dropped["gate"]) == (60, 150)
    assert one.service.stop() == 0, one.service.log
    one.service.check_sidecars()


def test_a_recording_by_check_sequences_is_refused_where_there_are_none(lab: Lab, directory: Path) -> None:
    lab.veth("a")
    config = configuration(directory, [{"uri": "ring:a", "trigger": {"start": "fcserr"}}])
    status, said = refused(lab, directory, config)
    assert status == 78
    assert "interface a: fcserr needs the frames' check sequence, which a does not hand up" in said
    config = configuration(directory, [{"uri": "ring:a", "keep": {"kind": "filter", "filter": "tcp prot 80"}}])
    status, said = refused(lab, directory, config)
    assert status == 78 and "tcp prot 80" in said
    config = configuration(directory, [{"uri": "ring:a", "capture_filters": ["ip", "udp prot 80"]}])
    status, said = refused(lab, directory, config)
    assert status == 78 and "udp prot 80" in said
    path = directory / "appliance.toml"
    path.write_text(toml(config))
    checked = lab.run([*APPLIANCE, "check-config", "-c", str(path)], check=False)
    assert checked.returncode == 78 and "udp prot 80" in checked.stderr
