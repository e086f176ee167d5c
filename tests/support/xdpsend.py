"""Sends numbered frames faster than sockets can: a BPF program in the kernel numbers and redirects live frames.

`python -m support.xdpsend INTERFACE... [options]`: options and report as of `support.sender`, without VLAN tags.
For benchmarks on veth pairs: every receiving end is named with `--receiver`, or the kernel drops the frames.

BPF_PROG_RUN with BPF_F_TEST_XDP_LIVE_FRAMES (Linux 5.18) runs an XDP program again and again over recycled pages and
acts on its verdict. The program, assembled by hand below, takes the next number from a map and waits for its time by
dropping frames until it has come, so a paced sender keeps one CPU busy. Then it cuts the frame to its size, writes
number, interface and flow into it, round robin, renews the checksum and redirects. CRC-32 is affine: the checksum is
that of number 0 on that interface and of that size, exclusive-or one table entry for each byte of the number.

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

from support.frames import (
    FLOWS_PER_DESTINATION_PORT,
    MINIMUM_BYTES,
    SOURCE_ID_OFFSET,
    UDP_DESTINATION_PORT,
    UDP_SOURCE_PORT,
    Shape,
    Template,
    parse_sizes,
)
from support.sender import UNLIMITED, Stop

_SYSCALL = {"x86_64": 321, "aarch64": 280}
_MAP_CREATE, _MAP_LOOKUP, _MAP_UPDATE, _PROG_LOAD, _PROG_RUN, _LINK_CREATE = 0, 1, 2, 5, 10, 28
_ARRAY, _XDP_PROGRAM, _XDP_ATTACH = 2, 6, 37
_LIVE_FRAMES = 1 << 1
_DRIVER_MODE = 1 << 2
_BATCH = 64  # frames between two flushes in the kernel; a veth's queue holds 256
_ENDLESS = (1 << 31) - 1
_MAXIMUM_INTERFACES = 16
_MAXIMUM_SIZES = 16
_TICK_S = 0.05  # between the signals that end a call into the kernel, once it should end

# The map's one value: next frame, start (CLOCK_MONOTONIC, ns), ns per frame << 16, frames in all (u64 each); the
# interfaces' indices (u32); for each interface and each size an entry; eight tables of 256 checksum differences (u32),
# first byte first. An entry: checksum of number 0, octets to cut off as a negative number (u32 each), IP length, IP
# checksum, UDP length (as on the wire), 2 unused.
_STATE = struct.Struct("=QQQQ")
_ENTRY = struct.Struct("=Ii2s2s2sxx")
_INTERFACES_OFFSET = _STATE.size
_ENTRIES_OFFSET = _INTERFACES_OFFSET + 4 * _MAXIMUM_INTERFACES
_TABLES_OFFSET = _ENTRIES_OFFSET + _ENTRY.size * _MAXIMUM_INTERFACES * _MAXIMUM_SIZES
_VALUE_BYTES = _TABLES_OFFSET + 8 * 256 * 4

# In an untagged frame of IPv4 and UDP.
_IP_LENGTH, _IP_CHECKSUM, _IP_SOURCE_ID, _PORTS, _UDP_LENGTH = 16, 24, 28, 34, 38

MAXIMUM_BYTES = 3000  # a frame, its headroom and the kernel's own data share a page
LONGEST_CALL_S = 1e6  # an endless sender has no end that a timer could take

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


def _numbering_program(map_fd: int, interfaces: int, template: Template, shape: Shape) -> bytes:
    """r6 context, then packet; r7 map's value; r8 number; r9 entry. Opcodes: linux/bpf.h and linux/bpf_common.h."""
    return b"".join(
        [
            *_choose(map_fd, interfaces, len(shape.sizes)),
            *(_cut() if len(shape.sizes) > 1 else ()),
            *_find_packet(template.patch_offset + 12),
            *_checksum(),
            *(_flow(shape.flows) if shape.udp else ()),
            *_write(template, shape.udp),
        ]
    )


