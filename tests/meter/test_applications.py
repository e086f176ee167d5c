"""Applications and names in flows and records: what the table keeps, what collectors read, what tshark finds."""

from __future__ import annotations

import csv
import json
import subprocess
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
from capture.payloads import INITIAL_1, START, client_hello, digests, handshake, question, record, server_name, tcp, udp
from formats.craft import Packet, pcap_file
from meter.flow_packets import NO_SHARED, SECOND, SHARED, Decoder, Memory, flow_records, make_table, take_rows
from support.judges import tshark_fields
from support.service import APPLIANCE

from appliance.capture.application import Inspector
from appliance.errors import ApplianceError
from appliance.meter.pack import Packer
from appliance.meter.settings import ExportSettings, MeterSettings
from appliance.meter.templates import TemplateSet
from appliance.offline import meter_files

TEXTS = ("application", "server_name", "alpn", "dns_name", "http_host", "http_method", "ssh", "reverse_ssh")
B4A4 = bytes([10, 0, 0, 2, 10, 0, 0, 1])


def metered(frames: Iterable[bytes | Packet], entropy: bool = False, **settings: Any) -> Any:
    table = make_table(**({"name_bytes": 1 << 20, "entropy": entropy} | settings))
    memory = Memory(b"".join(digests(frames, Inspector(entropy=entropy))))
    assert table.update(memory.address, memory.length) == memory.length
    return table


def rows_of(table: Any) -> list[dict[str, Any]]:
    """Of every flow; texts by name, without the empty ones."""
    assert table.flush()
    rows = sorted(take_rows(table), key=lambda row: row["flow_id"])
    for row in rows:
        row["names"] = {name: text for name, text in zip(TEXTS, row["texts"], strict=True) if text}
    return rows


def back(payload: bytes, sport: int, dport: int = 40000) -> bytes:
    """From the other end."""
    return tcp(payload, sport, dport).replace(bytes([10, 0, 0, 1, 10, 0, 0, 2]), B4A4)


def test_a_flow_has_the_names_of_its_first_messages() -> None:
    table = metered([tcp(b""), tcp(client_hello()), udp(question("example.org", 15), 999, 53)])
    tls, dns = rows_of(table)
    assert tls["names"] == {"application": "tls", "server_name": "www.example.org", "alpn": "h2,http/1.1"}
    assert dns["names"] == {"application": "dns", "dns_name": "example.org"} and dns["dns_type"] == 15
    assert (table.counters()["flows_tls"], table.counters()["flows_dns"]) == (1, 1)


def test_the_first_name_stays_and_another_application_does_not_replace_it() -> None:
    later = tcp(b"GET / HTTP/1.1\r\nHost: b\r\n\r\n"), tcp(client_hello("c"))
    (row,) = rows_of(metered([tcp(client_hello("a", ())), *later]))
    assert row["names"] == {"application": "tls", "server_name": "a"}


def test_both_sides_of_ssh_are_told_apart() -> None:
    table = metered([tcp(b"SSH-2.0-a\r\n", dport=22), back(b"SSH-2.0-b\r\n", 22)])
    assert rows_of(table)[0]["names"] == {"application": "ssh", "ssh": "SSH-2.0-a", "reverse_ssh": "SSH-2.0-b"}


def test_names_of_the_whole_message_replace_those_of_its_beginning() -> None:
    hello = client_hello()
    table = metered([tcp(hello[:150]), tcp(hello[150:], sequence=1150)])
    assert rows_of(table)[0]["names"]["server_name"] == "www.example.org"
    assert table.counters()["partial_names"] == 0
    alone = metered([tcp(hello[:150])])
    rows_of(alone)
    assert alone.counters()["partial_names"] == 1


def test_names_and_entropy_stay_over_active_time_outs() -> None:
    frames = [Packet(START, tcp(client_hello("a", ()))), Packet(START + 11 * SECOND, tcp(b""))]
    table = metered(frames, entropy=True, active_timeout_ns=10 * SECOND)
    first, second = rows_of(table)
    assert first["names"] == second["names"] == {"application": "tls", "server_name": "a"}
    assert first["forward"]["entropy"] == second["forward"]["entropy"] > 0


def test_entropy_is_that_of_each_directions_first_payload() -> None:
    table = metered([tcp(b"ab" * 8), tcp(b"a" * 16), back(bytes(range(256)), 443)], entropy=True)
    (row,) = rows_of(table)
    assert (row["forward"]["entropy"], row["reverse"]["entropy"]) == (32, 255)


