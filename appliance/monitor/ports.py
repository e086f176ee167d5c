"""Port capture over the control socket: rules, start, stop, figures, and the captured bytes as they lie in memory.

    {"request": "capture", "port": "uplink", "do": "get"}
    {"request": "capture", "port": "uplink", "do": "set", "trigger": [0, 0, 4, 0], "keep": [0, 0, -1], ...}
    {"request": "capture", "port": "uplink", "do": "filter", "index": 0, "expression": "tcp port 80"}
    {"request": "capture", "port": "uplink", "do": "start" | "stop" | "streams"}
    {"request": "capture", "port": "uplink", "do": "read", "position": 0}

Clients are not trusted: every number is checked before it is written where a worker reads it, expressions are compiled
here and not in a worker, and nothing is opened for a client: what was captured is handed over as bytes, which nobody
here looks at. All that is set lies in the port's memory, so another life of this process finds it there.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from appliance.capture import bpf
from appliance.capture.features import hands_up_fcs
from appliance.errors import InputOutputError, UsageError
from appliance.ring import port as memory
from appliance.ring.port import PortMemory

START_CRITERIA = ("ON", "FCSERR", "FILTER", "PLDERR")
STOP_CRITERIA = ("FULL", "FCSERR", "FILTER", "PLDERR", "USERSTOP")
KEEP_KINDS = ("ALL", "FCSERR", "NOTPLD", "TPLD", "FILTER", "PLDERR")
MAX_BYTE_COUNT = 262144
MAX_PRETRIGGER_PACKETS = 1_000_000
READ_BYTES = 1 << 18
ANSWER_TIMEOUT_S = 3.0
ANSWER_EVERY_S = 0.002
LINKTYPE_ETHERNET = 1
U32 = (1 << 32) - 1


@dataclass(frozen=True)
class PortParts:
    """One interface's port, as the supervisor hands it to the monitor. `refusal`: why it has none."""

    label: str
    interface: str  # the host's name for it
    port_fd: int = -1
    wake_fd: int = -1  # the capture worker's eventfd
    filters: tuple[str, ...] = ()  # of the configuration
    refusal: str = ""


class Ports:
    """Answers "capture" requests for all interfaces."""

    def __init__(self, parts: Sequence[PortParts], generation: int) -> None:
        self._ports = {one.label: Port(one, generation) for one in parts if one.port_fd >= 0}
        self._refusals = {one.label: one.refusal for one in parts if one.port_fd < 0}

    async def answer(self, message: Mapping[str, Any]) -> object:
        """The result of one request. UsageError, InputOutputError: it is refused, and why."""
        label = message.get("port")
        if label is None:
            return sorted(self._ports)
        if not isinstance(label, str) or label not in self._ports:
            reason = self._refusals.get(label) if isinstance(label, str) else None
            known = ", ".join(sorted(self._ports)) or "none"
            raise UsageError(reason or f"there is no interface {str(label)[:64]!r} with port capture; there is {known}")
        return await self._ports[label].do(message)


