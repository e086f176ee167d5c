"""What is written once per file or interface, judged by Wireshark's tools where they are installed."""

from __future__ import annotations

import shutil
import struct
import subprocess
from pathlib import Path

import pytest
from hypothesis import given, strategies as st

from appliance.errors import FormatError
from appliance.formats.encode import (
    InterfaceDescription,
    interface_description,
    interface_record,
    interface_statistics,
    options,
    pcap_header,
    section_header,
)

TEXT = st.text(st.characters(exclude_characters="\0", codec="utf-8"), max_size=40)
DESCRIPTIONS = st.builds(
    InterfaceDescription,
    linktype=st.integers(0, 65535),
    snaplen=st.integers(0, 2**32 - 1),
    name=TEXT,
    description=TEXT,
    speed_bps=st.integers(0, 2**64 - 1),
    filter=TEXT,
    operating_system=TEXT,
    hardware=TEXT,
    comment=TEXT,
    fcs_bits=st.none() | st.integers(0, 255),
    source_tsresol=st.integers(0, 255),
)


@given(DESCRIPTIONS)
def test_a_record_keeps_everything_that_is_known_of_an_interface(interface: InterfaceDescription) -> None:
    record = interface_record(interface)
    assert struct.unpack("=I", record[4:8]) == struct.unpack("=I", record[-4:]) == (len(record),)
    assert len(record) % 4 == 0
    assert InterfaceDescription.parse(record) == interface


@given(DESCRIPTIONS)
def test_a_file_gets_the_interface_with_nanosecond_times_and_no_code_of_ours(interface: InterfaceDescription) -> None:
    block = interface_description(interface)
    codes = [code for code, _ in options(memoryview(block)[16:-4], "=")]
    assert all(code < 0x8000 for code in codes)
    assert InterfaceDescription.parse(block).source_tsresol == 9


@given(st.binary(max_size=80), st.sampled_from("<>"))
def test_no_block_however_broken_makes_the_parser_fail_otherwise_than_cleanly(body: bytes, byte_order: str) -> None:
    try:
        InterfaceDescription.parse(body, byte_order)
    except FormatError:
        pass


def test_an_option_longer_than_its_block_is_refused() -> None:
    block = struct.pack("=IIHHIHHI", 1, 28, 1, 0, 0, 2, 3000, 0) + struct.pack("=I", 28)
    with pytest.raises(FormatError, match="option 2 claims 3000 bytes"):
        InterfaceDescription.parse(block)


def test_long_names_are_cut_at_a_character_so_that_a_record_stays_small() -> None:
    record = interface_record(InterfaceDescription(1, name="é" * 60_000))
    assert len(record) < 5000
    assert set(InterfaceDescription.parse(record).name) == {"é"}


@pytest.mark.parametrize(
    ("tsresol", "finer"), [(6, False), (9, True), (7, True), (0, False), (0x80 | 19, False), (0x80 | 20, True)]
)
def test_only_times_finer_than_a_microsecond_need_nanosecond_files(tsresol: int, finer: bool) -> None:
    assert InterfaceDescription(1, source_tsresol=tsresol).needs_nanoseconds is finer


@pytest.mark.parametrize(("nanoseconds", "kind"), [(True, "nanosecond pcap"), (False, "tcpdump/... - pcap")])
def test_capinfos_reads_the_pcap_header(tmp_path: Path, nanoseconds: bool, kind: str) -> None:
    path = tmp_path / "empty.pcap"
    path.write_bytes(pcap_header(113, nanoseconds=nanoseconds, snaplen=1500))
    report = _capinfos("-t", "-E", "-l", path)
    assert kind in report
    assert "Linux cooked-mode capture v1" in report
    assert "1500 bytes" in report


def test_capinfos_reads_section_interface_and_statistics(tmp_path: Path) -> None:
    interface = InterfaceDescription(
        linktype=1, snaplen=9000, name="veth0", description="the uplink", speed_bps=10**10, filter="ip or ip6"
    )
    path = tmp_path / "empty.pcapng"
    path.write_bytes(
        section_header()
        + interface_description(interface)
        + interface_statistics(0, 1_700_000_060 * 10**9, start_ns=1_700_000_000 * 10**9, received=12, os_dropped=3)
    )
    report = _capinfos(path)
    for expected in (
        "Capture application: capture-appliance",
        "Name = veth0",
        "Description = the uplink",
        "Speed = 10000000000",
        "Capture length = 9000",
        "Time precision = nanoseconds (9)",
        "Filter string = ip or ip6",
        "Number of stat entries = 1",
    ):
        assert expected in report


def test_tshark_reads_the_drop_counts_of_the_statistics(tmp_path: Path) -> None:
    if shutil.which("tshark") is None:
        pytest.skip("tshark is not installed")
    path = tmp_path / "statistics.pcapng"
    blocks = section_header() + interface_description(InterfaceDescription(1))
    blocks += interface_statistics(
        0, 10**18, start_ns=10**17, end_ns=10**18, received=7, dropped=1, filter_accepted=6, os_dropped=2, delivered=4
    )
    path.write_bytes(blocks)
    # The file itself as one frame: its dissector shows every field of every block.
    report = subprocess.run(
        ["tshark", "-r", path, "-X", "read_format:MIME Files Format", "-V"], capture_output=True, text=True, check=True
    ).stdout
    for expected in (
        "Number of Received Packets = 7",
        "Number of Dropped Packets = 1",
        "Number of Accepted Packets = 6",
        "Number of Packets Dropped by OS = 2",
        "Number of Packets Delivered to the User = 4",
    ):
        assert f"Option: {expected}\n" in report


def _capinfos(*arguments: str | Path) -> str:
    if shutil.which("capinfos") is None:
        pytest.skip("capinfos is not installed")
    return subprocess.run(["capinfos", *arguments], capture_output=True, text=True, check=True).stdout
