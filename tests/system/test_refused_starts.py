"""A start that cannot be: a message that names what is wrong, a named exit status, and nothing left behind."""

from __future__ import annotations

import socket
import stat
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from support.captures import write_pcap
from support.frames import numbered_frame
from support.lab import Lab, requires_root, requires_tool
from support.service import Service, configuration, refused

pytestmark = requires_root


@pytest.fixture
def output(directory: Path) -> Path:
    """Where the output would be; its parent exists and is empty."""
    return directory / "deep" / "output"


def assert_refused(
    lab: Lab,
    directory: Path,
    config: Mapping[str, Any] | str,
    status: int,
    *words: str,
    prefix: tuple[str, ...] = (),
) -> str:
    before = sorted(directory.rglob("*"))
    code, said = refused(lab, directory, config, prefix)
    assert code == status, said
    for word in words:
        assert word in said
    assert "Traceback" not in said
    assert sorted(directory.rglob("*")) == before
    assert lab.run(["cat", "/proc/net/packet"]).stdout.count("\n") == 1  # no packet socket
    return said


def as_nobody(*capabilities: str) -> tuple[str, ...]:
    """The start of a command that runs as nobody with no more than these capabilities.

    It may also read everything, for the checkout can lie below a folder that only its owner may enter.
    """
    kept = ",".join(f"+{name}" for name in (*capabilities, "dac_read_search"))
    only = ("--bounding-set=-all," + kept, "--inh-caps=-all," + kept, "--ambient-caps=-all," + kept)
    return ("setpriv", "--reuid=65534", "--regid=65534", "--clear-groups", *only)


def plain(directory: Path, interface: Mapping[str, Any] | None = None, **tables: Any) -> dict[str, Any]:
    return configuration(directory, [interface or {"uri": "ring:a"}], **tables)


def test_a_bad_filter(lab: Lab, directory: Path, output: Path) -> None:
    lab.veth("a")
    config = plain(output, {"uri": "ring:a", "filter": "tcp port nonsense"})
    assert_refused(lab, directory, config, 78, "tcp port nonsense", "a")


def test_a_cpu_that_does_not_exist(lab: Lab, directory: Path, output: Path) -> None:
    lab.veth("a")
    config = plain(output, {"uri": "ring:a", "cpus": [0, 8191]})
    assert_refused(lab, directory, config, 78, "interface a: cpus: there is no CPU 8191", "available: ")


def test_a_filter_that_libpcap_refuses_for_a_file(lab: Lab, directory: Path, output: Path) -> None:
    path = write_pcap(directory / "in.pcap", [(0, numbered_frame(0, 0))])
    config = plain(output, {"uri": f"pcapfile:{path}", "filter": "frobnicate"})
    assert_refused(lab, directory, config, 78, "frobnicate")


def test_an_interface_that_does_not_exist(lab: Lab, directory: Path, output: Path) -> None:
    lab.veth("a")
    config = configuration(output, [{"uri": "ring:a"}, {"uri": "ring:nowhere0"}])
    assert_refused(lab, directory, config, 66, "nowhere0", "does not exist")


def test_a_file_that_does_not_exist(lab: Lab, directory: Path, output: Path) -> None:
    config = plain(output, {"uri": f"pcapfile:{directory}/missing.pcap"})
    assert_refused(lab, directory, config, 66, "missing.pcap", "does not exist")


def test_a_file_that_is_no_capture(lab: Lab, directory: Path, output: Path) -> None:
    (directory / "text.pcap").write_text("this is not a capture file at all")
    config = plain(output, {"uri": f"pcapfile:{directory}/text.pcap"})
    assert_refused(lab, directory, config, 74, "text.pcap")


def test_a_compressor_that_does_not_exist(lab: Lab, directory: Path, output: Path) -> None:
    lab.veth("a")
    config = plain(output, output={"compressor": ["no-such-compressor", "-1"]})
    assert_refused(lab, directory, config, 66, "no-such-compressor")


