"""File names and numbers: what they look like, that no number comes twice, and which leftovers are ours."""

from __future__ import annotations

import os
import stat
import subprocess
import tempfile
import time
from pathlib import Path

import pytest

from appliance.errors import CannotCreateError, InputOutputError, MissingPermissionError
from appliance.merge.naming import (
    ApplianceNaming,
    MtracecapNaming,
    Naming,
    SharedNumber,
    SingleFileNaming,
    prepare_directories,
)

START_NS = 1_700_000_000_123_456_789  # 2023-11-14 22:13:20 UTC


@pytest.fixture
def dead_pid() -> int:
    process = subprocess.Popen(["true"])
    process.wait()
    return process.pid


def in_child(act: object, *arguments: object) -> None:
    """Runs `act` in a forked process that ends at once."""
    pid = os.fork()
    if pid == 0:
        try:
            act(*arguments)  # type: ignore[operator]
        finally:
            os._exit(0)
    assert os.waitpid(pid, 0)[1] == 0


def appliance_naming(directory: Path) -> ApplianceNaming:
    naming = ApplianceNaming(directory, "main", ".pcapng.lz4")
    prepare_directories(naming)
    return naming


class TestApplianceNaming:
    def test_names_are_in_utc_without_colons_and_with_a_padded_number(self, tmp_path: Path) -> None:
        naming = appliance_naming(tmp_path)
        name = "main-20231114T221320Z-00000007.pcapng.lz4"
        assert naming.final_path(7, START_NS) == str(tmp_path / "ready" / name)
        assert naming.sidecar_path(7, START_NS) == str(tmp_path / "meta" / f"{name}.json")
        assert naming.staging_path(7) == str(tmp_path / "work" / "main-00000007.pcapng.lz4")
        assert naming.quarantine_path(7) == str(tmp_path / "quarantine" / "main-00000007.pcapng.lz4")

    def test_its_directories_are_made_with_their_mode_whatever_the_umask(self, tmp_path: Path) -> None:
        old = os.umask(0o777)
        try:
            naming = appliance_naming(tmp_path / "state")
        finally:
            os.umask(old)
        made = {Path(path).name: stat.S_IMODE(os.stat(path).st_mode) for path in naming.directories}
        assert made == dict.fromkeys(("state", "work", "ready", "meta", "quarantine"), 0o750)

    def test_numbers_go_on_after_a_restart(self, tmp_path: Path) -> None:
        assert [appliance_naming(tmp_path).next_sequence() for _ in range(3)] == [0, 1, 2]
        assert (tmp_path / "meta" / "sequence").read_text() == "2\n"

    def test_a_number_taken_by_a_worker_that_died_is_not_given_again(self, tmp_path: Path) -> None:
        naming = appliance_naming(tmp_path)
        in_child(naming.next_sequence)
        assert naming.next_sequence() == 1

    @pytest.mark.parametrize("damage", [None, b"", b"12", b"x\n", b"-1\n", b"9" * 40 + b"\n"])
    def test_a_lost_number_is_found_again_in_the_names_that_are_there(
        self, tmp_path: Path, damage: bytes | None
    ) -> None:
        naming = appliance_naming(tmp_path)
        (tmp_path / "meta" / "main-20231114T221320Z-00000041.pcapng.lz4.json").touch()
        (tmp_path / "ready" / "main-20231114T221320Z-00000007.pcapng.lz4").touch()
        (tmp_path / "ready" / "other-20231114T221320Z-00000099.pcapng.lz4").touch()
        if damage is not None:
            (tmp_path / "meta" / "sequence").write_bytes(damage)
        assert naming.next_sequence() == 42
        assert (tmp_path / "meta" / "sequence").read_text() == "42\n"

    def test_a_number_that_was_not_used_is_given_again_if_it_was_the_last(self, tmp_path: Path) -> None:
        naming = appliance_naming(tmp_path)
        assert [naming.next_sequence() for _ in range(3)] == [0, 1, 2]
        naming.give_back(1)
        assert naming.next_sequence() == 3
        naming.give_back(3)
        assert naming.next_sequence() == 3

    def test_staging_and_quarantine_paths_never_exist_yet(self, tmp_path: Path) -> None:
        naming = appliance_naming(tmp_path)
        Path(naming.staging_path(5)).touch()
        (tmp_path / "quarantine" / "main-00000005.pcapng.lz4").symlink_to("nowhere")
        for path in (naming.staging_path(5), naming.quarantine_path(5)):
            assert path is not None
            assert not os.path.lexists(path)
            assert path.endswith(".1")

    def test_leftovers_are_this_outputs_captures_in_work_whatever_they_end_in(self, tmp_path: Path) -> None:
        naming = appliance_naming(tmp_path)
        work = tmp_path / "work"
        ours = ["main-00000009.pcapng.lz4", "main-00000008.pcap.zst", "main-00000007.pcapng.1"]
        for age, name in enumerate([*ours, "flows-00000001.ipfix", "other-00000001.pcapng", "main-1.pcapng"]):
            (work / name).touch()
            os.utime(work / name, (1000 + age, 1000 + age))
        (work / "main-00000001.pcapng").symlink_to("nowhere")
        (work / "main-00000002.pcapng").mkdir()
        assert naming.leftovers() == [str(work / name) for name in ours]


