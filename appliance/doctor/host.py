"""The host itself: rights, kernel, clock, what is installed, interfaces."""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import importlib.metadata
import importlib.util
import os
import platform
import shlex
import socket
import struct
import sys
from collections.abc import Iterator, Sequence

from appliance.capture.interfaces import HostInterface
from appliance.doctor.check import Check, user_name
from appliance.process import CAP_NET_RAW, has_capability

# linux/if_packet.h
_SOL_PACKET, _PACKET_RX_RING, _PACKET_VERSION, _PACKET_IGNORE_OUTGOING, _TPACKET_V3 = 263, 5, 10, 23, 2
# linux/sockios.h, linux/ethtool.h
_SIOCETHTOOL = 0x8946
_ETHTOOL_GGRO, _ETHTOOL_GFLAGS = 0x2B, 0x25
_ETH_FLAG_LRO = 1 << 15
# linux/timex.h
_TIME_ERROR, _TIMEX_BYTES = 5, 512
_PACKAGES = (
    "pypcap", "multiprocessing-logging", "psutil", "lz4", "ipfix", "prometheus-client", "pydantic", "typer", "rich",
    "sdnotify", "starlette", "uvicorn", "zstandard",
)  # fmt: skip


# Rights and kernel ----------------------------------------------------------------------------------------------------


def check_rights() -> Check:
    if has_capability(CAP_NET_RAW):
        return Check("right to capture", "ok", "CAP_NET_RAW is effective")
    user = user_name()
    return Check(
        "right to capture",
        "fail",
        f"user {user} lacks CAP_NET_RAW; files can be read, interfaces cannot",
        "sudo ./bootstrap run; or install systemd/appliance.service, which grants it; or keep your user: "
        f"sudo setpriv --reuid={user} --regid={os.getegid()} --init-groups --inh-caps=+net_raw --ambient-caps=+net_raw "
        f"{shlex.quote(os.path.abspath(sys.argv[0]))} run -c FILE",
    )


def check_packet_socket() -> Check:
    """Makes a small TPACKET_V3 ring, bound to nothing."""
    name = "kernel"
    release = platform.release()
    try:
        with socket.socket(socket.AF_PACKET, socket.SOCK_RAW, 0) as sock:
            sock.setsockopt(_SOL_PACKET, _PACKET_VERSION, _TPACKET_V3)
            sock.setsockopt(_SOL_PACKET, _PACKET_RX_RING, struct.pack("7I", 1 << 16, 1, 2048, 32, 8, 0, 0))
            sock.setsockopt(_SOL_PACKET, _PACKET_IGNORE_OUTGOING, 1)
    except PermissionError:
        return Check(name, "warn", f"Linux {release}; its packet rings cannot be tried without CAP_NET_RAW")
    except OSError as error:
        advice = "use Linux 4.20 or newer with CONFIG_PACKET; pcap:IF does without"
        return Check(name, "fail", f"Linux {release} has no TPACKET_V3 ring for us: {error.strerror}", advice)
    return Check(name, "ok", f"Linux {release} with TPACKET_V3")


def check_clock() -> Check:
    """Whether the kernel believes its clock (adjtimex(2)); a packet is worth no more than its time."""
    timex = ctypes.create_string_buffer(_TIMEX_BYTES)
    state = ctypes.CDLL(None, use_errno=True).adjtimex(timex)
    if state == _TIME_ERROR:
        return Check(
            "clock",
            "warn",
            "the clock is not synchronised",
            "start chrony or systemd-timesyncd: timedatectl set-ntp true",
        )
    if state < 0:
        return Check("clock", "warn", f"the clock's state is unknown: {os.strerror(ctypes.get_errno())}")
    return Check("clock", "ok", "the clock is synchronised")


# Installation ---------------------------------------------------------------------------------------------------------


def check_packages() -> Check:
    found, missing = [f"Python {platform.python_version()}"], []
    for package in _PACKAGES:
        try:
            found.append(f"{package} {importlib.metadata.version(package)}")
        except importlib.metadata.PackageNotFoundError:
            missing.append(package)
    if "pypcap" in missing and sys.version_info >= (3, 12):
        missing.remove("pypcap")
        found.append("no pypcap (it does not build here; pcap: goes through our own libpcap binding)")
    if missing:
        return Check("packages", "fail", f"missing: {', '.join(missing)}", f"pip install {' '.join(missing)}")
    return Check("packages", "ok", ", ".join(found))


def check_workers_package() -> Check:
    """Another distribution with a top-level `workers` overwrites ours, and pip says nothing."""
    ours = None
    with contextlib.suppress(ModuleNotFoundError):
        ours = importlib.util.find_spec("workers.capture")
    if ours is None or ours.origin is None:
        return Check(
            "workers",
            "fail",
            "the package `workers` is not ours: another distribution has one too",
            "install the appliance into a virtual environment of its own",
        )
    return Check("workers", "ok", os.path.dirname(ours.origin))


# Interfaces -----------------------------------------------------------------------------------------------------------


def check_interface(interface: HostInterface) -> Iterator[Check]:
    name = f"interface {interface.name}"
    if not interface.is_up:
        yield Check(name, "warn", "is down", f"sudo ip link set {interface.name} up")
        return
    merging = [feature for feature, is_on in receive_offloads(interface.name).items() if is_on]
    if merging and interface.kind != "loopback":
        off = " ".join(f"{feature} off" for feature in merging)
        yield Check(
            name,
            "warn",
            f"{' and '.join(merging)} on: the card or kernel joins packets before they are captured",
            f"sudo ethtool -K {interface.name} {off}",
        )
    else:
        yield Check(name, "ok", f"up, MTU {interface.mtu}" + (", no carrier" if not interface.has_carrier else ""))


def receive_offloads(interface: str) -> dict[str, bool]:
    """Whether GRO and LRO are on, as far as the driver tells (SIOCETHTOOL, needs no privilege)."""
    gro, flags = _ethtool_value(interface, _ETHTOOL_GGRO), _ethtool_value(interface, _ETHTOOL_GFLAGS)
    return {"gro": bool(gro), "lro": bool(flags & _ETH_FLAG_LRO)}


def _ethtool_value(interface: str, command: int) -> int:
    """The 32-bit value of one of ethtool's get commands; 0 when the driver has none."""
    value = (ctypes.c_uint32 * 2)(command, 0)  # struct ethtool_value
    request = struct.pack("16sP16x", os.fsencode(interface), ctypes.addressof(value))  # struct ifreq
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        try:
            fcntl.ioctl(sock, _SIOCETHTOOL, request)
        except OSError:
            return 0
    return int(value[1])


def check_missing_interfaces(names: Sequence[str], interfaces: Sequence[HostInterface]) -> Iterator[Check]:
    there = {interface.name for interface in interfaces}
    for name in names:
        if name not in there:
            advice = f"name one of: {', '.join(sorted(there))}"
            yield Check(f"interface {name}", "fail", "does not exist", advice)
