"""Each line of mtracecap's documentation (its two forms, its options), run, in a test named after it.

Short and long forms are both run; files are the inputs wherever the outcome does not need an interface. EXAMPLES.md
says which line is which test.
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support.captures import write_capture
from support.frames import Shape, numbered_frame
from support.judges import capinfos, check_numbered, decompressed, packet_count, packets, packets_by_wireshark
from support.lab import Lab, requires_root, requires_tool, wait_until

MTRACECAP = [sys.executable, "-m", "appliance.mtracecap"]
START = "20231114-221320"  # UTC, of the frames' first
pytestmark = requires_tool("capinfos", "tshark", "gzip", "lz4")


def run(*argv: object, status: int = 0, **options: Any) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(
        [*MTRACECAP, *map(str, argv)], capture_output=True, text=True, check=False, timeout=60, **options
    )
    assert done.returncode == status, done.stderr
    assert "Traceback" not in done.stderr
    return done


@pytest.fixture
def source(tmp_path: Path) -> Callable[..., Path]:
    """Makes an input: frames of an interface, at these seconds behind START."""

    def make(number: int, seconds: list[float], size: int = 100) -> Path:
        shape = Shape((size,), None, True, 2)
        frames = [(int(s * 10**9), numbered_frame(number, n, shape)) for n, s in enumerate(seconds)]
        return write_capture(tmp_path / f"in{number}", "pcap", frames)

    return make


@pytest.fixture
def base(tmp_path: Path) -> Path:
    directory = tmp_path / "out"
    directory.mkdir()
    return directory


def names(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


def files(directory: Path) -> list[Path]:
    return sorted(directory.iterdir())


class Live:
    """mtracecap on an interface of a lab, recording when this is made."""

    def __init__(self, lab: Lab, *argv: str) -> None:
        self.process = lab.popen([*MTRACECAP, "-v", *argv], stderr=subprocess.PIPE, text=True)

        def begun() -> bool:
            assert self.process.poll() is None, self.process.communicate()[1]
            lines = lab.run(["cat", "/proc/net/packet"]).stdout.splitlines()[1:]
            wanted = sum(word.startswith("ring:") for word in argv)
            bound = sum(line.split()[3] == "0003" and line.split()[4] != "0" for line in lines)
            caught = re.search(r"^SigCgt:\s*([0-9a-f]+)$", Path(f"/proc/{self.process.pid}/status").read_text(), re.M)
            takes_term = caught is not None and bool(int(caught[1], 16) >> (signal.SIGTERM - 1) & 1)
            return bound >= wanted and takes_term

        wait_until(begun, "the capture has begun", timeout_s=20)

    def stop(self) -> str:
        self.process.send_signal(signal.SIGTERM)
        said = str(self.process.communicate(timeout=30)[1])
        assert self.process.returncode == 0, said
        return said


# The two forms --------------------------------------------------------------------------------------------------------


def test_mtracecap_flags_outputuri_traceuri(tmp_path: Path, source: Callable[..., Path]) -> None:
    """mtracecap flags outputuri traceuri [traceuri...]"""
    inputs = [f"pcapfile:{source(i, [i * 0.1 + n for n in range(20)])}" for i in range(3)]
    run(f"pcapfile:{tmp_path}/one", inputs[0])
    run(f"pcapfile:{tmp_path}/all", *inputs)
    check_numbered([tmp_path / "one"]).assert_exact({0: 20})
    check_numbered([tmp_path / "all"]).assert_exact({0: 20, 1: 20, 2: 20})
    assert capinfos(tmp_path / "all").in_order


def test_mtracecap_flags_B_baseuri_traceuri(base: Path, source: Callable[..., Path]) -> None:  # noqa: N802
    """mtracecap flags -B baseuri traceuri [traceuri...]"""
    inputs = [f"pcapfile:{source(i, [i * 0.1 + n for n in range(20)])}" for i in range(3)]
    run("-U", "-B", f"pcapfile:{base}", *inputs)
    assert names(base) == [f"{START}-00000000"]
    check_numbered(files(base)).assert_exact({0: 20, 1: 20, 2: 20})


# The options, in the order of the documentation -----------------------------------------------------------------------


@pytest.mark.parametrize("flag", [["-B"], ["--baseuri"], ["--baseuri=%s"]])
@pytest.mark.parametrize(("scheme", "kind"), [("pcapfile", "pcap"), ("pcapng", "pcapng"), ("erf", "erf")])
def test_B_baseuri(base: Path, source: Callable[..., Path], flag: list[str], scheme: str, kind: str) -> None:  # noqa: N802
    """-B --baseuri FMT:DIR"""
    uri = f"{scheme}:{base}"
    words = [flag[0] % uri] if "%s" in flag[0] else [*flag, uri]
    run(*words, f"pcapfile:{source(0, [0, 1])}", f"pcapfile:{source(1, [0, 1])}")
    (path,) = files(base)
    assert re.fullmatch(r"\d{8}-\d{6}-00000000", path.name)
    assert capinfos(path).file_type == kind
    assert packet_count([path]) == 4


@pytest.mark.parametrize("flag", ["-F", "--filter"])
def test_F_filter(tmp_path: Path, source: Callable[..., Path], flag: str) -> None:  # noqa: N802
    """-F --filter BPF"""
    run(flag, "udp src port 20001", f"pcapfile:{tmp_path}/out", f"pcapfile:{source(0, list(range(40)))}")
    done = subprocess.run(
        ["tshark", "-n", "-r", f"{tmp_path}/out", "-T", "fields", "-e", "udp.srcport"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.split() == ["20001"] * 20


@pytest.mark.parametrize("flag", ["-G", "--rotate-seconds"])
def test_G_rotate_seconds(base: Path, source: Callable[..., Path], flag: str) -> None:  # noqa: N802
    """-G --rotate-seconds S: of recorded packets, their own time; aligned to the clock, which is ours."""
    run("-U", flag, "10", "-B", f"pcapfile:{base}", f"pcapfile:{source(0, [0, 9, 10, 25])}")
    assert names(base) == [f"{START}-00000000", "20231114-221330-00000001", "20231114-221345-00000002"]
    assert [capinfos(path).packets for path in files(base)] == [2, 1, 1]


@requires_root
def test_G_rotate_seconds_even_with_no_packets(base: Path) -> None:  # noqa: N802
    """An idle segment is a valid capture file with a header and no packets, through the pipe too."""
    with Lab() as lab:
        live = Live(lab, "-G", "1", "--pipeout=lz4 -q -c", "-B", f"pcapfile:{base}", f"ring:{lab.veth('a')[0]}")
        wait_until(lambda: sum(not name.startswith("tmp-") for name in names(base)) >= 2, "two idle files")
        live.stop()
    assert {len(decompressed(path)) for path in files(base)} == {24}


@pytest.mark.parametrize("flag", ["-S", "--rotate-sizemb"])
def test_S_rotate_sizemb(base: Path, source: Callable[..., Path], flag: str) -> None:  # noqa: N802
    """-S --rotate-sizemb MB: MiB of captured bytes, before the packet that crosses, before compression."""
    size, count = 1000, 2500
    path = source(0, [n / 1000 for n in range(count)], size)
    run(flag, "1", "-Z", "gz", "-B", f"pcapfile:{base}", f"pcapfile:{path}")
    each = (1 << 20) // size
    assert [capinfos(file).packets for file in files(base)] == [each, each, count - 2 * each]


@pytest.mark.parametrize("flag", ["-H", "--libtrace-help"])
def test_H_libtrace_help(flag: str) -> None:  # noqa: N802
    """-H --libtrace-help"""
    said = run(flag).stdout
    for scheme in ("pcapfile:", "pcap:", "pcapint:", "pcapng:", "int:", "ring:", "erf:", "rawerf:", "tsh:", "fr+:"):
        assert scheme in said


@pytest.mark.parametrize("flag", ["-h", "--help"])
def test_h_help(flag: str) -> None:
    """-h --help"""
    said = run(flag).stdout
    assert said.startswith("usage: mtracecap [flags] outputuri traceuri [traceuri...]")
    assert "mtracecap [flags] -B baseuri traceuri [traceuri...]" in said


@pytest.mark.parametrize("flag", ["-v", "--verbose"])
def test_v_verbose(tmp_path: Path, source: Callable[..., Path], flag: str) -> None:
    """-v --verbose"""
    path = source(0, [0])
    quiet = run(f"pcapfile:{tmp_path}/a", f"pcapfile:{path}").stderr
    loud = run(flag, f"pcapfile:{tmp_path}/b", f"pcapfile:{path}").stderr
    assert quiet == ""
    assert "received 1 = written 1" in loud


@pytest.mark.parametrize("flag", ["-s", "--snaplen"])
def test_s_snaplen(tmp_path: Path, source: Callable[..., Path], flag: str) -> None:
    """-s --snaplen BYTES: 64, the original's default, when asked for; everything when not."""
    path = source(0, [0, 1], size=200)
    run(flag, "64", f"pcapfile:{tmp_path}/cut", f"pcapfile:{path}")
    run(f"pcapfile:{tmp_path}/whole", f"pcapfile:{path}")
    cut, whole = (packets_by_wireshark(tmp_path / name) for name in ("cut", "whole"))
    assert [(len(p.data), p.original_length) for p in cut] == [(64, 200)] * 2
    assert [(len(p.data), p.original_length) for p in whole] == [(200, 200)] * 2


