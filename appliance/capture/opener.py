"""Opens packet sockets: the one thing that needs a capability, in the one process that keeps one.

The socket is made for no protocol, gets its ring and its filter, and only then is bound: between a socket's birth and
its bind the kernel would hand it the packets of every interface (measured: the first packet after the bind of a socket
opened for ETH_P_ALL came from another interface).

The opener is a tiny process. It answers requests on a SOCK_SEQPACKET unix socket: JSON in, JSON out, the packet socket
beside it by SCM_RIGHTS.
"""

from __future__ import annotations

import array
import base64
import dataclasses
import errno
import fcntl
import json
import os
import socket
import struct
from typing import Any

from appliance.capture import bpf
from appliance.errors import ApplianceError, InputOutputError, MissingInputError, MissingPermissionError

ETH_P_ALL = 0x0003
SOL_PACKET = 263
PACKET_ADD_MEMBERSHIP = 1
PACKET_RX_RING = 5
PACKET_VERSION = 10
PACKET_FANOUT = 18
PACKET_FANOUT_HASH = 0
PACKET_IGNORE_OUTGOING = 23
PACKET_MR_PROMISC = 1
TPACKET_V3 = 2
SIOCGIFHWADDR = 0x8927
# A block holds the longest packet (262144 bytes and its headers). At a low rate each block time-out takes one block, so
# it is their number that says how long the ring bridges when nobody reads it: 128 of 8 ms are a second.
BLOCK_BYTES = 1 << 19
FRAME_BYTES = 2048
MESSAGE_BYTES = 65536

LINKTYPE_ETHERNET = 1
LINKTYPE_RAW = 101
LINKTYPE_RADIOTAP = 127
LINKTYPE_LINUX_SLL2 = 276
ARPHRD_LOOPBACK = 772
COMPILE_TIMEOUT_S = 4.0
FILTER_OF = "filter of"  # a request for the program alone
# Hardware types (linux/if_arp.h) whose frames have a link type of their own; all others are captured cooked.
LINKTYPES = {
    1: LINKTYPE_ETHERNET,
    ARPHRD_LOOPBACK: LINKTYPE_ETHERNET,
    512: LINKTYPE_RAW,  # PPP: the kernel hands over bare IP
    768: LINKTYPE_RAW,  # IPIP tunnel
    769: LINKTYPE_RAW,  # IP6 tunnel
    776: LINKTYPE_RAW,  # SIT
    778: LINKTYPE_RAW,  # GRE
    803: LINKTYPE_RADIOTAP,
    65534: LINKTYPE_RAW,  # tun
}


class OpenerGoneError(InputOutputError):
    """The opener process ended."""


@dataclasses.dataclass(frozen=True)
class OpenRequest:
    """What to open. `linktype` "sll2" asks for cooked packets whatever the hardware is."""

    interface: str
    filter: str = ""
    snaplen: int = 262144
    promiscuous: bool = True
    kernel_ring_bytes: int = 64 << 20
    block_timeout_ms: int = 8
    linktype: str = ""
    fanout_group: int = 0


@dataclasses.dataclass(frozen=True)
class OpenedInterface:
    """A packet socket, bound and filling its ring. The caller owns `fd`."""

    fd: int
    interface: str
    ifindex: int
    linktype: int
    cooked: bool
    block_bytes: int
    block_count: int


