"""Output and input traces: what the originals' documentation promises, and what the usual tools say of the files."""

from __future__ import annotations

import doctest
import os
import random
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.judges import capinfos, packets_by_wireshark
from support.lab import Lab, requires_root, requires_tool

from appliance.formats import output_trace as module, packet as packet_module
from appliance.formats.output_trace import (
    BZIP2_COMPRESSION,
    LZ4_COMPRESSION,
    LZMA_COMPRESSION,
    LZO_COMPRESSION,
    NO_COMPRESSION,
    O_APPEND,
    ZLIB_COMPRESSION,
    ZSTD_COMPRESSION,
    InputTrace,
    OutputTrace,
    Packet,
    input_trace,
    output_trace,
    plt_exc_libtrace,
)

START_NS = 1_700_000_000_000_000_000
FORMATS = ("pcapfile", "pcap", "pcapng", "erf", "rawerf")
PROGRAMS = {
    ZLIB_COMPRESSION: "gzip",
    BZIP2_COMPRESSION: "bzip2",
    LZO_COMPRESSION: "lzop",
    LZMA_COMPRESSION: "xz",
    ZSTD_COMPRESSION: "zstd",
    LZ4_COMPRESSION: "lz4",
}


def some_packets(count: int = 50, seed: int = 3, link_type: int = 1) -> list[Packet]:
    chance = random.Random(seed)
    return [
        Packet(START_NS + i * 1_000_003, chance.randbytes(chance.randint(60, 300)), 1514, link_type)
        for i in range(count)
    ]


@pytest.fixture(autouse=True)
def plain_umask() -> Iterator[None]:
    before = os.umask(0o027)
    yield
    os.umask(before)


def unpacked(path: Path, compression: int) -> Path:
    if compression == NO_COMPRESSION:
        return path
    plain = path.with_name("unpacked")
    with path.open("rb") as packed, plain.open("wb") as out:
        subprocess.run([PROGRAMS[compression], "-dc"], stdin=packed, stdout=out, check=True)
    return plain


@pytest.mark.parametrize("module_", [module, packet_module])
def test_the_documentations_examples_run(module_: object) -> None:
    result = doctest.testmod(module_)  # type: ignore[arg-type]
    assert result.failed == 0
    assert result.attempted > 0 or module_ is packet_module


@pytest.mark.parametrize("scheme", FORMATS)
def test_each_format_holds_the_packets_and_times_that_wireshark_reads(tmp_path: Path, scheme: str) -> None:
    packets = some_packets()
    path = tmp_path / "a"
    with output_trace(f"{scheme}:{path}") as trace:
        trace.write_packets(packets[:-1])
        trace.write_packet(packets[-1])
    before = 18 if scheme in ("erf", "rawerf") else 0
    read = packets_by_wireshark(path)
    assert [(p.time_ns, bytes(p.data[before:])) for p in read] == [(p.timestamp_ns, p.data) for p in packets]
    with input_trace(str(path)) as trace_in:
        assert list(trace_in) == packets


@pytest.mark.parametrize("level", [1, 5, 9])
@pytest.mark.parametrize("compression", PROGRAMS)
def test_each_compression_is_what_its_program_unpacks(tmp_path: Path, compression: int, level: int) -> None:
    if shutil.which(PROGRAMS[compression]) is None:
        pytest.skip(f"not installed: {PROGRAMS[compression]}")
    path = tmp_path / "a"
    trace = output_trace(f"pcapfile:{path}")
    trace.conf_compress_type(compression)
    trace.conf_compress_level(level)
    trace.start_output()
    trace.write_packets(some_packets())
    trace.close_output()
    assert [p.time_ns for p in packets_by_wireshark(unpacked(path, compression))] == [
        p.timestamp_ns for p in some_packets()
    ]


