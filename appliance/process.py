"""What every process of the appliance does alike: its place in the world, its rights, its signs of life, its end."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import logging
import os
import pwd
import resource
import signal
import socket
import struct
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from appliance.counters import STATES, CounterPage, CounterPages
from appliance.errors import ApplianceError, CannotCreateError, ConfigError, MissingInputError, MissingPermissionError

if TYPE_CHECKING:
    from appliance.config import Config
    from appliance.logs import WorkerLog

log = logging.getLogger(__name__)

CAP_NET_RAW = 13
CAP_SYS_ADMIN_LAST = 63
_CAPABILITY_VERSION_3 = 0x20080522
_PR_CAPBSET_DROP = 24
_PR_SET_NO_NEW_PRIVS = 38
_PR_SET_PDEATHSIG = 1
_PR_SET_KEEPCAPS = 8
_PR_SET_DUMPABLE = 4
_PR_SET_NAME = 15
_PR_CAP_AMBIENT = 47
_PR_CAP_AMBIENT_CLEAR_ALL = 4

DRAIN = b"drain"  # supervisor to worker: finish what you have, then end
ROTATE = b"rotate"
RENEW = b"renew"  # supervisor to worker: hand out what you have, then end; a successor with other settings goes on
RELOAD = b"reload "  # and what follows is the worker's matter: new settings
LOG_LEVEL = b"log level "  # and its name: from now on
MESSAGE_BYTES = 65536  # the longest word of the supervisor
SHORTAGES = (errno.ENOMEM, errno.EMFILE, errno.ENFILE, errno.EAGAIN, errno.ENOBUFS)
EXIT_CRASHED = 70  # EX_SOFTWARE: an error that is ours


@dataclass
class WorkerContext:
    """What a worker process is given. `channel` is a SOCK_SEQPACKET socket to the supervisor: `DRAIN`, `ROTATE`, or EOF
    when the supervisor is gone, which means the same as DRAIN. `parts` is what only this kind of worker needs."""

    name: str
    pages: CounterPages
    page: CounterPage
    channel: socket.socket
    topology: Any
    config: Config
    parts: Any = None
    keep_descriptors: tuple[int, ...] = ()
    cpus: tuple[int, ...] = ()  # that it runs on; none: any
    capabilities: tuple[int, ...] = ()  # what this process keeps until it has opened its source
    _draining: bool = field(default=False, init=False)

    def beat(self) -> None:
        """A sign of life: once per turn of the worker's loop, and at least once a second."""
        self.page["heartbeat_ns"] = time.monotonic_ns()

    def set_state(self, state: str) -> None:
        self.page["state"] = STATES.index(state)

    def messages(self) -> list[bytes]:
        """What the supervisor said since the last look; never waits. EOF becomes one DRAIN."""
        said: list[bytes] = []
        while True:
            try:
                message = self.channel.recv(MESSAGE_BYTES, socket.MSG_DONTWAIT)
            except BlockingIOError:
                return said
            except OSError:
                message = b""
            if not message:
                if not self._draining:
                    self._draining = True
                    said.append(DRAIN)
                return said
            if message == DRAIN:
                self._draining = True
            if not takes_log_level(message):
                said.append(message)


def takes_log_level(message: bytes) -> bool:
    """Whether that was all that the supervisor said."""
    if not message.startswith(LOG_LEVEL):
        return False
    logging.getLogger().setLevel(message.removeprefix(LOG_LEVEL).decode())
    return True


def run_worker(main: Callable[[WorkerContext], int], context: WorkerContext, worker_log: WorkerLog) -> None:
    """The body of a forked worker: sets the process up, runs `main`, never returns to the caller's code."""
    status = EXIT_CRASHED
    try:
        set_up_worker(context, worker_log)
        status = main(context)
    except ApplianceError as error:
        log.error("%s", error)
        status = error.exit_code
    except OSError as error:
        if error.errno not in SHORTAGES:
            log.critical("a fault of the program itself", exc_info=True)
        else:
            log.error("the machine is short of what is needed: %s", error)
    except BaseException:
        log.critical("a fault of the program itself", exc_info=True)
    finally:
        context.set_state("ended")
        with contextlib.suppress(Exception):
            worker_log.flush_worker()
        os._exit(status)