def test_a_hook_that_does_not_exist(lab: Lab, directory: Path, output: Path) -> None:
    lab.veth("a")
    assert_refused(lab, directory, plain(output, output={"hook": ["no-such-hook"]}), 66, "hook", "no-such-hook")


def test_a_compressor_that_the_user_of_the_service_may_not_run(lab: Lab, directory: Path) -> None:
    lab.veth("a")
    program = directory / "compress"
    program.write_text("#!/bin/sh\nexec cat\n")
    program.chmod(0o700)
    config = plain(directory / "output", output={"compressor": [str(program)]}, service={"user": "daemon"})
    assert_refused(lab, directory, config, 77, "daemon", str(program))


def test_an_unknown_key_and_a_bad_value_are_told_together(lab: Lab, directory: Path, output: Path) -> None:
    config = plain(output, {"uri": "ring:a", "snaplem": 96}, output={"rotate_seconds": -1})
    assert_refused(lab, directory, config, 78, "interface[0].snaplem", "snaplen", "output[0].rotate_seconds")


def test_a_configuration_that_does_not_exist(lab: Lab, directory: Path) -> None:
    code = lab.run([str(Path(sys.executable).with_name("appliance")), "run", "-c", "/no/such.toml"], check=False)
    assert code.returncode == 66
    assert "/no/such.toml" in code.stderr


def test_a_directory_that_is_a_file(lab: Lab, directory: Path) -> None:
    lab.veth("a")
    (directory / "taken").write_text("mine")
    assert_refused(lab, directory, plain(directory / "taken"), 73, "taken")
    assert (directory / "taken").read_text() == "mine"


def test_a_directory_below_a_file(lab: Lab, directory: Path) -> None:
    lab.veth("a")
    (directory / "taken").write_text("mine")
    assert_refused(lab, directory, plain(directory / "taken" / "below"), 73, "taken")


@requires_tool("setpriv")
def test_a_directory_of_somebody_else(lab: Lab, directory: Path) -> None:
    """Root without its powers over files, and with the right to capture."""
    lab.veth("a")
    config = plain(directory / "output")
    assert_refused(lab, directory, config, 73, str(directory / "output"), prefix=as_nobody("net_raw"))


@requires_tool("setpriv")
@pytest.mark.parametrize(
    "prefix", [("setpriv", "--bounding-set=-net_raw", "--inh-caps=-net_raw")], ids=["bounding set"]
)
def test_no_right_to_capture(lab: Lab, directory: Path, output: Path, prefix: tuple[str, ...]) -> None:
    lab.veth("a")
    assert_refused(lab, directory, plain(output), 77, "interface a", "CAP_NET_RAW", prefix=prefix)


@requires_tool("setpriv")
def test_no_right_to_capture_as_an_ordinary_user(lab: Lab, directory: Path, output: Path) -> None:
    lab.veth("a")
    directory.chmod(0o777)
    assert_refused(lab, directory, plain(output), 77, "interface a", "CAP_NET_RAW", prefix=as_nobody())


@requires_tool("setpriv")
def test_another_user_when_not_started_as_root(lab: Lab, directory: Path, output: Path) -> None:
    lab.veth("a")
    directory.chmod(0o777)
    config = plain(output, service={"user": "daemon"})
    assert_refused(lab, directory, config, 77, "daemon", prefix=as_nobody())


def test_a_user_that_does_not_exist(lab: Lab, directory: Path, output: Path) -> None:
    lab.veth("a")
    assert_refused(lab, directory, plain(output, service={"user": "nobody-at-all"}), 66, "nobody-at-all")


