"""Sends numbered frames faster than sockets can: a BPF program in the kernel numbers and redirects live frames.

`python -m support.xdpsend INTERFACE... [options]`: options and report as of `support.sender`, one size per run, no UDP.
For benchmarks on veth pairs: every receiving end is named with `--receiver`, or the kernel drops the frames.

BPF_PROG_RUN with BPF_F_TEST_XDP_LIVE_FRAMES (Linux 5.18) runs an XDP program again and again over recycled pages and
acts on its verdict. The program, assembled by hand below, takes the next number from a map and waits for its time by
dropping frames until it has come, so a paced sender keeps one CPU busy. Then it writes number and interface into the
frame, round robin, renews the checksum and redirects. CRC-32 is affine: the checksum is that of number 0 on interface
0, exclusive-or one table entry for each byte of the number and one for the interface.

The count of frames redirected is exact; what the receiver's veth had no room for is missing from its rx_packets.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import json
import os
import platform
import signal
import socket
import struct
import sys
import time
from types import TracebackType
from typing import Self

from support.frames import MINIMUM_BYTES, SOURCE_ID_OFFSET, Shape, Template
from support.sender import UNLIMITED, Stop

_SYSCALL = {"x86_64": 321, "aarch64": 280}
_MAP_CREATE, _MAP_LOOKUP, _MAP_UPDATE, _PROG_LOAD, _PROG_RUN, _LINK_CREATE = 0, 1, 2, 5, 10, 28
_ARRAY, _XDP_PROGRAM, _XDP_ATTACH = 2, 6, 37
_LIVE_FRAMES = 1 << 1
_DRIVER_MODE = 1 << 2
_BATCH = 64  # frames between two flushes in the kernel; a veth's queue holds 256
_ENDLESS = (1 << 31) - 1
_MAXIMUM_INTERFACES = 16

# The map's one value: next frame, start (CLOCK_MONOTONIC, ns), ns per frame << 16, frames in all (u64 each); the
# interfaces (index, checksum difference: u32 each); eight tables of 256 checksum differences (u32), first byte first.
_STATE = struct.Struct("=QQQQ")
_INTERFACES_OFFSET = _STATE.size
_TABLES_OFFSET = _INTERFACES_OFFSET + 8 * _MAXIMUM_INTERFACES
_VALUE_BYTES = _TABLES_OFFSET + 8 * 256 * 4

_libc = ctypes.CDLL(None, use_errno=True)


def _bpf(command: int, layout: str, *values: int) -> int:
    number = _SYSCALL.get(platform.machine())
    if number is None:
        raise OSError(f"no system call number of bpf(2) for {platform.machine()}")
    attributes = ctypes.create_string_buffer(struct.pack("=" + layout, *values))
    result: int = _libc.syscall(number, command, attributes, len(attributes) - 1)
    if result < 0:
        raise OSError(ctypes.get_errno(), f"bpf({command}): {os.strerror(ctypes.get_errno())}")
    return result


def _instruction(code: int, target: int = 0, source: int = 0, offset: int = 0, immediate: int = 0) -> bytes:
    return struct.pack("<BBhi", code, source << 4 | target, offset, immediate)


def _numbering_program(map_fd: int, interfaces: int, template: Template) -> bytes:
    """r6 packet, r7 map's value, r8 number, r9 checksum. Opcodes: linux/bpf.h and linux/bpf_common.h."""
    step = _instruction
    base = template.checksum(0)
    code = [
        step(0x61, 6, 1, 0),  # r6 = data
        step(0x61, 2, 1, 4),  # r2 = data_end
        step(0xBF, 3, 6),
        step(0x07, 3, immediate=template.patch_offset + 12),
        step(0x2D, 3, 2, 1),  # the verifier wants to see that the frame is long enough
        step(0x05, offset=2),
        step(0xB7, 0, immediate=1),  # XDP_DROP
        step(0x95),
        step(0x62, 10, 0, -4, 0),  # key 0
        step(0x18, 1, 1, 0, map_fd),
        step(0),
        step(0xBF, 2, 10),
        step(0x07, 2, immediate=-4),
        step(0x85, immediate=1),  # bpf_map_lookup_elem
        step(0x55, 0, 0, 1, 0),
        step(0x95),
        step(0xBF, 7, 0),
        step(0x79, 8, 7, 0),  # next frame
        step(0x79, 1, 7, 24),
        step(0x2D, 1, 8, 2),  # frames in all > next frame, else drop
        step(0xB7, 0, immediate=1),
        step(0x95),
        step(0x85, immediate=5),  # bpf_ktime_get_ns
        step(0x79, 1, 7, 8),
        step(0x1F, 0, 1),  # since the start
        step(0x79, 1, 7, 16),
        step(0x2F, 1, 8),
        step(0x77, 1, immediate=16),
        step(0x3D, 0, 1, 2),  # due, else drop
        step(0xB7, 0, immediate=1),
        step(0x95),
        step(0xBF, 1, 8),
        step(0x07, 1, immediate=1),
        step(0x7B, 7, 1, 0),
        step(0xBF, 4, 8),
        step(0x97, 4, immediate=interfaces),  # r4 = interface
        step(0x37, 8, immediate=interfaces),
        step(0xBF, 5, 4),
        step(0x57, 5, immediate=_MAXIMUM_INTERFACES - 1),
        step(0x67, 5, immediate=3),
        step(0x0F, 5, 7),  # r5 = its entry
        step(0xB4, 9, immediate=base - (1 << 32) if base >> 31 else base),
        step(0x61, 3, 5, _INTERFACES_OFFSET + 4),
        step(0xAF, 9, 3),
    ]
    for byte in range(8):  # big-endian: the first byte on the wire is the highest
        code += [
            step(0xBF, 1, 8),
            step(0x77, 1, immediate=56 - 8 * byte),
            step(0x57, 1, immediate=0xFF),
            step(0x67, 1, immediate=2),
            step(0xBF, 2, 7),
            step(0x0F, 2, 1),
            step(0x61, 3, 2, _TABLES_OFFSET + byte * 1024),
            step(0xAF, 9, 3),
        ]
    code += [
        step(0xDC, 8, immediate=64),  # to big-endian
        step(0x7B, 6, 8, template.patch_offset),
        step(0xDC, 9, immediate=32),
        step(0x63, 6, 9, template.patch_offset + 8),
        step(0xDC, 4, immediate=16),
        step(0x6B, 6, 4, template.interface_offset),
        step(0x6B, 6, 4, SOURCE_ID_OFFSET),
        step(0x61, 1, 5, _INTERFACES_OFFSET),
        step(0xB7, 2, immediate=0),
        step(0x85, immediate=23),  # bpf_redirect
        step(0x95),
    ]
    return b"".join(code)


