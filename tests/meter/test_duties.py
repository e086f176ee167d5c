"""The duties of an exporter (RFC 7011, 5103, 5610, 5655), each read out of our octets by a program that is not ours.

Most judges are tshark, which reads any sequence of messages as an IPFIX file, and nfcapd, nfacctd and ipfixDump.
"""

from __future__ import annotations

import contextlib
import json
import re
import shutil
import socket
import subprocess
import time
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest
from meter.certificates import HAS_OPENSSL, NO_OPENSSL, Authority
from meter.flow_packets import ACK, FIN, RST, SECOND, START, SYN, TCP, Memory, Packet, digests
from meter.test_collectors import Nfcapd, faults
from meter.test_exporter import COUNTS, TcpCollector, expired, export, received, udp_uri, wait_until
from meter.test_tls import OpensslCollector, tls_exporter

from appliance.config import parse_destination
from appliance.meter import export_socket, export_udp
from appliance.meter.export_udp import UdpExporter
from appliance.meter.exporter import ExporterParts
from appliance.meter.exporters import make_exporter
from appliance.meter.metering import Metering
from appliance.meter.settings import ExportSettings, InterfaceName, MeterSettings

ALL_FIELDS = "cflow.max_template_fields:0"  # tshark's default limit is 60


def needs(*programs: str) -> pytest.MarkDecorator:
    missing = [program for program in programs if shutil.which(program) is None]
    return pytest.mark.skipif(bool(missing), reason=f"{', '.join(missing)} not installed")


@pytest.fixture
def collector() -> Iterable[socket.socket]:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as bound:
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4 << 20)
        bound.bind(("127.0.0.1", 0))
        yield bound


class Told:
    """What tshark says of messages, each a list by field name; `text` is all of it."""

    def __init__(self, directory: Path, messages: Iterable[bytes]) -> None:
        self.path = directory / f"messages-{time.monotonic_ns()}.ipfix"
        self.path.write_bytes(b"".join(messages))
        self.text = run("tshark", "-n", "-o", ALL_FIELDS, "-r", self.path, "-V")
        for complaint in ("Malformed", "No template found", "Expert Info", "Unexpected"):
            assert complaint not in self.text, complaint

    def fields(self, *names: str) -> list[list[list[str]]]:
        """By message and name the values, in order."""
        words = [word for name in names for word in ("-e", name)]
        out = run("tshark", "-n", "-o", ALL_FIELDS, "-r", self.path, "-T", "fields", *words)
        return [[cell.split(",") if cell else [] for cell in line.split("\t")] for line in out.splitlines()]

    def field(self, name: str) -> list[list[str]]:
        return [values for (values,) in self.fields(name)]

    def every(self, name: str) -> list[str]:
        return [value for values in self.field(name) for value in values]


def run(*command: str | Path) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout


def of_file(directory: Path, packets: Sequence[Packet], meter: MeterSettings | None = None, **settings: Any) -> bytes:
    """An IPFIX file of these packets, ended as at a shutdown."""
    exports = (ExportSettings("file:", directory=directory, **settings),)
    metering = Metering(replace(meter or MeterSettings(), export=exports))
    feed(metering, packets)
    metering.finish()
    (path,) = (directory / "flows").iterdir()
    return path.read_bytes()


def feed(metering: Metering, packets: Sequence[Packet]) -> None:
    memory = Memory(digests(packets))
    metering.feed(memory.address, memory.length)


def v6(last: int) -> bytes:
    return b"\x20\1" + bytes(13) + bytes([last])


MIX = [
    Packet(protocol=TCP, flags=SYN, status=0x180, octets=60),
    replace(Packet(protocol=TCP, flags=SYN | ACK, status=0x180), **Packet().back),
    *(Packet(source_port=port) for port in range(2000, 2100)),
    Packet(source=v6(1), destination=v6(2)),
    Packet(protocol=1, source_port=0, destination_port=0, icmp=(8, 0), status=0x200),
]


@needs("tshark")
@pytest.mark.parametrize("message_bytes", [512, 1400, 65535])
def test_duty_1_messages_have_version_10_full_sets_and_template_numbers_from_256(
    tmp_path: Path, message_bytes: int
) -> None:
    told = Told(tmp_path, [of_file(tmp_path, MIX, message_bytes=message_bytes)])
    assert {value for values in told.field("cflow.version") for value in values} == {"10"}
    for set_ids, lengths in told.fields("cflow.flowset_id", "cflow.flowset_length"):
        assert set_ids and len(set_ids) == len(lengths) and min(map(int, lengths)) > 4
        assert all(int(set_id) in (2, 3) or int(set_id) >= 256 for set_id in set_ids)
    assert min(map(int, told.every("cflow.template_id"))) >= 256
    assert told.every("cflow.padding") == []


