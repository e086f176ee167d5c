"""Test traffic with a trailer of our own, on an interface that the user names: for loss, latency and errors per stream.

Frames are UDP in IPv4, whole in every checksum. Each carries its stream, its number, the time at which it was handed to
the kernel, and checksums, in a trailer that port capture knows (the layout is in appliance/capture/payload.pyi):

    Ethernet (14) | IPv4 (20) | UDP (8) | filling | trailer (36)

This is a probe, bounded in count and rate, not a load generator: it is Python, frame by frame.
"""

from __future__ import annotations

import errno
import ipaddress
import os
import re
import socket
import struct
import time
import zlib
from dataclasses import dataclass

from appliance.errors import InputOutputError, MissingInputError, MissingPermissionError, UsageError

MAGIC = 0x54504C31  # "TPL1"
TRAILER_BYTES = 36
HEADER_BYTES = 42
MIN_FRAME_BYTES = HEADER_BYTES + TRAILER_BYTES + 2  # something under the checksum
MAX_FRAME_BYTES = 9014
MAX_COUNT = 10_000_000
MAX_RATE_PPS = 100_000
MAX_STREAM = (1 << 32) - 1
DISCARD_PORT = 9  # RFC 863
SOURCE_PORT = 49152
FULL_WAIT_S = 0.0005
FULL_TRIES = 10_000  # five seconds without room
_TRAILER = struct.Struct("!IIQqII")  # without its own checksum
_MAC = re.compile(r"[0-9a-fA-F]{2}(:[0-9a-fA-F]{2}){5}", re.ASCII)


@dataclass(frozen=True)
class StreamShape:
    """What the frames of a stream have in common. `frame_bytes` is without check sequence."""

    stream: int = 0
    frame_bytes: int = 128
    destination_mac: str = "02:00:00:00:00:02"
    source_mac: str = "02:00:00:00:00:01"
    source: str = "192.0.2.1"
    destination: str = "192.0.2.2"

    def check(self) -> None:
        """UsageError: it cannot be sent."""
        if not MIN_FRAME_BYTES <= self.frame_bytes <= MAX_FRAME_BYTES:
            raise UsageError(f"a test frame has {MIN_FRAME_BYTES} to {MAX_FRAME_BYTES} bytes, not {self.frame_bytes}")
        if not 0 <= self.stream <= MAX_STREAM:
            raise UsageError(f"a stream's number is from 0 to {MAX_STREAM}, not {self.stream}")
        for mac in (self.destination_mac, self.source_mac):
            if not _MAC.fullmatch(mac):
                raise UsageError(f"{mac!r} is no address such as 02:00:00:00:00:02")
        for address in (self.source, self.destination):
            try:
                ipaddress.IPv4Address(address)
            except ValueError:
                raise UsageError(f"{address!r} is no IPv4 address") from None


class FrameMaker:
    """Makes the frames of one stream. What they have in common is computed once."""

    def __init__(self, stream: StreamShape) -> None:
        stream.check()
        self._stream = stream.stream
        udp_bytes = stream.frame_bytes - 34
        self._filling = bytes(i & 0xFF for i in range(udp_bytes - 8 - TRAILER_BYTES))
        self._filling_crc = zlib.crc32(self._filling)
        addresses = ipaddress.IPv4Address(stream.source).packed + ipaddress.IPv4Address(stream.destination).packed
        macs = bytes.fromhex((stream.destination_mac + stream.source_mac).replace(":", ""))
        ip = struct.pack("!BBHHHBBH", 0x45, 0, 20 + udp_bytes, 0, 0x4000, 64, socket.IPPROTO_UDP, 0) + addresses
        ip = ip[:10] + struct.pack("!H", internet_checksum(ip)) + ip[12:]
        self._head = macs + b"\x08\x00" + ip
        self._ports = struct.pack("!HHH", SOURCE_PORT, DISCARD_PORT, udp_bytes)
        self._pseudo = addresses + struct.pack("!HH", socket.IPPROTO_UDP, udp_bytes)

    def frame(self, sequence: int, timestamp_ns: int) -> bytes:
        trailer = _TRAILER.pack(MAGIC, self._stream, sequence, timestamp_ns, len(self._filling), self._filling_crc)
        payload = self._filling + trailer + struct.pack("!I", zlib.crc32(trailer))
        checksum = internet_checksum(self._pseudo + self._ports + b"\0\0" + payload) or 0xFFFF
        return self._head + self._ports + struct.pack("!H", checksum) + payload


def damaged(frame: bytes) -> bytes:
    """The same frame with one byte of its filling changed on the way."""
    return frame[:HEADER_BYTES] + bytes((frame[HEADER_BYTES] ^ 0x55,)) + frame[HEADER_BYTES + 1 :]


def internet_checksum(data: bytes) -> int:
    """RFC 1071: the complement of the ones' complement sum, which is the remainder by 2**16 - 1."""
    total = int.from_bytes(data + bytes(len(data) & 1), "big")
    return 0xFFFF - (total % 0xFFFF) if total else 0xFFFF


def generate(
    interface: str,
    stream: StreamShape,
    *,
    count: int,
    rate_pps: float,
    first_sequence: int = 0,
    damage_every: int = 0,
) -> int:
    """Sends `count` frames, numbered from `first_sequence`, at `rate_pps`; returns how many.

    `damage_every`: each so many-th frame's payload is damaged (0: none). MissingInputError: no such interface.
    MissingPermissionError: CAP_NET_RAW is missing. InputOutputError: the interface takes nothing. UsageError.
    """
    if not 1 <= count <= MAX_COUNT or not 0 < rate_pps <= MAX_RATE_PPS or first_sequence < 0 or damage_every < 0:
        raise UsageError(f"1 to {MAX_COUNT} frames, at most {MAX_RATE_PPS} a second; numbers from 0")
    maker = FrameMaker(stream)
    with open_interface(interface) as sock:
        started = time.perf_counter()
        for i in range(count):
            time.sleep(max(0.0, started + i / rate_pps - time.perf_counter()))
            frame = maker.frame(first_sequence + i, time.time_ns())
            send(sock, damaged(frame) if damage_every and (i + 1) % damage_every == 0 else frame, interface)
    return count


def open_interface(interface: str) -> socket.socket:
    """A packet socket that only sends."""
    try:
        sock = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, 0)
    except PermissionError:
        raise MissingPermissionError(f"interface {interface}: sending needs CAP_NET_RAW; run it with sudo") from None
    try:
        sock.bind((interface, 0))
    except OSError as error:
        sock.close()
        if error.errno == errno.ENODEV:
            raise MissingInputError(
                f"interface {interface} does not exist; `appliance interfaces` lists those that do"
            ) from None
        raise InputOutputError(f"interface {interface} cannot be opened: {error.strerror}") from None
    return sock


def send(sock: socket.socket, frame: bytes, interface: str) -> None:
    """One frame; what the kernel has no room for is offered again, so that no number is left out."""
    for _ in range(FULL_TRIES):
        try:
            sock.send(frame)
            return
        except OSError as error:
            if error.errno not in (errno.ENOBUFS, errno.EAGAIN):
                raise InputOutputError(f"interface {interface}: {os.strerror(error.errno or 0)}") from None
        time.sleep(FULL_WAIT_S)
    raise InputOutputError(f"interface {interface}: it takes no frame for {FULL_TRIES * FULL_WAIT_S:g} s")