@requires_tool("tracepktdump", "tracestats")
@pytest.mark.parametrize("compression", [NO_COMPRESSION, ZLIB_COMPRESSION, BZIP2_COMPRESSION, LZMA_COMPRESSION])
@pytest.mark.parametrize("scheme", ["pcapfile", "erf"])
def test_libtraces_tools_open_the_files(tmp_path: Path, scheme: str, compression: int) -> None:
    path = tmp_path / "a"
    with output_trace(f"{scheme}:{path}") as trace:
        pass
    trace = output_trace(f"{scheme}:{path}")
    trace.conf_compress_type(compression)
    trace.start_output()
    trace.write_packets(some_packets())
    trace.close_output()
    done = subprocess.run(["tracestats", f"{scheme}:{path}"], check=True, capture_output=True, text=True)
    assert next(line.split()[1] for line in done.stdout.splitlines() if "Total:" in line) == "50"
    dumped = subprocess.run(["tracepktdump", "-c", "1", f"{scheme}:{path}"], check=True, capture_output=True, text=True)
    assert "Nov 14 " in dumped.stdout


@requires_tool("tcpdump")
@pytest.mark.parametrize("scheme", ["pcapfile", "pcapng"])
def test_tcpdump_reads_plain_files(tmp_path: Path, scheme: str) -> None:
    path = tmp_path / "a"
    with output_trace(f"{scheme}:{path}") as trace:
        trace.write_packets(some_packets())
    argv = ["tcpdump", "-nn", "-tt", "--time-stamp-precision=nano", "-r", str(path)]
    lines = subprocess.run(argv, check=True, capture_output=True, text=True).stdout.splitlines()
    stamps = [line.split()[0] for line in lines if line[:2] == "17"]
    assert stamps == [f"{p.timestamp_ns // 10**9}.{p.timestamp_ns % 10**9:09}" for p in some_packets()]


@pytest.mark.parametrize("compression", [0, 1, 2, 4, 5, 6])
@pytest.mark.parametrize("scheme", ["pcapfile", "pcapng", "erf"])
def test_append_adds_to_a_valid_file_and_the_result_is_one(tmp_path: Path, scheme: str, compression: int) -> None:
    if compression and shutil.which(PROGRAMS[compression]) is None:
        pytest.skip(f"not installed: {PROGRAMS[compression]}")
    path = tmp_path / "a"
    packets = some_packets()
    for part in (packets[:20], packets[20:]):
        trace = output_trace(f"{scheme}:{path}")
        trace.conf_file_flags(O_APPEND)
        trace.conf_compress_type(compression)
        trace.start_output()
        trace.write_packets(part)
        trace.close_output()
    assert capinfos(unpacked(path, compression)).packets == 50
    with input_trace(f"{scheme}:{path}") as trace_in:
        assert list(trace_in) == packets


def append_to(path: Path, scheme: str, packets: list[Packet]) -> None:
    trace = output_trace(f"{scheme}:{path}")
    trace.conf_file_flags(O_APPEND)
    trace.start_output()
    with trace:
        trace.write_packets(packets)