@needs("tshark", "nfcapd", "nfdump")
def test_duty_2_the_sequence_counts_data_records_and_goes_on_over_its_end(
    tmp_path: Path, collector: socket.socket
) -> None:
    first = (1 << 32) - 3
    settings = ExportSettings(udp_uri(collector), template_copies=1)
    exporter = UdpExporter(ExporterParts(MeterSettings(), settings, first_sequence=first))
    export(exporter, 100)
    exporter.statistics(COUNTS)
    exporter.close(time.monotonic() + 5)
    messages = received(collector)
    told = Told(tmp_path, messages)  # it says when a number is not the expected one
    numbers = [int(number) for number in told.every("cflow.sequence")]
    assert numbers[0] == first and 0 < numbers[-1] < 200 and len(numbers) == len(messages)
    directory = tmp_path / "nfcapd"
    directory.mkdir()
    judge = Nfcapd(directory)
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as again:
        for message in messages:
            again.sendto(message, ("127.0.0.1", judge.port))
    flows, said = judge.stop()
    assert len(flows) == 100 and faults(said) and not any(faults(said)), said


@needs("tshark")
def test_duty_3_a_template_comes_before_its_data(tmp_path: Path) -> None:
    told = Told(tmp_path, [of_file(tmp_path, MIX, message_bytes=512)])
    known: set[str] = set()
    for set_ids, template_ids in told.fields("cflow.flowset_id", "cflow.template_id"):
        known |= set(template_ids)
        assert {set_id for set_id in set_ids if int(set_id) >= 256} <= known


@needs("tshark")
def test_duty_4_addresses_and_times_have_their_full_length_and_the_epoch_of_1900(tmp_path: Path) -> None:
    told = Told(tmp_path, [of_file(tmp_path, MIX)])
    lengths = dict(re.findall(r"Type: (\w+) \(\d+\)\n +Length: (\d+)", told.text))
    full = dict.fromkeys(["IP_SRC_ADDR", "IP_DST_ADDR"], "4") | dict.fromkeys(["IPV6_SRC_ADDR", "IPV6_DST_ADDR"], "16")
    full |= {f"flow{end}{unit}": "8" for end in ("Start", "End") for unit in ("Milliseconds", "Nanoseconds")}
    full |= dict.fromkeys(["SRC_MAC", "DESTINATION_MAC"], "6")
    found = {name: lengths[name] for name in full if name in lengths}
    assert found == {name: full[name] for name in found} and len(found) >= 8, lengths
    nanoseconds = re.findall(r"StartTime: (.*) UTC", told.text)
    assert nanoseconds and all(moment == "Nov 14, 2023 22:13:20.000000000" for moment in nanoseconds)


@needs("tshark")
def test_duty_5_over_udp_templates_come_again_by_time_and_by_messages(tmp_path: Path, collector: socket.socket) -> None:
    by_messages = ExportSettings(udp_uri(collector), template_copies=1, template_refresh_messages=3, datagrams_per_s=0)
    exporter = make_exporter(MeterSettings(), by_messages)
    export(exporter, 200)
    told = Told(tmp_path, received(collector))
    since = 0
    for set_ids in told.field("cflow.flowset_id"):
        since = 0 if "2" in set_ids else since + ("256" in set_ids)
        assert since <= 3
    assert sum("2" in set_ids for set_ids in told.field("cflow.flowset_id")) > 5
    by_time = make_exporter(MeterSettings(), ExportSettings(udp_uri(collector), template_refresh_s=10))
    by_time.service(time.monotonic(), COUNTS)
    received(collector)
    by_time.service(time.monotonic() + 10, COUNTS)
    told = Told(tmp_path, received(collector))
    assert {"2", "3"} <= set(told.every("cflow.flowset_id")), "templates and options templates, without a flow"


@needs("tshark")
def test_duty_6_over_udp_templates_are_sent_several_times_before_their_first_use(
    tmp_path: Path, collector: socket.socket
) -> None:
    export(make_exporter(MeterSettings(), ExportSettings(udp_uri(collector))), 10)
    told = Told(tmp_path, received(collector))
    before_use, _, _ = told.text.partition("[id=256]")
    copies = before_use.count("Template (Id = 256,")
    assert copies == 3


@needs("tshark")
def test_duty_7_over_udp_nothing_is_withdrawn_and_no_number_gets_another_meaning(
    tmp_path: Path, collector: socket.socket
) -> None:
    exporter = make_exporter(MeterSettings(), ExportSettings(udp_uri(collector), template_refresh_messages=2))
    for _ in range(5):
        export(exporter, 20)
    exporter.close(time.monotonic() + 5)
    check_meanings(Told(tmp_path, received(collector)))