class Port:
    """One interface's port."""

    def __init__(self, parts: PortParts, generation: int) -> None:
        self._parts = parts
        self._memory = PortMemory(parts.port_fd, generation)
        self._busy = asyncio.Lock()
        if not self._memory.filters() and self._memory.figures()["captures"] == 0:
            for index, expression in enumerate(parts.filters):
                self._memory.set_filter(index, expression.encode(), b"")

    async def do(self, message: Mapping[str, Any]) -> object:
        what = message.get("do")
        if what == "get":
            return self.shown()
        if what == "read":
            return self.read(number(message, "position", 0, (1 << 63) - 1))
        if what == "streams":
            return self._memory.streams_seen()
        async with self._busy:
            if what == "set":
                self.set(message)
            elif what == "filter":
                self.set_filter(message)
            elif what == "start":
                await self.start()
            elif what == "stop":
                await self.stop()
            else:
                raise UsageError('"do" must be one of: get, set, filter, start, stop, read, streams')
        return None

    # ---- looking ----

    def shown(self) -> dict[str, Any]:
        settings = self._memory.settings
        start, start_filter, stop, stop_filter, kind, index, byte_count, pretrigger, fcs_bytes = settings
        return {
            "label": self._parts.label,
            "interface": self._parts.interface,
            "trigger": [start, start_filter, stop, stop_filter],
            "keep": [kind, index, -1 if byte_count == U32 else byte_count],
            "pretrigger_packets": pretrigger,
            "fcs_bytes": fcs_bytes,
            "filters": {index: text.decode("utf-8", "replace") for index, text in self._memory.filters().items()},
            "speed_bps": link_speed_bps(self._parts.interface),
            **self._memory.figures(),
        }

    def read(self, position: int) -> dict[str, Any]:
        """Captured bytes from `position` on; where they begin is told, for what was there may be overwritten."""
        before = self._memory.figures()
        try:
            begins, data = self._memory.read(position, READ_BYTES)
        except ValueError as error:
            raise InputOutputError(f"{self._parts.label}: {error}; start the capture anew") from None
        return {
            "captures": before["captures"],
            "head": before["head"],
            "position": begins,
            "data": base64.b64encode(data).decode("ascii"),
        }

    # ---- rules ----

    def set(self, message: Mapping[str, Any]) -> None:
        """Each of `trigger`, `keep` and `pretrigger_packets` that is there."""
        self._refuse_while_capturing()
        settings = list(self._memory.settings)
        if "trigger" in message:
            settings[0:4] = trigger_of(numbers(message, "trigger", 4))
        if "keep" in message:
            settings[4:7] = keep_of(numbers(message, "keep", 3))
        if "pretrigger_packets" in message:
            settings[7] = number(message, "pretrigger_packets", 0, MAX_PRETRIGGER_PACKETS)
        self._memory.configure(*settings)

    def set_filter(self, message: Mapping[str, Any]) -> None:
        self._refuse_while_capturing()
        index = number(message, "index", 0, memory.FILTERS - 1)
        expression = message.get("expression")
        if not isinstance(expression, str) or len(expression.encode()) > memory.FILTER_TEXT_BYTES:
            raise UsageError(f"a filter's expression is text of at most {memory.FILTER_TEXT_BYTES} bytes")
        program = self._compiled(expression) if expression else b""
        self._memory.set_filter(index, expression.encode(), program)

    def _compiled(self, expression: str) -> bytes:
        """For packets as the worker shows them, the tag in its place."""
        linktype = self._memory.figures()["linktype"] or LINKTYPE_ETHERNET
        program = bpf.compile_offline(linktype, expression).instructions
        if len(program) > memory.FILTER_INSTRUCTIONS * 8:
            raise UsageError(
                f"filter {expression[:80]!r} compiles to {len(program) // 8} instructions, at most "
                f"{memory.FILTER_INSTRUCTIONS} fit"
            )
        return program

    def _refuse_while_capturing(self) -> None:
        state = self._memory.figures()["state"]
        if state != "stopped":
            raise UsageError(f"{self._parts.label} is {state}: stop it before its rules are changed")

    # ---- start and stop ----

    async def start(self) -> None:
        self._refuse_while_capturing()
        settings = list(self._memory.settings)
        self._check_what_is_asked(settings)
        settings[8] = 4 if hands_up_fcs(self._parts.interface) else 0
        for index, text in self._memory.filters().items():
            self._memory.set_filter(index, text, self._compiled(text.decode("utf-8", "replace")))
        try:
            self._memory.provide(self._parts.port_fd)
        except OSError as error:
            raise InputOutputError(
                f"{self._parts.label}: {self._memory.capacity} bytes for the capture cannot be had ({error.strerror}); "
                "lower capture_buffer_bytes"
            ) from None
        self._memory.configure(*settings)
        await self._tell(memory.COMMAND_START)
        if self._memory.figures()["stopped_because"] == "bad filter":
            raise InputOutputError(f"{self._parts.label}: the capture worker refuses a filter's program")

    async def stop(self) -> None:
        if self._memory.figures()["state"] != "stopped":
            await self._tell(memory.COMMAND_STOP)

    def _check_what_is_asked(self, settings: Sequence[int]) -> None:
        """Whether this interface can do it. UsageError says what is missing."""
        start, start_filter, stop, stop_filter, kind, index, *_ = settings
        names = (START_CRITERIA[start], STOP_CRITERIA[stop], KEEP_KINDS[kind])
        if "FCSERR" in names and not hands_up_fcs(self._parts.interface):
            raise UsageError(
                f"{self._parts.label}: FCSERR needs the frames' check sequence, which {self._parts.interface} does not "
                f"hand up; a card that can does so after: ethtool -K {self._parts.interface} rx-fcs on rx-all on"
            )
        filters = self._memory.filters()
        for name, wanted in zip(names, (start_filter, stop_filter, index), strict=True):
            if name == "FILTER" and wanted not in filters:
                raise UsageError(f"{self._parts.label}: there is no filter {wanted}; set it first")

    async def _tell(self, command: int) -> None:
        request = self._memory.command(command, time.time_ns())
        deadline = time.monotonic() + ANSWER_TIMEOUT_S
        while not self._memory.is_answered(request):
            with contextlib.suppress(BlockingIOError):  # its counter is full: it has a wake to read already
                os.eventfd_write(self._parts.wake_fd, 1)
            if time.monotonic() > deadline:
                raise InputOutputError(
                    f"{self._parts.label}: its capture worker does not answer; is the service ending?"
                )
            await asyncio.sleep(ANSWER_EVERY_S)