def test_an_address_of_the_metrics_that_is_in_use(lab: Lab, directory: Path) -> None:
    lab.veth("a")
    first = Service(lab, directory, [{"uri": "ring:a"}], monitor={"listen": "127.0.0.1:9750"})
    other = directory / "other"
    sockets = lab.run(["cat", "/proc/net/packet"]).stdout
    code, said = refused(lab, directory, plain(other, monitor={"listen": "127.0.0.1:9750"}))
    assert code == 73, said
    assert "127.0.0.1:9750" in said
    assert not other.exists()
    assert lab.run(["cat", "/proc/net/packet"]).stdout.count("\n") == sockets.count("\n")
    assert first.stop() == 0


def test_a_second_instance_on_the_same_directory_does_not_harm_the_first(lab: Lab, directory: Path) -> None:
    _, pa = lab.veth("a")
    first = Service(lab, directory, [{"uri": "ring:a"}])
    pids = first.pids()
    code, said = refused(lab, directory, plain(directory))
    assert code == 69, said
    assert str(directory) in said
    assert "another instance" in said
    sent = lab.send([pa], frames=1000, rate=10_000)
    first.wait_at_rest({"a": 1000})
    assert first.pids() == pids
    assert first.stop() == 0
    first.check(sent.sent_by_id)
    first.assert_nothing_left()


def test_a_control_socket_of_another_service(lab: Lab, directory: Path, output: Path) -> None:
    lab.veth("a")
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(directory / "control"))
        listener.listen()
        config = plain(output, monitor={"control_socket": str(directory / "control")})
        assert_refused(lab, directory, config, 73, str(directory / "control"))
    assert stat.S_ISSOCK((directory / "control").lstat().st_mode)


def test_rings_that_do_not_fit_into_memory_bytes(lab: Lab, directory: Path, output: Path) -> None:
    lab.veth("a")
    config = plain(output, {"uri": "ring:a", "ring_bytes": 64 << 20}, memory_bytes=16 << 20)
    assert_refused(lab, directory, config, 78, "memory_bytes")


@requires_tool("prlimit")
def test_too_few_open_files(lab: Lab, directory: Path, output: Path) -> None:
    lab.veth("a")
    said = assert_refused(lab, directory, plain(output), 73, "open files", prefix=("prlimit", "--nofile=40:40"))
    assert "40 are allowed" in said


@requires_tool("prlimit")
def test_too_little_memory_for_the_rings(lab: Lab, directory: Path, output: Path) -> None:
    lab.veth("a")
    config = plain(output, {"uri": "ring:a", "ring_bytes": 1 << 30, "kernel_ring_bytes": 1 << 20})
    assert_refused(lab, directory, config, 73, "memory_bytes", prefix=("prlimit", f"--as={1 << 30}"))


def test_link_types_that_do_not_fit_into_one_pcap(lab: Lab, directory: Path, output: Path) -> None:
    lab.veth("a")
    lab.run(["ip", "tuntap", "add", "dev", "t", "mode", "tun"])
    config = configuration(output, [{"uri": "ring:a"}, {"uri": "ring:t"}], output={"format": "pcap"})
    assert_refused(lab, directory, config, 78, "link type", "pcapng")


@pytest.mark.parametrize("name", ["a;id", "../x", "a b", "-x"])
def test_a_name_that_is_no_interface_name(lab: Lab, directory: Path, output: Path, name: str) -> None:
    assert_refused(lab, directory, plain(output, {"uri": f"ring:{name}"}), 78, "interface[0].uri")


def test_a_label_that_would_leave_the_directory(lab: Lab, directory: Path, output: Path) -> None:
    config = plain(output, {"uri": "ring:a", "label": "../../x"})
    assert_refused(lab, directory, config, 78, "interface[0].label")


def test_a_symbolic_link_in_the_place_of_a_directory(lab: Lab, directory: Path, output: Path) -> None:
    lab.veth("a")
    target = directory / "target"
    target.mkdir()
    output.mkdir(parents=True)
    (output / "work").symlink_to(target)
    assert_refused(lab, directory, plain(output), 73, "work")
    assert list(target.iterdir()) == []
