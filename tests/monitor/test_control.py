"""Real unix sockets, a real event loop in a thread; the clients are the shipped one and raw ones."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import socket
import stat
import threading
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
from monitor.pages import Appliance

from appliance.errors import CannotCreateError, InputOutputError, MissingPermissionError
from appliance.monitor import control
from appliance.monitor.control import (
    MAX_CONNECTIONS,
    MAX_REQUEST_BYTES,
    ControlClient,
    ControlServer,
    NotRunningError,
    open_control_socket,
    remove_control_socket,
)
from appliance.monitor.view import Snapshot


class Service:
    """A control server in a thread of its own. `counts` is what it counted, `rotations` what it forwarded."""

    def __init__(self, path: Path, appliance: Appliance) -> None:
        self.path = path
        self.counts: Counter[str] = Counter()
        self.rotations = 0
        self.listener = open_control_socket(path)
        self.appliance = appliance
        self.loop: asyncio.AbstractEventLoop
        self.stopped: asyncio.Event
        self.ready = threading.Event()
        self.thread = threading.Thread(target=lambda: asyncio.run(self.serve()))
        self.thread.start()
        assert self.ready.wait(10)

    async def serve(self) -> None:
        handlers = {"status": lambda: self.appliance.snapshot().as_json(), "rotate": self.rotate, "fail": self.fail}
        self.loop, self.stopped = asyncio.get_running_loop(), asyncio.Event()
        server = await ControlServer(handlers, lambda name: self.counts.update([name])).start(self.listener)
        self.ready.set()
        await self.stopped.wait()
        server.close()

    def rotate(self) -> str:
        self.rotations += 1
        return "rotating"

    def fail(self) -> str:
        raise BrokenPipeError("the supervisor is gone")

    def stop(self) -> None:
        self.loop.call_soon_threadsafe(self.stopped.set)
        self.thread.join()
        remove_control_socket(self.listener, self.path)


@pytest.fixture
def service(tmp_path: Path, appliance: Appliance) -> Iterator[Service]:
    appliance.traffic()
    made = Service(tmp_path / "control.sock", appliance)
    yield made
    made.stop()


def raw(path: Path) -> socket.socket:
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    connection.settimeout(10)
    connection.connect(os.fspath(path))
    return connection


def answer_to(path: Path, line: bytes) -> dict[str, object]:
    with raw(path) as connection:
        connection.sendall(line)
        with connection.makefile("rb") as file:
            answer = json.loads(file.readline())
    assert isinstance(answer, dict)
    return answer


def test_status_is_the_snapshot(service: Service, appliance: Appliance) -> None:
    assert Snapshot.from_json(ControlClient(service.path).ask("status")) == appliance.snapshot()


def test_rotate_reaches_the_supervisor_once(service: Service) -> None:
    assert ControlClient(service.path).ask("rotate") == "rotating"
    assert service.rotations == 1
    assert service.counts["control_requests"] == 1


def test_one_connection_may_ask_several_times(service: Service) -> None:
    with raw(service.path) as connection, connection.makefile("rb") as file:
        for _ in range(3):
            connection.sendall(b'{"request": "rotate"}\n')
            assert json.loads(file.readline()) == {"ok": True, "result": "rotating"}
    assert service.rotations == 3


@pytest.mark.parametrize(
    "line",
    [b"\n", b"{}\n", b"[]\n", b'{"request": 5}\n', b'{"request": ["rotate"]}\n', b'{"request": "reboot"}\n', b"\xff\n"],
)
def test_a_request_that_is_none_is_refused(service: Service, line: bytes) -> None:
    assert answer_to(service.path, line)["ok"] is False
    assert service.rotations == 0


def test_deeply_nested_json_is_refused(service: Service) -> None:
    assert answer_to(service.path, b"[" * 4000 + b"\n") == {"ok": False, "error": "the request is not JSON"}


def test_a_request_that_is_too_long_is_refused_and_the_connection_closed(service: Service) -> None:
    with raw(service.path) as connection, connection.makefile("rb") as file:
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            connection.sendall(b"x" * (4 * MAX_REQUEST_BYTES))
        with contextlib.suppress(ConnectionResetError):
            assert json.loads(file.readline())["ok"] is False
            assert file.readline() == b""
    assert ControlClient(service.path).ask("rotate") == "rotating"


def test_a_failing_handler_is_an_answer(service: Service) -> None:
    with pytest.raises(InputOutputError, match="the supervisor is gone"):
        ControlClient(service.path).ask("fail")


def test_silent_connections_are_closed_and_the_next_client_is_served(
    service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(control, "IDLE_TIMEOUT_S", 0.2)
    silent = [raw(service.path) for _ in range(MAX_CONNECTIONS)]
    for connection in silent:
        assert connection.recv(1) == b""  # closed by the server
        connection.close()
    assert ControlClient(service.path).ask("rotate") == "rotating"
    assert service.counts["rejected_connections"] == MAX_CONNECTIONS


def test_more_connections_than_allowed_are_turned_away(service: Service) -> None:
    held = [raw(service.path) for _ in range(MAX_CONNECTIONS)]
    with raw(service.path) as one_more:
        assert one_more.recv(1) == b""
    held[0].sendall(b'{"request": "rotate"}\n')
    assert b"rotating" in held[0].recv(100)
    for connection in held:
        connection.close()


@pytest.mark.parametrize("umask", [0o000, 0o022, 0o777])
def test_the_mode_does_not_depend_on_the_umask(tmp_path: Path, umask: int) -> None:
    path = tmp_path / "control.sock"
    before = os.umask(umask)
    try:
        listener = open_control_socket(path)
        assert os.umask(umask) == umask
    finally:
        os.umask(before)
    assert stat.S_IMODE(path.stat().st_mode) == 0o660
    remove_control_socket(listener, path)
    assert not path.exists()


def test_the_socket_of_a_dead_service_is_replaced(tmp_path: Path) -> None:
    path = tmp_path / "control.sock"
    open_control_socket(path).close()
    assert path.is_socket()
    listener = open_control_socket(path)
    with raw(path):
        pass
    remove_control_socket(listener, path)


def test_the_socket_of_a_living_service_is_left_alone(service: Service) -> None:
    with pytest.raises(CannotCreateError, match=r"control\.sock: another service listens there"):
        open_control_socket(service.path)
    assert ControlClient(service.path).ask("rotate") == "rotating"


@pytest.mark.parametrize("kind", ["file", "directory", "symlink"])
def test_what_is_no_socket_is_left_alone(tmp_path: Path, kind: str) -> None:
    path, target = tmp_path / "control.sock", tmp_path / "target"
    target.write_text("precious")
    if kind == "file":
        path.write_text("precious")
    elif kind == "directory":
        path.mkdir()
    else:
        path.symlink_to(target)
    with pytest.raises(CannotCreateError, match="something else of that name"):
        open_control_socket(path)
    assert path.exists() and target.read_text() == "precious"


def test_a_path_that_is_too_long_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(CannotCreateError, match=r"holds 107; set monitor\.control_socket"):
        open_control_socket(tmp_path / ("x" * 120))


def test_a_place_that_cannot_be_written_is_refused_by_name() -> None:
    with pytest.raises(CannotCreateError, match=r"control socket /proc/nowhere/control\.sock: "):
        open_control_socket(Path("/proc/nowhere/control.sock"))


def test_a_service_that_is_not_there_is_named(tmp_path: Path) -> None:
    path = tmp_path / "control.sock"
    with pytest.raises(NotRunningError, match=r"no service listens on .*control\.sock"):
        ControlClient(path).ask("status")
    open_control_socket(path).close()  # stale
    with pytest.raises(NotRunningError, match="no service listens on"):
        ControlClient(path).ask("status")


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to become somebody who may not connect")
def test_a_user_outside_the_group_is_told_what_to_do(service: Service) -> None:
    service.path.parent.chmod(0o755)
    groups = os.getgroups()
    os.setgroups([])
    os.setegid(65534)
    os.seteuid(65534)
    try:
        with pytest.raises((MissingPermissionError, NotRunningError)) as caught:
            ControlClient(service.path).ask("status")
    finally:
        os.seteuid(0)
        os.setegid(0)
        os.setgroups(groups)
    assert "user 65534 may not connect; join the socket's group" in str(caught.value)


def test_a_service_that_does_not_answer_is_named(tmp_path: Path) -> None:
    listener = open_control_socket(tmp_path / "control.sock")
    began = time.monotonic()
    with pytest.raises(InputOutputError, match=r"does not answer within 0\.2 s"):
        ControlClient(tmp_path / "control.sock", timeout_s=0.2).ask("status")
    assert time.monotonic() - began < 5
    listener.close()


@pytest.mark.parametrize("answer", [b"", b"hello\n", b"[1]\n", b'{"ok": false}\n'])
def test_an_answer_that_is_none_is_an_error(tmp_path: Path, answer: bytes) -> None:
    listener = open_control_socket(tmp_path / "control.sock")
    listener.setblocking(True)

    def serve() -> None:
        connection, _ = listener.accept()
        with connection:
            connection.recv(100)
            connection.sendall(answer)

    thread = threading.Thread(target=serve)
    thread.start()
    with pytest.raises(InputOutputError, match=r"control\.sock"):
        ControlClient(tmp_path / "control.sock").ask("status")
    thread.join()
    listener.close()
