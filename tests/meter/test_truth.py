"""Real captures, metered into an IPFIX file: conversations equal to the truth, which Wireshark's tools told."""

from __future__ import annotations

import csv
import ipaddress
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

import pytest
from meter.flow_packets import (
    NO_SHARED,
    SHARED,
    Decoder,
    Memory,
    capture_digests,
    flow_records,
    number,
)

from appliance.errors import FormatError
from appliance.meter.metering import Metering
from appliance.meter.settings import ExportSettings, MeterSettings

REVERSE = 29305
PROTOCOLS = {"tcp": 6, "udp": 17}

End = tuple[bytes, int]
Conversation = tuple[int, frozenset[End]]
Totals = dict[Conversation, dict[End, tuple[int, int]]]  # by sender: packets, IP octets


TUNNEL_PORTS = {2152, 3544, 4789, 5247, 6081}


def truth_files(tunnels: str = "outer") -> dict[str, Path]:
    """Capture's name: its outermost or its innermost conversations; without tunnels they are the same."""
    files = {}
    for path in sorted((SHARED / "truth" / "flows").glob("*.tsv")):
        name, _, kind = path.name.removesuffix(".tsv").rpartition(".")
        if kind in (tunnels, "flows"):
            files[name] = path
    return files


def truth(path: Path) -> Totals:
    totals: dict[Conversation, dict[End, Counter[str]]] = defaultdict(lambda: defaultdict(Counter))
    with path.open(newline="") as rows:
        for row in csv.DictReader(rows, delimiter="\t"):
            a = (ipaddress.ip_address(row["ip_a"]).packed, int(row["port_a"]))
            b = (ipaddress.ip_address(row["ip_b"]).packed, int(row["port_b"]))
            for sender, direction in ((a, "ab"), (b, "ba")):
                count = totals[PROTOCOLS[row["proto"]], frozenset((a, b))][sender]
                count["packets"] += int(row[f"pkts_{direction}"])
                count["octets"] += int(row[f"ipbytes_{direction}"])
    return settled(totals)


def settled(totals: dict[Conversation, dict[End, Counter[str]]]) -> Totals:
    return {
        key: {end: (count["packets"], count["octets"]) for end, count in ends.items() if count["packets"]}
        for key, ends in totals.items()
    }


def meter(capture: Path, directory: Path, **settings: Any) -> tuple[list[dict[tuple[int, int], bytes]], int, int]:
    """(flow records of the IPFIX file, packets metered, packets ignored)"""
    out = directory / "out.ipfix"
    out.unlink(missing_ok=True)
    exports = (ExportSettings(f"file:{out}", single_file=True),)
    metering = Metering(MeterSettings(export=exports, **settings))
    ignored = 0
    try:
        for records, reasons in capture_digests(capture, inner=metering.settings.tunnels == "inner"):
            ignored += sum(count for reason, count in reasons.items() if reason != "octets")
            memory = Memory(records)
            metering.feed(memory.address, memory.length)
    except FormatError:
        pass  # what was whole before the damage counts
    metering.finish()
    page = metering.page
    assert page["metered_packets"] == page["exported_packets"] and page["late_packets"] <= page["metered_packets"]
    return flow_records(Decoder().stream(out.read_bytes())), page["metered_packets"], ignored


def conversations(records: list[dict[tuple[int, int], bytes]]) -> Totals:
    """TCP and UDP with ports; later fragments have none, and the truth leaves them out."""
    totals: dict[Conversation, dict[End, Counter[str]]] = defaultdict(lambda: defaultdict(Counter))
    for record in records:
        protocol = number(record, 4)
        if protocol not in PROTOCOLS.values():
            continue
        v4 = number(record, 60) == 4
        a = (record[0, 8 if v4 else 27], number(record, 7))
        b = (record[0, 12 if v4 else 28], number(record, 11))
        if a[1] == b[1] == 0:
            continue
        for sender, enterprise in ((a, 0), (b, REVERSE)):
            if (enterprise, 2) in record:
                count = totals[protocol, frozenset((a, b))][sender]
                count["packets"] += number(record, 2, enterprise)
                count["octets"] += number(record, 1, enterprise)
    return settled(totals)


