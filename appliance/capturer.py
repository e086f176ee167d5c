"""Port capture of the running service, asynchronous: triggers, what is kept, figures, the captured packets.

    >>> from appliance.capturer import connect, enums
    >>> async def first_frames() -> None:
    ...     port = await connect("uplink")
    ...     await port.capturer.trigger.set(
    ...         start_criteria=enums.StartTrigger.ON, start_criteria_filter=0,
    ...         stop_criteria=enums.StopTrigger.FULL, stop_criteria_filter=0)
    ...     await port.capturer.keep.set_all()
    ...     await port.capturer.state.set_start()
    ...     await asyncio.sleep(1)
    ...     await port.capturer.state.set_stop()
    ...     for packet in await port.capturer.obtain_captured():
    ...         print((await packet.packet.get()).hex_data, (await packet.extra.get()).length)

The names and numbers are those of the Xena capture API; what they mean on Linux:

- Each criterion is decided per packet where the packets are captured, at any rate that is captured at all.
- A capture holds every packet that arrives after `set_start` returned and before `set_stop` was called. The start
  criterion's packet is the first one (unless `pretrigger` keeps some from before it), the stop criterion's the last.
- Stop FULL keeps the earliest packets and stops when the buffer is full; with every other stop the buffer is a circle
  that holds the latest. The packet that met the start criterion is not looked at for the stop criterion.
- `byte_count`: -1 is no limit, and 0 is none either.
- `state.set_start` refuses what the interface cannot do, with the reason. Rules do not change while it captures.
"""

from __future__ import annotations

import asyncio
import base64
import enum
import json
import os
import struct
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from appliance.config import Monitor
from appliance.errors import ApplianceError, InputOutputError, MissingPermissionError
from appliance.formats.encode import (
    InterfaceDescription,
    interface_description,
    pcap_header,
    section_header,
)
from appliance.monitor.control import MAX_RESPONSE_BYTES, NotRunningError

EPOCH_2010_NS = 1_262_304_000_000_000_000  # the reference counts time from 2010-01-01T00:00:00Z
TIMEOUT_S = 10.0
NO_LATENCY = -(1 << 63)
_PACKET = struct.Struct("=IIIIQQQqQII")  # struct port_packet of ring/port.h
_EPB = struct.Struct("=IIIIIII")
_BLOCK_PACKET = 6


class CaptureError(InputOutputError):
    """The service refuses a request; the message says why."""


class enums:  # noqa: N801  the reference's name
    """The reference's enums, with its numbers."""

    class StartTrigger(enum.IntEnum):
        ON = 0
        FCSERR = 1
        FILTER = 2
        PLDERR = 3

    class StopTrigger(enum.IntEnum):
        FULL = 0
        FCSERR = 1
        FILTER = 2
        PLDERR = 3
        USERSTOP = 4

    class PacketType(enum.IntEnum):
        ALL = 0
        FCSERR = 1
        NOTPLD = 2
        TPLD = 3
        FILTER = 4
        PLDERR = 5

    class StartOrStop(enum.IntEnum):
        STOP = 0
        START = 1


# What is answered -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class StateReply:
    on_off: enums.StartOrStop


@dataclass(frozen=True)
class TriggerReply:
    start_criteria: enums.StartTrigger
    start_criteria_filter: int
    stop_criteria: enums.StopTrigger
    stop_criteria_filter: int


@dataclass(frozen=True)
class KeepReply:
    kind: enums.PacketType
    index: int
    byte_count: int


@dataclass(frozen=True)
class StatsReply:
    """`status`: 1 when it has stopped because the buffer is full, else 0. `packets` are in the buffer; `seen_packets`
    passed since the start, `overwritten_packets` made room for later ones. `start_time`: ns since 2010-01-01 UTC."""

    status: int
    packets: int
    start_time: int
    state: str  # "stopped", "waiting" (for the start criterion), "capturing"
    stopped_because: str  # "", "full", "user", "trigger"
    seen_packets: int
    overwritten_packets: int


@dataclass(frozen=True)
class StreamStats:
    """A stream of test payloads since the start. Latencies are ns, and mean something where sender and receiver share
    a clock; None before the first packet."""

    stream: int
    packets: int
    bytes: int
    lost: int
    misordered: int
    payload_errors: int
    latency_min_ns: int | None
    latency_mean_ns: int | None
    latency_max_ns: int | None


@dataclass(frozen=True)
class PacketReply:
    hex_data: str


@dataclass(frozen=True)
class ExtraReply:
    """`time_captured`: ns since 2010-01-01 UTC. `latency`: ns, None without a test payload. `byte_time_count`: what the
    link could have carried since the packet before, in bytes; None when its speed is not known. `length`: bytes on the
    wire, without check sequence unless the card hands it up."""

    time_captured: int
    latency: int | None
    byte_time_count: int | None
    length: int


