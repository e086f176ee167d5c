"""Templates, plans and messages: what stands in a record, and that readers which we did not write agree."""

from __future__ import annotations

import io
import shutil
import struct
import subprocess
import warnings
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from meter.flow_packets import (
    ACK,
    ICMP,
    SECOND,
    START,
    SYN,
    TCP,
    UDP,
    Decoded,
    Decoder,
    Memory,
    Packet,
    digests,
    flow_records,
    make_table,
    number,
)

from appliance.meter.pack import Message, Packer
from appliance.meter.settings import ExportSettings, MeterSettings
from appliance.meter.table import ROW_BYTES, FlowTable
from appliance.meter.templates import FlowTemplate, TemplateSet, build_messages

REVERSE = 29305
TCP_TALK = Packet(
    protocol=TCP, flags=SYN, status=0x190, octets=60, sequence=0xFFFF0001, vlan=0x6005, interface=7, ttl=61
)
TALKS = [
    replace(TCP_TALK),
    replace(TCP_TALK, **TCP_TALK.back, time_ns=START + 1_500_000, flags=SYN | ACK, octets=1500, ttl=50, tos=4),
    Packet(time_ns=START + SECOND + 1, source_port=53, protocol=UDP),
    Packet(time_ns=START + SECOND + 2, protocol=ICMP, source_port=0, destination_port=0, icmp=(8, 3), status=0x200),
    Packet(
        time_ns=START + SECOND + 3, source=b"\x20\1" + b"\0" * 13 + b"\1", destination=b"\x20\1" + b"\0" * 13 + b"\2"
    ),
    Packet(
        time_ns=START + SECOND + 4,
        source=b"\x20\1" + b"\0" * 13 + b"\1",
        destination=b"\x20\1" + b"\0" * 13 + b"\2",
        protocol=58,
        source_port=0,
        destination_port=0,
        icmp=(128, 0),
        status=0x200,
    ),
]


def expired(packets: list[Packet], **settings: Any) -> FlowTable:
    """A table whose rows are the flows of these packets."""
    table = make_table(tcp_analysis=True, **settings)
    memory = Memory(digests(packets))
    assert table.update(memory.address, memory.length) == memory.length
    assert table.flush()
    return table


def make_packer(export: ExportSettings, message_bytes: int = 1400) -> Packer:
    templates = TemplateSet(MeterSettings(), export)
    return Packer(templates.plans, biflow=export.biflow, observation_domain=export.domain, message_bytes=message_bytes)


def stamped(messages: list[Message], sequence: int = 0) -> bytes:
    for message in messages:
        message.stamp(1_700_000_123, sequence)
        sequence += message.records
    return b"".join(message.data for message in messages)


def exported(packets: list[Packet], message_bytes: int = 1400, **settings: Any) -> list[Decoded]:
    export = ExportSettings("file:", **settings)
    announcement = TemplateSet(MeterSettings(), export).announcement(message_bytes)
    table = expired(packets)
    messages = announcement + make_packer(export, message_bytes).pack(table.rows_address, table.row_count)
    return Decoder().stream(stamped(messages))


