"""A collector of flow records as a process of the lab."""

from __future__ import annotations

import sys
from pathlib import Path

from support.ipfix_sink import Received, read_messages
from support.lab import Lab

SINK = Path(__file__).with_name("ipfix_sink.py")


class Collector:
    """It writes what it receives to a file, connection by connection."""

    def __init__(self, lab: Lab, directory: Path, kind: str, port: int = 4739) -> None:
        self.path = directory / f"received-{kind}"
        self.lab = lab
        self.command = [sys.executable, str(SINK), kind, str(port), str(self.path)]
        self.process = lab.popen(self.command)

    def start_again(self) -> None:
        self.process.kill()
        self.process.wait()
        self.process = self.lab.popen(self.command)

    def received(self) -> Received:
        return read_messages(self.path)