_step = _instruction
_DROP = (_step(0xB7, 0, immediate=1), _step(0x95))


def _choose(map_fd: int, interfaces: int, sizes: int) -> list[bytes]:
    """Takes the next number when its time has come; the interface goes to the stack at -16."""
    step = _step
    return [
        step(0xBF, 6, 1),  # r6 = context
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
        *_DROP,
        step(0x85, immediate=5),  # bpf_ktime_get_ns
        step(0x79, 1, 7, 8),
        step(0x1F, 0, 1),  # since the start
        step(0x79, 1, 7, 16),
        step(0x2F, 1, 8),
        step(0x77, 1, immediate=16),
        step(0x3D, 0, 1, 2),  # due, else drop
        *_DROP,
        step(0xBF, 1, 8),
        step(0x07, 1, immediate=1),
        step(0x7B, 7, 1, 0),
        step(0xBF, 4, 8),
        step(0x97, 4, immediate=interfaces),
        step(0x37, 8, immediate=interfaces),
        step(0x57, 4, immediate=_MAXIMUM_INTERFACES - 1),  # the verifier wants to see the bound
        step(0x7B, 10, 4, -16),
        step(0xBF, 9, 8),
        step(0x97, 9, immediate=sizes),
        step(0x57, 9, immediate=_MAXIMUM_SIZES - 1),
        step(0x27, 4, immediate=_MAXIMUM_SIZES),
        step(0x0F, 9, 4),
        step(0x27, 9, immediate=_ENTRY.size),
        step(0x0F, 9, 7),
        step(0x07, 9, immediate=_ENTRIES_OFFSET),  # r9 = the entry
    ]


def _cut() -> list[bytes]:
    """The frame is as long as the longest; shorter ones lose their end."""
    return [
        _step(0xBF, 1, 6),
        _step(0x61, 2, 9, 4),
        _step(0x67, 2, immediate=32),  # sign extension
        _step(0xC7, 2, immediate=32),
        _step(0x85, immediate=65),  # bpf_xdp_adjust_tail
        _step(0x15, 0, 0, 2, 0),
        *_DROP,
    ]


def _find_packet(needed_bytes: int) -> list[bytes]:
    return [
        _step(0x61, 2, 6, 4),  # r2 = data_end
        _step(0x61, 6, 6, 0),  # r6 = data
        _step(0xBF, 3, 6),
        _step(0x07, 3, immediate=needed_bytes),
        _step(0xBD, 3, 2, 2),  # the verifier wants to see that the frame is long enough
        *_DROP,
    ]


def _checksum() -> list[bytes]:
    """r3 = the checksum of this number."""
    code = [_step(0x61, 3, 9, 0)]
    for byte in range(8):  # big-endian: the first byte on the wire is the highest
        code += [
            _step(0xBF, 1, 8),
            _step(0x77, 1, immediate=56 - 8 * byte),
            _step(0x57, 1, immediate=0xFF),
            _step(0x67, 1, immediate=2),
            _step(0xBF, 2, 7),
            _step(0x0F, 2, 1),
            _step(0x61, 5, 2, _TABLES_OFFSET + byte * 1024),
            _step(0xAF, 3, 5),
        ]
    return code


def _flow(flows: int) -> list[bytes]:
    """The ports of flow `number % flows`, and the lengths."""
    code = [
        _step(0xBF, 1, 8),
        _step(0x97, 1, immediate=flows),
        _step(0xBF, 2, 1),
        _step(0x97, 1, immediate=FLOWS_PER_DESTINATION_PORT),
        _step(0x37, 2, immediate=FLOWS_PER_DESTINATION_PORT),
        _step(0x07, 1, immediate=UDP_SOURCE_PORT),
        _step(0x07, 2, immediate=UDP_DESTINATION_PORT),
        _step(0xDC, 1, immediate=16),
        _step(0xDC, 2, immediate=16),
        _step(0x6B, 6, 1, _PORTS),
        _step(0x6B, 6, 2, _PORTS + 2),
    ]
    for offset, target in ((8, _IP_LENGTH), (10, _IP_CHECKSUM), (12, _UDP_LENGTH)):
        code += [_step(0x69, 1, 9, offset), _step(0x6B, 6, 1, target)]
    return code


