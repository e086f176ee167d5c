"""Each example call of the Xena capture API's documentation, to the letter, against a running service."""

from __future__ import annotations

import asyncio
import doctest
import re
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
from support.lab import Lab, requires_root, requires_tool
from support.service import Service, service_directory

import appliance.capturer
from appliance.capturer import EPOCH_2010_NS, CaptureError, Port, connect, enums

pytestmark = [requires_root, requires_tool("lz4")]

Example = Callable[[Port], Awaitable[None]]


class Bed:
    """A service that stands for all examples."""

    def __init__(self, lab: Lab, directory: Path) -> None:
        self.lab = lab
        name, self.peer = lab.veth("a")
        self.service = Service(lab, directory, [{"uri": f"ring:{name}", "label": "uplink", "capture_filters": ["ip"]}])
        self.socket = self.service.config["monitor"]["control_socket"]

    def run(self, example: Example) -> None:
        """One example on a port that does not capture."""

        async def on_a_stopped_port() -> None:
            port = await connect("uplink", self.socket)
            await port.capturer.state.set_stop()
            await example(port)

        asyncio.run(on_a_stopped_port())

    def send(self, frames: int) -> None:
        self.lab.send([self.peer], frames=frames, rate=20_000)


@pytest.fixture(scope="module")
def bed() -> Iterator[Bed]:
    with service_directory() as directory, Lab() as lab:
        made = Bed(lab, directory)
        yield made
        assert made.service.stop() == 0


async def assert_trigger(port: Port, *expected: int) -> None:
    resp = await port.capturer.trigger.get()
    found = (resp.start_criteria, resp.start_criteria_filter, resp.stop_criteria, resp.stop_criteria_filter)
    assert found == expected


def test_trigger_set_on_full(bed: Bed) -> None:
    async def example(port: Port) -> None:
        await port.capturer.trigger.set(start_criteria=enums.StartTrigger.ON, start_criteria_filter=0, stop_criteria=enums.StopTrigger.FULL, stop_criteria_filter=0)  # noqa: E501  # fmt: skip
        await assert_trigger(port, 0, 0, 0, 0)

    bed.run(example)


def test_trigger_set_on_userstop(bed: Bed) -> None:
    async def example(port: Port) -> None:
        await port.capturer.trigger.set(start_criteria=enums.StartTrigger.ON, start_criteria_filter=0, stop_criteria=enums.StopTrigger.USERSTOP, stop_criteria_filter=0)  # noqa: E501  # fmt: skip
        await assert_trigger(port, 0, 0, 4, 0)

    bed.run(example)


def test_trigger_set_fcserr_fcserr(bed: Bed) -> None:
    async def example(port: Port) -> None:
        await port.capturer.trigger.set(start_criteria=enums.StartTrigger.FCSERR, start_criteria_filter=0, stop_criteria=enums.StopTrigger.FCSERR, stop_criteria_filter=0)  # noqa: E501  # fmt: skip
        await assert_trigger(port, 1, 0, 1, 0)

    bed.run(example)


def test_trigger_set_plderr_plderr(bed: Bed) -> None:
    async def example(port: Port) -> None:
        await port.capturer.trigger.set(start_criteria=enums.StartTrigger.PLDERR, start_criteria_filter=0, stop_criteria=enums.StopTrigger.PLDERR, stop_criteria_filter=0)  # noqa: E501  # fmt: skip
        await assert_trigger(port, 3, 0, 3, 0)

    bed.run(example)


def test_trigger_set_filter_filter(bed: Bed) -> None:
    async def example(port: Port) -> None:
        await port.capturer.trigger.set(start_criteria=enums.StartTrigger.FILTER, start_criteria_filter=0, stop_criteria=enums.StopTrigger.FILTER, stop_criteria_filter=0)  # noqa: E501  # fmt: skip
        await assert_trigger(port, 2, 0, 2, 0)

    bed.run(example)


def test_trigger_get(bed: Bed) -> None:
    async def example(port: Port) -> None:
        resp = await port.capturer.trigger.get()
        assert isinstance(resp.start_criteria, enums.StartTrigger)
        assert isinstance(resp.stop_criteria, enums.StopTrigger)
        assert (resp.start_criteria_filter, resp.stop_criteria_filter) == (0, 0)

    bed.run(example)


@pytest.mark.parametrize("kind", list(enums.PacketType))
def test_keep_set(bed: Bed, kind: enums.PacketType) -> None:
    async def example(port: Port) -> None:
        await port.capturer.keep.set(kind=kind, index=0, byte_count=0)
        resp = await port.capturer.keep.get()
        assert (resp.kind, resp.index, resp.byte_count) == (kind, 0, 0)

    bed.run(example)


