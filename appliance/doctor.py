"""What on this host stands in the way of a good capture, and what to do about it. Looks, and changes nothing."""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import importlib.metadata
import importlib.util
import os
import platform
import pwd
import shlex
import shutil
import socket
import struct
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import psutil

from appliance.capture.interfaces import HostInterface, host_interfaces
from appliance.config import Config, Output
from appliance.console import size_text
from appliance.plan import Plan, available_memory_bytes, make_plan
from appliance.process import CAP_NET_RAW, has_capability

Outcome = Literal["ok", "warn", "fail"]

# linux/if_packet.h
_SOL_PACKET, _PACKET_RX_RING, _PACKET_VERSION, _PACKET_IGNORE_OUTGOING, _TPACKET_V3 = 263, 5, 10, 23, 2
# linux/sockios.h, linux/ethtool.h
_SIOCETHTOOL = 0x8946
_ETHTOOL_GGRO, _ETHTOOL_GFLAGS = 0x2B, 0x25
_ETH_FLAG_LRO = 1 << 15
# linux/timex.h
_TIME_ERROR, _TIMEX_BYTES = 5, 512
_NETWORK_FILE_SYSTEMS = (
    "nfs",
    "nfs4",
    "cifs",
    "smb3",
    "smbfs",
    "9p",
    "ceph",
    "glusterfs",
    "afs",
    "sshfs",
    "fuse.sshfs",
)
_PACKAGES = (
    "pypcap", "multiprocessing-logging", "psutil", "lz4", "ipfix", "prometheus-client", "pydantic", "typer", "rich",
    "sdnotify", "starlette", "uvicorn", "zstandard",
)  # fmt: skip
_STAGING = ("work", "ready", "meta", "quarantine")


@dataclass(frozen=True)
class Check:
    """One finding. `advice` is what to do, "" when there is nothing to do."""

    check: str
    outcome: Outcome
    finding: str
    advice: str = ""


def examine(config: Config | None) -> list[Check]:
    """All checks; those that need a configuration (expanded already) only with one."""
    interfaces = host_interfaces()
    checks = [check_rights(), check_packet_socket(), check_clock(), check_packages(), check_workers_package()]
    names = captured_names(config, interfaces)
    checks += [check for interface in interfaces if interface.name in names for check in check_interface(interface)]
    if config is not None:
        checks += check_missing_interfaces(names, interfaces)
        checks.append(check_memory(make_plan(config)))
        checks += [check for output in config.outputs for check in check_output(output)]
        checks += check_listener(config)
    return checks


def captured_names(config: Config | None, interfaces: Sequence[HostInterface]) -> list[str]:
    """The live interfaces of the configuration; without one, those that `ring:*` would take."""
    if config is None:
        return [interface.name for interface in interfaces if not interface.left_out_because]
    return [interface.source.target for interface in config.interfaces if interface.source.is_live]


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


def user_name() -> str:
    """The name of the effective user; its number where it has none (containers)."""
    try:
        return pwd.getpwuid(os.geteuid()).pw_name
    except KeyError:
        return str(os.geteuid())


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


# Memory, disks, addresses ---------------------------------------------------------------------------------------------


def check_memory(plan: Plan) -> Check:
    kernel_bytes = sum(source.interface.kernel_ring_bytes for source in plan.live_sources)
    wanted = plan.memory_bytes + kernel_bytes
    available = min(psutil.virtual_memory().available, available_memory_bytes())
    finding = f"rings {size_text(plan.memory_bytes)} + kernel rings {size_text(kernel_bytes)}"
    finding += f", {size_text(available)} available"
    if wanted > available:
        return Check("memory", "fail", finding, "lower memory_bytes, or interface.kernel_ring_bytes")
    if wanted > available // 2:
        return Check("memory", "warn", finding, "lower memory_bytes if other programs need the rest")
    return Check("memory", "ok", finding)


def check_output(output: Output) -> Iterator[Check]:
    name = f"output {output.name}"
    directory = existing_ancestor(output.directory)
    devices = {path: os.stat(path).st_dev for path in _staging_paths(output.directory)}
    if len(set(devices.values())) > 1:
        places = ", ".join(os.path.basename(path) for path in devices)
        advice = "put them on one file system: files are renamed between them"
        yield Check(name, "fail", f"{output.directory}: {places} are on different file systems", advice)
    if not os.access(directory, os.W_OK | os.X_OK):
        advice = f"sudo chown {user_name()} {directory}; or set output.directory"
        yield Check(name, "fail", f"{directory}: user {user_name()} may not write there", advice)
    free, kind = psutil.disk_usage(str(directory)).free, file_system(directory)
    finding = f"{output.directory}: {size_text(free)} free on {kind}"
    if output.min_free_bytes and free < output.min_free_bytes:
        advice = "free some space, or lower output.min_free_bytes"
        yield Check(name, "fail", f"{finding}, below min_free_bytes {size_text(output.min_free_bytes)}", advice)
    elif kind in _NETWORK_FILE_SYSTEMS:
        yield Check(name, "warn", finding, "write to a local disk, and move finished files out of ready/")
    elif kind == "tmpfs":
        yield Check(name, "warn", finding, "tmpfs is memory, and empty after a restart of the machine")
    else:
        yield Check(name, "ok", finding)
    yield check_compressor(output)


def check_compressor(output: Output) -> Check:
    name = f"output {output.name}"
    if isinstance(output.compressor, str):
        return Check(name, "ok", f"compressor {output.compressor} needs no program")
    program = output.compressor[0]
    found = shutil.which(program)
    if found is None:
        return Check(name, "fail", f"compressor {program} is not installed", f'install {program}, or use "lz4"')
    return Check(name, "ok", f"compressor {found}")


def _staging_paths(directory: Path) -> list[str]:
    return [os.fspath(directory / part) for part in _STAGING if (directory / part).is_dir()]


def existing_ancestor(path: Path) -> Path:
    """The nearest directory above (or at) `path` that exists."""
    path = Path(os.path.abspath(path))
    return next(directory for directory in (path, *path.parents) if directory.is_dir())


def file_system(path: Path) -> str:
    """The kind of the file system that holds `path` ("ext4"), from the mount table."""
    real = os.path.realpath(path)
    best, kind = "", "unknown"
    with contextlib.suppress(OSError):
        for partition in psutil.disk_partitions(all=True):
            mount = partition.mountpoint
            inside = real == mount or real.startswith(mount.rstrip("/") + "/")
            if inside and len(mount) >= len(best):
                best, kind = mount, partition.fstype
    return kind


def check_listener(config: Config) -> Iterator[Check]:
    address = config.monitor.address
    if address is not None and address[0] not in ("127.0.0.1", "::1", "localhost"):
        yield Check(
            "monitor",
            "warn",
            f"listens on {config.monitor.listen}: whoever reaches it reads all figures, without a password",
            'set monitor.listen to "127.0.0.1:9750", or put a proxy with authentication before it',
        )