@pytest.mark.parametrize("flag", [["-U"], ["--use-utc"], []])
def test_U_use_utc(base: Path, source: Callable[..., Path], flag: list[str]) -> None:  # noqa: N802
    """-U --use-utc; local time without it."""
    there = os.environ | {"TZ": "XYZ-3"}
    run(*flag, "-B", f"pcapfile:{base}", f"pcapfile:{source(0, [0])}", env=there)
    assert names(base) == [f"{START}-00000000" if flag else "20231115-011320-00000000"]


@requires_root
@pytest.mark.parametrize("flag", ["-W", "--watchfile"])
def test_W_watchfile(tmp_path: Path, base: Path, flag: str) -> None:  # noqa: N802
    """-W --watchfile FILE: wait until FILE exists before going on with the next segment."""
    gate = tmp_path / "gate"
    with Lab() as lab:
        a, peer = lab.veth("a")
        live = Live(lab, flag, str(gate), "-B", f"pcapfile:{base}", f"ring:{a}")
        report = lab.send([peer], frames=500, rate=10_000)
        time.sleep(0.3)
        assert names(base) == []
        gate.touch()
        wait_until(lambda: bool(names(base)), "a file")
        live.stop()
    check_numbered(files(base)).assert_exact(report.sent_by_id)


@requires_root
@pytest.mark.parametrize("flag", ["-w", "--maxwait_ms"])
def test_w_maxwait_ms(base: Path, flag: str) -> None:
    """-w --maxwait_ms MS: packets of two interfaces in order, and none is held for longer than that."""
    with Lab() as lab:
        (a, a_peer), (b, b_peer) = lab.veth("a"), lab.veth("b")
        live = Live(lab, flag, "400", "-B", f"pcapfile:{base}", f"ring:{a}", f"ring:{b}")
        report = lab.send([a_peer, b_peer], frames=2000, rate=10_000)
        live.stop()
    check_numbered(files(base)).assert_exact(report.sent_by_id)
    assert capinfos(files(base)[0]).in_order


