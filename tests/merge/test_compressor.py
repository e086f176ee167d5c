"""Where a segment's bytes go: files, pipes, children."""

from __future__ import annotations

import fcntl
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from support.judges import decompressed

from appliance.errors import MissingInputError
from appliance.merge.compressor import (
    CompressorSink,
    FileSink,
    SinkError,
    StreamSink,
    built_in_argv,
    compressor_argv,
    compressor_suffix,
    program_argv,
    takes_by_reading,
)
from appliance.merge.rotation import NANOSECONDS, NEVER, RotationPolicy
from appliance.merge.segment import create_exclusively


def no_beat() -> None:
    """Nobody watches."""


def staging(tmp_path: Path) -> tuple[str, int]:
    path = str(tmp_path / "staging")
    return path, create_exclusively(path, 0o600)


def test_a_program_that_does_not_exist_is_refused_before_anything_is_written() -> None:
    with pytest.raises(MissingInputError, match="no-such-compressor"):
        compressor_argv(["no-such-compressor", "-1"])


@pytest.mark.parametrize(
    ("compressor", "suffix"),
    [
        ("none", ""),
        ("lz4", ".lz4"),
        (["zstd", "-1"], ".zst"),
        (["/usr/bin/pigz"], ".gz"),
        (["xz"], ".xz"),
        (["own-tool", "-x"], ".own-tool"),
    ],
)
def test_names_end_in_what_the_compressor_makes(compressor: str | list[str], suffix: str) -> None:
    assert compressor_suffix(compressor) == suffix


def test_pages_are_lent_to_known_programs_alone(tmp_path: Path) -> None:
    script = tmp_path / "zstd"
    script.write_text("#!/bin/sh\nexec cat\n")
    renamed = tmp_path / "pigz"
    renamed.symlink_to("/bin/cat")
    assert takes_by_reading(built_in_argv())
    assert takes_by_reading(program_argv(["gzip", "-1"], "compressor"))
    assert not any(takes_by_reading((str(path),)) for path in (script, renamed, tmp_path / "lz4"))


def test_a_plain_file_is_there_once_it_is_finished_and_locked_until_then(tmp_path: Path) -> None:
    path, fd = staging(tmp_path)
    sink = FileSink(path, fd)
    sink.write(memoryview(b"content"), no_beat)
    with open(path, "rb") as other:
        with pytest.raises(BlockingIOError):
            fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)
        sink.finish(1)
        fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)
        assert other.read() == b"content"


def test_a_file_that_cannot_be_cut_back_keeps_no_whole_writes(tmp_path: Path) -> None:
    path, fd = staging(tmp_path)
    sink = FileSink(path, fd)
    full = os.open("/dev/full", os.O_WRONLY)
    os.dup2(full, fd)
    os.close(full)
    with pytest.raises(SinkError, match="No space left"):
        sink.write(memoryview(b"content"), no_beat)
    assert not sink.keeps_whole_writes
    sink.abandon()


def test_a_compressor_holds_nothing_but_its_pipe_its_file_and_its_complaints(tmp_path: Path) -> None:
    path, fd = staging(tmp_path)
    stranger = os.open("/dev/null", os.O_RDONLY)
    os.set_inheritable(stranger, True)
    sink = CompressorSink(path, fd, ["cat"], 5)
    time.sleep(0.1)
    assert sorted(os.listdir(f"/proc/{sink.pid}/fd")) == ["0", "1", "2"]
    assert os.getsid(sink.pid) == sink.pid
    environment = Path(f"/proc/{sink.pid}/environ").read_bytes().split(b"\0")
    assert {line.partition(b"=")[0] for line in environment if line} == {b"PATH", b"LANG"}
    with open(path, "rb") as other, pytest.raises(BlockingIOError):
        fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)
    sink.write(memoryview(b"content"), no_beat)
    sink.finish(5)
    os.close(stranger)
    assert Path(path).read_bytes() == b"content"


def test_no_descriptor_is_left_over_however_a_compressor_ends(tmp_path: Path) -> None:
    before = len(os.listdir("/proc/self/fd"))
    for number, (argv, finishes) in enumerate(
        [(["cat"], True), (["false"], True), (["sleep", "60"], True), (["sleep", "60"], False)]
    ):
        path = str(tmp_path / str(number))
        sink = CompressorSink(path, create_exclusively(path, 0o600), argv, 5)
        if finishes:
            try:
                sink.finish(0.3)
            except SinkError:
                pass
        else:
            sink.abandon()
    with pytest.raises(SinkError, match="cannot be started"):
        CompressorSink(path, os.dup(1), ["/no/such/program"], 5)
    assert len(os.listdir("/proc/self/fd")) == before


