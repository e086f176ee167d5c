"""mtracecap end to end: real interfaces, real files, real compressors; judged by programs that we did not write."""

from __future__ import annotations

import itertools
import os
import pty
import re
import select
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import pytest
from support.captures import write_capture
from support.frames import numbered_frame
from support.judges import capinfos, check_numbered, decompressed, packet_count, packets, packets_by_wireshark
from support.lab import Lab, requires_root, requires_tool, wait_until

MTRACECAP = [sys.executable, "-m", "appliance.mtracecap"]


class Recording:
    """A mtracecap that runs in a lab, and records already when this is made."""

    def __init__(self, lab: Lab, *argv: str, **options: Any) -> None:
        self.lab = lab
        self.process = lab.popen([*MTRACECAP, "-v", *argv], stderr=subprocess.PIPE, text=True, **options)

    def stop(self, timeout_s: float = 30.0) -> tuple[int, str]:
        """TERM; the exit status, and what it said."""
        self.process.send_signal(signal.SIGTERM)
        return self.wait(timeout_s)

    def wait(self, timeout_s: float = 30.0) -> tuple[int, str]:
        said = self.process.communicate(timeout=timeout_s)[1]
        return self.process.returncode, said


def wait_for_capture(recording: Recording, count: int) -> None:
    """Until `count` packet sockets are bound, each to its interface, and the program answers to TERM."""

    def begun() -> bool:
        assert recording.process.poll() is None, recording.wait()
        lines = recording.lab.run(["cat", "/proc/net/packet"]).stdout.splitlines()[1:]
        bound = sum(line.split()[3] == "0003" and line.split()[4] != "0" for line in lines)
        status = Path(f"/proc/{recording.process.pid}/status").read_text()
        caught = re.search(r"^SigCgt:\s*([0-9a-f]+)$", status, re.M)
        return bound >= count and caught is not None and bool(int(caught[1], 16) >> (signal.SIGTERM - 1) & 1)

    wait_until(begun, "the capture has begun", timeout_s=20)


def series(directory: Path) -> list[Path]:
    """The files of -B, in the order of their names."""
    return sorted(directory.iterdir())


def assert_names(paths: Sequence[Path], extension: str, first_number: int = 0) -> None:
    """Date, time, and numbers without a gap."""
    for number, path in enumerate(paths, first_number):
        pattern = rf"\d{{8}}-\d{{6}}-{number:08d}{re.escape(extension)}"
        assert re.fullmatch(pattern, path.name), path.name


def mtracecap(*argv: object, status: int = 0, **options: Any) -> subprocess.CompletedProcess[bytes]:
    done = subprocess.run([*MTRACECAP, *map(str, argv)], capture_output=True, check=False, timeout=60, **options)
    assert done.returncode == status, done.stderr.decode()
    assert b"Traceback" not in done.stderr
    return done