# ---- what a client may say ----


def number(message: Mapping[str, Any], name: str, low: int, high: int) -> int:
    value = message.get(name)
    if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
        raise UsageError(f"{name} must be a whole number from {low} to {high}")
    return value


def numbers(message: Mapping[str, Any], name: str, count: int) -> list[int]:
    values = message[name]
    if not isinstance(values, list) or len(values) != count:
        raise UsageError(f"{name} must be a list of {count} whole numbers")
    return [number({f"{name}[{i}]": value}, f"{name}[{i}]", -1, U32) for i, value in enumerate(values)]


def trigger_of(values: Sequence[int]) -> list[int]:
    start, start_filter, stop, stop_filter = values
    if not (0 <= start < len(START_CRITERIA) and 0 <= stop < len(STOP_CRITERIA)):
        raise UsageError(
            f"a trigger starts with 0 to {len(START_CRITERIA) - 1} ({', '.join(START_CRITERIA)}) and stops with 0 to "
            f"{len(STOP_CRITERIA) - 1} ({', '.join(STOP_CRITERIA)})"
        )
    if not (0 <= start_filter < memory.FILTERS and 0 <= stop_filter < memory.FILTERS):
        raise UsageError(f"filters have the numbers 0 to {memory.FILTERS - 1}")
    return [start, start_filter, stop, stop_filter]


def keep_of(values: Sequence[int]) -> list[int]:
    kind, index, byte_count = values
    if not 0 <= kind < len(KEEP_KINDS):
        raise UsageError(f"what is kept is 0 to {len(KEEP_KINDS) - 1} ({', '.join(KEEP_KINDS)})")
    if index < 0 or (KEEP_KINDS[kind] == "FILTER" and index >= memory.FILTERS):
        raise UsageError(f"the index is a stream's number, or a filter's from 0 to {memory.FILTERS - 1}")
    if byte_count > MAX_BYTE_COUNT:
        raise UsageError(f"byte_count is -1 (no limit) or at most {MAX_BYTE_COUNT}")
    return [kind, index, byte_count & U32]


def link_speed_bps(interface: str) -> int:
    """0 when it is not known."""
    import psutil

    found = psutil.net_if_stats().get(interface)
    return max(0, found.speed) * 1_000_000 if found is not None else 0