@pytest.mark.skipif(not truth_files(), reason=NO_SHARED)
def test_there_is_truth_for_25_captures() -> None:
    assert len(truth_files()) == 25


@pytest.mark.parametrize("name", truth_files() or [pytest.param("", marks=pytest.mark.skip(reason=NO_SHARED))])
@pytest.mark.parametrize("vlan_in_key", [True, False])
def test_packets_and_octets_of_every_conversation_equal_the_truth(name: str, vlan_in_key: bool, tmp_path: Path) -> None:
    records, _, _ = meter(SHARED / "captures" / name, tmp_path, vlan_in_key=vlan_in_key, max_fragmented=0)
    assert conversations(records) == truth(truth_files()[name])


@pytest.mark.parametrize("name", truth_files("inner") or [pytest.param("", marks=pytest.mark.skip(reason=NO_SHARED))])
def test_packets_and_octets_inside_the_tunnels_equal_the_truth(name: str, tmp_path: Path) -> None:
    """The truth knows TCP and UDP alone, so a tunnel's packet that carries ICMP counts there as the tunnel's own UDP:
    tunnels' own conversations are left out here. tests/capture/test_tunnels.py has them, packet by packet."""
    records, _, _ = meter(SHARED / "captures" / name, tmp_path, tunnels="inner", max_fragmented=0)
    assert without_tunnels(conversations(records)) == without_tunnels(truth(truth_files("inner")[name]))


@pytest.mark.skipif(not truth_files(), reason=NO_SHARED)
def test_real_later_fragments_get_the_ports_of_the_first(tmp_path: Path) -> None:
    records, metered, _ = meter(SHARED / "captures" / "ip4_fragments.pcap", tmp_path)
    assert metered == 53
    assert sum(packets for ends in conversations(records).values() for packets, _ in ends.values()) == 53


def without_tunnels(totals: Totals) -> Totals:
    return {key: ends for key, ends in totals.items() if not {port for _, port in key[1]} & TUNNEL_PORTS}


@pytest.mark.skipif(not truth_files(), reason=NO_SHARED)
def test_biflow_and_two_uniflows_say_the_same(tmp_path: Path) -> None:
    expected = truth(truth_files()["mix-apps.pcap"])
    out = tmp_path / "uni.ipfix"
    exports = (ExportSettings(f"file:{out}", single_file=True, biflow=False),)
    metering = Metering(MeterSettings(export=exports))
    for records, _ in capture_digests(SHARED / "captures" / "mix-apps.pcap"):
        memory = Memory(records)
        metering.feed(memory.address, memory.length)
    metering.finish()
    assert conversations(flow_records(Decoder().stream(out.read_bytes()))) == expected


def packet_counts() -> dict[str, int]:
    table = SHARED / "truth" / "capinfos.tsv"
    if not table.exists():
        return {}
    with table.open(newline="") as rows:
        read = list(csv.DictReader(rows, delimiter="\t", quoting=csv.QUOTE_NONE))
    column = "packets"
    return {
        row["file"]: int(row[column])
        for row in read
        if row[column].isdigit()
        and not row["file"].endswith((".erf", ".snoop"))
        and row["file"] != "modified-format.pcap"
    }


@pytest.mark.parametrize("name", packet_counts() or [pytest.param("", marks=pytest.mark.skip(reason=NO_SHARED))])
def test_every_packet_of_every_capture_is_metered_or_ignored_with_a_reason(name: str, tmp_path: Path) -> None:
    records, metered, ignored = meter(SHARED / "captures" / name, tmp_path)
    assert metered + ignored == packet_counts()[name]
    assert sum(number(r, 2) + (number(r, 2, REVERSE) if (REVERSE, 2) in r else 0) for r in records) == metered