@pytest.mark.parametrize(
    ("command", "said"),
    [
        ("exit 3", "ended with status 3"),
        ("echo no licence >&2; exit 1", "ended with status 1: no licence"),
        ("kill -9 $$", "was ended by signal 9"),
    ],
)
def test_a_failed_compressor_is_named_with_its_own_words(tmp_path: Path, command: str, said: str) -> None:
    path, fd = staging(tmp_path)
    sink = CompressorSink(path, fd, ["sh", "-c", command], 5)
    with pytest.raises(SinkError, match=f"compressor sh {said}"):
        sink.finish(5)


def test_a_compressor_that_died_says_so_before_anything_is_written_to_it(tmp_path: Path) -> None:
    path, fd = staging(tmp_path)
    sink = CompressorSink(path, fd, ["sleep", "60"], 5)
    assert sink.is_alive
    os.kill(sink.pid, signal.SIGKILL)
    os.waitid(os.P_PID, sink.pid, os.WEXITED | os.WNOWAIT)
    assert not sink.is_alive
    sink.abandon()


def test_a_stopped_compressor_is_given_up_after_its_time_out_and_ended(tmp_path: Path) -> None:
    path, fd = staging(tmp_path)
    sink = CompressorSink(path, fd, ["cat"], 0.3)
    os.kill(sink.pid, signal.SIGSTOP)
    beats: list[int] = []
    with pytest.raises(SinkError, match=r"took no byte for 0\.3 s"):
        sink.write(memoryview(bytes(4 << 20)), lambda: beats.append(1))
    assert beats
    sink.abandon()
    with pytest.raises(ProcessLookupError):
        os.kill(sink.pid, 0)


def test_the_built_in_compressor_makes_a_frame_with_a_checksum_that_lz4_accepts(tmp_path: Path) -> None:
    argv = compressor_argv("lz4")
    assert argv is not None
    path, fd = staging(tmp_path)
    sink = CompressorSink(path, fd, argv, 20)
    content = os.urandom(3 << 20)
    sink.write(memoryview(content), no_beat)
    sink.finish(20)
    assert decompressed(path) == content
    assert Path(path).read_bytes()[4] & 0x04, "content checksum"


def test_the_built_in_compressor_starts_anywhere_also_if_the_interpreter_was_found_by_a_relative_path() -> None:
    code = "from appliance.merge.compressor import built_in_argv; print(*built_in_argv(), sep=chr(10))"
    relative = os.path.relpath(Path(sys.executable).parent)
    found = subprocess.run(
        [Path(sys.executable).name, "-c", code],
        env=os.environ | {"PATH": f"{relative}:{os.environ['PATH']}"},
        capture_output=True,
        text=True,
        check=True,
    )
    done = subprocess.run(found.stdout.split("\n")[:-1], input=bytes(100), cwd="/", capture_output=True)
    assert (done.returncode, done.stderr) == (0, b"")


def test_the_built_in_compressor_fails_where_it_cannot_write() -> None:
    with open("/dev/full", "wb") as full:
        done = subprocess.run(built_in_argv(), input=bytes(100), stdout=full, stderr=subprocess.PIPE)
    assert done.returncode == os.EX_IOERR
    assert done.stderr == b"compress: No space left on device\n"


@pytest.mark.parametrize("blocking", [True, False])
def test_a_slow_reader_of_a_stream_gets_everything_and_the_writer_shows_its_life(blocking: bool) -> None:
    reading, writing = os.pipe()
    os.set_blocking(writing, blocking)
    content = os.urandom(1 << 20)
    found = bytearray()

    def read_slowly() -> None:
        time.sleep(0.7)
        while chunk := os.read(reading, 100_000):
            found.extend(chunk)

    reader = threading.Thread(target=read_slowly)
    reader.start()
    beats: list[int] = []
    sink = StreamSink("-", writing)
    sink.write(memoryview(content), lambda: beats.append(1))
    sink.finish(1)
    reader.join()
    os.close(reading)
    assert found == content
    assert beats


def test_a_stream_without_a_reader_is_an_error() -> None:
    reading, writing = os.pipe()
    os.close(reading)
    sink = StreamSink("-", writing)
    with pytest.raises(SinkError, match="Broken pipe"):
        sink.write(memoryview(b"content"), no_beat)
    sink.abandon()


@pytest.mark.parametrize(("at_s", "boundary_s"), [(0, 60), (59, 60), (60, 120), (1_700_000_040, 1_700_000_100)])
def test_boundaries_are_multiples_of_the_interval(at_s: int, boundary_s: int) -> None:
    policy = RotationPolicy(rotate_seconds=60)
    assert policy.boundary_after(at_s * NANOSECONDS) == boundary_s * NANOSECONDS
    assert policy.boundary_after(at_s * NANOSECONDS + 1) == boundary_s * NANOSECONDS


def test_without_limits_nothing_ever_ends_and_no_time_is_too_late_for_a_boundary() -> None:
    policy = RotationPolicy()
    assert (policy.boundary_after(5), policy.max_packets, policy.max_bytes) == (NEVER, NEVER, NEVER)
    assert RotationPolicy(rotate_seconds=60).boundary_after(NEVER) == NEVER