def open_interface(request: OpenRequest) -> OpenedInterface:
    """Opens one interface. Raises MissingInputError, MissingPermissionError, ConfigError (filter), InputOutputError."""
    name = request.interface
    ifindex = interface_index(name)
    hardware = hardware_type(name)
    linktype = captured_linktype(hardware, request.linktype)
    cooked = linktype == LINKTYPE_LINUX_SLL2
    try:
        sock = socket.socket(socket.AF_PACKET, socket.SOCK_DGRAM if cooked else socket.SOCK_RAW, 0)
    except PermissionError as error:
        raise MissingPermissionError(permission_message(name)) from error
    try:
        instructions = filter_instructions(request, cooked)
        block_count = max(2, request.kernel_ring_bytes // BLOCK_BYTES)
        set_up_ring(sock, block_count, request.block_timeout_ms)
        bpf.attach(sock.fileno(), instructions)
        if hardware == ARPHRD_LOOPBACK:
            # Every packet passes loopback twice, out and in.
            sock.setsockopt(SOL_PACKET, PACKET_IGNORE_OUTGOING, 1)
        if request.promiscuous:
            sock.setsockopt(SOL_PACKET, PACKET_ADD_MEMBERSHIP, struct.pack("iHH8s", ifindex, PACKET_MR_PROMISC, 0, b""))
        sock.bind((name, ETH_P_ALL))
        if request.fanout_group:
            sock.setsockopt(SOL_PACKET, PACKET_FANOUT, request.fanout_group | PACKET_FANOUT_HASH << 16)
        return OpenedInterface(sock.detach(), name, ifindex, linktype, cooked, BLOCK_BYTES, block_count)
    except OSError as error:
        if error.errno == errno.ENODEV:
            raise MissingInputError(f"interface {name} does not exist") from error
        if error.errno in (errno.EPERM, errno.EACCES):
            raise MissingPermissionError(permission_message(name)) from error
        if error.errno == errno.ENOMEM:
            raise InputOutputError(
                f"interface {name}: the kernel has no memory for a ring of {request.kernel_ring_bytes} bytes; "
                "lower kernel_ring_bytes"
            ) from error
        raise InputOutputError(f"interface {name} cannot be opened: {error}") from error
    finally:
        sock.close()


def captured_linktype(hardware: int, asked: str) -> int:
    """The link type that an interface of this hardware type (ARPHRD_*) is captured with; `asked` as in OpenRequest."""
    return LINKTYPE_LINUX_SLL2 if asked == "sll2" else LINKTYPES.get(hardware, LINKTYPE_LINUX_SLL2)


def permission_message(name: str) -> str:
    return (
        f"interface {name}: capturing needs CAP_NET_RAW, which this process does not have; "
        "run it with sudo, or install the service (systemd/appliance.service grants it)"
    )


def interface_index(name: str) -> int:
    try:
        return socket.if_nametoindex(name)
    except OSError as error:
        raise MissingInputError(
            f"interface {name} does not exist; `appliance interfaces` lists those that do"
        ) from error


def hardware_type(name: str) -> int:
    """ARPHRD_* of an interface (netdevice(7), SIOCGIFHWADDR)."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        answer = fcntl.ioctl(sock, SIOCGIFHWADDR, struct.pack("16sH22x", name.encode(), 0))
    return int(struct.unpack_from("H", answer, 16)[0])


def filter_instructions(request: OpenRequest, cooked: bool) -> bytes:
    if not request.filter:
        return bpf.accept_all(request.snaplen)
    if cooked:
        # libpcap compiles cooked filters for its own pseudo-header, which a SOCK_DGRAM socket's packets do not have.
        return bpf.compile_offline(LINKTYPE_RAW, request.filter, request.snaplen).instructions
    return bpf.compile_live(request.interface, request.filter, request.snaplen).instructions


def set_up_ring(sock: socket.socket, block_count: int, block_timeout_ms: int) -> None:
    """PACKET_RX_RING with struct tpacket_req3 (linux/if_packet.h)."""
    frames = BLOCK_BYTES // FRAME_BYTES * block_count
    sock.setsockopt(SOL_PACKET, PACKET_VERSION, TPACKET_V3)
    ring = struct.pack("7I", BLOCK_BYTES, block_count, FRAME_BYTES, frames, block_timeout_ms, 0, 0)
    sock.setsockopt(SOL_PACKET, PACKET_RX_RING, ring)


def interface_exists(ifindex: int) -> bool:
    """Whether an interface has this index. One that is deleted and made anew gets another."""
    try:
        socket.if_indextoname(ifindex)
    except OSError:
        return False
    return True


def stop_accepting(fd: int) -> None:
    """From now on the kernel adds nothing to this socket's ring; what it holds stays."""
    bpf.attach(fd, bpf.reject_all())


def send_opened(channel: socket.socket, opened: OpenedInterface, flags: int = 0) -> None:
    """A packet socket over a unix socket, with what is known of it. OSError as for sendmsg(2)."""
    # socket.send_fds and recv_fds of Python 3.11 take flags, and ignore them.
    rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [opened.fd]))]
    channel.sendmsg([json.dumps(dataclasses.asdict(opened)).encode()], rights, flags)


