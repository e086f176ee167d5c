"""What every process does alike: its rights, its descriptors, its words with the supervisor."""

from __future__ import annotations

import os
import pwd
import socket
import tempfile
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from support.lab import requires_root

from appliance import process
from appliance.counters import CAPTURE_FIELDS, CounterPages
from appliance.errors import MissingInputError, MissingPermissionError
from appliance.process import CAP_NET_RAW, DRAIN, ROTATE, WorkerContext


def in_child(body: Callable[[], None]) -> None:
    """Runs `body` in a forked child; AssertionError with its traceback when it fails there."""
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            body()
        except BaseException:
            os.write(writer, traceback.format_exc().encode()[-4000:])
        finally:
            os._exit(0)
    os.close(writer)
    with open(reader, "rb") as file:
        failure = file.read().decode()
    os.waitpid(pid, 0)
    assert not failure, failure


def status() -> dict[str, str]:
    lines = Path("/proc/self/status").read_text().splitlines()
    return {key: value.strip() for key, _, value in (line.partition(":") for line in lines)}


# ---- rights ----------------------------------------------------------------------------------------------------------


@requires_root
def test_dropping_leaves_nothing_and_no_way_back() -> None:
    def body() -> None:
        process.drop_privileges("")
        found = status()
        assert found["NoNewPrivs"] == "1"
        assert {int(found[key], 16) for key in ("CapEff", "CapPrm", "CapInh", "CapBnd", "CapAmb")} == {0}
        assert not process.has_capability(CAP_NET_RAW)
        with pytest.raises(PermissionError):
            socket.socket(socket.AF_PACKET, socket.SOCK_RAW, 0)
        with pytest.raises(OSError, match="cannot be dropped"):
            process.set_capabilities((CAP_NET_RAW,))

    in_child(body)


@requires_root
def test_what_is_kept_survives_the_change_of_the_user() -> None:
    def body() -> None:
        account = pwd.getpwnam("nobody")
        process.drop_privileges("nobody", (CAP_NET_RAW,))
        found = status()
        assert set(found["Uid"].split()) == {str(account.pw_uid)}
        assert set(found["Gid"].split()) == {str(account.pw_gid)}
        assert {int(found[key], 16) for key in ("CapEff", "CapPrm", "CapBnd")} == {1 << CAP_NET_RAW}
        socket.socket(socket.AF_PACKET, socket.SOCK_RAW, 0).close()
        with pytest.raises(PermissionError):
            os.setresuid(0, 0, 0)

    in_child(body)


def test_a_user_that_does_not_exist_is_named() -> None:
    with pytest.raises(MissingInputError, match="nobody-at-all"):
        process.check_user("nobody-at-all")


@requires_root
def test_only_root_can_become_another_user() -> None:
    def body() -> None:
        process.become_user("nobody")
        process.check_user("nobody")
        process.become_user("nobody")
        with pytest.raises(MissingPermissionError, match="daemon"):
            process.check_user("daemon")
        with pytest.raises(MissingPermissionError, match="daemon"):
            process.become_user("daemon")

    in_child(body)


@requires_root
def test_root_without_the_right_to_change_its_user_is_told_so() -> None:
    def body() -> None:
        process.set_capabilities(())
        with pytest.raises(MissingPermissionError, match="CAP_SETUID"):
            process.become_user("nobody")

    in_child(body)


@requires_root
def test_whether_a_user_may_run_a_program_is_asked_as_that_user() -> None:
    with tempfile.TemporaryDirectory() as directory:  # pytest's own are closed to others
        os.chmod(directory, 0o755)
        program = Path(directory) / "program"
        program.write_text("#!/bin/sh\n")
        program.chmod(0o755)
        assert process.may_run("nobody", str(program))
        program.chmod(0o700)
        assert not process.may_run("nobody", str(program))
        assert process.may_run("root", str(program))
    assert os.geteuid() == 0


# ---- descriptors -----------------------------------------------------------------------------------------------------


def is_open(fd: int) -> bool:
    try:
        os.fstat(fd)
    except OSError:
        return False
    return True


def test_all_descriptors_but_those_that_are_named_are_closed() -> None:
    reader, writer = os.pipe()
    others = [os.open("/dev/null", os.O_RDONLY) for _ in range(20)]
    pid = os.fork()
    if pid == 0:
        process.close_descriptors({0, 1, 2, writer})
        os.write(writer, repr([fd for fd in range(1024) if is_open(fd)]).encode())
        os._exit(0)
    os.close(writer)
    os.waitpid(pid, 0)
    assert os.read(reader, 1000).decode() == repr(sorted({0, 1, 2, writer}))
    for fd in (reader, *others):
        os.close(fd)


# ---- words -----------------------------------------------------------------------------------------------------------


def context_with(channel: socket.socket) -> WorkerContext:
    pages = CounterPages([("capture/a", CAPTURE_FIELDS)])
    nothing: Any = SimpleNamespace()
    return WorkerContext("capture/a", pages, pages["capture/a"], channel, nothing, nothing)


@pytest.fixture
def pair() -> Iterator[tuple[socket.socket, WorkerContext]]:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with ours, theirs:
        yield ours, context_with(theirs)


def test_messages_come_whole_and_in_order_and_are_not_waited_for(pair: tuple[socket.socket, WorkerContext]) -> None:
    supervisor, context = pair
    assert context.messages() == []
    supervisor.send(ROTATE)
    supervisor.send(b"x" * 3000)
    supervisor.send(DRAIN)
    assert context.messages() == [ROTATE, b"x" * 3000, DRAIN]
    assert context.messages() == []


def test_the_end_of_the_supervisor_is_one_drain(pair: tuple[socket.socket, WorkerContext]) -> None:
    supervisor, context = pair
    supervisor.send(ROTATE)
    supervisor.close()
    assert context.messages() == [ROTATE, DRAIN]
    assert context.messages() == []


def test_a_drain_that_was_told_is_not_told_again_by_the_end(pair: tuple[socket.socket, WorkerContext]) -> None:
    supervisor, context = pair
    supervisor.send(DRAIN)
    supervisor.close()
    assert context.messages() == [DRAIN]
    assert context.messages() == []


def test_a_beat_and_a_state_are_on_the_page(pair: tuple[socket.socket, WorkerContext]) -> None:
    _, context = pair
    assert (context.page["heartbeat_ns"], context.page["state"]) == (0, 0)
    context.beat()
    context.set_state("draining")
    assert context.page["heartbeat_ns"] > 0
    assert context.page["state"] == 2