def set_up_worker(context: WorkerContext, worker_log: WorkerLog) -> None:
    signal.set_wakeup_fd(-1)
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2):
        # Those concern the supervisor, which tells us what follows from them. A terminal sends them to all of us.
        signal.signal(number, signal.SIG_IGN)
    signal.signal(signal.SIGPIPE, signal.SIG_IGN)
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    worker_log.use_in_worker()
    keep = {0, 1, 2, context.channel.fileno()}
    close_descriptors(keep.union(worker_log.worker_descriptors(), context.keep_descriptors))
    if context.capabilities and not context.name.startswith("capture/"):
        set_capabilities(())
    set_process_name(context.name)
    use_cpus(context.cpus)
    context.page["pid"] = os.getpid()
    context.page["started_ns"] = time.monotonic_ns()
    context.beat()
    context.set_state("running")


def close_descriptors(keep: Iterable[int]) -> None:
    """Closes all but `keep`: a worker that held another worker's channel open would keep it from seeing its EOF."""
    kept = set(keep)
    for name in os.listdir("/proc/self/fd"):
        if int(name) not in kept:
            with contextlib.suppress(OSError):
                os.close(int(name))


def allow_open_files(wanted: int) -> None:
    """Raises our limit of open files as far as `wanted`. CannotCreateError: more than this process may have."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY or soft >= wanted:
        return
    if hard != resource.RLIM_INFINITY and hard < wanted:
        raise CannotCreateError(
            f"{wanted} open files are needed, {hard} are allowed; raise the limit (ulimit -n, LimitNOFILE= of a unit)"
        )
    resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def check_cpus(wanted: Iterable[tuple[str, Iterable[int]]]) -> None:
    """ConfigError: this machine, or this process' share of it (sched_setaffinity(2), cpusets), does not have all of
    them. `wanted`: (who, CPUs)."""
    allowed = os.sched_getaffinity(0)
    faults = [f"{who}: cpus: {why_not(cpu)}" for who, cpus in wanted for cpu in sorted(set(cpus) - allowed)]
    if faults:
        raise ConfigError(f"{'; '.join(faults)}; available: {', '.join(map(str, sorted(allowed)))}")


def why_not(cpu: int) -> str:
    if os.path.exists(f"/sys/devices/system/cpu/cpu{cpu}"):
        return f"this process may not run on CPU {cpu} (taskset, CPUAffinity=, a container's cpuset)"
    return f"there is no CPU {cpu}"


def use_cpus(cpus: Iterable[int]) -> None:
    """From now on only these, and for what is started from here too. One that has gone since it was checked is no
    reason not to run."""
    if wanted := set(cpus):
        try:
            os.sched_setaffinity(0, wanted)
        except OSError as error:
            log.warning("cpus %s: %s; running on any", sorted(wanted), error.strerror)


@contextlib.contextmanager
def on_cpus(cpus: Iterable[int]) -> Iterator[None]:
    """What is done in the block is done there: memory that is touched first lies in their NUMA node."""
    before = os.sched_getaffinity(0)
    use_cpus(cpus)
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


def set_process_name(name: str) -> None:
    """What ps and top show (15 characters)."""
    libc().prctl(_PR_SET_NAME, name.encode()[:15], 0, 0, 0)


# ---- rights ----


_libc: ctypes.CDLL | None = None


def libc() -> ctypes.CDLL:
    global _libc
    if _libc is None:
        _libc = ctypes.CDLL(None, use_errno=True)
    return _libc


def effective_capabilities() -> int:
    """CapEff of this process, one bit a capability (capabilities(7))."""
    with open("/proc/self/status") as status:
        for line in status:
            if line.startswith("CapEff:"):
                return int(line.split()[1], 16)
    return 0


def has_capability(number: int) -> bool:
    return bool(effective_capabilities() >> number & 1)


def set_capabilities(kept: Iterable[int]) -> None:
    """Effective and permitted become exactly `kept`, inheritable and ambient empty (capset(2))."""
    mask = 0
    for number in kept:
        mask |= 1 << number
    header = struct.pack("Ii", _CAPABILITY_VERSION_3, 0)
    low, high = mask & 0xFFFFFFFF, mask >> 32
    data = struct.pack("6I", low, low, 0, high, high, 0)
    libc().prctl(_PR_CAP_AMBIENT, _PR_CAP_AMBIENT_CLEAR_ALL, 0, 0, 0)
    if libc().capset(header, data) != 0:
        number = ctypes.get_errno()
        raise OSError(number, f"capabilities cannot be dropped: {os.strerror(number)}")


def drop_privileges(user: str, kept: Iterable[int] = ()) -> None:
    """For good: another user if one is named, no capability but `kept`, none to be gained by any exec.

    Raises MissingInputError for a user that does not exist, MissingPermissionError when we may not become that user.
    """
    kept = tuple(kept)
    no_new_privileges()
    for number in range(CAP_SYS_ADMIN_LAST + 1):
        if number not in kept:
            libc().prctl(_PR_CAPBSET_DROP, number, 0, 0, 0)  # fails without CAP_SETPCAP: then there is little to drop
    if user:
        become_user(user)
    set_capabilities(number for number in kept if permitted(number))


def permitted(number: int) -> bool:
    with open("/proc/self/status") as status:
        for line in status:
            if line.startswith("CapPrm:"):
                return bool(int(line.split()[1], 16) >> number & 1)
    return False


def no_new_privileges() -> None:
    libc().prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)


def account_of(user: str) -> pwd.struct_passwd:
    """MissingInputError: there is no such user."""
    try:
        return pwd.getpwnam(user)
    except KeyError:
        raise MissingInputError(f"user {user!r} does not exist") from None


def check_user(user: str) -> None:
    """MissingInputError, MissingPermissionError: this process cannot become `user`."""
    account = account_of(user)
    if os.geteuid() != 0 and os.geteuid() != account.pw_uid:
        raise MissingPermissionError(
            f"user {user!r}: only root can become another user; run with sudo, or leave the user out"
        )


def become_user(user: str) -> None:
    account = account_of(user)
    if os.getuid() == account.pw_uid and os.geteuid() == account.pw_uid:
        return
    check_user(user)
    libc().prctl(_PR_SET_KEEPCAPS, 1, 0, 0, 0)
    try:
        os.initgroups(user, account.pw_gid)
        os.setresgid(account.pw_gid, account.pw_gid, account.pw_gid)
        os.setresuid(account.pw_uid, account.pw_uid, account.pw_uid)
    except PermissionError:
        raise MissingPermissionError(
            f"user {user!r}: this process may not change its user (CAP_SETUID, CAP_SETGID); leave the user out"
        ) from None


def may_run(user: str, program: str) -> bool:
    """Whether a user may run a program."""
    return has_access(user, program, os.X_OK)


def has_access(user: str, path: str | os.PathLike[str], mode: int) -> bool:
    """access(2) for a user: asked by a child process that becomes that user; "" is ourselves."""
    if not user:
        return os.access(path, mode, effective_ids=True)
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            become_user(user)
            status = 0 if os.access(path, mode) else 1
        finally:
            os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0


def die_with_parent(parent: int) -> None:
    """SIGKILL for this process when its parent ends: for processes that hold nothing worth draining."""
    libc().prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent:
        sys.exit(EXIT_CRASHED)
