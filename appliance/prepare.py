"""Everything that is checked, and made, before the first process starts: a run either starts whole or leaves nothing.

Each check raises an ApplianceError that names its object; `Preparation.undo` removes what was made.
"""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
import stat
from collections.abc import Sequence

from appliance.capture import bpf
from appliance.config import Output
from appliance.errors import CannotCreateError, ConfigError, FormatError, GaveUpError, MissingInputError
from appliance.formats.encode import InterfaceDescription
from appliance.formats.reader import read_interfaces
from appliance.merge.compressor import compressor_argv
from appliance.merge.naming import Naming
from appliance.plan import Plan, Source

log = logging.getLogger(__name__)

DIRECTORY_MODE = 0o2750  # the group of the directory is inherited, so that consumers can be in it


class Preparation:
    """What was made for this run, in the order in which it was made."""

    def __init__(self) -> None:
        self._directories: list[str] = []
        self._lock_fds: list[int] = []

    def make_directories(self, paths: Sequence[str]) -> None:
        """Directories that exist are only checked; all must be writable and on one file system, because files get
        from one into the other by rename."""
        devices: dict[int, str] = {}
        for path in paths:
            self._make(path)
            status = os.stat(path)
            if not stat.S_ISDIR(status.st_mode):
                raise CannotCreateError(f"{path} is not a directory")
            if not os.access(path, os.W_OK | os.X_OK):
                raise CannotCreateError(f"{path}: this user may not write there")
            devices.setdefault(status.st_dev, path)
        if len(devices) > 1:
            first, second, *_ = devices.values()
            raise CannotCreateError(f"{first} and {second} are on different file systems; files are renamed between them")

    def _make(self, path: str) -> None:
        missing = []
        at = os.path.abspath(path)
        while not os.path.lexists(at):
            missing.append(at)
            at = os.path.dirname(at)
        for directory in reversed(missing):
            try:
                os.mkdir(directory, DIRECTORY_MODE & 0o777)
                os.chmod(directory, DIRECTORY_MODE)
            except OSError as error:
                raise CannotCreateError(f"{directory}: cannot be created: {error.strerror}") from error
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

    def hand_over(self, uid: int, gid: int) -> None:
        """What was made belongs to the user that the service becomes."""
        for path in self._directories:
            os.chown(path, uid, gid)
        for fd in self._lock_fds:
            os.fchown(fd, uid, gid)

    def undo(self) -> None:
        for fd in self._lock_fds:
            with contextlib.suppress(OSError):
                os.unlink(os.readlink(f"/proc/self/fd/{fd}"))
            os.close(fd)
        for path in reversed(self._directories):
            with contextlib.suppress(OSError):
                os.rmdir(path)


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
        return read_interfaces(source.uri.target)
    except FormatError as error:
        if error.packets or "damaged" in str(error):
            # Damage is met again, and counted, when the file is read: what is whole before it is worth having.
            return []
        raise


def check_linktypes(output: Output, linktypes: Sequence[tuple[str, int]]) -> None:
    """A pcap file holds one link type. `linktypes`: (label, link type) of every interface known at the start."""
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


def check_output(output: Output, naming: Naming, preparation: Preparation) -> None:
    compressor_argv(output.compressor)
    preparation.make_directories(naming.directories)
    if naming.lock_path is not None:
        preparation.lock(naming.lock_path)