def _write(template: Template, udp: bool) -> list[bytes]:
    """Number, checksum, interface; then off."""
    code = [
        _step(0xDC, 8, immediate=64),  # to big-endian
        _step(0x7B, 6, 8, template.patch_offset),
        _step(0xDC, 3, immediate=32),
        _step(0x63, 6, 3, template.patch_offset + 8),
        _step(0x79, 4, 10, -16),  # r4 = interface
        _step(0xBF, 5, 4),
        _step(0x57, 5, immediate=_MAXIMUM_INTERFACES - 1),
        _step(0x67, 5, immediate=2),
        _step(0x0F, 5, 7),
        _step(0x61, 1, 5, _INTERFACES_OFFSET),
        _step(0xDC, 4, immediate=16),
        _step(0x6B, 6, 4, template.interface_offset),
        _step(0x6B, 6, 4, SOURCE_ID_OFFSET),
    ]
    if udp:
        code.append(_step(0x6B, 6, 4, _IP_SOURCE_ID))
    return [*code, _step(0xB7, 2, immediate=0), _step(0x85, immediate=23), _step(0x95)]  # bpf_redirect


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
    """Numbered frames, round robin over the interfaces, which are numbered as they stand."""

    def __init__(
        self, interfaces: list[str], shape: Shape, frames: int, rate_pps: float, first_sequence: int = 0
    ) -> None:
        """`frames` per interface, from number `first_sequence` on; `rate_pps` of all together (0: the limit)."""
        if not 1 <= len(interfaces) <= _MAXIMUM_INTERFACES or len(shape.sizes) > _MAXIMUM_SIZES:
            raise ValueError(f"1 to {_MAXIMUM_INTERFACES} interfaces, up to {_MAXIMUM_SIZES} sizes")
        if shape.vlan is not None or max(shape.sizes) > MAXIMUM_BYTES:
            raise ValueError(f"no VLAN tag, and no more than {MAXIMUM_BYTES} bytes")
        self.interfaces = interfaces
        self.total = frames * len(interfaces)
        self._first = first_sequence * len(interfaces)
        self.rate_pps = rate_pps
        largest = Template(0, max(shape.sizes), shape)
        self._frame = ctypes.create_string_buffer(largest.frame, largest.size)
        self._map = _bpf(_MAP_CREATE, "IIIII", _ARRAY, 4, _VALUE_BYTES, 1, 0)
        self._value = ctypes.create_string_buffer(_VALUE_BYTES)
        self._key = ctypes.c_uint32(0)
        base = largest.checksum(0)
        for i, name in enumerate(interfaces):
            struct.pack_into("=I", self._value, _INTERFACES_OFFSET + 4 * i, _ifindex(name))
            for place, size in enumerate(shape.sizes):
                offset = _ENTRIES_OFFSET + _ENTRY.size * (_MAXIMUM_SIZES * i + place)
                entry = _entry(Template(i, size, shape), largest.size)
                struct.pack_into(f"{_ENTRY.size}s", self._value, offset, entry)
        tables = [largest.checksum(value << (56 - 8 * byte)) ^ base for byte in range(8) for value in range(256)]
        struct.pack_into(f"={len(tables)}I", self._value, _TABLES_OFFSET, *tables)
        self._program = _load(_numbering_program(self._map, len(interfaces), largest, shape))

    def run(self, stop: Stop) -> float:
        """Sends until all is sent or `stop` is wanted; returns the seconds it took.

        A call into the kernel costs about 25 ms of set-up, so one call does it all: at the limit it runs so many
        times, paced it runs on until a timer's signal breaks it. A signal that comes just before the call breaks
        nothing, so the timer goes on ticking; TERM and INT set it ticking, too.
        """
        interval = int((1_000_000_000 << 16) / self.rate_pps) if self.rate_pps else 0
        signal.signal(signal.SIGALRM, lambda _number, _frame: None)
        stop.then = lambda: signal.setitimer(signal.ITIMER_REAL, _TICK_S, _TICK_S)
        started_ns = time.monotonic_ns()
        # Frame 0 would have been due so much earlier.
        origin_ns = started_ns - (self._first * interval >> 16)
        _STATE.pack_into(self._value, 0, self._first, origin_ns, interval, self._first + self.total)
        self._map_access(_MAP_UPDATE)
        try:
            while (left := self.total - self.sent) > 0 and not stop.wanted:
                due_s = 0.0  # what is late is all due, and goes at the limit
                if self.rate_pps:
                    due_s = max(0.0, (started_ns - time.monotonic_ns()) / 1e9 + self.total / self.rate_pps)
                    signal.setitimer(signal.ITIMER_REAL, min(due_s, LONGEST_CALL_S), _TICK_S)
                self._run_program(_ENDLESS if due_s else min(left, _ENDLESS))
        finally:
            stop.then = None
            signal.setitimer(signal.ITIMER_REAL, 0)
        return (time.monotonic_ns() - started_ns) / 1e9

    @property
    def sent(self) -> int:
        """Frames redirected so far, of all interfaces."""
        self._map_access(_MAP_LOOKUP)
        return int(_STATE.unpack_from(self._value)[0]) - self._first

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