def check_meanings(told: Told) -> None:
    """Nothing is withdrawn (a template without fields), and no template ID has two meanings."""
    assert min(map(int, told.every("cflow.template_field_count"))) > 0
    meanings: dict[str, set[str]] = {}
    end = r"(?=Template \(Id|Set \d+ \[|\nFrame|\Z)"
    for number, content in re.findall(rf"Template \(Id = (\d+)(.*?){end}", told.text, re.S):
        meanings.setdefault(number, set()).add(str(re.findall(r"Type: (\S+)|Length: (\d+)", content)))
    assert len(meanings) >= 16 and all(len(different) == 1 for different in meanings.values())


@needs("tshark")
def test_duty_8_no_message_is_longer_than_the_path_takes_and_512_octets_where_it_is_unknown(
    tmp_path: Path, collector: socket.socket, monkeypatch: pytest.MonkeyPatch
) -> None:
    export(make_exporter(MeterSettings(), ExportSettings(udp_uri(collector))), 100)
    assert max(map(int, Told(tmp_path, received(collector)).every("cflow.len"))) <= 1400
    monkeypatch.setitem(export_udp.PATH_MTU, socket.AF_INET, (socket.IPPROTO_IP, 10, 9999, 28))
    export(make_exporter(MeterSettings(), ExportSettings(udp_uri(collector))), 100)
    assert max(map(int, Told(tmp_path, received(collector)).every("cflow.len"))) <= 512