def receive(channel: socket.socket, flags: int = 0) -> tuple[bytes, int]:
    """A message, and the descriptor that came with it or -1. OSError as for recvmsg(2)."""
    message, ancillary, _, _ = channel.recvmsg(MESSAGE_BYTES, socket.CMSG_SPACE(array.array("i").itemsize), flags)
    for level, kind, data in ancillary:
        if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
            return message, array.array("i", data)[0]
    return message, -1


def parse_opened(message: bytes, fd: int) -> OpenedInterface:
    return OpenedInterface(**{**json.loads(message), "fd": fd})


# ---- the process ----


def serve(channel: socket.socket) -> None:
    """The opener's loop: one request, one answer, until the other end closes."""
    while message := channel.recv(MESSAGE_BYTES):
        try:
            fields = json.loads(message)
            if FILTER_OF in fields:
                channel.send(json.dumps({"filter": compiled_filter(OpenRequest(**fields[FILTER_OF]))}).encode())
                continue
            opened = open_interface(OpenRequest(**fields))
        except (ApplianceError, OSError) as error:
            answer = {"error": str(error), "kind": type(error).__name__}
            channel.send(json.dumps(answer).encode())
            continue
        send_opened(channel, opened)
        os.close(opened.fd)


def compiled_filter(request: OpenRequest) -> str:
    """Base64 of the program (struct sock_filter) that a socket opened for `request` would have."""
    cooked = captured_linktype(hardware_type(request.interface), request.linktype) == LINKTYPE_LINUX_SLL2
    return base64.b64encode(filter_instructions(request, cooked)).decode()


class OpenerClient:
    """The supervisor's end. Requests are answered in order; `open` waits, `ask`/`answer` do not."""

    def __init__(self, channel: socket.socket) -> None:
        self.channel = channel

    def ask(self, request: OpenRequest) -> None:
        self.channel.send(json.dumps(dataclasses.asdict(request)).encode())

    def answer(self) -> OpenedInterface:
        """The oldest outstanding answer. Raises what the opener raised; OpenerGoneError when it has ended."""
        fields, fd = self._receive()
        return OpenedInterface(**{**fields, "fd": fd})

    def compile(self, request: OpenRequest) -> bytes:
        """The program for an interface's filter (bpf.attach); waits. Raises as `answer`. Nothing may be outstanding."""
        try:
            self.channel.send(json.dumps({FILTER_OF: dataclasses.asdict(request)}).encode())
        except OSError:
            raise OpenerGoneError("the opener process is gone") from None
        self.channel.settimeout(COMPILE_TIMEOUT_S)
        try:
            fields, _ = self._receive()
        except TimeoutError:
            raise OpenerGoneError(f"the opener process has not answered within {COMPILE_TIMEOUT_S:g} s") from None
        finally:
            self.channel.settimeout(None)
        return base64.b64decode(fields["filter"])

    def _receive(self) -> tuple[dict[str, Any], int]:
        from appliance import errors

        try:
            message, fd = receive(self.channel)
        except ConnectionError:
            message = b""
        if not message:
            raise OpenerGoneError("the opener process is gone")
        fields = json.loads(message)
        if "error" in fields:
            kind = getattr(errors, fields["kind"], InputOutputError)
            raise kind(fields["error"])
        return fields, fd

    def open(self, request: OpenRequest) -> OpenedInterface:
        self.ask(request)
        return self.answer()