def _load(program: bytes) -> int:
    code = ctypes.create_string_buffer(program, len(program))
    licence = ctypes.create_string_buffer(b"GPL")
    log = ctypes.create_string_buffer(1 << 16)
    addresses = (ctypes.addressof(code), ctypes.addressof(licence), 1, len(log), ctypes.addressof(log))
    try:
        return _bpf(_PROG_LOAD, "IIQQIIQ", _XDP_PROGRAM, len(program) // 8, *addresses)
    except OSError as error:
        raise OSError(error.errno, f"{error.strerror}; the verifier says: {log.value.decode()[-500:]}") from None


def available() -> bool:
    """Whether this kernel lets this process send so."""
    program = _instruction(0xB7, 0, immediate=1) + _instruction(0x95)  # XDP_DROP
    frame = ctypes.create_string_buffer(MINIMUM_BYTES)
    try:
        fd = _load(program)
        try:
            values = (fd, 0, MINIMUM_BYTES, 0, ctypes.addressof(frame), 0, 1, 0, 0, 0, 0, 0, _LIVE_FRAMES, 0, 1)
            _bpf(_PROG_RUN, "IIIIQQIIIIQQIII", *values)
        finally:
            os.close(fd)
    except OSError:
        return False
    return True


class PassProgram:
    """A native XDP_PASS program on an interface while the `with` block lasts: a veth takes redirected frames then."""

    def __init__(self, interface: str) -> None:
        self._interface = interface

    def __enter__(self) -> Self:
        program = _load(_instruction(0xB7, 0, immediate=2) + _instruction(0x95))
        ifindex = _ifindex(self._interface)
        try:
            self._link = _bpf(_LINK_CREATE, "IIIIQ", program, ifindex, _XDP_ATTACH, _DRIVER_MODE, 0)
        finally:
            os.close(program)
        return self

    def __exit__(
        self, _type: type[BaseException] | None, _error: BaseException | None, _trace: TracebackType | None
    ) -> None:
        os.close(self._link)


class XdpSender:
    """Numbered frames of one size, round robin over the interfaces, which are numbered as they stand."""

    def __init__(self, interfaces: list[str], size: int, frames: int, rate_pps: float) -> None:
        """`frames` per interface, `rate_pps` of all together (0: the limit)."""
        if not 1 <= len(interfaces) <= _MAXIMUM_INTERFACES:
            raise ValueError(f"1 to {_MAXIMUM_INTERFACES} interfaces")
        self.interfaces = interfaces
        self.total = frames * len(interfaces)
        self.rate_pps = rate_pps
        shape = Shape((size,))
        template = Template(0, size, shape)
        self._frame = ctypes.create_string_buffer(template.frame, size)
        self._map = _bpf(_MAP_CREATE, "IIIII", _ARRAY, 4, _VALUE_BYTES, 1, 0)
        self._value = ctypes.create_string_buffer(_VALUE_BYTES)
        self._key = ctypes.c_uint32(0)
        base = template.checksum(0)
        for i, name in enumerate(interfaces):
            difference = Template(i, size, shape).checksum(0) ^ base
            struct.pack_into("=II", self._value, _INTERFACES_OFFSET + 8 * i, _ifindex(name), difference)
        tables = [template.checksum(value << (56 - 8 * byte)) ^ base for byte in range(8) for value in range(256)]
        struct.pack_into(f"={len(tables)}I", self._value, _TABLES_OFFSET, *tables)
        self._program = _load(_numbering_program(self._map, len(interfaces), template))

    def run(self, stop: Stop) -> float:
        """Sends until all is sent or `stop` is wanted; returns the seconds it took.

        A call into the kernel costs about 25 ms of set-up, so one call does it all: at the limit it runs so many
        times, paced it runs on until the timer's signal breaks it.
        """
        interval = int((1_000_000_000 << 16) / self.rate_pps) if self.rate_pps else 0
        signal.signal(signal.SIGALRM, lambda _number, _frame: None)
        started_ns = time.monotonic_ns()
        _STATE.pack_into(self._value, 0, 0, started_ns, interval, self.total)
        self._map_access(_MAP_UPDATE)
        while (left := self.total - self.sent) > 0 and not stop.wanted:
            if self.rate_pps:
                due_s = (started_ns - time.monotonic_ns()) / 1e9 + self.total / self.rate_pps
                signal.setitimer(signal.ITIMER_REAL, max(0.001, due_s))
            self._run_program(_ENDLESS if self.rate_pps else min(left, _ENDLESS))
        return (time.monotonic_ns() - started_ns) / 1e9

    @property
    def sent(self) -> int:
        """Frames redirected so far, of all interfaces."""
        self._map_access(_MAP_LOOKUP)
        return int(_STATE.unpack_from(self._value)[0])

    def sent_by_interface(self) -> dict[str, int]:
        rounds, rest = divmod(self.sent, len(self.interfaces))
        return {name: rounds + (i < rest) for i, name in enumerate(self.interfaces)}

    def _run_program(self, repeat: int) -> None:
        frame, size = ctypes.addressof(self._frame), len(self._frame)
        values = (self._program, 0, size, 0, frame, 0, repeat, 0, 0, 0, 0, 0, _LIVE_FRAMES, 0, _BATCH)
        try:
            _bpf(_PROG_RUN, "IIIIQQIIIIQQIII", *values)
        except InterruptedError:
            pass

    def _map_access(self, command: int) -> None:
        _bpf(command, "IIQQQ", self._map, 0, ctypes.addressof(self._key), ctypes.addressof(self._value), 0)


def _ifindex(interface: str) -> int:
    return socket.if_nametoindex(interface)


def main() -> int:
    parser = argparse.ArgumentParser(prog="xdpsend", description="Send numbered frames from the kernel.")
    parser.add_argument("interfaces", nargs="+", metavar="INTERFACE")
    parser.add_argument("--receiver", action="append", default=[], help="an interface that is to receive them")
    parser.add_argument("--frames", type=int, default=1_000_000, help="per interface; 0: until TERM")
    parser.add_argument("--rate", type=float, default=0.0, help="frames per second, all interfaces together; 0: limit")
    parser.add_argument("--size", type=int, default=MINIMUM_BYTES)
    arguments = parser.parse_args()
    stop = Stop()
    frames = arguments.frames or UNLIMITED // _MAXIMUM_INTERFACES
    with contextlib.ExitStack() as receivers:
        for name in arguments.receiver:
            receivers.enter_context(PassProgram(name))
        sender = XdpSender(arguments.interfaces, arguments.size, frames, arguments.rate)
        seconds = sender.run(stop)
    report = {
        "sent": sender.sent_by_interface(),
        "ids": {name: i for i, name in enumerate(sender.interfaces)},
        "first_sequence": 0,
        "retries": 0,
        "seconds": seconds,
        "rate_pps": sender.sent / seconds,
    }
    json.dump(report, sys.stdout)
    print()
    return 0


if __name__ == "__main__":
    sys.exit(main())