@requires_root
@requires_tool("lz4", "capinfos")
class TestSeriesFromInterfaces:
    def test_two_interfaces_every_frame_once_and_in_order_through_rotation_and_compressor(self, tmp_path: Path) -> None:
        frames = 60_000
        with Lab() as lab:
            (a, a_peer), (b, b_peer) = lab.veth("a"), lab.veth("b")
            # Order is promised for packets that are not later than -w: on a busy machine half a second is.
            flags = ["-w", "500", "-G", "1", "-U", "--file-ext=.pcap.lz4", "--pipeout=lz4 -q -c"]
            recording = Recording(lab, "-B", f"pcapfile:{tmp_path}", *flags, f"ring:{a}", f"ring:{b}")
            wait_for_capture(recording, 2)
            report = lab.send([a_peer, b_peer], frames=frames, rate=40_000)
            status, said = recording.stop()
        assert status == 0, said
        assert report.sent_by_id == {0: frames, 1: frames}
        files = series(tmp_path)
        assert_names(files, ".pcap.lz4")
        assert len(files) >= 3
        subprocess.run(["lz4", "-q", "-m", "-t", *files], check=True)
        check_numbered(files).assert_exact(report.sent_by_id)
        assert packet_count(files) == 2 * frames
        # The first or the last second may be one without packets: capinfos knows no order of such a file.
        assert all(info.in_order or info.packets == 0 for info in map(capinfos, files)), said

    def test_a_silent_interface_holds_nothing_back(self, tmp_path: Path) -> None:
        with Lab() as lab:
            (a, a_peer), (b, _) = lab.veth("a"), lab.veth("b")
            recording = Recording(lab, "-UG", "1", "-B", f"pcapfile:{tmp_path}", f"ring:{a}", f"ring:{b}")
            wait_for_capture(recording, 2)
            sender = lab.start_sender([a_peer], rate=20_000)
            appeared: dict[str, float] = {}
            deadline = time.time() + 4.5
            while time.time() < deadline:
                for path in series(tmp_path):
                    if not path.name.startswith("tmp-"):
                        appeared.setdefault(path.name, time.time())
                time.sleep(0.02)
            report = sender.stop()
            status, said = recording.stop()
        assert status == 0, said
        check_numbered(series(tmp_path)).assert_exact(report.sent_by_id)
        latest = {path.name: packet_times(path)[-1] for path in series(tmp_path) if packet_times(path)}
        assert len(appeared) >= 3
        for name, moment in appeared.items():
            if name in latest:
                # Closed at the full second behind its last packet, published without waiting for anything else.
                assert moment < latest[name] // 10**9 + 1 + 3, name

    def test_idle_seconds_make_whole_files_without_packets(self, tmp_path: Path) -> None:
        with Lab() as lab:
            a, _ = lab.veth("a")
            flags = ["-UG1", "--file-ext=.pcap.lz4", "--pipeout=lz4 -q -c"]
            recording = Recording(lab, *flags, "-B", f"pcapfile:{tmp_path}", f"ring:{a}")
            wait_for_capture(recording, 1)
            wait_until(lambda: sum(not p.name.startswith("tmp-") for p in series(tmp_path)) >= 3, "three idle files")
            status, said = recording.stop()
        assert status == 0, said
        files = series(tmp_path)
        assert_names(files, ".pcap.lz4")
        assert packet_count(files) == 0
        assert {len(decompressed(path)) for path in files} == {24}

    def test_files_are_temporary_until_they_are_whole(self, tmp_path: Path) -> None:
        with Lab() as lab:
            a, peer = lab.veth("a")
            recording = Recording(lab, "-B", f"pcapfile:{tmp_path}", f"ring:{a}")
            wait_for_capture(recording, 1)
            report = lab.send([peer], frames=100, rate=10_000)
            wait_until(lambda: bool(series(tmp_path)), "a staging file")
            assert [bool(re.fullmatch(r"tmp-\d+-00000000", path.name)) for path in series(tmp_path)] == [True]
            assert [path.stat().st_mode & 0o777 for path in series(tmp_path)] == [0o600]
            status, said = recording.stop()
        assert status == 0, said
        files = series(tmp_path)
        assert_names(files, "")
        check_numbered(files).assert_exact(report.sent_by_id)

    def test_a_new_file_before_the_packet_that_crosses_the_size(self, tmp_path: Path) -> None:
        frames, size = 3_000, 1000
        with Lab() as lab:
            a, peer = lab.veth("a")
            recording = Recording(lab, "-S", "1", "-B", f"pcapng:{tmp_path}", f"ring:{a}")
            wait_for_capture(recording, 1)
            report = lab.send([peer], frames=frames, rate=20_000, sizes=(size,))
            status, said = recording.stop()
        assert status == 0, said
        files = series(tmp_path)
        assert_names(files, "")
        check_numbered(files).assert_exact(report.sent_by_id)
        per_file = (1 << 20) // size
        assert [capinfos(path).packets for path in files] == [per_file, per_file, frames - 2 * per_file]

    def test_filter_and_snaplen_and_the_original_length(self, tmp_path: Path) -> None:
        with Lab() as lab:
            a, peer = lab.veth("a")
            flags = ["-F", "udp src port 20001", "-s", "96"]
            recording = Recording(lab, *flags, "-B", f"pcapfile:{tmp_path}", f"ring:{a}")
            wait_for_capture(recording, 1)
            lab.send([peer], frames=300, rate=10_000, sizes=(200,), flows=3)
            status, said = recording.stop()
        assert status == 0, said
        found = [packet for path in series(tmp_path) for packet in packets_by_wireshark(path)]
        assert [(len(packet.data), packet.original_length) for packet in found] == [(96, 200)] * 100

    def test_the_watch_file_holds_back_the_next_file_and_not_the_capture(self, tmp_path: Path) -> None:
        directory, gate = tmp_path / "out", tmp_path / "gate"
        directory.mkdir()
        with Lab() as lab:
            a, peer = lab.veth("a")
            recording = Recording(lab, "-W", str(gate), "-B", f"pcapfile:{directory}", f"ring:{a}")
            wait_for_capture(recording, 1)
            report = lab.send([peer], frames=2_000, rate=10_000)
            time.sleep(0.5)
            assert series(directory) == []
            gate.touch()
            wait_until(lambda: bool(series(directory)), "a file")
            status, said = recording.stop()
        assert status == 0, said
        check_numbered(series(directory)).assert_exact(report.sent_by_id)

    def test_term_ends_the_wait_for_the_watch_file_and_what_was_captured_is_written(self, tmp_path: Path) -> None:
        with Lab() as lab:
            a, peer = lab.veth("a")
            recording = Recording(lab, "-W", str(tmp_path / "gate"), "-B", f"pcapfile:{tmp_path}", f"ring:{a}")
            wait_for_capture(recording, 1)
            report = lab.send([peer], frames=2_000, rate=10_000)
            status, said = recording.stop()
        assert status == 0, said
        files = series(tmp_path)
        assert_names(files, "")
        check_numbered(files).assert_exact(report.sent_by_id)

    def test_the_sequence_goes_on_behind_the_number_in_the_file(self, tmp_path: Path) -> None:
        directory, number = tmp_path / "out", tmp_path / "number"
        directory.mkdir()
        number.write_text("41\n")
        for _ in range(2):
            with Lab() as lab:
                a, _ = lab.veth("a")
                recording = Recording(lab, "-N", str(number), "-UG1", "-B", f"pcapfile:{directory}", f"ring:{a}")
                wait_for_capture(recording, 1)
                time.sleep(1.2)
                status, said = recording.stop()
            assert status == 0, said
        files = series(directory)
        assert_names(files, "", first_number=42)
        assert number.read_text() == f"{41 + len(files)}\n"

    def test_privileges_are_given_up_when_the_inputs_are_open(self, tmp_path: Path) -> None:
        directory = tmp_path / "out"
        directory.mkdir()
        for path in (directory, *directory.parents):
            if path.is_relative_to("/tmp") and path != Path("/tmp"):
                path.chmod(0o755)
        os.chown(directory, 65534, -1)
        with Lab() as lab:
            a, peer = lab.veth("a")
            flags = ["--relinquish-privileges=nobody", "-B", f"pcapfile:{directory}"]
            recording = Recording(lab, *flags, f"ring:{a}")
            wait_for_capture(recording, 1)
            wait_until(lambda: bool(series(directory)), "a file")
            status_file = Path(f"/proc/{recording.process.pid}/status").read_text()
            report = lab.send([peer], frames=500, rate=10_000)
            status, said = recording.stop()
        assert status == 0, said
        assert re.search(r"^Uid:\t65534\t65534\t65534\t65534$", status_file, re.M)
        assert re.search(r"^CapEff:\t0+$", status_file, re.M)
        check_numbered(series(directory)).assert_exact(report.sent_by_id)
        assert {path.stat().st_uid for path in series(directory)} == {65534}

    def test_a_compressor_that_fails_is_no_published_file_and_a_status(self, tmp_path: Path) -> None:
        directory, script = tmp_path / "out", tmp_path / "fails"
        directory.mkdir()
        script.write_text("#!/bin/sh\ncat\nexit 3\n")
        script.chmod(0o755)
        with Lab() as lab:
            a, peer = lab.veth("a")
            recording = Recording(lab, f"--pipeout={script}", "-B", f"pcapfile:{directory}", f"ring:{a}")
            wait_for_capture(recording, 1)
            lab.send([peer], frames=100, rate=10_000)
            status, said = recording.stop()
        assert status == 74, said
        assert "fails" in said
        assert "status 3" in said
        assert [path.name.startswith("tmp-") for path in series(directory)] == [True]

    @pytest.mark.parametrize(
        ("flags", "status", "words"),
        [
            (["-F", "tcp prot"], 78, "tcp prot"),
            (["--pipeout=nosuchprogram -c"], 66, "nosuchprogram"),
            (["ring:nosuchif0"], 66, "nosuchif0"),
        ],
    )
    def test_what_cannot_work_is_refused_and_leaves_nothing(
        self, tmp_path: Path, flags: list[str], status: int, words: str
    ) -> None:
        with Lab() as lab:
            a, _ = lab.veth("a")
            command = [*MTRACECAP, *flags, "-B", f"pcapfile:{tmp_path}", f"ring:{a}"]
            done = lab.run(command, check=False)
        assert done.returncode == status, done.stderr
        assert words in done.stderr
        assert "Traceback" not in done.stderr
        assert list(tmp_path.iterdir()) == []


