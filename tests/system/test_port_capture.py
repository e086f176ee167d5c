"""Port capture on a running service: exact triggers on live numbered frames, over the control socket."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from pathlib import Path
from typing import Any

from support.frames import ETHERNET_BYTES, HEADER
from support.judges import check_numbered
from support.lab import Lab, requires_root, requires_tool
from support.service import Service

from appliance.capturer import CapturedPacket, Port, connect, enums

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

    def __init__(self, lab: Lab, directory: Path, **interface: Any) -> None:
        self.lab = lab
        self.name, self.peer = lab.veth("a")
        self.service = Service(lab, directory, [{"uri": f"ring:{self.name}", "label": "uplink"} | interface])
        self.socket = self.service.config["monitor"]["control_socket"]
        self.sent = 0

    def send(self, frames: int, rate: float = 20_000, **options: Any) -> None:
        report = self.lab.send([self.peer], frames=frames, rate=rate, first_sequence=self.sent, **options)
        assert report.total == frames
        self.sent += frames

    async def connect(self) -> Port:
        return await connect("uplink", self.socket)

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
