"""`check-config` and `doctor -c`: what the service would refuse is found before it is started."""

from __future__ import annotations

import fcntl
import json
import os
import pwd
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from appliance.cli import run_command

APPLIANCE = [sys.executable, "-c", "from appliance.start import main; main()"]
NO_SUCH_CPU = 8191


def configured(tmp_path: Path, *, interface: str = "", output: str = "", rest: str = "") -> Path:
    """A configuration that is good as it stands, with more lines in each table."""
    path = tmp_path / "a.toml"
    path.write_text(
        f'[[interface]]\nuri = "ring:lo"\n{interface}\n'
        f'[[output]]\ndirectory = "{tmp_path}/out"\n{output}\n'
        f'[monitor]\nlisten = ""\ncontrol_socket = ""\n{rest}\n'
    )
    return path


def check(path: Path, capfd: pytest.CaptureFixture[str]) -> tuple[int, str]:
    """Exit status and what was said of `check-config`."""
    status = run_command(["check-config", "-c", str(path)])
    shown = capfd.readouterr()
    return status, shown.out if status == 0 else shown.err


def findings(path: Path, capfd: pytest.CaptureFixture[str]) -> dict[str, list[tuple[str, str]]]:
    """The doctor's: check -> (outcome, finding) of each."""
    run_command(["doctor", "--json", "-c", str(path)])
    found: dict[str, list[tuple[str, str]]] = {}
    for row in json.loads(capfd.readouterr().out):
        assert row["advice"] or row["outcome"] != "fail"
        found.setdefault(row["check"], []).append((row["outcome"], row["finding"]))
    return found


# check-config --------------------------------------------------------------------------------------------------------