def test_names_that_find_no_room_are_counted_and_the_flow_keeps_its_application() -> None:
    frames = [tcp(record(handshake(server_name(b"a" * 100))), port) for port in range(1000, 1100)]
    table = metered(frames, name_bytes=64 * 20)  # each takes two blocks
    rows = rows_of(table)
    assert [row["names"].get("server_name") for row in rows] == ["a" * 100] * 10 + [None] * 90
    assert all(row["names"]["application"] == "tls" for row in rows)
    assert table.counters()["dropped_names"] == 90


def test_the_room_of_ended_flows_is_used_again() -> None:
    frames = [
        Packet(START + i * 40 * SECOND, tcp(record(handshake(server_name(b"%03d" % i * 50))), 1000 + i))
        for i in range(50)
    ]
    table = metered(frames, name_bytes=64 * 3)
    rows = rows_of(table)
    assert [row["names"]["server_name"] for row in rows] == [f"{i:03d}" * 50 for i in range(50)]
    assert table.counters()["dropped_names"] == 0


def test_names_are_within_the_memory_that_is_told_and_nothing_without_the_setting() -> None:
    plain, naming = make_table(), make_table(name_bytes=1 << 20)
    assert naming.memory_bytes - plain.memory_bytes == (1 << 20) + 4096 * 2 * 520
    memory = Memory(b"".join(digests([tcp(client_hello())], Inspector(entropy=True))))
    assert plain.update(memory.address, memory.length) == memory.length
    (row,) = rows_of(plain)
    assert row["names"] == {} and row["forward"]["entropy"] is None


@pytest.mark.parametrize("damage", [b"\xff\xff", b"\x02\x00", b"\x09\x02"])
def test_a_damaged_extension_is_passed_over(damage: bytes) -> None:
    """Its length field is wrong: longer than the record, too short, longer than any."""
    (good,) = digests([tcp(client_hello())], Inspector())
    table = make_table(name_bytes=1 << 20)
    memory = Memory(good[:122] + damage + good[124:])
    assert table.update(memory.address, memory.length) == memory.length
    assert rows_of(table)[0]["names"] == {}


# Records --------------------------------------------------------------------------------------------------------------

FRAMES = [
    tcp(client_hello()),
    udp(INITIAL_1),
    udp(question("www.example.net", 28), 999, 53),
    tcp(b"GET / HTTP/1.1\r\nHost: host.example\r\n\r\n", 40001, 80),
    tcp(b"SSH-2.0-client\r\n", 40002, 22),
    back(b"SSH-2.0-server\r\n", 22, 40002),
    tcp(record(handshake(server_name(b'=1+2,"\x1b\r\n'))), 40003),
]
NAMES = ("applicationName", "sslServerName", "tlsAlpn", "dnsQName", "httpRequestHost", "httpRequestMethod")
NAMES += ("sshVersion", "reverseSshVersion")


def capture(path: Path) -> str:
    path.write_bytes(pcap_file([Packet(START + i * 1000, frame) for i, frame in enumerate(FRAMES)]))
    return str(path)


def records(tmp_path: Path, file_format: str) -> Path:
    out = tmp_path / f"flows.{file_format}"
    settings = MeterSettings(applications=True, entropy=True)
    export = ExportSettings("file:", file_format=file_format)
    meter_files([capture(tmp_path / "a.pcap")], str(out), settings, export=export)
    return out


def test_json_and_csv_have_the_names_and_nothing_that_steers_a_terminal(tmp_path: Path) -> None:
    rows = [json.loads(line) for line in records(tmp_path, "json").read_text().splitlines()]
    found = sorted(tuple(row[name] for name in NAMES if row.get(name)) for row in rows)
    assert found == [
        ("dns", "www.example.net"),
        ("http", "host.example", "GET"),
        ("quic", "example.com", "alpn"),
        ("ssh", "SSH-2.0-client", "SSH-2.0-server"),
        ("tls", '=1+2,"\\027\\013\\010'),
        ("tls", "www.example.org", "h2,http/1.1"),
    ]
    assert all(row["payloadEntropy"] > 0 for row in rows)
    content = records(tmp_path, "csv").read_bytes()
    assert b"\x1b" not in content and b"\r" not in content
    by_column = list(csv.DictReader(content.decode().splitlines()))
    assert sorted(tuple(row[name] for name in NAMES if row.get(name)) for row in by_column) == found


