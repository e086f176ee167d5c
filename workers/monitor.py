"""The monitor worker: reads the counter pages and tells, over HTTP and the control socket. It asks no worker anything,
but for port capture, whose commands it leaves in a port's memory.

One event loop serves both; a thread looks up the host's figures, because a hung file system must not stop a scrape.
"""

from __future__ import annotations

import asyncio
import logging
import socket
from collections.abc import Mapping
from dataclasses import dataclass

from appliance.errors import InputOutputError
from appliance.monitor.control import ControlServer
from appliance.monitor.host import HostSampler
from appliance.monitor.ports import PortParts, Ports
from appliance.monitor.topology import changed
from appliance.monitor.view import Topology, View
from appliance.monitor.web import WebServer, application
from appliance.process import DRAIN, RELOAD, ROTATE, WorkerContext
from appliance.ring.ring import Mapping as RingMapping

log = logging.getLogger(__name__)

HEARTBEAT_S = 1.0


@dataclass(frozen=True)
class MonitorParts:
    """What a monitor worker needs besides its context.

    The supervisor opens both sockets (listener.open_listener, control.open_control_socket) before it forks: an address
    that is taken is then an error at the start, and a restarted monitor finds the clients that wait. -1: there is none.
    """

    listener_fd: int
    control_fd: int
    rings: tuple[tuple[str, int], ...]  # (label of the source, descriptor of its packet ring)
    generation: int
    ports: tuple[PortParts, ...] = ()

    @property
    def descriptors(self) -> tuple[int, ...]:
        fds = [self.listener_fd, self.control_fd, *(fd for _, fd in self.rings)]
        fds += [fd for port in self.ports for fd in (port.port_fd, port.wake_fd)]
        return tuple(fd for fd in fds if fd >= 0)


def main(context: WorkerContext) -> int:
    asyncio.run(Monitor(context, context.parts).run())
    return 0


class Monitor:
    """Serves until the supervisor says drain, or is gone."""

    def __init__(self, context: WorkerContext, parts: MonitorParts) -> None:
        self._topology: Topology = context.topology
        self._context = context
        self._parts = parts
        self._rings = {label: RingMapping(fd, parts.generation) for label, fd in parts.rings}
        self._host = HostSampler(context.pages, self._topology)
        self._view = View(context.pages, self._topology, ring_usage=self._ring_usage, host=self._host.figures)
        self._handlers = {
            "status": lambda: self._view.snapshot().as_json(),
            "rotate": self._rotate,
            "version": lambda: self._topology.version,
        }
        self._ports = Ports(parts.ports, parts.generation)
        self._drained = asyncio.Event()

    async def run(self) -> None:
        loop = asyncio.get_running_loop()
        loop.add_reader(self._context.channel, self._listen)
        self._host.start()
        beating = loop.create_task(self._beat())
        control = await self._serve_control()
        web, serving = self._serve_web(loop)
        await self._drained.wait()
        self._context.set_state("draining")
        if control is not None:
            control.close()
        if web is not None and serving is not None:
            web.end()
            await serving
        beating.cancel()
        self._host.stop()
        loop.remove_reader(self._context.channel)

    async def _serve_control(self) -> asyncio.AbstractServer | None:
        if self._parts.control_fd < 0:
            return None
        listener = socket.socket(fileno=self._parts.control_fd)
        return await ControlServer(self._handlers, self._context.page.add, {"capture": self._ports.answer}).start(
            listener
        )

    def _serve_web(self, loop: asyncio.AbstractEventLoop) -> tuple[WebServer | None, asyncio.Task[None] | None]:
        if self._parts.listener_fd < 0:
            return None, None
        server = WebServer(application(self._view.snapshot, self._context.page.add), self._context.page.add)
        return server, loop.create_task(server.serve([socket.socket(fileno=self._parts.listener_fd)]))

    async def _beat(self) -> None:
        while True:
            self._context.beat()
            await asyncio.sleep(HEARTBEAT_S)

    def _listen(self) -> None:
        for message in self._context.messages():
            if message == DRAIN:
                self._drained.set()
            elif message.startswith(RELOAD):
                self._topology = self._view.topology = changed(self._topology, message.removeprefix(RELOAD))

    def _rotate(self) -> str:
        try:
            self._context.channel.send(ROTATE, socket.MSG_DONTWAIT)
        except OSError as error:
            raise InputOutputError(f"the supervisor does not take the request: {error.strerror}") from None
        return "the open files will be closed and published"

    def _ring_usage(self) -> Mapping[str, int]:
        return {label: ring.used_bytes for label, ring in self._rings.items()}
