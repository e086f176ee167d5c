"""Everything that is checked, and made, before the first process starts: a run either starts whole or leaves nothing.

Each check raises an ApplianceError that names its object; `Preparation.undo` removes what was made.
"""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
from collections.abc import Sequence
from pathlib import Path

from appliance.capture import bpf, opener
from appliance.capture.gate import check_rules
from appliance.config import Config, Output
from appliance.errors import (
    CannotCreateError,
    ConfigError,
    FormatError,
    GaveUpError,
    MissingInputError,
    MissingPermissionError,
)
from appliance.formats.encode import InterfaceDescription
from appliance.formats.erf import LINKTYPES as ERF_LINKTYPES
from appliance.formats.reader import read_interfaces
from appliance.merge.compressor import compressor_argv, program_argv
from appliance.merge.naming import Naming, prepare_directories
from appliance.plan import Plan, Source
from appliance.process import account_of, check_cpus, may_run

log = logging.getLogger(__name__)

LOCK_FILE = ".lock"  # in the first directory of an output


class Preparation:
    """What was made for this run, in the order in which it was made."""

    def __init__(self) -> None:
        self._directories: list[str] = []
        self._lock_fds: list[int] = []

    def make_directories(self, naming: Naming) -> None:
        """The policy's directories, all on one file system, because files get from one into the other by rename."""
        if naming.makes_directories:
            refuse_links(naming.directories[1:])
        missing = [path for directory in naming.directories for path in missing_parts(directory)]
        try:
            prepare_directories(naming)
        finally:
            self._directories += [path for path in missing if os.path.isdir(path) and path not in self._directories]
        devices = {os.stat(path).st_dev: path for path in reversed(naming.directories)}
        if len(devices) > 1:
            first, second, *_ = devices.values()
            raise CannotCreateError(
                f"{first} and {second} are on different file systems; files are renamed between them"
            )

    def make_parents(self, path: str, mode: int = 0o755) -> None:
        """The directories above `path`."""
        for directory in missing_parts(os.path.dirname(path)):
            try:
                os.mkdir(directory, mode)
            except OSError as error:
                raise CannotCreateError(f"{directory}: cannot be made: {error.strerror}") from error
            self._directories.append(directory)

    def lock(self, path: str) -> None:
        """One instance a directory. GaveUpError: another one is running."""
        try:
            fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o640)
        except OSError as error:
            raise CannotCreateError(f"{path}: cannot be opened: {error.strerror}") from error
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(fd)
            raise GaveUpError(f"{os.path.dirname(path)}: another instance is writing there") from None
        self._lock_fds.append(fd)

    def hand_over(self, user: str) -> None:
        """What was made belongs to the user that the service becomes."""
        for path in [*self._directories, *(f"/proc/self/fd/{fd}" for fd in self._lock_fds)]:
            self.give(path, user)

    @staticmethod
    def give(path: str, user: str) -> None:
        if os.geteuid() == 0:
            account = account_of(user)
            os.chown(path, account.pw_uid, account.pw_gid)

    def release(self) -> None:
        """The run is over; what it made stays."""
        for fd in self._lock_fds:
            os.close(fd)
        self._lock_fds.clear()

    def undo(self) -> None:
        for fd in self._lock_fds:
            with contextlib.suppress(OSError):
                os.unlink(os.readlink(f"/proc/self/fd/{fd}"))
        self.release()
        for path in reversed(self._directories):
            with contextlib.suppress(OSError):
                os.rmdir(path)


def check_statically(config: Config, plan: Plan) -> None:
    """Everything that keeps a run with this plan from starting, as far as it can be found without rights, and without
    making or opening anything but files to read. `plan` is that of `config`."""
    if config.service.user:
        account_of(config.service.user)
    check_all_cpus(config)
    for output in config.outputs:
        check_programs(output, config.service.user if os.geteuid() == 0 else "")
    check_sources(plan)


def check_all_cpus(config: Config) -> None:
    """ConfigError names every `cpus` that cannot be had."""
    check_cpus(
        [
            *((f"interface {interface.label or interface.uri}", interface.cpus) for interface in config.interfaces),
            *((f"output {output.name}", output.cpus) for output in config.outputs),
            ("meter", config.meter.cpus),
            ("traceflow", config.traceflow.cpus),
        ]
    )


def check_sources(plan: Plan) -> None:
    """Whether interfaces and files are there, their filters compile, and the outputs can hold their link types."""
    files = check_files(plan)
    for planned in plan.outputs:
        linktypes = []
        for source in planned.sources:
            if source.uri.is_live:
                linktype = check_interface(source, planned.output)
                linktypes += [(source.label, linktype)] if source.uri.scheme == "ring" else []
            linktypes += [(source.label, interface.linktype) for interface in files.get(source.label, ())]
        check_linktypes(planned.output, linktypes)