def test_the_table_for_people_ends_with_application_and_name(tmp_path: Path) -> None:
    out = records(tmp_path, "ipfix")
    command = [*APPLIANCE, "ipfix", "read", str(out), "--format", "table"]
    lines = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    ends = [line.split("  ")[-1] for line in lines if " TCP " in line or " UDP " in line]
    assert "forced ssh SSH-2.0-client" in ends and "forced dns www.example.net" in ends
    assert not any("\x1b" in line for line in lines)


def test_ipfix_dump_reads_the_names_by_the_types_that_the_file_tells(tmp_path: Path) -> None:
    out = records(tmp_path, "ipfix")
    done = subprocess.run(["ipfixDump", "--rfc5610", "--in", out], capture_output=True, text=True, check=True)
    for text in (
        "www.example.org",
        "example.com",
        "www.example.net",
        "host.example",
        "SSH-2.0-client",
        "SSH-2.0-server",
    ):
        assert text in done.stdout, text
    for element in ("sslServerName", "dnsQName", "payloadEntropy", "httpRequestHost", "sshVersion", "applicationName"):
        assert element in done.stdout, element


def test_tshark_reads_every_record_whole(tmp_path: Path) -> None:
    """Of templates it takes 60 fields unless it is told to take more."""
    out = records(tmp_path, "ipfix")
    fields = ["-e", "cflow.appl_name", "-e", "cflow.http_request_host", "-e", "_ws.malformed"]
    command = ["tshark", "-o", "cflow.max_template_fields:100", "-r", out, "-T", "fields", *fields]
    read = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    rows = [line.split("\t") for line in read.splitlines() if line.strip()]
    assert [sorted(row[0].split(",")) for row in rows] == [["dns", "http", "quic", "ssh", "tls", "tls"]]
    assert "host.example" in rows[0][1] and rows[0][2] == ""


def test_in_the_shortest_messages_names_are_cut_and_records_stay_whole(tmp_path: Path) -> None:
    templates = TemplateSet(MeterSettings(applications=True, entropy=True), ExportSettings("udp://127.0.0.1:1"))
    table = metered([tcp(record(handshake(server_name(b"a" * 254)))), tcp(b"SSH-2.0-" + b"b" * 240 + b"\r\n", 2)])
    assert table.flush()
    packer = Packer(templates.plans, biflow=True, observation_domain=1, message_bytes=512)
    messages = packer.pack(table.rows_address, table.row_count)
    assert all(len(message.data) <= 512 for message in messages)
    stream = b"".join(bytes(message.data) for message in templates.announcement(512) + messages)
    found = flow_records(Decoder().stream(stream))
    assert [found[0][6871, 294], found[1][0, 96]] == [b"a" * 254, b"ssh"]


# Agreement with tshark ------------------------------------------------------------------------------------------------

End = tuple[str, str]
Conversation = tuple[str, frozenset[End]]
FIELDS = (
    "ip.src", "ip.dst", "ipv6.src", "ipv6.dst", "tcp.srcport", "tcp.dstport", "udp.srcport", "udp.dstport",
    "tls.handshake.type", "tls.handshake.extensions_server_name", "tls.handshake.extensions_alpn_str",
    "dns.qry.name", "dns.qry.type", "http.request.method", "http.host", "ssh.protocol", "quic.version",
    "tcp.segment.count",
)  # fmt: skip
SHOWN = "tls.handshake.type == 1 or dns.qry.name or http.request.method or ssh.protocol"
DNS_PORTS = {"53", "5353", "5355"}
# Conversations that are named in another way, or not at all, and why.
OTHERWISE = {
    "mix-apps.pcap": (2, "TLS inside of OpenVPN's own framing"),
    "mixed-vlan-mpls.pcap": (1, "a request of HTTP/0.9, which has no version"),
    "skype.pcap": (17, "a ClientHello in the record layer of SSL 2"),
}


def as_tshark_says(path: Path) -> dict[Conversation, dict[str, str]]:
    """Of the conversations that have one address pair, what their first message says."""
    found: dict[Conversation, dict[str, str]] = {}
    for row in tshark_fields(path, *FIELDS, display_filter=SHOWN):
        one = dict(zip(FIELDS, row, strict=True))
        conversation = ends_of(one)
        if conversation is None or conversation in found:
            continue
        said = message_of(one, conversation)
        if said is not None:
            found[conversation] = said
    return found