@needs("tshark")
def test_duty_9_every_connection_begins_with_all_templates_and_sequence_0(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(export_socket, "RETRY_FIRST_S", 0.01)
    tcp = TcpCollector()
    exporter = make_exporter(MeterSettings(), ExportSettings(tcp.uri))
    for session in range(2):
        export(exporter, 100)
        wait_until(lambda: not exporter.queue, exporter)
        wait_until(lambda n=session: tcp.read() is None and len(tcp.sessions) > n)
        told = Told(tmp_path, [bytes(tcp.sessions[session])])
        assert told.every("cflow.sequence")[0] == "0"
        first_use = next(i for i, set_ids in enumerate(told.field("cflow.flowset_id")) if "256" in set_ids)
        templates = {number for numbers in told.field("cflow.template_id")[:first_use] for number in numbers}
        assert {str(number) for number in (*range(256, 268), 300, 301, 302, 303, 311)} <= templates
        tcp.connections[session].close()
        tcp.connections[session] = socket.socket()  # of the next one nothing is read yet
        wait_until(lambda: exporter.page["up"] == 0, exporter)
    exporter.close(time.monotonic())
    tcp.close()


@needs("tshark")
def test_duty_10_what_is_not_sent_is_counted_in_the_reliability_options(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(export_socket, "RETRY_FIRST_S", 0.01)
    tcp = TcpCollector()
    tcp.close()  # nobody is there for now
    exporter = make_exporter(MeterSettings(), ExportSettings(tcp.uri, queue_bytes=1 << 16))
    table = expired(1000)
    for _ in range(5):
        exporter.export(table.rows_address, table.row_count)
        assert exporter.queued_bytes <= 1 << 16
    lost = exporter.page["not_sent_flows"]
    assert 0 < lost < 5000 and exporter.retry_s > export_socket.RETRY_FIRST_S  # type: ignore[attr-defined]
    tcp = TcpCollector(tcp.port)
    wait_until(lambda: not exporter.queue, exporter)
    exporter.statistics(COUNTS)
    exporter.close(time.monotonic() + 5)
    tcp.read()
    tcp.close()
    told = Told(tmp_path, [bytes(tcp.sessions[0])])
    assert told.every("cflow.notsent_flows") == told.every("cflow.notsent_packets") == [str(lost)]
    assert told.every("cflow.notsent_octets") == [str(100 * lost)]
    assert exporter.page["flow_records"] == 5000 - lost


@needs("tshark")
def test_duty_11_over_tcp_no_number_gets_another_meaning_so_nothing_need_be_withdrawn(tmp_path: Path) -> None:
    tcp = TcpCollector()
    exporter = make_exporter(MeterSettings(packet_sequence=3), ExportSettings(tcp.uri))
    for _ in range(5):
        export(exporter, 100)
        wait_until(lambda: not exporter.queue, exporter)
    exporter.close(time.monotonic() + 5)
    wait_until(lambda: tcp.read() is None and len(tcp.sessions[0]) == exporter.page["bytes"])
    check_meanings(Told(tmp_path, [bytes(tcp.sessions[0])]))
    tcp.close()


@pytest.mark.skipif(not HAS_OPENSSL, reason=NO_OPENSSL)
@needs("tshark")
def test_duty_12_tls_has_two_certificates_and_a_version_from_1_2_on(tmp_path: Path) -> None:
    authority = Authority(tmp_path, "authority")
    ours, theirs = authority.issue("exporter"), authority.issue("collector")
    options = ("-Verify", "1", "-verify_return_error", "-CAfile", str(authority.certificate))
    judge = OpensslCollector(tmp_path, theirs, *options)
    try:
        exporter = tls_exporter(judge.uri, authority, tls_certificate=ours.certificate, tls_key=ours.key)
        export(exporter, 50)
        wait_until(lambda: not exporter.queue, exporter)
        exporter.close(time.monotonic() + 5)
        wait_until(lambda: judge.flows() == 50)
    finally:
        judge.stop()
    assert len(Told(tmp_path, [judge.file.read_bytes()]).every("cflow.flow_end_reason")) == 50


@pytest.mark.parametrize("uri", ["sctp://collector:4739", "dtls://collector:4740"])
def test_duty_13_sctp_is_optional_and_refused_by_its_name(uri: str) -> None:
    with pytest.raises(ValueError, match=f"{uri.partition(':')[0]}:// is not supported"):
        parse_destination(uri)


@needs("ipfixDump", "tshark")
def test_duty_14_options_tell_of_processes_keys_types_and_interfaces(tmp_path: Path) -> None:
    meter = MeterSettings(interfaces=(InterfaceName(0, "uplink", "ring:eth0"),))
    content = of_file(tmp_path, MIX, meter)
    told = run("ipfixDump", "-i", Told(tmp_path, [content]).path)
    for scope, field in (
        ("meteringProcessId", "exportedFlowRecordTotalCount"),
        ("meteringProcessId", "ignoredPacketTotalCount"),
        ("exportingProcessId", "notSentFlowTotalCount"),
        ("templateId", "flowKeyIndicator"),
        ("informationElementId", "informationElementName"),
        ("ingressInterface", "interfaceName"),
    ):
        assert re.search(rf"\(S\) +{scope} : .*(\n.*){{1,9}}?{field} : ", told), field
    assert told.index("informationElementDescription : ") < told.index("flowStartMilliseconds"), "types come first"


@needs("tshark")
def test_duty_14_a_file_begins_with_its_templates(tmp_path: Path) -> None:
    told = Told(tmp_path, [of_file(tmp_path, MIX)])
    sets = [set_id for set_ids in told.field("cflow.flowset_id") for set_id in set_ids]
    assert sets.index("2") < min(sets.index(set_id) for set_id in sets if 256 <= int(set_id) < 300)


@needs("tshark")
def test_duty_15_flow_end_reasons_are_as_the_flows_ended(tmp_path: Path) -> None:
    directory = tmp_path
    exports = (ExportSettings("file:", directory=directory),)
    metering = Metering(MeterSettings(max_flows=64, active_timeout_s=60, export=exports))
    ended = Packet(protocol=TCP, source_port=1, status=0x180)
    feed(metering, [replace(ended, flags=SYN), replace(ended, flags=RST)])
    both = replace(ended, source_port=2)
    feed(metering, [replace(both, flags=FIN | ACK), replace(both, **both.back, flags=FIN | ACK)])
    feed(metering, [Packet(source_port=3)])  # idle
    feed(metering, [Packet(source_port=4, time_ns=START + i * 20 * SECOND) for i in range(5)])  # active
    feed(metering, [Packet(source_port=1000 + i, time_ns=START + 81 * SECOND) for i in range(70)])  # too many
    metering.finish()  # the rest is forced
    (path,) = (directory / "flows").iterdir()
    told = Told(tmp_path, [path.read_bytes()])
    reasons = dict.fromkeys("12345", 0)
    for value in told.every("cflow.flow_end_reason"):
        reasons[value] += 1
    assert reasons["3"] == 2 and reasons["2"] >= 1 and reasons["1"] == 1 and reasons["5"] > 0 and reasons["4"] > 0
    assert reasons["5"] == metering.page["flows_lack_of_resources"]


@needs("tshark")
def test_duty_16_flows_end_on_time_also_when_no_packet_comes(tmp_path: Path, collector: socket.socket) -> None:
    metering = Metering(MeterSettings(export=(ExportSettings(udp_uri(collector), template_copies=1),)))
    feed(metering, [Packet()])
    metering.advance(START + 29 * SECOND)  # as live sources do by the clock
    metering.service(time.monotonic())
    before = received(collector)
    metering.advance(START + 31 * SECOND)
    metering.service(time.monotonic())
    after = received(collector)
    assert Told(tmp_path, before).every("cflow.flow_end_reason") == []
    assert Told(tmp_path, before + after).every("cflow.flow_end_reason") == ["1"]


@needs("tshark")
def test_duty_17_a_flow_that_goes_on_keeps_its_direction_and_its_number(tmp_path: Path) -> None:
    there = Packet(protocol=TCP, flags=SYN, status=0x180)
    talk = [there]
    for i in range(1, 40):  # the answers come first in every later part
        answer = replace(there, **there.back, flags=ACK, time_ns=START + i * 20 * SECOND)
        talk += [answer, replace(there, flags=ACK, time_ns=answer.time_ns + 1)]
    told = Told(tmp_path, [of_file(tmp_path, talk)])
    flows = set(told.every("cflow.flow_id"))
    assert len(told.every("cflow.flow_id")) >= 3 and len(flows) == 1
    assert set(told.every("cflow.srcaddr")) == {"10.0.0.1"} and set(told.every("cflow.biflow_direction")) == {"1"}


@needs("ipfixDump", "tshark")
def test_duty_18_packets_that_are_not_metered_are_counted(tmp_path: Path) -> None:
    exports = (ExportSettings("file:", directory=tmp_path),)
    metering = Metering(MeterSettings(export=exports), ignored=lambda: (17, 1234))
    feed(metering, [Packet()])
    metering.finish()
    (path,) = (tmp_path / "flows").iterdir()
    told = run("ipfixDump", "-i", path)
    assert re.findall(r"ignoredPacketTotalCount : (\d+)", told) == ["17"]
    assert re.findall(r"ignoredOctetTotalCount : (\d+)", told) == ["1234"]


@needs("nfacctd")
def test_nfacctd_has_every_flow_with_its_flags_and_times(tmp_path: Path) -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    keys = "src_host,dst_host,src_port,dst_port,proto,tcpflags,timestamp_start,timestamp_end"
    options = {"daemonize": "false", "nfacctd_ip": "127.0.0.1", "nfacctd_port": port, "plugins": "print"}
    options |= {"aggregate": keys, "print_output": "json", "print_refresh_time": 2, "print_history": "1h"}
    config = tmp_path / "nfacctd.conf"
    config.write_text("".join(f"{key}: {value}\n" for key, value in options.items()))
    out = (tmp_path / "flows.json").open("w+")
    judge = subprocess.Popen(["nfacctd", "-f", config], stdout=out, stderr=subprocess.DEVNULL, stdin=subprocess.DEVNULL)
    try:
        wait_until(lambda: f":{port:04X} " in Path("/proc/net/udp").read_text())
        exports = (ExportSettings(f"udp://127.0.0.1:{port}", biflow=False),)
        metering = Metering(MeterSettings(export=exports))

        def flows() -> list[dict[str, Any]]:
            lines = (tmp_path / "flows.json").read_text().splitlines()
            return [json.loads(line) for line in lines if line.endswith("}")]

        def is_heard() -> bool:
            """It listens before it can do anything with what it hears."""
            probe = Metering(MeterSettings(export=exports))
            feed(probe, [Packet(source_port=9)])
            probe.finish()
            time.sleep(0.5)
            return any(flow["port_src"] == 9 for flow in flows())

        wait_until(is_heard)
        there = Packet(protocol=TCP, status=0x180, flags=SYN, time_ns=START + 250_000_000)
        talk = [there, replace(there, **there.back, flags=SYN | ACK, octets=70), replace(there, flags=ACK | FIN)]
        feed(metering, [*talk, *(Packet(source_port=i, time_ns=START + SECOND) for i in range(2000, 2010))])
        metering.finish()
        wait_until(lambda: sum(flow["port_src"] != 9 for flow in flows()) >= 12)
    finally:
        for process in psutil.Process(judge.pid).children(recursive=True):
            with contextlib.suppress(psutil.NoSuchProcess):  # it starts one for each print, which ends by itself
                process.kill()
        judge.kill()
        judge.wait(timeout=20)
        out.close()
    found = {(flow["port_src"], flow["tcp_flags"], flow["packets"], flow["bytes"]) for flow in flows()}
    assert {(1000, "19", 2, 200), (80, "18", 1, 70), (2000, "0", 1, 100)} <= found
    assert {flow["timestamp_start"] for flow in flows() if flow["port_src"] == 1000} == {"2023-11-14 22:13:20.250000"}