def test_a_good_one_is_told_what_was_not_looked_at(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    path = configured(tmp_path)
    status, said = check(path, capfd)
    assert status == 0
    assert f"directories, addresses and collectors were not looked at: appliance doctor -c {path}" in said


def test_cpus_that_do_not_exist_are_named_with_their_roles_and_those_there_are(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    cpus = f"cpus = [{NO_SUCH_CPU}]"
    path = configured(tmp_path, interface=cpus, output=cpus, rest=f"[meter]\n{cpus}")
    status, said = check(path, capfd)
    assert status == os.EX_CONFIG
    for who in ("interface lo", "output main", "meter"):
        assert f"{who}: cpus: there is no CPU {NO_SUCH_CPU}" in said
    assert f"available: {', '.join(map(str, sorted(os.sched_getaffinity(0))))}" in said


@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="needs two CPUs, to be kept off one")
def test_a_cpu_that_this_process_is_kept_off_is_told_from_one_that_does_not_exist(tmp_path: Path) -> None:
    first, second, *_ = sorted(os.sched_getaffinity(0))
    path = configured(tmp_path, interface=f"cpus = [{first}, {second}]")
    done = subprocess.run(
        [*APPLIANCE, "check-config", "-c", str(path)],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        preexec_fn=lambda: os.sched_setaffinity(0, {first}),
    )
    assert done.returncode == os.EX_CONFIG
    assert f"interface lo: cpus: this process may not run on CPU {second} (" in done.stderr
    assert f"available: {first}\n" in done.stderr and "there is no CPU" not in done.stderr


def test_cpus_that_are_there_are_good(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    path = configured(tmp_path, interface=f"cpus = {sorted(os.sched_getaffinity(0))}")
    assert check(path, capfd)[0] == 0


@pytest.mark.parametrize(
    ("tables", "status", "named"),
    [
        ({"rest": '[service]\nuser = "no-such-user"'}, os.EX_NOINPUT, "user 'no-such-user' does not exist"),
        ({"output": 'hook = ["no-such-hook"]'}, os.EX_NOINPUT, "hook 'no-such-hook'"),
        (
            {"output": 'format = "erf"\nlinktype = "sll2"'},
            os.EX_CONFIG,
            "output main: lo has link type 276, for which ERF has no type",
        ),
        (
            {"rest": '[[meter.export]]\nuri = "tls://192.0.2.1:4740"\ntls_ca = "/no/such.pem"'},
            os.EX_NOINPUT,
            "/no/such.pem: No such file or directory",
        ),
    ],
)
def test_what_the_service_refuses_is_refused(
    tmp_path: Path, tables: dict[str, str], status: int, named: str, capfd: pytest.CaptureFixture[str]
) -> None:
    got, said = check(configured(tmp_path, **tables), capfd)
    assert (got, named in said) == (status, True), said
    assert not (tmp_path / "out").exists()


def test_the_certificates_of_a_meter_that_is_off_are_not_asked_for(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    export = '[[meter.export]]\nuri = "tls://192.0.2.1:4740"\ntls_ca = "/no/such.pem"'
    assert check(configured(tmp_path, rest=f"[meter]\nenabled = false\n{export}"), capfd)[0] == 0


# doctor --------------------------------------------------------------------------------------------------------------


def test_the_doctor_makes_nothing(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    path = configured(tmp_path, rest=f'[meter]\n[[meter.export]]\nuri = "file:{tmp_path}/flows"')
    findings(path, capfd)
    assert sorted(tmp_path.iterdir()) == [path]


def test_the_doctor_finds_addresses_that_others_have(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    taken = tmp_path / "control.sock"
    with socket.create_server(("127.0.0.1", 0)) as listener, socket.socket(socket.AF_UNIX) as control:
        control.bind(os.fspath(taken))
        control.listen(1)
        path = configured(tmp_path)
        address = f"127.0.0.1:{listener.getsockname()[1]}"
        text = path.read_text().replace('listen = ""', f'listen = "{address}"')
        path.write_text(text.replace('control_socket = ""', f'control_socket = "{taken}"'))
        found = findings(path, capfd)
        assert found["monitor"][0][0] == "fail" and address in found["monitor"][0][1]
        assert found["control socket"] == [("fail", f"{taken}: another service listens there")]
    taken.unlink()
    found = findings(path, capfd)
    assert [found[name][0][0] for name in ("monitor", "control socket")] == ["ok", "ok"]


def test_the_doctor_does_not_hold_a_running_instance_against_it(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "out").mkdir()
    lock = tmp_path / "out" / ".lock"
    with socket.create_server(("127.0.0.1", 0)) as listener, lock.open("w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        path = configured(tmp_path)
        path.write_text(path.read_text().replace('listen = ""', f'listen = "127.0.0.1:{listener.getsockname()[1]}"'))
        found = findings(path, capfd)
        assert found["service"] == [("ok", "an instance runs with these directories; the addresses are its own")]
        assert "monitor" not in found
    assert findings(path, capfd)["monitor"][0][0] == "ok"


def test_the_doctor_finds_a_collector_whose_name_is_unknown(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    uris = ("udp://no-such-collector.invalid:4739", "tcp://127.0.0.1:4739")
    found = findings(configured(tmp_path, rest="".join(f'[[meter.export]]\nuri = "{uri}"\n' for uri in uris)), capfd)
    assert found[f"export {uris[0]}"][0][0] == "warn"
    assert found[f"export {uris[1]}"] == [("ok", "goes to 127.0.0.1")]


def test_the_doctor_finds_a_link_below_an_output(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "ready").symlink_to(tmp_path)
    found = findings(configured(tmp_path), capfd)
    assert ("fail", f"{tmp_path}/out/ready is a symbolic link") in found["output main"]


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to look with another user's eyes")
def test_the_doctor_looks_at_directories_and_programs_as_the_user_that_the_service_becomes(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    program = tmp_path / "compress"
    program.write_text("#!/bin/sh\ncat\n")
    program.chmod(0o700)
    (tmp_path / "out").mkdir(mode=0o755)
    user = pwd.getpwuid(65534).pw_name
    path = configured(tmp_path, output=f'compressor = ["{program}"]', rest=f'[service]\nuser = "{user}"')
    found = findings(path, capfd)
    assert ("fail", f"{tmp_path}/out: user {user} may not write there") in found["output main"]
    assert ("fail", f"output main: user {user!r} may not run its compressor {program}") in found["output main"]
    assert found["user"] == [("ok", f"{user} exists")]


def test_the_doctor_finds_cpus_that_do_not_exist(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    ((outcome, finding),) = findings(configured(tmp_path, interface=f"cpus = [{NO_SUCH_CPU}]"), capfd)["cpus"]
    assert outcome == "fail" and f"interface lo: cpus: there is no CPU {NO_SUCH_CPU}" in finding