# What is captured -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class CapturedPacket:
    """One packet, already here: `packet.get()` and `extra.get()` are awaitable for the reference's sake alone."""

    data: bytes
    original_length: int
    timestamp_ns: int  # since 1970
    number: int  # of the packets that passed since the start, from 0
    gap_ns: int
    latency_ns: int | None
    stream: int | None
    sequence: int | None
    has_fcs_error: bool
    has_payload_error: bool
    met_start: bool
    met_stop: bool
    is_pretrigger: bool
    is_outgoing: bool
    speed_bps: int

    @property
    def packet(self) -> _PacketContent:
        return _PacketContent(self)

    @property
    def extra(self) -> _PacketExtra:
        return _PacketExtra(self)


@dataclass(frozen=True)
class _PacketContent:
    captured: CapturedPacket

    async def get(self) -> PacketReply:
        return PacketReply(self.captured.data.hex())


@dataclass(frozen=True)
class _PacketExtra:
    captured: CapturedPacket

    async def get(self) -> ExtraReply:
        one = self.captured
        byte_times = one.gap_ns * one.speed_bps // 8_000_000_000 if one.speed_bps else None
        return ExtraReply(one.timestamp_ns - EPOCH_2010_NS, one.latency_ns, byte_times, one.original_length)


def parse_captured(data: bytes, speed_bps: int = 0) -> Iterator[CapturedPacket]:
    """Packets as they lie in a port's buffer. CaptureError: they do not."""
    at = 0
    while at < len(data):
        if at + _PACKET.size > len(data):
            raise CaptureError("the service's captured packets are cut")
        length, captured, original, flags, timestamp, number, gap, latency, sequence, stream, _ = _PACKET.unpack_from(
            data, at
        )
        if length < _PACKET.size + captured or at + length > len(data):
            raise CaptureError("the service's captured packets are not understood: is its version another one?")
        has_payload = latency != NO_LATENCY
        yield CapturedPacket(
            data=data[at + _PACKET.size : at + _PACKET.size + captured],
            original_length=original,
            timestamp_ns=timestamp,
            number=number,
            gap_ns=gap,
            latency_ns=latency if has_payload else None,
            stream=stream if has_payload else None,
            sequence=sequence if has_payload else None,
            has_fcs_error=bool(flags & 1),
            has_payload_error=bool(flags & 2),
            met_start=bool(flags & 8),
            met_stop=bool(flags & 16),
            is_pretrigger=bool(flags & 32),
            is_outgoing=bool(flags & 64),
            speed_bps=speed_bps,
        )
        at += length


# The port -------------------------------------------------------------------------------------------------------------


class Port:
    """One interface of the service, by its label. `connect` makes it."""

    def __init__(self, label: str, control_socket: Path) -> None:
        self.label = label
        self.control_socket = control_socket
        self.capturer = Capturer(self)
        self.filters = Filters(self)

    async def ask(self, do: str, **values: object) -> Any:
        """One request. NotRunningError, MissingPermissionError, CaptureError."""
        return await ask(self.control_socket, {"request": "capture", "port": self.label, "do": do, **values})

    async def shown(self) -> dict[str, Any]:
        """All that the service tells of this port."""
        found = await self.ask("get")
        if not isinstance(found, dict):
            raise CaptureError(f"{self.control_socket}: the answer is not that of an appliance")
        return found


class Filters:
    """The port's BPF filters, by index from 0 to 15. Triggers and keep rules name them."""

    def __init__(self, port: Port) -> None:
        self._port = port

    async def set(self, index: int, expression: str) -> None:
        """An expression as for tcpdump; an empty one removes the filter. CaptureError: it is none."""
        await self._port.ask("filter", index=index, expression=expression)

    async def get(self) -> dict[int, str]:
        shown = await self._port.shown()
        return {int(index): expression for index, expression in shown["filters"].items()}


