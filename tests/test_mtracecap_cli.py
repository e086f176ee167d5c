"""mtracecap's command line: how it is read, what is asked of the engine, and what is refused before anything is opened.

The flags are those of ANT mtracecap 0.4.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from support.lab import requires_tool

from appliance import mtracecap
from appliance.capture.uri import Uri
from appliance.errors import (
    CannotCreateError,
    InputOutputError,
    MissingInputError,
    MissingPermissionError,
    UsageError,
)
from appliance.merge.naming import MtracecapNaming, SingleFileNaming
from appliance.mtracecap import Arguments, Job, check_machine, make_job, parse_arguments

SERIES = ["-B", "pcapfile:/data", "ring:lo"]


def parse(*argv: str) -> Arguments:
    return parse_arguments(argv)


def job(*argv: str) -> Job:
    return make_job(parse_arguments(argv))


def check(*argv: str) -> None:
    arguments = parse_arguments(argv)
    check_machine(arguments, make_job(arguments))


@pytest.fixture
def capture(tmp_path: Path) -> Path:
    """A pcap file without packets."""
    path = tmp_path / "in.pcap"
    path.write_bytes(bytes.fromhex("d4c3b2a1020004000000000000000000ffff000001000000"))
    return path


class TestForms:
    def test_without_base_the_first_positional_is_the_output(self) -> None:
        arguments = parse("pcapfile:out.pcap", "pcapfile:a.pcap", "pcapng:b.pcapng")
        assert arguments.output == Uri("pcapfile", "out.pcap", is_live=False)
        assert [str(uri) for uri in arguments.inputs] == ["pcapfile:a.pcap", "pcapng:b.pcapng"]
        naming = make_job(arguments).naming
        assert isinstance(naming, SingleFileNaming)
        assert naming.path == os.path.abspath("out.pcap")

    def test_with_base_every_positional_is_an_input(self) -> None:
        arguments = parse("-B", "pcapng:/data", "ring:a", "ring:b")
        assert [str(uri) for uri in arguments.inputs] == ["ring:a", "ring:b"]
        done = make_job(arguments)
        assert isinstance(done.naming, MtracecapNaming)
        assert done.naming.directories == ("/data",)
        assert (done.config.outputs[0].format, str(done.config.outputs[0].directory)) == ("pcapng", "/data")

    def test_the_whole_example_of_the_manual(self) -> None:
        done = job(*"-B pcapfile:DIR -G 1 -U --file-ext=.pcap.lz4".split(), "--pipeout=lz4 -q -c", "ring:a", "ring:b")
        output = done.config.outputs[0]
        assert (output.rotate_seconds, output.format) == (1, "pcap")
        assert output.compressor == ("lz4", "-q", "-c")
        assert done.naming.final_path(5, 0).endswith("DIR/19700101-000000-00000005.pcap.lz4")
        assert [interface.uri for interface in done.config.interfaces] == ["ring:a", "ring:b"]

    def test_flags_may_be_clustered_abbreviated_and_anywhere(self) -> None:
        arguments = parse("ring:lo", "-UvvG5", "--base=pcapfile:/data", "--pipe", "gzip -c", "-s", "96")
        assert (arguments.use_utc, arguments.verbosity, arguments.rotate_seconds) == (True, 2, 5)
        assert (arguments.pipeout, arguments.snaplen) == (("gzip", "-c"), 96)

    def test_every_long_flag_is_its_short_one(self) -> None:
        short = parse(*"-B pcapfile:/d -F udp -G 9 -N s -S 7 -U -W w -Z xz -s 64 -v -w 3 -z 2 ring:lo".split())
        long = parse(
            *"--baseuri pcapfile:/d --filter udp --rotate-seconds 9 --seqfile s --rotate-sizemb 7 --use-utc".split(),
            *"--watchfile w --compress-type xz --snaplen 64 --verbose --maxwait_ms 3 --compress-level 2".split(),
            "ring:lo",
        )
        assert short == long

    def test_a_bare_name_is_guessed_as_a_file_or_an_interface(self, capture: Path) -> None:
        assert parse("-B", "pcapfile:/d", str(capture)).inputs[0].scheme == "pcapfile"
        assert str(parse("-B", "pcapfile:/d", "lo").inputs[0]) == "ring:lo"


class TestDefaultsAndMeanings:
    def test_the_three_defaults_that_differ_from_0_4(self) -> None:
        config = job(*SERIES).config
        assert config.interfaces[0].snaplen == 262144
        assert config.outputs[0].max_wait_ms == 50
        assert config.outputs[0].rotate_seconds == 0

    def test_nothing_is_compressed_rotated_metered_served_or_deleted_unless_asked_for(self) -> None:
        config = job(*SERIES).config
        output = config.outputs[0]
        assert (output.compressor, output.rotate_bytes, output.rotate_packets) == ("none", 0, 0)
        assert (output.retain_bytes, output.retain_seconds, output.min_free_bytes) == (0, 0, 0)
        assert output.empty_segments == "header"
        assert not config.meter.enabled
        assert (config.monitor.address, config.monitor.control_socket) == (None, None)

    def test_sizes_count_the_packets_mebibytes(self) -> None:
        done = job("-S", "3", *SERIES)
        assert done.config.outputs[0].rotate_bytes == 3 << 20

    def test_one_filter_and_snaplen_serve_all_inputs(self) -> None:
        interfaces = job("-F", "udp port 53", "-s", "128", *SERIES, "ring:b").config.interfaces
        assert [(interface.filter, interface.snaplen) for interface in interfaces] == [("udp port 53", 128)] * 2

    def test_user_wait_watch_file_and_verbosity_reach_the_engine(self) -> None:
        done = job("--relinquish-privileges=daemon", "-w", "7", "-W", "gate", "-v", *SERIES)
        assert (done.config.service.user, done.config.outputs[0].max_wait_ms) == ("daemon", 7)
        assert done.watch_file == os.path.abspath("gate")
        assert (done.config.service.log_level, job(*SERIES).config.service.log_level) == ("info", "warning")
        assert job("-w", "0", *SERIES).config.outputs[0].max_wait_ms == 1

    def test_the_sequence_file_is_read_and_written(self, tmp_path: Path) -> None:
        (tmp_path / "n").write_text("6\n")
        naming = job("-N", str(tmp_path / "n"), *SERIES).naming
        assert naming.next_sequence() == 7
        assert (tmp_path / "n").read_text() == "7\n"

    @pytest.mark.parametrize(
        ("flags", "argv"),
        [
            ("-z 6", ("gzip", "-c", "-6")),
            ("-z 1 -Z gz", ("gzip", "-c", "-1")),
            ("-Z gzip", ("gzip", "-c")),
            ("-Z zlib", ("gzip", "-c")),
            ("-Z bz2 -z 9", ("bzip2", "-c", "-9")),
            ("-Z lzo", ("lzop", "-c")),
            ("-Zxz", ("xz", "-c")),
            ("-z 0 -Z gz", "none"),
            ("-Z no -z 5", "none"),
            ("-Z no --pipeout=cat", ("cat",)),
        ],
    )
    def test_compression(self, flags: str, argv: object) -> None:
        assert job(*flags.split(), *SERIES).config.outputs[0].compressor == argv


class TestRefusals:
    @pytest.mark.parametrize(
        ("argv", "words"),
        [
            ("", "no output is named"),
            ("pcapfile:out.pcap", "no input is named"),
            ("-B pcapfile:/d", "no input is named"),
            ("-B nonsense:/d ring:lo", "output 'nonsense:/d': .*pcapfile"),
            ("-B pcapfile:- ring:lo", "-B pcapfile:-: needs a directory"),
            ("-B duck:/d ring:lo", "duck: holds the state"),
            ("out.pcap ring:lo", "'out.pcap'"),
            ("-B pcapfile:/d rnig:lo", "did you mean ring"),
            ("-B pcapfile:/d nosuchthing", "'nosuchthing' is neither a file nor an interface"),
            ("-B pcapfile:/d ring:../x", "no interface name"),
            ("-G 1.5 -B pcapfile:/d ring:lo", "-G '1.5': must be a whole number"),
            ("-G -1 -B pcapfile:/d ring:lo", "-G '-1'"),
            ("--rotate-seconds=x -B pcapfile:/d ring:lo", "--rotate-seconds 'x'"),
            ("-z 10 -B pcapfile:/d ring:lo", "-z '10': must be a whole number from 0 to 9"),
            ("-s 262145 -B pcapfile:/d ring:lo", "-s '262145'"),
            ("-Z rar -B pcapfile:/d ring:lo", "-Z 'rar': is none of gz"),
            ("-X -B pcapfile:/d ring:lo", "option -X not recognized"),
            ("--rotate -B pcapfile:/d ring:lo", "option --rotate not a unique prefix"),
            ("-B", "option -B requires argument"),
            ("--use-utc=1 -B pcapfile:/d ring:lo", "option --use-utc must not have an argument"),
            ("-z 3 --pipeout=lz4 -B pcapfile:/d ring:lo", "--pipeout and -z or -Z"),
            ("--pipeout= -B pcapfile:/d ring:lo", "--pipeout: names no command"),
            ("--file-ext=/x -B pcapfile:/d ring:lo", "--file-ext '/x'"),
            ("-G 1 pcapfile:out ring:lo", "-G makes a series of files, which needs -B"),
            ("-S 1 pcapfile:out ring:lo", "-S makes a series of files, which needs -B"),
            ("-B pcapfile:/d ring:lo pcapfile:x", "ring:lo and pcapfile:x cannot be merged"),
            ("-B pcapfile:/d pcapfile:- pcapng:-", "standard input .* once only"),
            ("--relinquish-privileges=a;b -B pcapfile:/d ring:lo", "service.user: "),
        ],
    )
    def test_a_wrong_command_line_is_a_usage_error_that_names_the_flag(self, argv: str, words: str) -> None:
        with pytest.raises(UsageError, match=words):
            job(*argv.split())

    def test_a_missing_input_is_named(self, tmp_path: Path) -> None:
        with pytest.raises(MissingInputError, match=r"pcapfile:.*/none\.pcap: No such file"):
            check("-B", f"pcapfile:{tmp_path}", f"pcapfile:{tmp_path}/none.pcap")
        with pytest.raises(MissingInputError, match="is a directory"):
            check("-B", f"pcapfile:{tmp_path}", f"pcapfile:{tmp_path}")
        with pytest.raises(MissingInputError, match="ring:nosuchif0: there is no interface"):
            check("-B", f"pcapfile:{tmp_path}", "ring:nosuchif0")

    def test_an_output_that_cannot_be_created_is_named(self, tmp_path: Path, capture: Path) -> None:
        with pytest.raises(CannotCreateError, match="nowhere: does not exist"):
            check("-B", f"pcapfile:{tmp_path}/nowhere", str(capture))
        with pytest.raises(CannotCreateError, match=r"nowhere: does not exist"):
            check(f"pcapfile:{tmp_path}/nowhere/out.pcap", str(capture))
        with pytest.raises(CannotCreateError, match=r"in\.pcap: exists already"):
            check(f"pcapfile:{capture}", str(capture))

    def test_a_missing_compressor_is_refused_at_the_start(self, tmp_path: Path, capture: Path) -> None:
        with pytest.raises(MissingInputError, match="nosuchprogram"):
            check("-B", f"pcapfile:{tmp_path}", "--pipeout=nosuchprogram -c", str(capture))

    def test_a_damaged_sequence_file_is_refused_at_the_start(self, tmp_path: Path, capture: Path) -> None:
        (tmp_path / "n").write_text("many\n")
        with pytest.raises(InputOutputError, match=str(tmp_path / "n")):
            check("-B", f"pcapfile:{tmp_path}", "-N", str(tmp_path / "n"), str(capture))
        with pytest.raises(CannotCreateError, match="nowhere/n"):
            check("-B", f"pcapfile:{tmp_path}", "-N", str(tmp_path / "nowhere" / "n"), str(capture))

    def test_an_unknown_user_is_named(self, tmp_path: Path, capture: Path) -> None:
        with pytest.raises(UsageError, match="no user 'nosuchuser0'"):
            check("-B", f"pcapfile:{tmp_path}", "--relinquish-privileges=nosuchuser0", str(capture))

    @pytest.mark.skipif(os.geteuid() != 0, reason="needs root: only root can give up its privileges")
    def test_a_directory_that_the_later_user_may_not_write_is_refused(self, tmp_path: Path, capture: Path) -> None:
        os.chmod(tmp_path, 0o700)
        with pytest.raises((MissingPermissionError, CannotCreateError), match=re.escape(str(tmp_path))):
            check("-B", f"pcapfile:{tmp_path}", "--relinquish-privileges=nobody", str(capture))
        assert os.geteuid() == 0

    @requires_tool("gzip")
    def test_a_good_command_line_passes_and_leaves_nothing_behind(self, tmp_path: Path, capture: Path) -> None:
        before = sorted(tmp_path.iterdir())
        check("-B", f"pcapfile:{tmp_path}", "-z", "3", "-N", str(tmp_path / "n"), str(capture))
        check(f"pcapfile:{tmp_path}/out.pcap", str(capture))
        assert sorted(tmp_path.iterdir()) == before


class TestProgram:
    def call(self, *argv: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "appliance.mtracecap", *argv]
        return subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)

    @pytest.mark.parametrize(
        ("argv", "status"),
        [
            (["-Q"], 64),
            ([], 64),
            (["pcapfile:out.pcap", "pcapfile:/nowhere.pcap"], 66),
            (["pcapfile:/nowhere/out.pcap", "pcapfile:/dev/null"], 73),
        ],
    )
    def test_refusals_have_named_statuses_one_clear_line_and_no_traceback(self, argv: list[str], status: int) -> None:
        done = self.call(*argv)
        assert done.returncode == status
        assert done.stderr.startswith("mtracecap: ")
        assert "Traceback" not in done.stderr
        assert done.stdout == ""

    @pytest.mark.parametrize("flag", ["-h", "--help"])
    def test_help_lists_every_flag_and_the_deliberate_differences(self, flag: str) -> None:
        done = self.call(flag)
        assert done.returncode == 0
        for long, short in mtracecap.LONG_OPTIONS.items():
            assert f"--{long.rstrip('=')}" in done.stdout
            assert not short or f"-{short}, " in done.stdout
        assert "Three defaults differ" in done.stdout
        assert "Done right" in done.stdout
        assert max(map(len, done.stdout.splitlines())) <= 120

    def test_libtrace_help_lists_the_uris(self) -> None:
        done = self.call("-H")
        assert done.returncode == 0
        assert all(word in done.stdout for word in ("ring:", "pcap:", "int:", "pcapfile:", "pcapng:"))