def test_append_keeps_to_the_microseconds_of_the_file(tmp_path: Path) -> None:
    path = tmp_path / "a"
    with output_trace(f"pcapfile:{tmp_path / 'ns'}") as trace:
        trace.write_packets(some_packets(3))
    subprocess.run(["editcap", "-F", "pcap", tmp_path / "ns", path], check=True)
    append_to(path, "pcapfile", some_packets(2))
    times = [p.timestamp_ns // 1000 * 1000 for p in some_packets(3) + some_packets(2)]
    assert [p.time_ns for p in packets_by_wireshark(path)] == times


@pytest.mark.parametrize(
    ("before", "scheme", "link_type", "reason"),
    [
        ("whole", "pcapng", 1, "a pcap file, to which no pcapng"),
        ("whole", "pcapfile", 113, "one link type"),
        ("cut", "pcapfile", 1, "damaged"),
        ("packed", "pcapfile", 1, "gz compressed"),
        ("swapped", "pcapfile", 1, "byte order"),
        ("text", "pcapfile", 1, "neither pcap nor"),
    ],
)
def test_append_to_what_it_does_not_fit_is_refused_and_changes_nothing(
    tmp_path: Path, before: str, scheme: str, link_type: int, reason: str
) -> None:
    path = tmp_path / "a"
    with output_trace(f"pcapfile:{path}") as trace:
        trace.write_packets(some_packets(3))
    content = path.read_bytes()
    if before == "cut":
        content = content[:-1]
    elif before == "packed":
        content = subprocess.run(["gzip", "-c", path], check=True, capture_output=True).stdout
    elif before == "swapped":
        content = b"".join(content[i : i + 4][::-1] for i in (0,)) + bytes(
            b for i in (4, 6) for b in content[i : i + 2][::-1]
        ) + b"".join(content[i : i + 4][::-1] for i in range(8, 24, 4))  # fmt: skip
    elif before == "text":
        content = b"plain text, and no capture file at all"
    path.write_bytes(content)
    with pytest.raises(plt_exc_libtrace, match=reason):
        append_to(path, scheme, some_packets(3, link_type=link_type))
    assert path.read_bytes() == content


def test_without_append_a_file_begins_anew(tmp_path: Path) -> None:
    for count in (20, 3):
        with output_trace(f"pcapfile:{tmp_path / 'a'}") as trace:
            trace.write_packets(some_packets(count))
    assert capinfos(tmp_path / "a").packets == 3


@pytest.mark.parametrize("mode", [0o600, 0o640, 0o666, 0o440])
def test_permission_bits_are_the_files_whatever_the_umask(tmp_path: Path, mode: int) -> None:
    trace = output_trace(f"pcapfile:{tmp_path / 'a'}")
    trace.conf_file_flags(mode)
    with trace:
        trace.write_packets(some_packets(1))
    assert (tmp_path / "a").stat().st_mode & 0o777 == mode


def test_the_flags_of_open_are_no_permission_bits(tmp_path: Path) -> None:
    trace = output_trace(f"pcapfile:{tmp_path / 'a'}")
    trace.conf_file_flags(os.O_CREAT | os.O_WRONLY)
    with trace:
        pass
    assert (tmp_path / "a").stat().st_mode & 0o777 == 0o640  # 0666 and the umask
    trace = output_trace(f"pcapfile:{tmp_path / 'a'}")
    trace.conf_file_flags(os.O_CREAT | os.O_EXCL)
    with pytest.raises(plt_exc_libtrace, match="File exists"):
        trace.start_output()


def test_an_empty_trace_is_a_valid_file(tmp_path: Path) -> None:
    for scheme in ("pcapfile", "pcapng", "erf"):
        with output_trace(f"{scheme}:{tmp_path / scheme}"):
            pass
        with input_trace(f"{scheme}:{tmp_path / scheme}") as trace:
            assert trace.read_packet() is None


def test_pcapng_holds_several_link_types_and_pcap_names_the_second(tmp_path: Path) -> None:
    packets = some_packets(3) + some_packets(3, link_type=113)
    with output_trace(f"pcapng:{tmp_path / 'a'}") as trace:
        trace.write_packets(packets)
    with input_trace(f"pcapng:{tmp_path / 'a'}") as trace_in:
        assert list(trace_in) == packets
    with output_trace(f"pcapfile:{tmp_path / 'b'}") as trace:
        trace.write_packets(packets[:3])
        with pytest.raises(plt_exc_libtrace, match="one link type, 1 here, not 113 as well"):
            trace.write_packet(packets[3])
    with (
        output_trace(f"erf:{tmp_path / 'c'}") as trace,
        pytest.raises(plt_exc_libtrace, match="ERF has no type for link type 113"),
    ):
        trace.write_packet(packets[3])


@pytest.mark.parametrize("scheme", ["pcapfile", "pcapng", "erf"])
def test_batches_of_records_are_copied_without_loss(tmp_path: Path, scheme: str) -> None:
    packets = some_packets(5000)
    with output_trace(f"pcapng:{tmp_path / 'a'}") as trace:
        trace.write_packets(iter(packets))
    with input_trace(str(tmp_path / "a")) as source, output_trace(f"{scheme}:{tmp_path / 'b'}") as trace:
        assert sum(trace.write_records(batch, source.interfaces) for batch in source.batches()) == 5000
    with input_trace(str(tmp_path / "b")) as source:
        assert list(source) == packets


def test_standard_output_and_standard_input_are_a_dash(tmp_path: Path) -> None:
    writing = (
        "from appliance.formats.output_trace import *\n"
        "trace = output_trace('pcapng:-'); trace.conf_compress_type(ZLIB_COMPRESSION)\n"
        "with trace: trace.write_packets(Packet(i, bytes(60)) for i in range(1000))\n"
    )
    reading = "from appliance.formats.output_trace import *\nwith input_trace('-') as t: print(len(list(t)))\n"
    done = subprocess.run([sys.executable, "-c", writing], check=True, capture_output=True)
    counted = subprocess.run([sys.executable, "-c", reading], input=done.stdout, check=True, capture_output=True)
    assert counted.stdout == b"1000\n"


@pytest.mark.parametrize("uri", ["pcapfile", "wrong:x", "pcapfile:", "rt:host", "tsh:/a", "int:a/b", "dag:/dev/dag0"])
def test_a_uri_that_is_no_output_is_a_value_error(uri: str) -> None:
    with pytest.raises(ValueError, match=r".+") as caught:
        output_trace(uri)
    assert isinstance(caught.value, plt_exc_libtrace)


def test_writing_what_is_no_packet_is_a_value_error(tmp_path: Path) -> None:
    with output_trace(f"pcapfile:{tmp_path / 'a'}") as trace:
        with pytest.raises(ValueError, match="not a Packet"):
            trace.write_packet(b"bytes")  # type: ignore[arg-type]
        with pytest.raises(ValueError, match="not a Packet"):
            trace.write_packets([some_packets(1)[0], None])  # type: ignore[list-item]


def test_writing_before_the_start_says_so(tmp_path: Path) -> None:
    with pytest.raises(plt_exc_libtrace, match="OutputTrace not started"):
        output_trace(f"pcapfile:{tmp_path / 'a'}").write_packet(some_packets(1)[0])
    assert not (tmp_path / "a").exists()


def test_a_closed_trace_stays_closed(tmp_path: Path) -> None:
    trace = output_trace(f"pcapfile:{tmp_path / 'a'}")
    trace.start_output()
    trace.close_output()
    trace.close_output()
    for call in (
        trace.start_output,
        trace.start,
        lambda: trace.conf_file_flags(0),
        lambda: trace.conf_compress_type(1),
    ):
        with pytest.raises(plt_exc_libtrace, match="closed"):
            call()


@pytest.mark.parametrize(
    ("what", "value"),
    [
        ("conf_compress_type", -1),
        ("conf_compress_type", 7),
        ("conf_compress_level", -1),
        ("conf_compress_level", 10),
        ("conf_compress_level", "5"),
        ("conf_file_flags", -1),
        ("conf_file_flags", 0o10000),
        ("conf_file_flags", "a"),
    ],
)
def test_a_setting_out_of_range_is_refused(tmp_path: Path, what: str, value: object) -> None:
    with pytest.raises(plt_exc_libtrace, match=r".+"):
        getattr(output_trace(f"pcapfile:{tmp_path / 'a'}"), what)(value)


def test_nothing_can_be_set_once_it_is_started(tmp_path: Path) -> None:
    with output_trace(f"pcapfile:{tmp_path / 'a'}") as trace, pytest.raises(plt_exc_libtrace, match="started already"):
        trace.conf_compress_level(1)


def test_a_file_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    with pytest.raises(plt_exc_libtrace, match="No such file or directory"):
        output_trace(f"pcapfile:{tmp_path}/missing/a").start_output()


def test_a_full_disk_is_an_error_that_says_so() -> None:
    with pytest.raises(plt_exc_libtrace, match="No space left"), output_trace("pcapfile:/dev/full") as trace:
        trace.write_packets(some_packets())


def test_a_damaged_input_gives_its_whole_packets_and_then_the_reason(tmp_path: Path) -> None:
    with output_trace(f"pcapfile:{tmp_path / 'a'}") as trace:
        trace.write_packets(some_packets(3))
    (tmp_path / "a").write_bytes((tmp_path / "a").read_bytes()[:-1])
    with input_trace(str(tmp_path / "a")) as source:
        assert [source.read_packet(), source.read_packet()] == some_packets(2)
        with pytest.raises(plt_exc_libtrace, match="2 packets are whole"):
            source.read_packet()


SEND_AND_RECEIVE = """
import sys
from appliance.formats.output_trace import *
sent = [Packet(i, bytes(12) + b"\\x88\\xb5" + i.to_bytes(4, "big") + bytes(42)) for i in range(500)]
with input_trace(sys.argv[2]) as source:
    with output_trace(sys.argv[1]) as trace:
        trace.write_packets(sent)
    got = []
    while len(got) < 500:
        got += [packet for packet in source.read_batch() if packet.data[12:14] == b"\\x88\\xb5"]
    print([packet.data for packet in got] == [packet.data for packet in sent], source.dropped_packets)
    print(all(packet.timestamp_ns > 1_700_000_000_000_000_000 for packet in got), got[0].link_type)
"""


@requires_root
@pytest.mark.parametrize(("output", "source"), [("int", "int"), ("ring", "ring"), ("pcapint", "pcapint")])
def test_an_interface_sends_the_packets_in_order_and_another_receives_them(output: str, source: str) -> None:
    with Lab() as lab:
        interface, peer = lab.veth("out")
        done = lab.run([sys.executable, "-c", SEND_AND_RECEIVE, f"{output}:{interface}", f"{source}:{peer}"])
        assert done.stdout == "True 0\nTrue 1\n"


def test_an_interface_that_is_not_there_is_named() -> None:
    with pytest.raises(plt_exc_libtrace, match="there is no interface nothere0"):
        output_trace("int:nothere0").start_output()
    with pytest.raises(plt_exc_libtrace, match="nothere0 does not exist"):
        input_trace("int:nothere0").start_input()
    with pytest.raises(plt_exc_libtrace, match="one interface"):
        input_trace("ring:*")


# Each example line of the original's documentation --------------------------------------------------------------------


def test_plt_output_trace_uri_makes_an_output_trace(tmp_path: Path) -> None:
    assert isinstance(output_trace(f"pcapfile:{tmp_path / 'a'}"), OutputTrace)
    assert isinstance(OutputTrace.new(f"pcapfile:{tmp_path / 'a'}"), OutputTrace)
    assert isinstance(InputTrace.new("pcapfile:-"), InputTrace)


def test_plt_output_trace_new_uri_is_the_same(tmp_path: Path) -> None:
    trace = output_trace.new(f"pcapfile:{tmp_path / 'a'}")
    trace.start()
    trace.write_packet(some_packets(1)[0])
    trace.close_output()
    assert capinfos(tmp_path / "a").packets == 1
    assert isinstance(input_trace.new("pcapfile:-"), InputTrace)


def test_plt_exc_libtrace_is_thrown_by_conf_start_and_write_that_fail(tmp_path: Path) -> None:
    fails = [
        lambda: output_trace(f"pcapfile:{tmp_path}/a").conf_compress_type(10),
        lambda: output_trace(f"pcapfile:{tmp_path}/missing/a").start_output(),
        lambda: output_trace(f"pcapfile:{tmp_path}/a").write_packet(some_packets(1)[0]),
    ]
    for fail in fails:
        with pytest.raises(plt_exc_libtrace):
            fail()
        with pytest.raises(ValueError, match=r".+"):  # the other habit of the original
            fail()


def test_plt_conf_start_write_close_all_return_none(tmp_path: Path) -> None:
    trace = output_trace(f"pcapfile:{tmp_path / 'a'}")
    results = [
        trace.conf_file_flags(O_APPEND | 0o644),
        trace.conf_compress_type(ZLIB_COMPRESSION),
        trace.conf_compress_level(9),
        trace.start_output(),
        trace.write_packet(some_packets(1)[0]),
        trace.close_output(),
    ]
    assert results == [None] * 6


def test_plt_start_is_another_name_of_start_output(tmp_path: Path) -> None:
    trace = output_trace(f"pcapfile:{tmp_path / 'a'}")
    trace.start()
    trace.close_output()
    assert (tmp_path / "a").exists()


def test_plt_constants_have_libtraces_numbers() -> None:
    assert [NO_COMPRESSION, ZLIB_COMPRESSION, BZIP2_COMPRESSION, LZO_COMPRESSION] == [0, 1, 2, 3]
    assert [LZMA_COMPRESSION, ZSTD_COMPRESSION, LZ4_COMPRESSION] == [4, 5, 6]
    assert os.O_APPEND == O_APPEND
    assert issubclass(plt_exc_libtrace, ValueError)


def test_plt_the_default_level_is_five(tmp_path: Path) -> None:
    sizes = {}
    for level in (None, 1, 5, 9):
        trace = output_trace(f"pcapfile:{tmp_path / 'a'}")
        trace.conf_compress_type(ZLIB_COMPRESSION)
        if level is not None:
            trace.conf_compress_level(level)
        with trace:
            trace.write_packets(Packet(i * 1000, bytes(range(200))) for i in range(2000))
        sizes[level] = (tmp_path / "a").stat().st_size
    assert sizes[None] == sizes[5]
    assert sizes[1] > sizes[9]