@pytest.mark.parametrize("level", range(10))
@pytest.mark.parametrize("flag", ["-z", "--compress-level"])
def test_z_compress_level(tmp_path: Path, source: Callable[..., Path], flag: str, level: int) -> None:
    """-z --compress-level 0..9; alone: gzip"""
    run(flag, level, f"pcapfile:{tmp_path}/out", f"pcapfile:{source(0, list(range(50)))}")
    content = (tmp_path / "out").read_bytes()
    assert content.startswith(bytes.fromhex("1f8b" if level else "d4c3b2a1"))
    check_numbered([tmp_path / "out"]).assert_exact({0: 50})


MAGICS = {"gz": "1f8b", "zlib": "1f8b", "bz": "425a68", "lzo": "894c5a4f", "xz": "fd377a58", "no": "d4c3b2a1"}


@requires_tool("bzip2", "xz", "lzop")
@pytest.mark.parametrize("word", ["gz", "gzip", "zlib", "bz", "bzip2", "bz2", "lzo", "lzop", "xz", "no", "none"])
@pytest.mark.parametrize("flag", ["-Z", "--compress-type"])
def test_Z_compress_type(tmp_path: Path, source: Callable[..., Path], flag: str, word: str) -> None:  # noqa: N802
    """-Z --compress-type gz|zlib|bz|lzo|xz|no (prefix match); without -z too, which the original forgets"""
    out = tmp_path / "out"
    run(flag, word, f"pcapfile:{out}", f"pcapfile:{source(0, list(range(50)))}")
    kind = next(kind for kind in MAGICS if word.startswith(kind))
    assert out.read_bytes().startswith(bytes.fromhex(MAGICS[kind]))
    if kind == "lzo":
        unpacked = subprocess.run(["lzop", "-dc"], stdin=out.open("rb"), capture_output=True, check=True).stdout
        (tmp_path / "out").write_bytes(unpacked)
    check_numbered([out]).assert_exact({0: 50})