def test_a_biflow_record_says_what_the_packets_said() -> None:
    record = next(r for r in flow_records(exported(TALKS)) if number(r, 4) == TCP)
    assert (record[0, 8], record[0, 12]) == (TCP_TALK.source, TCP_TALK.destination)
    assert (number(record, 7), number(record, 11), number(record, 60), number(record, 10)) == (1000, 80, 4, 7)
    assert (number(record, 152), number(record, 153)) == (START // 1_000_000, START // 1_000_000 + 1)
    assert (number(record, 2), number(record, 1)) == (1, 60)
    assert (number(record, 2, REVERSE), number(record, 1, REVERSE)) == (1, 1500)
    assert (number(record, 243), number(record, 245)) == (5, 0)
    assert (number(record, 6), number(record, 6, REVERSE)) == (SYN, SYN | ACK)
    assert (number(record, 14, 6871), number(record, 0x4000 | 14, 6871)) == (SYN, SYN | ACK)
    assert (number(record, 184), number(record, 52), number(record, 53, REVERSE)) == (0xFFFF0001, 61, 50)
    assert (number(record, 25), number(record, 26, REVERSE), number(record, 5, REVERSE)) == (60, 1500, 4)
    assert (number(record, 136), number(record, 239), number(record, 148), number(record, 197)) == (4, 1, 1, 0x40)
    assert number(record, 152, REVERSE) == number(record, 153, REVERSE) == START // 1_000_000 + 1
    assert (record[0, 56], record[0, 80]) == (b"\2\0\0\0\0\1", b"\2\0\0\0\0\2")


QOF, FLOWMON, FOKUS = 35566, 39499, 12325
TROUBLED = [  # a hole that is filled late, and an answer
    replace(TCP_TALK, mss=1460, window_scale=7, sequence=100),
    replace(
        TCP_TALK, **TCP_TALK.back, time_ns=START + 40 * SECOND // 1000, flags=SYN | ACK, sequence=500,
        acknowledgement=101, mss=1400, window_scale=2,
    ),
    replace(TCP_TALK, time_ns=START + 50 * SECOND // 1000, flags=ACK, sequence=101, acknowledgement=501, window=9),
    replace(TCP_TALK, time_ns=START + SECOND, flags=ACK, sequence=201, acknowledgement=501, payload=100),
    replace(TCP_TALK, time_ns=START + 2 * SECOND, flags=ACK, sequence=101, acknowledgement=501, payload=100),
    replace(TCP_TALK, time_ns=START + 3 * SECOND, flags=ACK, sequence=201, acknowledgement=501, payload=100),
    replace(
        TCP_TALK, **TCP_TALK.back, time_ns=START + 4 * SECOND, flags=ACK, sequence=501, acknowledgement=301, window=0
    ),
]  # fmt: skip


def test_a_tcp_record_says_what_the_analysis_found() -> None:
    (record,) = flow_records(exported(TROUBLED))
    back = 0x4000
    assert (number(record, 1024, QOF), number(record, 1024 | back, QOF)) == (200, 0)  # of 300 octets
    assert (number(record, 1025, QOF), number(record, 1025 | back, QOF)) == (2, 0)
    assert (number(record, 1035, QOF), number(record, 72, FLOWMON)) == (1, 0)
    assert (number(record, 1045, QOF), number(record, 1045 | back, QOF)) == (0, 1)
    assert (number(record, 1033, QOF), number(record, 1033 | back, QOF)) == (1460, 1400)
    assert (number(record, 238), number(record, 238, REVERSE)) == (7, 2)
    assert number(record, 1044, QOF) == 512 << 7
    assert (number(record, 1029, QOF), number(record, 1030, QOF), number(record, 1046, QOF)) == (50, 50, 2)
    assert (number(record, 69, FLOWMON), number(record, 179, FOKUS)) == (50_000, 40_000)
    assert number(record, 179 | back, FOKUS) == 10_000


def test_without_the_analysis_its_elements_are_absent() -> None:
    templates = TemplateSet(MeterSettings(tcp_analysis=False), ExportSettings("file:"))
    *_, message = Decoder().stream(stamped(templates.announcement(65535)))
    enterprises = {enterprise for fields in message.templates.values() for enterprise, _, _ in fields}
    assert enterprises == {0, 6871, REVERSE}
    with_it = TemplateSet(MeterSettings(tcp_analysis=True), ExportSettings("file:"))
    *_, message = Decoder().stream(stamped(with_it.announcement(65535)))
    others = {e for template_id in (256, 257, 260) for e, _, _ in message.templates[template_id]}
    assert others <= {0, REVERSE}  # of TCP alone


def test_nanoseconds_count_from_1900() -> None:
    record = next(r for r in flow_records(exported(TALKS)) if number(r, 4) == UDP and number(r, 60) == 4)
    seconds, fraction = divmod(number(record, 156), 1 << 32)
    assert seconds == START // SECOND + 1 + 2_208_988_800
    assert fraction == (1 << 32) // SECOND  # one nanosecond


def test_a_flow_of_one_direction_has_no_reverse_elements() -> None:
    record = next(r for r in flow_records(exported(TALKS)) if number(r, 4) == UDP)
    assert not any(enterprise == REVERSE for enterprise, _ in record)


def test_icmp_has_type_and_code_and_no_ports() -> None:
    records = flow_records(exported(TALKS))
    v4 = next(r for r in records if number(r, 4) == ICMP)
    v6 = next(r for r in records if number(r, 4) == 58)
    assert (number(v4, 32), number(v6, 139)) == (0x0803, 0x8000)
    assert (0, 7) not in v4 and (0, 11) not in v6


def test_without_biflow_every_direction_is_a_record_of_its_own() -> None:
    records = flow_records(exported(TALKS, biflow=False))
    assert len(records) == 6
    back = next(r for r in records if number(r, 4) == TCP and number(r, 7) == 80)
    assert (back[0, 8], back[0, 12], number(back, 11)) == (TCP_TALK.destination, TCP_TALK.source, 1000)
    assert (number(back, 2), number(back, 1), number(back, 6), number(back, 5)) == (1, 1500, SYN | ACK, 4)
    assert number(back, 152) == number(back, 153) == START // 1_000_000 + 1
    assert (back[0, 56], back[0, 80]) == (b"\2\0\0\0\0\2", b"\2\0\0\0\0\1")
    there = next(r for r in records if number(r, 4) == TCP and number(r, 7) == 1000)
    assert number(there, 153) == START // 1_000_000


def test_only_the_reverse_direction_of_a_record_may_have_packets() -> None:
    packet = Packet()
    later = [replace(packet, **packet.back, time_ns=START + 305 * SECOND)]
    steady = [replace(packet, time_ns=START + i * 20 * SECOND) for i in range(15)]
    for biflow in (True, False):
        records = flow_records(exported([*steady, *later], biflow=biflow))
        assert len(records) == 2
        key = (REVERSE, 2) if biflow else (0, 2)
        assert int.from_bytes(records[-1].get(key, b""), "big") == 1


@pytest.mark.parametrize("message_bytes", [512, 1400, 65535])
@pytest.mark.parametrize("biflow", [True, False])
def test_no_message_is_longer_than_allowed_and_all_records_arrive(message_bytes: int, biflow: bool) -> None:
    packets = [replace(p, source_port=port) for port in range(300) for p in (TALKS[2], TALKS[4])]
    packets += [replace(TCP_TALK, source_port=port) for port in range(100)]
    messages = exported(packets, message_bytes=message_bytes, biflow=biflow)
    assert max(message.length for message in messages) <= message_bytes
    assert len(flow_records(messages)) == 700


def test_records_of_one_template_share_a_set() -> None:
    packets = [replace(p, source_port=port) for port in range(30) for p in (TALKS[2], TALKS[4])]
    table = expired(packets)
    (message,) = make_packer(ExportSettings("file:"), 65535).pack(table.rows_address, table.row_count)
    sets, offset = 0, 16
    while offset < len(message.data):
        sets += 1
        offset += int.from_bytes(message.data[offset + 2 : offset + 4], "big")
    assert (sets, message.records, message.flows, message.packets, message.octets) == (2, 60, 60, 60, 6000)


def test_the_sequence_counts_data_records_and_wraps() -> None:
    export = ExportSettings("file:")
    table = expired([replace(TALKS[2], source_port=port) for port in range(40)])
    messages = make_packer(export, 512).pack(table.rows_address, table.row_count)
    first = (1 << 32) - 3
    data = stamped(TemplateSet(MeterSettings(), export).announcement(512)[:6] + messages, first)
    expected = first
    for message in Decoder().stream(data):
        assert message.sequence == expected % (1 << 32)
        expected += len(message.records)
    assert expected > 1 << 32


def test_the_announcement_says_templates_options_and_flow_keys() -> None:
    messages = exported(TALKS)
    templates = {k: v for message in messages for k, v in message.templates.items()}
    scopes = {k: v for message in messages for k, v in message.scopes.items()}
    assert scopes == {300: 2, 301: 2, 302: 1, 303: 1, 311: 2}
    assert len(templates) == 12 + 5
    keys = {
        number(record, 145): number(record, 173)
        for message in messages
        for template_id, record in message.records
        if template_id == 303
    }
    assert set(keys) == {template_id for template_id in templates if template_id < 300}
    for template_id, indicator in keys.items():
        named = {templates[template_id][bit][1] for bit in range(64) if indicator >> bit & 1}
        addresses = {8, 12} if template_id < 262 else {27, 28}
        ports = set() if template_id in (260, 261, 266, 267) else {7, 11}
        assert named == addresses | ports | {4, 60, 243, 245}


def test_sampling_parameters_are_options_data(tmp_path: Path) -> None:
    meter = MeterSettings(packet_sampling=100, flow_sampling=8)
    data = stamped(TemplateSet(meter, ExportSettings("file:")).announcement(65535))
    *_, message = Decoder().stream(data)
    assert (message.scopes[304], message.scopes[305]) == (1, 1)
    by_template = dict(message.records)
    assert [number(by_template[304], element) for element in (302, 304, 305, 306)] == [304, 1, 1, 99]
    assert (number(by_template[305], 390), struct.unpack("!d", by_template[305][0, 311])) == (4, (0.125,))
    assert all((35566, 1025) not in [f[:2] for f in fields] for fields in message.templates.values())
    if shutil.which("tshark"):
        (tmp_path / "sampling.ipfix").write_bytes(data)
        command = ["tshark", "-n", "-V", "-r", tmp_path / "sampling.ipfix"]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        assert "Malformed" not in text and "Sampling Packet Space: 99" in text and "0.125" in text


def with_sequences(packets: list[Packet], count: int, message_bytes: int = 1400) -> bytes:
    meter, export = MeterSettings(packet_sequence=count), ExportSettings("file:")
    templates = TemplateSet(meter, export)
    table = expired(packets, packet_sequence=count)
    packer = Packer(templates.plans, biflow=True, observation_domain=1, message_bytes=message_bytes)
    return stamped(templates.announcement(message_bytes) + packer.pack(table.rows_address, table.row_count))


def listed(record: dict[tuple[int, int], bytes], place: int) -> tuple[tuple[int, int, int], list[int]]:
    """((enterprise, element, octets of each), values) of an ordered basicList (RFC 6313, 4.5.1)."""
    data = record[291, place]
    semantic, element, octets = struct.unpack_from("!BHH", data)
    assert semantic == 4
    enterprise, start = (int.from_bytes(data[5:9], "big"), 9) if element & 0x8000 else (0, 5)
    values = [int.from_bytes(data[i : i + octets], "big") for i in range(start, len(data), octets)]
    return (enterprise, element & 0x7FFF, octets), values


def test_the_first_packets_are_records_of_their_own_beside_the_flows() -> None:
    messages = Decoder().stream(with_sequences(TALKS, 8))
    records = [r for message in messages for template_id, r in message.records if template_id in (280, 281)]
    assert len(records) == len(flow_records(messages)) == 5
    tcp = next(r for r in records if number(r, 4) == TCP)
    assert (tcp[0, 8], number(tcp, 11), number(tcp, 148)) == (TCP_TALK.source, 80, 1)
    elements, times = listed(tcp, 7)
    assert elements == (0, 325, 8) and [t >> 32 for t in times] == [START // SECOND + 2_208_988_800] * 2
    assert times[1] - times[0] == (1 << 32) * 15 // 10_000  # 1.5 ms
    assert listed(tcp, 8) == ((0, 224, 8), [60, 1500])
    assert listed(tcp, 9) == ((8057, 1016, 1), [1, 255])  # forward, reverse
    assert listed(tcp, 10) == ((0, 6, 2), [SYN, SYN | ACK])


@pytest.mark.parametrize("message_bytes", [512, 1400, 65535])
def test_the_longest_sequences_fit_into_every_message(message_bytes: int) -> None:
    v6 = {"source": b"\x20\1" + b"\0" * 13 + b"\1", "destination": b"\x20\1" + b"\0" * 13 + b"\2"}
    packets = [Packet(time_ns=START + i, source_port=i % 7, **v6) for i in range(7 * 40)]
    messages = Decoder().stream(with_sequences(packets, 20, message_bytes))
    assert max(message.length for message in messages) <= message_bytes
    records = [r for message in messages for template_id, r in message.records if template_id == 281]
    assert [len(listed(r, 8)[1]) for r in records] == [20] * 7


@pytest.mark.skipif(shutil.which("tshark") is None, reason="tshark is not installed")
@pytest.mark.skipif(shutil.which("ipfixDump") is None, reason="ipfixDump is not installed")
def test_tshark_and_ipfixdump_read_the_first_packets(tmp_path: Path) -> None:
    path = tmp_path / "flows.ipfix"
    path.write_bytes(with_sequences(TALKS, 8))
    command = ["tshark", "-n", "-o", "cflow.max_template_fields:0", "-V", "-r", path]
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert "Malformed" not in text and "No template found" not in text and "Expert Info" not in text
    dumped = subprocess.run(["ipfixDump", "--in", path, "--yaf"], capture_output=True, text=True, check=True).stdout
    tcp = dumped[dumped.index("protocolIdentifier : 6\n") :]  # of its flow record; its sequence comes later
    sequence = tcp[tcp.index("basicList") :]
    words = [line.split() for line in sequence.splitlines()]
    values = [line[2] for line in words if len(line) > 2 and line[0] in ("1", "2") and line[1] == ":"]
    assert {"60", "1500"} <= set(values) and "ipTotalLength" in sequence and "0x02" not in values


def test_statistics_are_options_data() -> None:
    templates = TemplateSet(MeterSettings(), ExportSettings("file:", domain=9))
    counts = dict.fromkeys(
        [
            "messages",
            "flow_records",
            "bytes",
            "ignored_packets",
            "ignored_octets",
            "not_sent_flows",
            "not_sent_packets",
            "not_sent_octets",
        ],
        0,
    )
    counts |= {"flow_records": 5, "ignored_packets": 6, "ignored_octets": 60, "not_sent_packets": 7}
    counts |= {"first_ms": 8, "last_ms": 1 << 40}
    messages = templates.announcement(1400) + templates.statistics(counts, 1400)
    decoded = Decoder().stream(stamped(messages))[-1]
    by_template = dict(decoded.records)
    assert (number(by_template[300], 149), number(by_template[300], 42)) == (9, 5)
    assert (number(by_template[301], 164), number(by_template[301], 165)) == (6, 60)
    assert number(by_template[302], 167) == 7
    assert number(by_template[302], 323) == 1 << 40  # the second of the two stands


def test_messages_are_split_between_records() -> None:
    messages = build_messages(1, [(2, b"x" * 200, 0)] * 5 + [(256, b"y" * 200, 1)] * 3, 512)
    assert [len(m.data) for m in messages] == [420, 420, 424, 420]
    assert [m.records for m in messages] == [0, 0, 1, 2]


def test_plans_that_do_not_fit_are_refused() -> None:
    for plan in (
        (256, 6, 0, []),
        (256, 0, 0, [(1, 0, 3, 3)]),
        (256, 0, 0, [(0, ROW_BYTES - 15, 16, 16)]),
        (256, 0, 0, [(1, 0, 8, 1)] * 193),
    ):
        with pytest.raises(ValueError):
            Packer([plan], biflow=True, observation_domain=1, message_bytes=1400)


# ---- readers that we did not write ----


@pytest.mark.skipif(shutil.which("tshark") is None, reason="tshark is not installed")
@pytest.mark.parametrize("biflow", [True, False])
def test_tshark_reads_what_the_analysis_found(biflow: bool, tmp_path: Path) -> None:
    export = ExportSettings("file:", biflow=biflow)
    table = expired(TROUBLED)
    messages = TemplateSet(MeterSettings(), export).announcement(16384)
    messages += make_packer(export, 16384).pack(table.rows_address, table.row_count)
    (tmp_path / "flows.ipfix").write_bytes(stamped(messages))
    command = ["tshark", "-n", "-o", "cflow.max_template_fields:0", "-V", "-r", tmp_path / "flows.ipfix"]
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert "Malformed" not in text and "No template found" not in text and "Expert Info" not in text
    assert "TCP WINDOWS SCALE" in text.upper() or "WINDOW SCALE" in text.upper()
    assert "00 00 00 00 00 00 00 c8" in text and "00 00 00 00 00 00 01 2c" not in text  # goodput: 200 octets, not 300


@pytest.mark.skipif(shutil.which("tshark") is None, reason="tshark is not installed")
def test_without_the_analysis_tshark_reads_a_tcp_record_as_it_is_installed(tmp_path: Path) -> None:
    export = ExportSettings("file:", tcp_analysis=False)
    assert max(len(template.specs) for template in flow_templates(export)) == 46
    table = expired(TROUBLED)
    messages = TemplateSet(MeterSettings(), export).announcement(16384)
    messages += make_packer(export, 16384).pack(table.rows_address, table.row_count)
    (tmp_path / "flows.ipfix").write_bytes(stamped(messages))
    command = ["tshark", "-n", "-V", "-r", tmp_path / "flows.ipfix"]
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert "Malformed" not in text and "No template found" not in text and "Expert Info" not in text
    assert "FlowEndReason: End of Flow" in text or "Flow End Reason: " in text


def flow_templates(export: ExportSettings) -> list[FlowTemplate]:
    return [one for one in TemplateSet(MeterSettings(), export).flows if isinstance(one, FlowTemplate)]


@pytest.mark.parametrize(
    ("left_out", "fields"),
    [({}, 70), ({"nanoseconds": False}, 66), ({"nanoseconds": False, "tcp_analysis": False}, 42)],
)
def test_what_a_collector_does_not_want_is_not_in_its_templates(left_out: dict[str, bool], fields: int) -> None:
    found = flow_templates(ExportSettings("file:", **left_out))  # type: ignore[arg-type]
    assert max(len(template.specs) for template in found) == fields


@pytest.fixture
def ipfix_file(tmp_path: Path) -> Iterator[Path]:
    export = ExportSettings("file:")
    table = expired(TALKS)
    messages = TemplateSet(MeterSettings(), export).announcement(16384)
    messages += make_packer(export, 16384).pack(table.rows_address, table.row_count)
    path = tmp_path / "flows.ipfix"
    path.write_bytes(stamped(messages))
    yield path


def test_python_ipfix_reads_the_records(ipfix_file: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import ipfix.reader

        import appliance.meter.ipfix  # noqa: F401  the information model is loaded there

        reader = ipfix.reader.from_stream(io.BytesIO(ipfix_file.read_bytes()))
        records = [record for record in reader.namedict_iterator() if "protocolIdentifier" in record]
    assert len(records) == 5
    tcp = next(record for record in records if record["protocolIdentifier"] == TCP)
    assert str(tcp["sourceIPv4Address"]) == "10.0.0.1"
    assert (tcp["packetDeltaCount"], tcp["reverseOctetDeltaCount"], tcp["reverseMinimumIpTotalLength"]) == (
        1,
        1500,
        1500,
    )
    assert (tcp["initialTCPFlags"], tcp["reverseInitialTCPFlags"], tcp["dot1qVlanId"]) == (SYN, SYN | ACK, 5)
    assert tcp["flowStartMilliseconds"].timestamp() != 0


@pytest.mark.skipif(shutil.which("tshark") is None, reason="tshark is not installed")
def test_tshark_reads_the_file_and_finds_nothing_wrong(ipfix_file: Path) -> None:
    text = subprocess.run(
        ["tshark", "-n", "-o", "cflow.max_template_fields:0", "-r", ipfix_file, "-V"],
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    assert "Malformed" not in text and "No template found" not in text and "Expert Info" not in text
    fields = ["cflow.srcaddr", "cflow.packets", "cflow.octets", "cflow.flow_end_reason"]
    command = [
        "tshark",
        "-n",
        "-o",
        "cflow.max_template_fields:0",
        "-r",
        ipfix_file,
        "-T",
        "fields",
        *(x for f in fields for x in ("-e", f)),
    ]
    values = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert values.count("10.0.0.1") == 3
    assert "1500" in values