def ends_of(one: dict[str, str]) -> Conversation | None:
    """None: it lies in a tunnel, or has no ports."""
    addresses = [one["ip.src"] or one["ipv6.src"], one["ip.dst"] or one["ipv6.dst"]]
    protocol = "tcp" if one["tcp.srcport"] else "udp"
    ports = [one[f"{protocol}.srcport"], one[f"{protocol}.dstport"]]
    if any("," in text or not text for text in (*addresses, *ports)) or (one["ip.src"] and one["ipv6.src"]):
        return None
    return protocol, frozenset(zip(addresses, ports, strict=True))


def message_of(one: dict[str, str], conversation: Conversation) -> dict[str, str] | None:
    protocol, ends = conversation
    if "1" in one["tls.handshake.type"].split(","):
        application = "quic" if one["quic.version"] else "tls"
        if (application == "tls") != (protocol == "tcp") or (application == "quic" and not is_known(one)):
            return None
        names = {"sslServerName": one["tls.handshake.extensions_server_name"]}
        return {"applicationName": application, **names, "tlsAlpn": one["tls.handshake.extensions_alpn_str"]}
    if one["dns.qry.name"] and DNS_PORTS & {port for _, port in ends}:
        names = {"dnsQName": one["dns.qry.name"].split(",")[0], "dnsQRType": one["dns.qry.type"].split(",")[0]}
        return {"applicationName": "dns", **names}
    if one["http.request.method"] and protocol == "tcp":
        host = {"httpRequestHost": one["http.host"].split(",")[0]} if not one["tcp.segment.count"] else {}
        return {"applicationName": "http", "httpRequestMethod": one["http.request.method"].split(",")[0], **host}
    return {"applicationName": "ssh"} if one["ssh.protocol"] else None


def is_known(one: dict[str, str]) -> bool:
    """Versions 1 and 2, and the drafts 23 to 34; tshark also reads older ones, Facebook's, and those of greasing."""
    return all(
        number in (1, 0x6B3343CF) or 0xFF000017 <= number <= 0xFF000022
        for number in (int(text, 16) for text in one["quic.version"].split(","))
    )


def as_we_say(path: Path, tmp_path: Path) -> dict[Conversation, list[dict[str, Any]]]:
    out = tmp_path / "flows.json"
    settings = MeterSettings(applications=True, tunnels="inner")
    meter_files([str(path)], str(out), settings, export=ExportSettings("file:", file_format="json"))
    found: dict[Conversation, list[dict[str, Any]]] = defaultdict(list)
    for line in out.read_text().splitlines():
        row = json.loads(line)
        if row["protocolIdentifier"] in (6, 17):
            source = row.get("sourceIPv4Address") or row["sourceIPv6Address"]
            destination = row.get("destinationIPv4Address") or row["destinationIPv6Address"]
            ends = (source, str(row["sourceTransportPort"])), (destination, str(row["destinationTransportPort"]))
            found["tcp" if row["protocolIdentifier"] == 6 else "udp", frozenset(ends)].append(row)
    return found


def captures() -> list[Path]:
    folder = SHARED / "captures"
    kinds = (".pcap", ".pcapng", ".cap", ".gz", ".zst")
    return [path for path in sorted(folder.glob("*")) if path.is_file() and path.suffix in kinds]


@pytest.mark.parametrize(
    "path",
    [pytest.param(path, id=path.name) for path in captures()]
    or [pytest.param(None, marks=pytest.mark.skip(reason=NO_SHARED))],
)
def test_names_are_those_that_tshark_finds(path: Path, tmp_path: Path) -> None:
    try:
        ours = as_we_say(path, tmp_path)
    except ApplianceError:
        pytest.skip("not a capture that is read")
    if not ours:
        pytest.skip("no TCP and no UDP in it")
    differences = []
    for conversation, said in as_tshark_says(path).items():
        named = [row for row in ours.get(conversation, []) if row["applicationName"]]
        if not any(all(str(row.get(name, "")) == text for name, text in said.items()) for row in named):
            differences.append((sorted(conversation[1]), said, [row["applicationName"] for row in named]))
    allowed, why = OTHERWISE.get(path.name, (0, ""))
    assert len(differences) == allowed, (why, differences)
