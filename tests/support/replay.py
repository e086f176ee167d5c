"""Sends the packets of a capture file through AF_PACKET: `python -m support.replay INTERFACE FILE [--rate PPS]`.

The report on the standard output is the number of packets sent. Only Ethernet, and only packets captured whole.
"""

from __future__ import annotations

import argparse
import errno
import os
import socket
import sys
import time
from collections.abc import Iterable
from pathlib import Path

from support.captures import write_pcap
from support.judges import LINKTYPE_ETHERNET, packets
from support.lab import TESTS_DIRECTORY, Lab


def replay(lab: Lab, interface: str, path: Path, rate: float = 10_000, namespace: str | None = None) -> int:
    """Sends the packets of a file from an interface of the lab, in their order; returns how many."""
    command = [sys.executable, "-m", "support.replay", interface, str(path), "--rate", str(rate)]
    environment = os.environ | {"PYTHONPATH": str(TESTS_DIRECTORY)}
    return int(lab.run(command, namespace=namespace, env=environment).stdout)


def send_frames(lab: Lab, interface: str, frames: Iterable[bytes], directory: Path, rate: float = 10_000) -> int:
    """Sends frames as they are given; `directory` is for a file in between."""
    path = write_pcap(directory / "frames.pcap", ((i, frame) for i, frame in enumerate(frames)))
    try:
        return replay(lab, interface, path, rate)
    finally:
        path.unlink()


def send(sock: socket.socket, frame: bytes) -> None:
    while True:
        try:
            sock.send(frame)
            return
        except OSError as error:
            if error.errno not in (errno.ENOBUFS, errno.EAGAIN):
                raise
            time.sleep(0.0002)


def main() -> None:
    parser = argparse.ArgumentParser(prog="replay", description="Send the packets of a capture file.")
    parser.add_argument("interface")
    parser.add_argument("file")
    parser.add_argument("--rate", type=float, default=10_000)
    arguments = parser.parse_args()
    sock = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, 0)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 8 << 20)
    sock.bind((arguments.interface, 0))
    started = time.perf_counter()
    sent = 0
    for packet in packets(arguments.file):
        if packet.linktype != LINKTYPE_ETHERNET or len(packet.data) != packet.original_length:
            raise SystemExit(f"{arguments.file}: packet {sent + 1} is not a whole Ethernet frame")
        time.sleep(max(0.0, started + sent / arguments.rate - time.perf_counter()))
        send(sock, bytes(packet.data))
        sent += 1
    print(sent)


if __name__ == "__main__":
    main()