class Capturer:
    """`port.capturer`."""

    def __init__(self, port: Port) -> None:
        self._port = port
        self.state = State(port)
        self.trigger = Trigger(port)
        self.keep = Keep(port)
        self.pretrigger = Pretrigger(port)
        self.stats = Stats(port)
        self.streams = Streams(port)

    async def obtain_captured(self) -> list[CapturedPacket]:
        """The packets in the buffer, oldest first. While it captures: those that were there when the reading began, as
        far as they are not overwritten meanwhile."""
        shown = await self._port.shown()
        captures, head, position = shown["captures"], shown["head"], shown["tail"]
        data = bytearray()
        while position < head:
            answer = await self._port.ask("read", position=position)
            if answer["captures"] != captures:
                raise CaptureError(f"{self._port.label}: a new capture was started while the old one was read")
            if answer["position"] != position:
                data.clear()  # overwritten meanwhile; what is left begins with a whole packet
            part = base64.b64decode(answer["data"])
            data += part
            position = answer["position"] + len(part)
            if not part and answer["position"] < head:
                raise CaptureError(f"{self._port.label}: the service's captured packets end too early")
        if position > head:
            del data[len(data) - (position - head) :]
        return list(parse_captured(bytes(data), shown["speed_bps"]))

    async def save(self, path: str | os.PathLike[str], file_format: str = "pcapng") -> int:
        """Writes what was captured into a new file, "pcapng" or "pcap" (nanoseconds); returns the packets.

        FileExistsError and other OSErrors as open() raises them: it is this process that writes the file."""
        shown = await self._port.shown()
        captured = await self.obtain_captured()
        content = as_file(captured, shown["linktype"], self._port.label, shown, file_format)
        with open(path, "xb") as file:
            file.write(content)
        return len(captured)


class State:
    """P_CAPTURE: whether it captures. What stopped by itself is STOP."""

    def __init__(self, port: Port) -> None:
        self._port = port

    async def set(self, on_off: enums.StartOrStop) -> None:
        await (self.set_start() if enums.StartOrStop(on_off) else self.set_stop())

    async def set_start(self) -> None:
        """Clears the buffer and starts. CaptureError: the interface cannot do what is asked, and why."""
        await self._port.ask("start")

    async def set_stop(self) -> None:
        """Stops; returns when every packet that arrived before is in the buffer."""
        await self._port.ask("stop")

    async def get(self) -> StateReply:
        return StateReply(enums.StartOrStop((await self._port.shown())["state"] != "stopped"))


class Trigger:
    """PC_TRIGGER: when it starts and stops. Filters are named by their index."""

    def __init__(self, port: Port) -> None:
        self._port = port

    async def set(
        self,
        start_criteria: enums.StartTrigger,
        start_criteria_filter: int,
        stop_criteria: enums.StopTrigger,
        stop_criteria_filter: int,
    ) -> None:
        values = [int(start_criteria), start_criteria_filter, int(stop_criteria), stop_criteria_filter]
        await self._port.ask("set", trigger=values)

    async def get(self) -> TriggerReply:
        start, start_filter, stop, stop_filter = (await self._port.shown())["trigger"]
        return TriggerReply(enums.StartTrigger(start), start_filter, enums.StopTrigger(stop), stop_filter)


class Keep:
    """PC_KEEP: which packets are kept, and how many bytes of each. `index`: the filter's for FILTER, the stream of test
    payloads for TPLD. `byte_count`: -1 and 0 are no limit."""

    def __init__(self, port: Port) -> None:
        self._port = port

    async def set(self, kind: enums.PacketType, index: int, byte_count: int) -> None:
        await self._port.ask("set", keep=[int(kind), index, byte_count])

    async def set_all(self, index: int = 0, byte_count: int = -1) -> None:
        await self.set(enums.PacketType.ALL, index, byte_count)

    async def set_fcserr(self, index: int = 0, byte_count: int = -1) -> None:
        await self.set(enums.PacketType.FCSERR, index, byte_count)

    async def set_notpld(self, index: int = 0, byte_count: int = -1) -> None:
        await self.set(enums.PacketType.NOTPLD, index, byte_count)

    async def set_tpld(self, index: int = 0, byte_count: int = -1) -> None:
        await self.set(enums.PacketType.TPLD, index, byte_count)

    async def set_filter(self, index: int = 0, byte_count: int = -1) -> None:
        await self.set(enums.PacketType.FILTER, index, byte_count)

    async def set_plderr(self, index: int = 0, byte_count: int = -1) -> None:
        await self.set(enums.PacketType.PLDERR, index, byte_count)

    async def get(self) -> KeepReply:
        kind, index, byte_count = (await self._port.shown())["keep"]
        return KeepReply(enums.PacketType(kind), index, byte_count)


class Pretrigger:
    """How many packets from before the start criterion's are kept (the last ones; 0: none). Not in the reference."""

    def __init__(self, port: Port) -> None:
        self._port = port

    async def set(self, packets: int) -> None:
        await self._port.ask("set", pretrigger_packets=packets)

    async def get(self) -> int:
        return int((await self._port.shown())["pretrigger_packets"])


class Stats:
    """PC_STATS."""

    def __init__(self, port: Port) -> None:
        self._port = port

    async def get(self) -> StatsReply:
        shown = await self._port.shown()
        return StatsReply(
            status=int(shown["stopped_because"] == "full"),
            packets=shown["packets"],
            start_time=shown["start_ns"] - EPOCH_2010_NS if shown["captures"] else 0,
            state=shown["state"],
            stopped_because=shown["stopped_because"],
            seen_packets=shown["seen_packets"],
            overwritten_packets=shown["overwritten_packets"],
        )