@pytest.mark.parametrize("kind", list(enums.PacketType))
def test_keep_set_shortcuts(bed: Bed, kind: enums.PacketType) -> None:
    """set_all() set_fcserr() set_filter() set_notpld() set_plderr() set_tpld()"""

    async def example(port: Port) -> None:
        await getattr(port.capturer.keep, f"set_{kind.name.lower()}")()
        resp = await port.capturer.keep.get()
        assert (resp.kind, resp.index, resp.byte_count) == (kind, 0, -1)

    bed.run(example)


async def anything_until_stopped(port: Port) -> None:
    await port.capturer.trigger.set(enums.StartTrigger.ON, 0, enums.StopTrigger.USERSTOP, 0)
    await port.capturer.keep.set_all()


def test_state_set_start_and_stop(bed: Bed) -> None:
    async def example(port: Port) -> None:
        await anything_until_stopped(port)
        await port.capturer.state.set(on_off=enums.StartOrStop.START)
        assert (await port.capturer.state.get()).on_off == enums.StartOrStop.START
        await port.capturer.state.set(on_off=enums.StartOrStop.STOP)
        assert (await port.capturer.state.get()).on_off == enums.StartOrStop.STOP

    bed.run(example)


def test_state_set_start_set_stop(bed: Bed) -> None:
    async def example(port: Port) -> None:
        await anything_until_stopped(port)
        await port.capturer.state.set_start()
        resp = await port.capturer.state.get()
        assert resp.on_off == enums.StartOrStop.START == 1
        await port.capturer.state.set_stop()
        resp = await port.capturer.state.get()
        assert resp.on_off == enums.StartOrStop.STOP == 0

    bed.run(example)


def test_stats_get(bed: Bed) -> None:
    async def example(port: Port) -> None:
        await anything_until_stopped(port)
        await port.capturer.state.set_start()
        bed.send(25)
        await port.capturer.state.set_stop()
        resp = await port.capturer.stats.get()
        assert (resp.status, resp.packets) == (0, 25)
        captured = await port.capturer.obtain_captured()
        assert 0 < captured[0].timestamp_ns - EPOCH_2010_NS - resp.start_time < 60_000_000_000

    bed.run(example)


def test_obtain_captured(bed: Bed, capsys: pytest.CaptureFixture[str]) -> None:
    async def example(port: Port) -> None:
        await anything_until_stopped(port)
        await port.capturer.state.set_start()
        bed.send(3)
        await port.capturer.state.set_stop()
        pkts = await port.capturer.obtain_captured()
        for i in range(len(pkts)):
            resp = await pkts[i].packet.get()
            print(f"Packet content # {i}: {resp.hex_data}")
        extra = await pkts[2].extra.get()
        assert (extra.length, extra.latency) == (60, None)
        assert extra.time_captured == pkts[2].timestamp_ns - EPOCH_2010_NS
        # A veth claims 10 Gbit/s: 1.25 byte times a nanosecond.
        assert extra.byte_time_count == (pkts[2].timestamp_ns - pkts[1].timestamp_ns) * 10 // 8

    bed.run(example)
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 3
    assert all(re.fullmatch(rf"Packet content # {i}: [0-9a-f]{{120}}", line) for i, line in enumerate(lines))


def test_every_criterion_is_accepted_and_the_start_refuses_what_cannot_be_done(bed: Bed) -> None:
    async def example(port: Port) -> None:
        for start in enums.StartTrigger:
            for stop in enums.StopTrigger:
                await port.capturer.trigger.set(start, 0, stop, 0)
                await port.capturer.keep.set_all()
                if "FCSERR" in (start.name, stop.name):
                    with pytest.raises(CaptureError, match="rx-fcs"):
                        await port.capturer.state.set_start()
                else:
                    await port.capturer.state.set_start()
                    await port.capturer.state.set_stop()

    bed.run(example)


def test_the_example_of_the_module_runs_as_it_stands_there(
    bed: Bed, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(appliance.capturer, "Monitor", lambda: SimpleNamespace(control_socket=Path(bed.socket)))
    (example,) = doctest.DocTestFinder(recurse=False).find(appliance.capturer)
    # Its second of waiting is long enough here for the frames to be sent, however busy the machine is.
    example.globs["asyncio"] = SimpleNamespace(sleep=lambda _seconds: asyncio.to_thread(bed.send, 4))
    assert doctest.DocTestRunner().run(example, clear_globs=False).failed == 0
    asyncio.run(example.globs["first_frames"]())
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 4 and all(line.endswith(" 60") for line in lines)