class TestMtracecapNaming:
    def test_names_hold_time_number_and_the_given_extension(self, tmp_path: Path) -> None:
        naming = MtracecapNaming(tmp_path, ".pcap.lz4", utc=True)
        assert naming.final_path(3, START_NS) == str(tmp_path / "20231114-221320-00000003.pcap.lz4")
        assert MtracecapNaming(tmp_path, utc=True).final_path(0, START_NS).endswith("20231114-221320-00000000")
        assert naming.staging_path(3) == str(tmp_path / f"tmp-{os.getpid()}-00000003")

    def test_the_time_is_local_unless_utc_is_asked_for(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("TZ", "XXX-05:30")
        time.tzset()
        try:
            assert MtracecapNaming(tmp_path).final_path(0, START_NS).endswith("/20231115-034320-00000000")
            assert MtracecapNaming(tmp_path, utc=True).final_path(0, START_NS).endswith("/20231114-221320-00000000")
        finally:
            monkeypatch.delenv("TZ")
            time.tzset()

    def test_without_a_sequence_file_numbers_begin_at_zero_and_outlive_a_worker(self, tmp_path: Path) -> None:
        naming = MtracecapNaming(tmp_path)
        in_child(naming.next_sequence)
        assert naming.next_sequence() == 1
        assert MtracecapNaming(tmp_path).next_sequence() == 0
        assert list(tmp_path.iterdir()) == []

    def test_the_sequence_file_holds_the_last_number_used(self, tmp_path: Path) -> None:
        file = tmp_path / "sequence"
        assert MtracecapNaming(tmp_path, sequence_file=file).next_sequence() == 0
        assert file.read_text() == "0\n"
        file.write_text("41\n")
        assert MtracecapNaming(tmp_path, sequence_file=file).next_sequence() == 42
        assert (file.read_text(), stat.S_IMODE(file.stat().st_mode)) == ("42\n", 0o644)

    def test_an_empty_sequence_file_begins_at_zero_with_a_warning(
        self, tmp_path: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        file = tmp_path / "sequence"
        file.touch()
        assert MtracecapNaming(tmp_path, sequence_file=file).next_sequence() == 0
        assert str(file) in caplog.text

    @pytest.mark.parametrize("damage", ["7", "x\n", "-3\n", "100000000\n", "1\n2\n", "\n"])
    def test_a_damaged_sequence_file_is_an_error_that_names_it(self, tmp_path: Path, damage: str) -> None:
        file = tmp_path / "sequence"
        file.write_text(damage)
        with pytest.raises(InputOutputError, match=str(file)):
            MtracecapNaming(tmp_path, sequence_file=file).next_sequence()
        assert file.read_text() == damage

    def test_the_number_wraps_after_eight_nines(self, tmp_path: Path) -> None:
        file = tmp_path / "sequence"
        file.write_text("99999998\n")
        naming = MtracecapNaming(tmp_path, sequence_file=file)
        assert [naming.next_sequence() for _ in range(3)] == [99999999, 0, 1]
        assert file.read_text() == "1\n"
        number = SharedNumber(modulus=2)
        assert [number.take() for _ in range(3)] == [0, 1, 0]

    def test_only_temporary_files_of_dead_processes_are_leftovers(self, tmp_path: Path, dead_pid: int) -> None:
        ours = [f"tmp-{dead_pid}-00000000", f"tmp-{dead_pid}-00000001.1", f"tmp-{os.getpid()}-00000002"]
        others = [
            f"tmp-{os.getppid()}-00000000",
            "tmp-x-00000000",
            f"tmp-{dead_pid}-0000000",
            "20231114-221320-00000000",
        ]
        for name in ours + others:
            (tmp_path / name).touch()
        assert sorted(MtracecapNaming(tmp_path).leftovers()) == sorted(str(tmp_path / name) for name in ours)

    def test_a_leftover_of_our_own_process_id_is_not_written_over(self, tmp_path: Path) -> None:
        naming = MtracecapNaming(tmp_path)
        Path(naming.staging_path(0)).touch()
        assert naming.staging_path(0) == str(tmp_path / f"tmp-{os.getpid()}-00000000.1")


class TestSingleFileNaming:
    def test_a_file_is_written_beside_its_name(self, tmp_path: Path) -> None:
        naming = SingleFileNaming(tmp_path / "out.pcap")
        assert naming.staging_path(0) == str(tmp_path / f"tmp-{os.getpid()}-out.pcap")
        assert naming.final_path(0, START_NS) == str(tmp_path / "out.pcap")
        assert naming.stream is None

    def test_a_name_that_was_taken_meanwhile_is_left_alone(self, tmp_path: Path) -> None:
        naming = SingleFileNaming(tmp_path / "out.pcap")
        (tmp_path / "out.pcap").write_bytes(b"precious")
        assert not naming.is_free()
        (tmp_path / "out.pcap.1").symlink_to("nowhere")
        assert naming.final_path(0, START_NS) == str(tmp_path / "out.pcap.2")

    def test_an_empty_file_gives_way_and_a_link_does_not(self, tmp_path: Path) -> None:
        (tmp_path / "out.pcap").touch()
        (tmp_path / "link.pcap").symlink_to("out.pcap")
        assert not SingleFileNaming(tmp_path / "link.pcap").is_free()
        naming = SingleFileNaming(tmp_path / "out.pcap")
        assert naming.is_free()
        assert naming.final_path(0, START_NS) == str(tmp_path / "out.pcap")
        assert not (tmp_path / "out.pcap").exists()

    def test_standard_output_devices_and_fifos_are_written_straight_into(self, tmp_path: Path) -> None:
        fifo = tmp_path / "fifo"
        os.mkfifo(fifo)
        for target in ("-", "/dev/null", str(fifo)):
            naming = SingleFileNaming(target)
            assert naming.stream == naming.staging_path(0) == naming.final_path(0, START_NS) == target
            assert naming.directories == ()

    def test_what_an_earlier_run_left_is_told_and_not_touched(self, tmp_path: Path, dead_pid: int) -> None:
        (tmp_path / f"tmp-{dead_pid}-out.pcap").touch()
        (tmp_path / f"tmp-{dead_pid}-outXpcap").touch()
        naming = SingleFileNaming(tmp_path / "out.pcap")
        assert naming.leftovers() == []
        assert naming.unfinished() == [str(tmp_path / f"tmp-{dead_pid}-out.pcap")]


class TestDirectories:
    @pytest.mark.parametrize("make", [MtracecapNaming, lambda path: SingleFileNaming(path / "x")])
    def test_a_directory_of_the_users_must_be_there(self, tmp_path: Path, make: object) -> None:
        naming: Naming = make(tmp_path / "nowhere")  # type: ignore[operator]
        with pytest.raises(CannotCreateError, match=r"nowhere: does not exist"):
            prepare_directories(naming)
        (tmp_path / "nowhere").touch()
        with pytest.raises(CannotCreateError, match=r"nowhere: is not a directory"):
            prepare_directories(naming)

    def test_a_file_in_the_place_of_a_directory_is_refused(self, tmp_path: Path) -> None:
        (tmp_path / "ready").touch()
        with pytest.raises(CannotCreateError, match=r"ready: is not a directory"):
            appliance_naming(tmp_path)
        with pytest.raises(CannotCreateError, match=r"ready/below: cannot be made: "):
            appliance_naming(tmp_path / "ready" / "below")

    @pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to be somebody else for a moment")
    def test_a_directory_that_may_not_be_written_is_refused(self) -> None:
        with tempfile.TemporaryDirectory() as directory:
            os.chmod(directory, 0o755)
            os.seteuid(65534)
            try:
                with pytest.raises(MissingPermissionError, match=rf"{directory}: .* user 65534"):
                    prepare_directories(MtracecapNaming(directory))
            finally:
                os.seteuid(0)