def check_interface(source: Source, output: Output) -> int:
    """Returns the link type that it would be captured with."""
    name = source.uri.target
    opener.interface_index(name)
    hardware = opener.hardware_type(name)
    linktype = opener.LINKTYPES.get(hardware, opener.LINKTYPE_RAW)
    check_rules(source.interface, linktype)
    if source.interface.filter:
        bpf.compile_offline(linktype, source.interface.filter)
    return opener.captured_linktype(hardware, output.linktype)


def check_files(plan: Plan) -> dict[str, list[InterfaceDescription]]:
    """Opens every file source and its filter once. Returns the interfaces that each names before its first packet."""
    interfaces: dict[str, list[InterfaceDescription]] = {}
    for source in plan.sources:
        if source.uri.is_live or source.uri.target == "-":
            continue
        interfaces[source.label] = found = first_interfaces(source)
        if source.interface.filter:
            bpf.compile_offline(found[0].linktype if found else 1, source.interface.filter)
    return interfaces


def first_interfaces(source: Source) -> list[InterfaceDescription]:
    if os.path.isdir(source.uri.target):
        raise MissingInputError(f"{source.uri.target} is a directory, not a capture file")
    try:
        return read_interfaces(source.uri.target, source.uri.told_format)
    except FormatError as error:
        if error.packets or "damaged" in str(error):
            # Damage is met again, and counted, when the file is read: what is whole before it is worth having.
            return []
        raise


def check_linktypes(output: Output, linktypes: Sequence[tuple[str, int]]) -> None:
    """A pcap file holds one link type, ERF has types for some. `linktypes`: (label, link type) of every interface known
    at the start."""
    if output.format == "erf":
        for label, linktype in linktypes:
            if linktype not in ERF_LINKTYPES:
                raise ConfigError(
                    f"output {output.name}: {label} has link type {linktype}, for which ERF has no type; "
                    'use format = "pcapng" or "pcap"'
                )
        return
    distinct = {linktype: label for label, linktype in reversed(linktypes)}
    if len(distinct) < 2:
        return
    (first, label), (second, other), *_ = sorted(distinct.items())
    what = f"{label} has link type {first}, {other} has {second}"
    if output.format != "pcapng":
        raise ConfigError(
            f"output {output.name}: {what}: one pcap file cannot hold both; "
            'use format = "pcapng", or linktype = "sll2" for live interfaces'
        )
    log.warning("output %s: %s: programs on libpcap refuse such a pcapng file; tshark reads it", output.name, what)


def check_output(output: Output, naming: Naming, preparation: Preparation, user: str) -> None:
    check_programs(output, user)
    preparation.make_directories(naming)
    if naming.makes_directories:
        preparation.lock(os.path.join(naming.directories[0], LOCK_FILE))


def check_programs(output: Output, user: str) -> list[str]:
    """The paths of compressor and hook, as far as there are some. MissingInputError: not installed;
    MissingPermissionError: not for `user` ("": not asked)."""
    argv = compressor_argv(output.compressor)
    programs = {"compressor": argv[0]} if argv is not None else {}
    if output.hook:
        programs["hook"] = program_argv(output.hook, "hook")[0]
    for what, program in programs.items():
        if user and not may_run(user, program):
            raise MissingPermissionError(f"output {output.name}: user {user!r} may not run its {what} {program}")
    return list(programs.values())


def is_locked(path: str) -> bool:
    """Whether another instance holds this lock file."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except OSError:
        return False
    try:
        fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(fd)
    return False


def check_traces(directory: Path, preparation: Preparation) -> None:
    """The directories of the flow traces: one service's, on one file system, and no links."""
    root = os.path.abspath(directory)
    below = [os.path.join(root, name) for name in ("work", "ready")]
    refuse_links(below)
    for path in below:
        preparation.make_parents(os.path.join(path, ""), 0o750)
        if not os.path.isdir(path) or not os.access(path, os.W_OK | os.X_OK):
            raise CannotCreateError(f"{path}: flow traces cannot be written there; it must be a directory of ours")
    if len({os.stat(path).st_dev for path in below}) > 1:
        raise CannotCreateError(f"{root}: work and ready are on different file systems; files are renamed between them")
    preparation.lock(os.path.join(root, ".lock"))


def refuse_links(paths: Sequence[str]) -> None:
    """What lies below the output's own directory is ours: a link there would lead our files to where others chose."""
    for path in paths:
        if os.path.islink(path):
            raise CannotCreateError(f"{path} is a symbolic link; only the output's directory itself may be one")


def missing_parts(path: str) -> list[str]:
    """The directory and its parents, as far as they do not exist, outermost first."""
    missing: list[str] = []
    while not os.path.lexists(path):
        missing.insert(0, path)
        path = os.path.dirname(path)
    return missing
