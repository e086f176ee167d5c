"""The monitor worker as a forked process, and the supervisor's ends of what it is given."""

from __future__ import annotations

import contextlib
import http.client
import os
import select
import signal
import socket
import traceback
from pathlib import Path

from monitor.pages import Appliance

from appliance.config import Config, Interface
from appliance.monitor.control import open_control_socket
from appliance.monitor.listener import open_listener
from appliance.process import WorkerContext
from appliance.ring.memory import allocate
from appliance.ring.ring import Producer, initialise
from workers.monitor import MonitorParts, main

GENERATION = 7
CAPACITY = 1 << 16


class Worker:
    """The forked monitor of `appliance`, and the supervisor's ends of everything."""

    def __init__(self, appliance: Appliance, control_path: Path) -> None:
        self.pages = appliance.pages
        self.control_path = control_path
        self.channel, child_channel = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        listener = open_listener("127.0.0.1", 0)
        control = open_control_socket(control_path)
        self.port = listener.getsockname()[1]
        ring_fd = allocate(CAPACITY, "uplink")
        initialise(ring_fd, CAPACITY, GENERATION)
        self.ring = Producer(ring_fd, GENERATION)
        parts = MonitorParts(listener.fileno(), control.fileno(), (("uplink", ring_fd),), GENERATION)
        page = appliance.pages["monitor"]
        config = Config(interfaces=(Interface(uri="ring:lo"),))
        context = WorkerContext("monitor", self.pages, page, child_channel, appliance.topology, config, parts)
        self.pid = os.fork()
        if self.pid == 0:
            self._work(context)
        child_channel.close()
        self.kept = (listener, control)

    def _work(self, context: WorkerContext) -> None:
        status = 1
        try:
            self.channel.close()
            status = main(context)
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(status)

    def get(self, path: str) -> tuple[int, bytes]:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=10)
        with contextlib.closing(connection):
            connection.request("GET", path)
            response = connection.getresponse()
            return response.status, response.read()

    def exit_status(self) -> int:
        """Waits for the end of the process; a process that does not end within 10 s fails the test."""
        pidfd = os.pidfd_open(self.pid)
        try:
            assert select.select([pidfd], [], [], 10)[0], "the worker does not end"
        finally:
            os.close(pidfd)
        status = os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])
        self.pid = 0
        return status

    def close(self) -> None:
        self.channel.close()
        if self.pid:
            os.kill(self.pid, signal.SIGKILL)
            os.waitpid(self.pid, 0)
        for opened in self.kept:
            opened.close()
