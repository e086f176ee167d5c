"""Files of every format and compression in the programs of others: the same packets, the same times.

| | plain | gzip | bzip2 | lzop | xz | zstd | lz4 |
|---|---|---|---|---|---|---|---|
| tshark, capinfos | itself | itself | unpacked | unpacked | unpacked | itself | itself |
| tracepktdump, tracestats, traceconvert (libtrace 3.0.22, of Debian) | itself | itself | itself | unpacked | itself | unpacked | unpacked |
| tcpdump | itself | unpacked | unpacked | unpacked | unpacked | unpacked | unpacked |

Unpacked: by the compression's own program. libtrace 3.0.22 reads no pcapng of anybody's, rawerf: unpacked alone (that is
what makes it raw), and serves no rt:; libpcap reads no ERF.
"""  # noqa: E501

from __future__ import annotations

import random
import shutil
import subprocess
from pathlib import Path

import pytest
from support.captures import write_capture
from support.judges import capinfos, packets_by_wireshark
from support.lab import requires_tool

from appliance.capture.uri import parse
from appliance.errors import UsageError
from appliance.formats.output_trace import Packet, output_trace

START_NS = 1_700_000_000_000_000_000
COMPRESSIONS = {"plain": 0, "gzip": 1, "bzip2": 2, "lzop": 3, "xz": 4, "zstd": 5, "lz4": 6}
READS_ITSELF = {"tshark": {"gzip", "zstd", "lz4"}, "libtrace": {"gzip", "bzip2", "xz"}}
ERF_HEADER_BYTES = 18  # and the pad of an Ethernet record, which wireshark shows too
EVERY = pytest.mark.parametrize(
    ("scheme", "compression"), [(s, c) for s in ("pcapfile", "pcap", "pcapng", "erf", "rawerf") for c in COMPRESSIONS]
)


def some_packets(count: int = 60) -> list[Packet]:
    chance = random.Random(5)
    sizes = [chance.randint(60, 1500) for _ in range(count)]
    return [Packet(START_NS + i * 1_000_003, chance.randbytes(n), n, 1) for i, n in enumerate(sizes)]


def made(path: Path, scheme: str, compression: str) -> Path:
    if compression != "plain" and shutil.which(compression) is None:
        pytest.skip(f"not installed: {compression}")
    trace = output_trace(f"{scheme}:{path}")
    trace.conf_compress_type(COMPRESSIONS[compression])
    with trace:
        trace.write_packets(some_packets())
    return path


def for_tool(path: Path, compression: str, tool: str) -> Path:
    """The file itself where the tool reads it, else what the compression's program makes of it."""
    if compression == "plain" or compression in READS_ITSELF.get(tool, ()):
        return path
    plain = path.with_name("unpacked")
    with path.open("rb") as packed, plain.open("wb") as out:
        subprocess.run([compression, "-dc"], stdin=packed, stdout=out, check=True)
    return plain


@requires_tool("tshark", "capinfos")
@EVERY
def test_tshark_and_capinfos(tmp_path: Path, scheme: str, compression: str) -> None:
    path = for_tool(made(tmp_path / "a", scheme, compression), compression, "tshark")
    before = ERF_HEADER_BYTES if "erf" in scheme else 0
    read = [(p.time_ns, bytes(p.data[before:])) for p in packets_by_wireshark(path)]
    assert read == [(p.timestamp_ns, p.data) for p in some_packets()]
    assert capinfos(path).packets == 60
    assert capinfos(path).in_order


@requires_tool("tracepktdump", "tracestats", "traceconvert", "tshark")
@EVERY
def test_libtraces_tools(tmp_path: Path, scheme: str, compression: str) -> None:
    tool = "" if scheme == "rawerf" else "libtrace"
    path = for_tool(made(tmp_path / "a", scheme, compression), compression, tool)
    uri = {"pcap": "pcapfile"}.get(scheme, scheme) + f":{path}"
    stats = subprocess.run(["tracestats", uri], capture_output=True, text=True, check=False)
    if scheme == "pcapng":
        assert "Unknown format (pcapng)" in stats.stderr + stats.stdout
        return
    assert stats.stdout.split("Total:")[1].split()[0] == "60"
    dumped = subprocess.run(["tracepktdump", uri], capture_output=True, text=True, check=True).stdout
    lengths = [line.split()[3].split("/") for line in dumped.splitlines() if line.startswith(" Capture: Packet Length")]
    assert [int(captured) for captured, _ in lengths] == [len(p.data) for p in some_packets()]
    converted = tmp_path / "converted"
    subprocess.run(["traceconvert", uri, f"pcapfile:{converted}"], check=True, capture_output=True)
    read = [(p.time_ns // 1000, bytes(p.data)) for p in packets_by_wireshark(converted)]
    # libtrace writes microseconds, and an ERF's fraction of 2^-32 s may lie just below one.
    assert [data for _, data in read] == [p.data for p in some_packets()]
    assert all(abs(us - p.timestamp_ns // 1000) <= 1 for (us, _), p in zip(read, some_packets(), strict=True))


@requires_tool("tcpdump")
@pytest.mark.parametrize("compression", COMPRESSIONS)
@pytest.mark.parametrize("scheme", ["pcapfile", "pcap", "pcapng"])
def test_tcpdump(tmp_path: Path, scheme: str, compression: str) -> None:
    path = for_tool(made(tmp_path / "a", scheme, compression), compression, "tcpdump")
    argv = ["tcpdump", "-nn", "-tt", "--time-stamp-precision=nano", "-r", str(path)]
    lines = subprocess.run(argv, check=True, capture_output=True, text=True).stdout.splitlines()
    stamps = [line.split()[0] for line in lines if line[:3] == "170"]
    assert stamps == [f"{p.timestamp_ns // 10**9}.{p.timestamp_ns % 10**9:09}" for p in some_packets()]


@requires_tool("tracestats", "editcap")
def test_debians_libtrace_reads_no_pcapng_of_wiresharks_either(tmp_path: Path) -> None:
    path = write_capture(tmp_path / "a", "pcapng", [(0, bytes(60))])
    for uri, said in ((f"pcapng:{path}", "Unknown format (pcapng)"), (str(path), "Unable to guess format")):
        done = subprocess.run(["tracestats", uri], capture_output=True, text=True, check=False)
        assert said in done.stdout + done.stderr
    assert capinfos(path).packets == 1


@requires_tool("tracestats", "nm", "ldd")
def test_debians_libtrace_has_no_program_that_could_serve_rt() -> None:
    """A server listens and accepts: none of its programs, nor the library, calls either. `rt:` is refused."""
    programs = sorted(Path(str(shutil.which("tracestats"))).parent.glob("trace*"))
    listed = subprocess.run(["ldd", str(shutil.which("tracestats"))], capture_output=True, text=True, check=True).stdout
    (library,) = [line.split()[2] for line in listed.splitlines() if "libtrace.so" in line]
    for path in (*programs, Path(library)):
        done = subprocess.run(["nm", "-D", "--undefined-only", str(path)], capture_output=True, text=True, check=False)
        called = {line.split()[-1].partition("@")[0] for line in done.stdout.splitlines()}
        assert not called & {"listen", "accept", "accept4"}, path
    with pytest.raises(UsageError, match="rt: needs a sender of libtrace's RT protocol"):
        parse("rt:localhost")
