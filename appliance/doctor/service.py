"""What a configuration asks of the host: whatever keeps the service from starting, or from going on for long."""

from __future__ import annotations

import contextlib
import errno
import os
import resource
import socket
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil

from appliance.config import Config, Output
from appliance.console import size_text
from appliance.doctor.check import Check, Outcome, user_name
from appliance.errors import ApplianceError, CannotCreateError
from appliance.monitor.listener import open_listener
from appliance.plan import Plan, available_memory_bytes, make_plan
from appliance.prepare import LOCK_FILE, check_all_cpus, check_programs, is_locked
from appliance.process import account_of, check_user, has_access

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
_STAGING = ("work", "ready", "meta", "quarantine")


def check_service(config: Config) -> Iterator[Check]:
    """`config`: expanded. What belongs to a service that runs with it already is not held against it."""
    plan = make_plan(config)
    user = config.service.user
    yield check_memory(plan)
    yield asked("cpus", lambda: check_all_cpus(config), "every worker has its CPUs", 'correct the "cpus" named')
    yield asked("open files", lambda: check_open_files(plan), f"{plan.open_files} are allowed", "raise the limit")
    if user:
        advice = f"sudo useradd --system {user}; and run the service as root, or leave service.user out"
        yield asked("user", lambda: check_user(user), f"{user} exists", advice)
        user = user if os.geteuid() == 0 and exists(user) else ""
    for output in config.outputs:
        yield from check_output(output, user)
        yield check_output_programs(output, user)
    if any(is_locked(os.fspath(output.directory / LOCK_FILE)) for output in config.outputs):
        yield Check("service", "ok", "an instance runs with these directories; the addresses are its own")
    else:
        yield from check_addresses(config)
    yield from check_exposure(config)
    if config.meter.enabled:
        yield from check_meter(config, user)


def asked(name: str, question: Callable[[], object], good: str, advice: str) -> Check:
    """The finding of a check that the start makes as well."""
    try:
        question()
    except ApplianceError as error:
        return Check(name, "fail", str(error), advice)
    return Check(name, "ok", good)


def exists(user: str) -> bool:
    with contextlib.suppress(ApplianceError):
        account_of(user)
        return True
    return False


def check_open_files(plan: Plan) -> None:
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard != resource.RLIM_INFINITY and hard < plan.open_files:
        raise CannotCreateError(f"{plan.open_files} are needed, {hard} are allowed (ulimit -n, LimitNOFILE= of a unit)")


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


def check_output(output: Output, user: str) -> Iterator[Check]:
    """`user`: whom the service becomes; "": ourselves."""
    name = f"output {output.name}"
    directory = existing_ancestor(output.directory)
    devices = {path: os.stat(path).st_dev for path in _staging_paths(output.directory)}
    if len(set(devices.values())) > 1:
        places = ", ".join(os.path.basename(path) for path in devices)
        advice = "put them on one file system: files are renamed between them"
        yield Check(name, "fail", f"{output.directory}: {places} are on different file systems", advice)
    yield from check_writable(name, output.directory, user, "output.directory")
    for path in (output.directory / part for part in _STAGING):
        if path.is_symlink():
            yield Check(name, "fail", f"{path} is a symbolic link", "remove it: files would be led elsewhere")
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


def check_writable(name: str, path: Path, user: str, key: str) -> Iterator[Check]:
    """The directory, and what is below it of ours; one that is missing is made by the service, as root if it can."""
    there = [path, *(path / part for part in _STAGING)] if path.is_dir() else []
    for directory in [part for part in there if part.is_dir()] or [existing_ancestor(path)]:
        who = user if there else ""
        if not has_access(who, directory, os.W_OK | os.X_OK):
            advice = f"sudo chown {who or user_name()} {directory}; or set {key}"
            yield Check(name, "fail", f"{directory}: user {who or user_name()} may not write there", advice)


def check_output_programs(output: Output, user: str) -> Check:
    name = f"output {output.name}"
    try:
        programs = check_programs(output, user)
    except ApplianceError as error:
        return Check(name, "fail", str(error), 'install it, or use compressor = "lz4" and no hook')
    return Check(name, "ok", f"runs {' and '.join(programs)}" if programs else "needs no program")


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


def check_addresses(config: Config) -> Iterator[Check]:
    """Whether the monitor can have its addresses; they are tried, and given back at once."""
    address, path = config.monitor.address, config.monitor.control_socket
    if address is not None:
        advice = "set monitor.listen to a free address of this host"
        yield asked(
            "monitor", lambda: open_listener(*address).close(), f"{config.monitor.listen} can be listened on", advice
        )
    if path is not None:
        outcome: Outcome = "ok"
        finding = f"{path} can be made"
        directory = existing_ancestor(path.parent)
        if is_listening(path):
            finding, outcome = f"{path}: another service listens there", "fail"
        elif os.path.lexists(path) and not path.is_socket():
            finding, outcome = f"{path}: there is something else of that name", "fail"
        elif not has_access("", directory, os.W_OK | os.X_OK):
            finding, outcome = f"{path}: user {user_name()} may not write to {directory}", "fail"
        advice = "set monitor.control_socket to a place of its own" if outcome == "fail" else ""
        yield Check("control socket", outcome, finding, advice)


def is_listening(path: Path) -> bool:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC) as probe:
        probe.setblocking(False)
        return probe.connect_ex(os.fspath(path)) in (0, errno.EAGAIN)


def check_exposure(config: Config) -> Iterator[Check]:
    address = config.monitor.address
    if address is not None and address[0] not in ("127.0.0.1", "::1", "localhost"):
        yield Check(
            "monitor",
            "warn",
            f"listens on {config.monitor.listen}: whoever reaches it reads all figures, without a password",
            'set monitor.listen to "127.0.0.1:9750", or put a proxy with authentication before it',
        )


def check_meter(config: Config, user: str) -> Iterator[Check]:
    """Collectors' names, and directories for flow files. A name that is unknown today does not keep the service from
    starting: it is looked up again and again."""
    for export in config.meter.exports:
        name, destination = f"export {export.uri}", export.destination
        if destination.scheme == "file":
            directory = destination.path or config.flows_directory.parent
            yield from check_writable(name, directory, user, "meter.export uri")
            continue
        try:
            found = socket.getaddrinfo(destination.host, destination.port)[0][4][0]
        except OSError as error:
            advice = "correct the name, or make the resolver know it; until then its flow records are lost and counted"
            yield Check(name, "warn", f"{destination.host}: {error.strerror}", advice)
        else:
            yield Check(name, "ok", f"goes to {found}")