class Streams:
    """Counts per stream of test payloads, of all packets since the start. Not in the reference under this name."""

    def __init__(self, port: Port) -> None:
        self._port = port

    async def get(self) -> list[StreamStats]:
        return [stream_stats(one) for one in await self._port.ask("streams")]


def stream_stats(one: Mapping[str, int]) -> StreamStats:
    measured = one["latency_packets"]
    return StreamStats(
        stream=one["stream"],
        packets=one["packets"],
        bytes=one["bytes"],
        lost=one["lost"],
        misordered=one["misordered"],
        payload_errors=one["payload_errors"],
        latency_min_ns=one["latency_min_ns"] if measured else None,
        latency_mean_ns=one["latency_sum_ns"] // measured if measured else None,
        latency_max_ns=one["latency_max_ns"] if measured else None,
    )


async def connect(label: str, control_socket: str | os.PathLike[str] | None = None) -> Port:
    """The port of the interface with this label, of the service behind `control_socket` (by default where a service
    has it). NotRunningError: there is none. CaptureError: it has no such port, or why that one cannot capture."""
    path = Path(control_socket) if control_socket is not None else Monitor().control_socket
    assert path is not None
    port = Port(label, path)
    await port.shown()
    return port


# Files ----------------------------------------------------------------------------------------------------------------


def as_file(
    captured: Sequence[CapturedPacket], linktype: int, label: str, shown: Mapping[str, Any], file_format: str
) -> bytes:
    """A capture file: "pcapng" or "pcap". ValueError: another format."""
    if file_format == "pcap":
        parts = [pcap_header(linktype, nanoseconds=True)]
        for one in captured:
            seconds, nanoseconds = divmod(one.timestamp_ns, 1_000_000_000)
            parts += [struct.pack("=IIII", seconds, nanoseconds, len(one.data), one.original_length), one.data]
        return b"".join(parts)
    if file_format != "pcapng":
        raise ValueError(f'a capture is saved as "pcapng" or "pcap", not as {file_format!r}')
    fcs_bits = int(shown["fcs_bytes"]) * 8
    interface = InterfaceDescription(
        linktype=linktype,
        name=label,
        description=str(shown["interface"]),
        speed_bps=int(shown["speed_bps"]),
        fcs_bits=fcs_bits or None,
    )
    parts = [section_header(), interface_description(interface)]
    parts += [_packet_block(one) for one in captured]
    return b"".join(parts)


def _packet_block(one: CapturedPacket) -> bytes:
    """An Enhanced Packet Block (draft-ietf-opsawg-pcapng, section 4.3)."""
    padded = one.data + bytes(-len(one.data) % 4)
    length = _EPB.size + len(padded) + 4
    high, low = one.timestamp_ns >> 32, one.timestamp_ns & 0xFFFFFFFF
    head = _EPB.pack(_BLOCK_PACKET, length, 0, high, low, len(one.data), one.original_length)
    return head + padded + struct.pack("=I", length)


# Asking ---------------------------------------------------------------------------------------------------------------


async def ask(control_socket: Path, message: Mapping[str, object]) -> Any:
    """One request over a connection of its own, and its result."""
    try:
        async with asyncio.timeout(TIMEOUT_S):
            reader, writer = await asyncio.open_unix_connection(control_socket, limit=MAX_RESPONSE_BYTES)
            try:
                writer.write(json.dumps(message).encode() + b"\n")
                await writer.drain()
                answer = json.loads(await reader.readuntil(b"\n"))
            finally:
                writer.close()
    except (FileNotFoundError, ConnectionRefusedError, NotADirectoryError):
        raise NotRunningError(
            f"no service listens on {control_socket}; start one with `appliance run`, or name its control socket"
        ) from None
    except PermissionError:
        raise MissingPermissionError(
            f"{control_socket}: user {os.geteuid()} may not connect; join the socket's group, or use sudo"
        ) from None
    except TimeoutError:
        raise InputOutputError(f"{control_socket}: the service does not answer within {TIMEOUT_S:g} s") from None
    except (OSError, EOFError, ValueError, asyncio.LimitOverrunError):
        raise InputOutputError(f"{control_socket}: the answer is not that of an appliance") from None
    if not isinstance(answer, dict) or not answer.get("ok"):
        raise CaptureError(str(answer.get("error")) if isinstance(answer, dict) else "no reason given")
    return answer.get("result")


__all__ = [
    "ApplianceError",
    "CaptureError",
    "CapturedPacket",
    "Port",
    "StreamStats",
    "as_file",
    "connect",
    "enums",
    "parse_captured",
]