def _entry(template: Template, largest_bytes: int) -> bytes:
    """What is different about the frames of one interface and one size; the fields of IP and UDP matter with UDP."""
    frame = template.frame
    fields = (frame[at : at + 2] for at in (_IP_LENGTH, _IP_CHECKSUM, _UDP_LENGTH))
    return _ENTRY.pack(template.checksum(0), template.size - largest_bytes, *fields)


def _ifindex(interface: str) -> int:
    return socket.if_nametoindex(interface)


def main() -> int:
    parser = argparse.ArgumentParser(prog="xdpsend", description="Send numbered frames from the kernel.")
    parser.add_argument("interfaces", nargs="+", metavar="INTERFACE")
    parser.add_argument("--receiver", action="append", default=[], help="an interface that is to receive them")
    parser.add_argument("--frames", type=int, default=1_000_000, help="per interface; 0: until TERM")
    parser.add_argument("--rate", type=float, default=0.0, help="frames per second, all interfaces together; 0: limit")
    parser.add_argument("--sizes", type=parse_sizes, default=(MINIMUM_BYTES,), help="bytes, comma-separated, or imix")
    parser.add_argument("--udp", action="store_true")
    parser.add_argument("--flows", type=int, default=1)
    parser.add_argument("--first-sequence", type=int, default=0)
    arguments = parser.parse_args()
    stop = Stop()
    frames = arguments.frames or UNLIMITED // _MAXIMUM_INTERFACES
    shape = Shape(arguments.sizes, None, arguments.udp, arguments.flows)
    with contextlib.ExitStack() as receivers:
        for name in arguments.receiver:
            receivers.enter_context(PassProgram(name))
        sender = XdpSender(arguments.interfaces, shape, frames, arguments.rate, arguments.first_sequence)
        seconds = sender.run(stop)
    report = {
        "sent": sender.sent_by_interface(),
        "ids": {name: i for i, name in enumerate(sender.interfaces)},
        "first_sequence": arguments.first_sequence,
        "retries": 0,
        "seconds": seconds,
        "rate_pps": sender.sent / seconds,
    }
    json.dump(report, sys.stdout)
    print()
    return 0


if __name__ == "__main__":
    sys.exit(main())
