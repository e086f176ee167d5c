"""What the rows of the benchmark compute for themselves; the measuring is `./bootstrap bench --quick`."""

from __future__ import annotations

import os
import signal
import struct
import subprocess
import sys
import time
from importlib import import_module
from pathlib import Path

import pytest

pytest.importorskip("numpy", reason="an extra of the benchmark")

from support.lab import requires_root, wait_until

from bench.__main__ import ROWS, measure
from bench.context import Bench, scratch_directory
from bench.live import Burst, Program, Trial, by_process, medians, not_above
from bench.measure import CpuTime
from bench.results import Picture, RowResult, Table
from bench.rows import idle, ipfix_pack, latency, live_meter, live_one, offline_flows


@pytest.mark.parametrize("name", ROWS)
def test_every_row_has_its_module(name: str) -> None:
    module = import_module(f"bench.rows.{name.replace('-', '_')}")
    assert (module.NAME, bool(module.TITLE), module.NEEDS_ROOT in (True, False)) == (name, True, True)
    assert callable(module.run_row)


def test_without_root_live_rows_say_so(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("os.geteuid", lambda: 1000)
    assert measure("latency", Bench(tmp_path)).error.startswith("needs root")


def test_a_row_that_fails_does_not_end_the_others(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def fail(_bench: Bench) -> RowResult:
        raise RuntimeError("no luck")

    monkeypatch.setattr("bench.rows.ipfix_pack.run_row", fail)
    assert measure("ipfix-pack", Bench(tmp_path)).error == "RuntimeError: no luck"


def test_scratch_data_is_gone_after_an_interrupt(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt), scratch_directory(tmp_path) as scratch:
        (scratch / "big").write_bytes(bytes(1000))
        raise KeyboardInterrupt
    assert not list(tmp_path.iterdir())


def test_a_packet_that_was_dropped_makes_the_others_dearer() -> None:
    spent = {"capture/a": 30_000.0, "merge/main": 10_000.0}
    assert Trial(offered=1000, lost=500, bursts=[Burst(800, 1.0, spent)]).ns_per_packet() == pytest.approx(100)
    assert Trial(offered=10, lost=10, bursts=[Burst(10, 1.0, {"x": 1.0})]).ns_per_packet() is None


def test_a_burst_that_was_disturbed_does_not_count() -> None:
    bursts = [Burst(10, 1.0, {"merge/main": ns}) for ns in (100.0, 5000.0, 120.0)]
    assert Trial(offered=30, bursts=bursts).ns_per_packet() == pytest.approx(12)


def test_sources_of_one_kind_count_together() -> None:
    spent = {"capture/a": 100.0, "capture/b": 200.0, "merge/main": 50.0, "opener": 1.0}
    one = Trial(offered=10, bursts=[Burst(10, 1.0, spent)])
    assert by_process([one]) == "capture 30, merge 5"
    assert one.ns_per_packet("capture", "opener") == pytest.approx(30.1)


def test_a_median_needs_every_round() -> None:
    trials = [Trial(offered=n) for n in (1, 5, 3)]
    assert medians(trials, lambda trial: trial.offered) == 3
    assert medians(trials, lambda trial: None if trial.offered == 1 else trial.offered) is None


def spending(*ns_per_packet: float) -> list[Trial]:
    return [Trial(offered=1, bursts=[Burst(1, 1.0, {"x": ns})]) for ns in ns_per_packet]


def test_programs_are_held_against_each_other_round_by_round() -> None:
    target = not_above("job", "ns", spending(30, 11, 12), "peer", spending(28, 10, 25), 1.0, Trial.ns_per_packet)
    assert (target.ours, target.peer) == (12, 25)
    assert target.ratio == pytest.approx(30 / 28)
    assert target.met is False


def test_a_peer_with_fewer_rounds_is_held_against_as_many_of_ours() -> None:
    target = not_above("job", "ns", spending(10, 90), "peer", spending(20), 1.0, Trial.ns_per_packet)
    assert (target.ours, target.ratio) == (50, 0.5)


def test_a_peer_without_a_figure_gives_no_ratio() -> None:
    assert not_above("job", "ns", spending(10), "peer", [], 1.0, Trial.ns_per_packet).met is None


def test_a_program_that_is_not_there_is_missing() -> None:
    program = Program("x", lambda interfaces, out: [], needs=("sh", "no-such-program"))
    assert program.missing == ["no-such-program"]


def test_cpu_of_short_lived_children_belongs_to_their_parent() -> None:
    before = {1: CpuTime("merge/main", 1.0, 0.5)}
    after = {1: CpuTime("merge/main", 1.5, 0.75), 2: CpuTime("python", 0.1, 0.0)}
    assert idle.spent_by_name(before, after) == {"merge/main": 0.75, "python": 0.1}


def test_latency_reads_packets_as_they_become_whole() -> None:
    header = struct.pack("<IHHIIII", 0xA1B23C4D, 2, 4, 0, 0, 65535, 1)
    stream = header + b"".join(struct.pack("<IIII", 1, i, 4, 4) + bytes(4) for i in range(3))
    reader = latency.PcapReader()
    found = [time for i in range(len(stream)) for time in reader.feed(stream[i : i + 1])]
    assert found == [1_000_000_000, 1_000_000_001, 1_000_000_002]


def test_python_ipfix_reads_every_record_back() -> None:
    assert ipfix_pack.read_back(ipfix_pack.packed(50)) == 50


def test_both_exporters_pack_what_they_are_given() -> None:
    ours, theirs = ipfix_pack._pack(100)[1], ipfix_pack._pack_tuples(100)[1]
    assert ours > 100 * 50 and theirs > 100 * 41


def test_records_of_an_ipfix_file_are_counted_by_its_last_sequence_number(tmp_path: Path) -> None:
    path = tmp_path / "flows.ipfix"
    path.write_bytes(b"".join(struct.pack(">HHIII", 10, 16, 0, sequence, 1) for sequence in (0, 40, 90)))
    assert offline_flows.ipfix_records(path) == 90


def test_a_meter_is_asked_for_its_own_count() -> None:
    assert live_meter.metered_packets(Trial(seen='{"meter": {"metered_packets": 7}}')) == 7
    assert live_meter.metered_packets(Trial(output="Total: Processed: 5, skipped: 0")) == 5
    assert live_meter.metered_packets(Trial(seen="Packets processed: 9\n", output="")) == 9
    assert live_meter.metered_packets(Trial(output="YAF statistics: Flows: 3 Packets: 8 Dropped: 0 Ignored: 1")) == 8
    assert live_meter.metered_packets(Trial(output="")) is None


def test_a_compressor_of_mtracecap_names_its_file(tmp_path: Path) -> None:
    (command,) = live_one._piped_mtracecap(["zstd", "-1"], "zst", ["a"], tmp_path)
    assert "--pipeout=zstd -1" in command
    assert f"pcapfile:{tmp_path}/out.pcap.zst" in command


def test_pictures_are_drawn_of_what_was_measured(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="an extra of the benchmark")
    from bench.pictures import draw

    table = Table("t", "A table", ("n", "program", "Mpps"), [[1, "a", 2.0], [2, "a", 3.0], [1, "b", None]])
    table.pictures = [Picture("Mpps", "n", "program"), Picture("Mpps", "n", "program", lines=True)]
    table.pictures.append(Picture("Mpps", "program", "program"))
    nothing = Table("u", "Nothing", ("n", "Mpps"), [[1, None]], pictures=[Picture("Mpps", "n", "n")])
    paths = draw([RowResult("t", "A row", [table, nothing])], tmp_path, "a machine")
    assert [path.name for path in paths] == ["t.png", "t-2.png", "t-3.png"]
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in paths)


@requires_root
@pytest.mark.parametrize("delay_s", [0.0, 0.1, 0.4])
def test_an_interrupt_leaves_no_namespace_and_no_data(tmp_path: Path, project: Path, delay_s: float) -> None:
    command = [sys.executable, "-m", "bench", "--quick", "--rows", "latency", "--scratch", str(tmp_path / "scratch")]
    command += ["--json", str(tmp_path / "bench.json"), "--pictures", str(tmp_path)]
    command += ["--recordings", str(tmp_path / "scratch")]
    (tmp_path / "scratch").mkdir()
    process = subprocess.Popen(
        command, env=os.environ | {"PYTHONPATH": str(project / "tests")}, stdout=subprocess.PIPE, text=True
    )
    namespaces = Path("/run/netns")

    def ours() -> list[Path]:
        return list(namespaces.glob(f"lab-{process.pid}-*")) if namespaces.is_dir() else []

    try:
        wait_until(lambda: bool(ours()) or process.poll() is not None, "a laboratory", 30.0)
        time.sleep(delay_s)  # in the making of the namespace, of the interfaces, in the start of the program
        process.send_signal(signal.SIGINT)
        output, _ = process.communicate(timeout=30)
    finally:
        process.kill()
        process.wait()
    assert process.returncode == 130, output
    assert ours() == []
    assert not list((tmp_path / "scratch").iterdir())