@pytest.mark.parametrize("flag", ["-N", "--seqfile"])
def test_N_seqfile(tmp_path: Path, source: Callable[..., Path], flag: str) -> None:  # noqa: N802
    """-N --seqfile FILE: "<n>\\n", the last number used; corrupt is fatal; empty warns and begins at 0."""
    path, number = source(0, [0, 9, 10, 25]), tmp_path / "number"

    def series(status: int = 0) -> tuple[list[str], str]:
        directory = tmp_path / f"out{len(list(tmp_path.iterdir()))}"
        directory.mkdir()
        said = run("-UG", "10", flag, number, "-B", f"pcapfile:{directory}", f"pcapfile:{path}", status=status).stderr
        return [name[-8:] for name in names(directory)], said

    number.write_text("41\n")
    assert series()[0] == ["00000042", "00000043", "00000044"]
    assert number.read_text() == "44\n"
    number.write_text("99999998\n")
    assert series()[0] == ["99999999", "00000000", "00000001"]
    assert number.read_text() == "1\n"
    number.write_text("")
    found, said = series()
    assert found == ["00000000", "00000001", "00000002"]
    assert "number is empty; the sequence begins at 0" in said
    number.write_text("many\n")
    found, said = series(status=74)
    assert found == []
    assert str(number) in said


def test_file_ext(base: Path, source: Callable[..., Path]) -> None:
    """--file-ext=EXT: the extension comes from here alone, whatever the compression."""
    run("-U", "-z", "6", "--file-ext=.pcap.gz", "-B", f"pcapfile:{base}", f"pcapfile:{source(0, [0])}")
    run("-U", "-z", "6", "-B", f"pcapfile:{base}", f"pcapfile:{source(1, [3600])}")
    assert names(base) == [f"{START}-00000000.pcap.gz", "20231114-231320-00000000"]


@requires_root
def test_relinquish_privileges(base: Path) -> None:
    """--relinquish-privileges=USER: after the inputs open, before the output does."""
    os.chown(base, 65534, -1)
    for path in (base, *base.parents):
        if path.is_relative_to("/tmp") and path != Path("/tmp"):
            path.chmod(0o755)
    with Lab() as lab:
        a, peer = lab.veth("a")
        live = Live(lab, "--relinquish-privileges=nobody", "-B", f"pcapfile:{base}", f"ring:{a}")
        report = lab.send([peer], frames=100, rate=10_000)
        live.stop()
    check_numbered(files(base)).assert_exact(report.sent_by_id)
    assert {path.stat().st_uid for path in files(base)} == {65534}


def test_pipeout(base: Path, tmp_path: Path, source: Callable[..., Path]) -> None:
    """--pipeout=COMMAND: split at spaces, no shell; one process a file, from our standard output into the file."""
    script, runs = tmp_path / "program", tmp_path / "runs"
    script.write_text(f'#!/bin/sh\necho "$#:$1:$2" >> {runs}\nexec gzip -c\n')
    script.chmod(0o755)
    path = source(0, [0, 9, 10, 25])
    run("-UG", "10", f"--pipeout={script} $HOME  >x", "-B", f"pcapfile:{base}", f"pcapfile:{path}")
    assert [capinfos(file).packets for file in files(base)] == [2, 1, 1]
    # The next process stands ready while a file is written, so there may be one more than files.
    assert set(runs.read_text().splitlines()) == {"2:$HOME:>x"}
    assert len(runs.read_text().splitlines()) in (3, 4)


# The names of the files -----------------------------------------------------------------------------------------------


def test_file_name(base: Path, source: Callable[..., Path]) -> None:
    """DIR/YYYYMMDD-HHMMSS-NNNNNNNN<ext>: time of the segment's first packet, sequence %08lu from 0"""
    run("-UG", "3600", "--file-ext=.x", "-B", f"pcapfile:{base}", f"pcapfile:{source(0, [7, 3601, 7300])}")
    assert names(base) == ["20231114-221327-00000000.x", "20231114-231321-00000001.x", "20231115-001500-00000002.x"]
    first = [next(iter(packets(path))).time_ns // 10**9 for path in files(base)]
    assert [time.strftime("%Y%m%d-%H%M%S", time.gmtime(second)) for second in first] == [
        name[:15] for name in names(base)
    ]


@requires_root
def test_tmp_pid_name_until_the_file_is_closed(base: Path) -> None:
    """tmp-<pid>-..., renamed when the file is closed"""
    with Lab() as lab:
        a, peer = lab.veth("a")
        live = Live(lab, "-B", f"pcapfile:{base}", f"ring:{a}")
        lab.send([peer], frames=10, rate=10_000)
        wait_until(lambda: bool(names(base)), "a staging file")
        assert all(re.fullmatch(r"tmp-\d+-00000000", name) for name in names(base))
        live.stop()
    assert [bool(re.fullmatch(r"\d{8}-\d{6}-00000000", name)) for name in names(base)] == [True]
