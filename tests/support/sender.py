"""Sends numbered frames through AF_PACKET at a steady rate: `python -m support.sender INTERFACE... [options]`.

Frames go round the interfaces one by one; the interface that stands n-th has the number n (or `--first-id` + n). What
the kernel refuses for want of room (ENOBUFS) is offered again, so a number is never left out: the report's counts are
exact. The report is one JSON object on the standard output; TERM ends the sending early and reports what was sent.
"""

from __future__ import annotations

import argparse
import ctypes
import errno
import json
import os
import signal
import socket
import sys
import time
from collections.abc import Callable
from types import FrameType

from support.frames import Shape, Template, parse_sizes

UNLIMITED = 1 << 62
_BATCH_INTERVAL_S = 0.0005  # at high rates a batch is what is due in this time
_MAXIMUM_BATCH = 64

_libc = ctypes.CDLL(None, use_errno=True)


class _Iovec(ctypes.Structure):
    _fields_ = [("base", ctypes.c_void_p), ("length", ctypes.c_size_t)]


class _Msghdr(ctypes.Structure):
    _fields_ = [
        ("name", ctypes.c_void_p),
        ("name_length", ctypes.c_uint32),
        ("iov", ctypes.c_void_p),
        ("iov_length", ctypes.c_size_t),
        ("control", ctypes.c_void_p),
        ("control_length", ctypes.c_size_t),
        ("flags", ctypes.c_int),
    ]


class _Mmsghdr(ctypes.Structure):
    _fields_ = [("header", _Msghdr), ("length", ctypes.c_uint)]


class Interface:
    """One interface's socket and the slots of its batch; a slot that keeps its template gets a new number only."""

    def __init__(self, name: str, interface_id: int, shape: Shape, batch: int, first_sequence: int) -> None:
        self.name = name
        self.interface_id = interface_id
        self.sent = 0
        self._first_sequence = first_sequence
        self.retries = 0
        self._shape = shape
        self._templates = [Template(interface_id, size, shape) for size in shape.sizes]
        self._slot_bytes = max(shape.sizes)
        self._batch = batch
        self._frames = bytearray(self._slot_bytes * batch)
        self._slots: list[Template | None] = [None] * batch
        base = ctypes.addressof(ctypes.c_char.from_buffer(self._frames))
        self._iovecs = (_Iovec * batch)()
        self._messages = (_Mmsghdr * batch)()
        for i in range(batch):
            self._iovecs[i].base = base + i * self._slot_bytes
            self._messages[i].header.iov = ctypes.addressof(self._iovecs[i])
            self._messages[i].header.iov_length = 1
        self._socket = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, 0)
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 8 << 20)
        self._socket.bind((name, 0))
        self._fd = self._socket.fileno()

    def send(self, count: int) -> int:
        """Sends up to `count` frames (at most a batch); returns how many went out."""
        count = min(count, self._batch)
        kinds = len(self._templates)
        sequence = self._first_sequence + self.sent
        for i in range(count):
            template = self._templates[sequence % kinds]
            offset = i * self._slot_bytes
            if self._slots[i] is not template:
                self._slots[i] = template
                self._frames[offset : offset + template.size] = template.frame
                self._iovecs[i].length = template.size
            template.number(self._frames, offset, sequence, self._shape.flow_of(sequence))
            sequence += 1
        return self._submit(count)

    def _submit(self, count: int) -> int:
        done: int = _libc.sendmmsg(self._fd, ctypes.byref(self._messages), count, 0)
        if done < 0:
            error = ctypes.get_errno()
            if error not in (errno.ENOBUFS, errno.EAGAIN, errno.EINTR):
                raise OSError(error, os.strerror(error), self.name)
            self.retries += 1
            time.sleep(0.0002)
            return 0
        self.sent += done
        return done


class Stop:
    """Set by TERM and INT; the loop looks at it once per round. `then` is called, too: whatever ends a long wait."""

    def __init__(self) -> None:
        self.wanted = False
        self.then: Callable[[], object] | None = None
        signal.signal(signal.SIGTERM, self._set)
        signal.signal(signal.SIGINT, self._set)
        signal.pthread_sigmask(signal.SIG_SETMASK, ())  # lab.py starts a sender with its signals blocked

    def _set(self, _number: int, _frame: FrameType | None) -> None:
        self.wanted = True
        if self.then is not None:
            self.then()


def run(interfaces: list[Interface], frames: int, rate_pps: float, stop: Stop) -> float:
    """Sends `frames` frames on each interface, at `rate_pps` in all (0: at the limit). Returns the seconds it took."""
    count = len(interfaces)
    total = frames * count
    started = time.perf_counter()
    sent = 0
    while sent < total and not stop.wanted:
        due = total if rate_pps == 0 else min(total, int((time.perf_counter() - started) * rate_pps) + 1)
        if due <= sent:
            time.sleep(max(0.0, started + sent / rate_pps - time.perf_counter()))
            continue
        share = max(1, (due - sent) // count)
        for interface in interfaces:
            if interface.sent < frames:
                sent += interface.send(min(share, frames - interface.sent))
    return time.perf_counter() - started


def batch_size(rate_pps: float, interfaces: int) -> int:
    """One frame per call while that can keep up, so that the interfaces alternate frame by frame."""
    if rate_pps == 0:
        return _MAXIMUM_BATCH
    return max(1, min(_MAXIMUM_BATCH, int(rate_pps * _BATCH_INTERVAL_S / interfaces) if rate_pps > 50_000 else 1))


def main() -> int:
    parser = argparse.ArgumentParser(prog="sender", description="Send numbered frames.")
    parser.add_argument("interfaces", nargs="+", metavar="INTERFACE")
    parser.add_argument("--frames", type=int, default=1000, help="per interface; 0: until TERM")
    parser.add_argument("--rate", type=float, default=0.0, help="frames per second, all interfaces together; 0: limit")
    parser.add_argument("--sizes", type=parse_sizes, default=(60,), help="bytes, comma-separated, or imix")
    parser.add_argument("--vlan", type=int)
    parser.add_argument("--udp", action="store_true")
    parser.add_argument("--flows", type=int, default=1)
    parser.add_argument("--first-id", type=int, default=0)
    parser.add_argument("--first-sequence", type=int, default=0)
    arguments = parser.parse_args()
    stop = Stop()
    shape = Shape(arguments.sizes, arguments.vlan, arguments.udp, arguments.flows)
    batch = batch_size(arguments.rate, len(arguments.interfaces))
    interfaces = [
        Interface(name, arguments.first_id + i, shape, batch, arguments.first_sequence)
        for i, name in enumerate(arguments.interfaces)
    ]
    seconds = run(interfaces, arguments.frames or UNLIMITED, arguments.rate, stop)
    sent = {interface.name: interface.sent for interface in interfaces}
    report = {
        "sent": sent,
        "ids": {interface.name: interface.interface_id for interface in interfaces},
        "first_sequence": arguments.first_sequence,
        "retries": sum(interface.retries for interface in interfaces),
        "seconds": seconds,
        "rate_pps": sum(sent.values()) / seconds if seconds else 0.0,
    }
    json.dump(report, sys.stdout)
    print()
    return 0


if __name__ == "__main__":
    sys.exit(main())