@requires_tool("mergecap", "capinfos", "editcap", "lz4", "zstd", "xz", "gzip")
class TestOneFileFromFiles:
    KINDS: ClassVar = {
        "microseconds": ["pcap", "pcap", "pcap"],
        "nanoseconds": ["nsecpcap", "pcap", "nsecpcap"],
        "pcapng": ["pcapng", "pcapng", "pcap"],
        "compressed": ["pcapng.lz4", "nsecpcap.gzip", "pcap.zstd"],
        "compressed otherwise": ["pcap.xz", "pcap.bzip2", "pcap.gzip"],
    }

    @staticmethod
    def inputs(directory: Path, kinds: Sequence[str], count: int = 2000) -> list[Path]:
        """Three files of numbered frames whose times interlock, each in order; no two packets have the same time."""
        directory.mkdir()
        paths = []
        for i, kind in enumerate(kinds):
            step_ns = (1000 if "nsec" in kind or "ng" in kind else 2_000) * 1000
            frames = [(n * step_ns + i * 251_000, numbered_frame(i, n)) for n in range(count)]
            paths.append(write_capture(directory / f"in{i}", kind, frames))
        return paths

    @pytest.mark.parametrize("kinds", KINDS.values(), ids=KINDS.keys())
    @pytest.mark.parametrize("sink", ["pcapfile", "pcapng"])
    def test_it_holds_the_same_packets_as_mergecap_in_time_order(
        self, tmp_path: Path, kinds: list[str], sink: str
    ) -> None:
        inputs = self.inputs(tmp_path / "in", kinds)
        output, peer = tmp_path / "out.pcap", tmp_path / "peer.pcapng"
        mtracecap(f"{sink}:{output}", *(f"pcapfile:{path}" for path in inputs))
        plain = []
        for path in inputs:
            plain.append(tmp_path / f"{path.name}.plain")
            plain[-1].write_bytes(decompressed(path))
        subprocess.run(["mergecap", "-w", str(peer), *map(str, plain)], check=True)
        mine, theirs = list(packets(output)), list(packets(peer))
        assert [packet.time_ns for packet in mine] == sorted(packet.time_ns for packet in mine)
        assert content(mine) == content(theirs)
        check_numbered([output]).assert_exact({0: 2000, 1: 2000, 2: 2000})
        assert capinfos(output).in_order
        assert sorted(path.name for path in tmp_path.iterdir() if path.suffix == ".pcap") == ["out.pcap"]

    @pytest.mark.parametrize(
        ("kinds", "magic"), [(["pcap"] * 3, "d4c3b2a1"), (["pcap", "nsecpcap", "pcap"], "4d3cb2a1")]
    )
    def test_a_pcap_has_nanoseconds_as_soon_as_one_input_has(
        self, tmp_path: Path, kinds: list[str], magic: str
    ) -> None:
        inputs = self.inputs(tmp_path / "in", kinds, count=5)
        mtracecap(f"pcapfile:{tmp_path}/out.pcap", *(f"pcapfile:{path}" for path in inputs))
        assert (tmp_path / "out.pcap").read_bytes()[:4].hex() == magic

    def test_standard_input_and_standard_output(self, tmp_path: Path) -> None:
        (path,) = self.inputs(tmp_path / "in", ["pcapng"], count=100)
        with path.open("rb") as file:
            done = mtracecap("pcapfile:-", "pcapfile:-", stdin=file)
        (tmp_path / "out.pcap").write_bytes(done.stdout)
        check_numbered([tmp_path / "out.pcap"]).assert_exact({0: 100})

    def test_a_terminal_sees_how_far_it_is_and_a_pipe_nothing(self, tmp_path: Path) -> None:
        (path,) = self.inputs(tmp_path / "in", ["pcap"], count=5)
        argv = [*MTRACECAP, f"pcapfile:{tmp_path}/out.pcap", "pcapfile:-"]
        leader, follower = pty.openpty()
        process = subprocess.Popen(argv, stdin=subprocess.PIPE, stderr=follower)
        os.close(follower)
        assert process.stdin is not None
        process.stdin.write(path.read_bytes())
        process.stdin.flush()
        shown = b""
        while b"5 packets, " not in shown:
            assert select.select([leader], [], [], 20)[0], shown
            shown += os.read(leader, 4096)
        process.stdin.close()
        assert process.wait(20) == 0
        os.close(leader)
        assert mtracecap(f"pcapfile:{tmp_path}/again.pcap", f"pcapfile:{tmp_path}/out.pcap").stderr == b""

    def test_a_fifo_is_written_straight_into(self, tmp_path: Path) -> None:
        (path,) = self.inputs(tmp_path / "in", ["pcap"], count=100)
        fifo = tmp_path / "fifo"
        os.mkfifo(fifo)
        with (tmp_path / "copy.pcap").open("wb") as copy:
            reader = subprocess.Popen(["cat", str(fifo)], stdout=copy)
            mtracecap(f"pcapfile:{fifo}", f"pcapfile:{path}")
            assert reader.wait(10) == 0
        check_numbered([tmp_path / "copy.pcap"]).assert_exact({0: 100})
        assert fifo.is_fifo()

    @pytest.mark.parametrize(
        ("flags", "magic"),
        [("-z3", "1f8b"), ("-Z gz", "1f8b"), ("-Zbz -z9", "425a68"), ("-Z xz", "fd377a58"), ("-Z no", "d4c3b2a1")],
    )
    def test_compression_by_type_and_level(self, tmp_path: Path, flags: str, magic: str) -> None:
        inputs = self.inputs(tmp_path / "in", ["pcap", "pcap"], count=200)
        output = tmp_path / "out"
        mtracecap(*flags.split(), f"pcapfile:{output}", *(f"pcapfile:{path}" for path in inputs))
        assert output.read_bytes().hex().startswith(magic)
        check_numbered([output]).assert_exact({0: 200, 1: 200})

    def test_files_of_a_series_are_named_by_the_time_of_their_first_packet(self, tmp_path: Path) -> None:
        frames = [(second * 10**9, numbered_frame(0, n)) for n, second in enumerate([0, 1, 3, 3600, 3601])]
        source = write_capture(tmp_path / "in", "pcap", frames)
        directory = tmp_path / "out"
        directory.mkdir()
        mtracecap("-UG", "2", "--file-ext=.pcap", "-B", f"pcapfile:{directory}", f"pcapfile:{source}")
        names = ["20231114-221320-00000000", "20231114-221323-00000001", "20231114-231320-00000002"]
        assert [path.name for path in series(directory)] == [f"{name}.pcap" for name in names]
        assert [capinfos(path).packets for path in series(directory)] == [2, 1, 2]

    def test_an_output_that_exists_is_not_touched(self, tmp_path: Path) -> None:
        (path,) = self.inputs(tmp_path / "in", ["pcap"], count=5)
        (tmp_path / "out.pcap").write_bytes(b"precious")
        done = mtracecap(f"pcapfile:{tmp_path}/out.pcap", f"pcapfile:{path}", status=73)
        assert b"out.pcap: exists already" in done.stderr
        assert (tmp_path / "out.pcap").read_bytes() == b"precious"

    def test_a_truncated_input_gives_its_whole_packets_and_a_status(self, tmp_path: Path) -> None:
        whole, cut = self.inputs(tmp_path / "in", ["pcap", "pcap"], count=100)
        cut.write_bytes(cut.read_bytes()[:-7])
        done = mtracecap(f"pcapfile:{tmp_path}/out.pcap", f"pcapfile:{whole}", f"pcapfile:{cut}", status=74)
        assert cut.name.encode() in done.stderr
        check_numbered([tmp_path / "out.pcap"]).assert_exact({0: 100, 1: 99})

    def test_different_link_types_do_not_fit_into_a_pcap_and_are_named(self, tmp_path: Path) -> None:
        first, second = self.inputs(tmp_path / "in", ["pcap", "pcap"], count=5)
        content = bytearray(second.read_bytes())
        content[20] = 101
        second.write_bytes(content)
        done = mtracecap(f"pcapfile:{tmp_path}/out.pcap", f"pcapfile:{first}", f"pcapfile:{second}", status=78)
        assert all(word in done.stderr for word in (b"in0", b"in1", b"pcapng"))
        assert sorted(path.name for path in tmp_path.iterdir()) == ["in"]


def packet_times(path: Path) -> list[int]:
    return [packet.time_ns for packet in itertools.islice(packets(path), None)]


def content(found: Sequence[Any]) -> list[tuple[int, bytes, int]]:
    return sorted((packet.time_ns, bytes(packet.data), packet.original_length) for packet in found)
