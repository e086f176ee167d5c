"""IPFIX records packed and framed, by us and by python-ipfix from tuples; python-ipfix reads both back."""

from __future__ import annotations

import io
import time
import warnings
from collections.abc import Callable, Sequence
from typing import Any

from meter.flow_packets import SECOND, START, Memory, Packet

from appliance.meter.pack import Message, Packer
from appliance.meter.settings import ExportSettings, MeterSettings
from appliance.meter.table import FlowTable
from appliance.meter.templates import TemplateSet
from bench.context import Bench
from bench.measure import median
from bench.results import Picture, RowResult, Table, Target, absolute

NAME = "ipfix-pack"
TITLE = "IPFIX records packed and framed"
NEEDS_ROOT = False

LIMIT_PER_S = 1_000_000.0
READ_BACK = 5_000  # python-ipfix reads some ten thousand records a second
MESSAGE_BYTES = 1400
EXPORT_S = 1_700_000_123
# What python-ipfix's own exporter is given: the usual fields of a flow, 9 of them where ours has some 20.
ELEMENTS = (
    "flowStartMilliseconds", "flowEndMilliseconds", "sourceIPv4Address", "destinationIPv4Address",
    "sourceTransportPort", "destinationTransportPort", "protocolIdentifier", "octetDeltaCount", "packetDeltaCount",
)  # fmt: skip


def run_row(bench: Bench) -> RowResult:
    count = 20_000 if bench.quick else 100_000
    table = Table(
        NAME,
        f"{TITLE}: {count:,} flows over IPv4, messages of up to {MESSAGE_BYTES} octets",
        ("program", "records", "octets a record", "records per s", "read back"),
        pictures=[Picture("records per s", "program", "program")],
    )
    rates: dict[str, list[float]] = {"appliance": [], "python-ipfix tuples": []}
    octets: dict[str, int] = {}
    for i in range(bench.rounds):
        bench.progress.step(f"round {i + 1} of {bench.rounds}")
        for name, pack in (("appliance", _pack), ("python-ipfix tuples", _pack_tuples)):
            seconds, octets[name] = pack(count)
            rates[name].append(count / seconds)
    for name, values in rates.items():
        back = read_back(packed(READ_BACK)) if name == "appliance" else None
        table.add(name, count, octets[name] / count, median(values), back)
    result = RowResult(NAME, TITLE, [table], conditions="one process, in memory")
    ours, theirs = (median(values) for values in rates.values())
    result.targets.append(absolute("IPFIX records packed", "records per s", ours, ">=", LIMIT_PER_S))
    result.targets.append(Target("IPFIX records packed", "records per s", ours, "python-ipfix", theirs, ">=", 1.0))
    right = float(table.value("read back", program="appliance") == READ_BACK)
    result.targets.append(absolute("IPFIX records packed", "all read back by python-ipfix", right, ">=", 1))
    return result


def _pack(count: int) -> tuple[float, int]:
    """Seconds for the records of so many flows, stamped; octets of all messages."""
    spent, octets, sequence = 0.0, 0, 0

    def take(messages: Sequence[Message]) -> None:
        nonlocal octets, sequence
        for message in messages:
            message.stamp(EXPORT_S, sequence)
            sequence += message.records
            octets += len(message.data)

    spent = each_batch(count, take)
    return spent, octets


def packed(count: int) -> bytes:
    """An IPFIX file with so many flows, templates first."""
    templates = TemplateSet(MeterSettings(), ExportSettings("file:"))
    messages: list[Message] = list(templates.announcement(MESSAGE_BYTES))
    each_batch(count, messages.extend)
    sequence = 0
    for message in messages:
        message.stamp(EXPORT_S, sequence)
        sequence += message.records
    return b"".join(message.data for message in messages)


def each_batch(count: int, take: Callable[[list[Message]], None]) -> float:
    """Packs a table's rows batch by batch, as the exporter does; seconds for packing and `take`, not for the table."""
    export = ExportSettings("file:")
    templates = TemplateSet(MeterSettings(), export)
    packer = Packer(
        templates.plans, biflow=export.biflow, observation_domain=export.domain, message_bytes=MESSAGE_BYTES
    )
    table = flow_table(count)
    spent = 0.0
    complete = False
    while not complete:
        complete = table.flush()
        begun = time.perf_counter()
        take(packer.pack(table.rows_address, table.row_count))
        spent += time.perf_counter() - begun
        table.clear_rows()
    return spent


def flow_table(count: int) -> FlowTable:
    """A table of so many flows of one packet each."""
    table = FlowTable(
        max_flows=max(64, 2 * count), idle_timeout_ns=30 * SECOND, active_timeout_ns=300 * SECOND, tcp_linger_ns=SECOND
    )
    packets = (
        Packet(START, bytes([10, i >> 16 & 0xFF, i >> 8 & 0xFF, i & 0xFF]), protocol=6 if i % 5 else 17)
        for i in range(count)
    )
    memory = Memory(b"".join(packet.digest for packet in packets))
    done = 0
    while done < memory.length:
        done += table.update(memory.address + done, memory.length - done)
    return table


def _pack_tuples(count: int) -> tuple[float, int]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import ipfix.ie
        import ipfix.message
        import ipfix.template

        import appliance.meter.ipfix  # noqa: F401  the information model is loaded there

        template = ipfix.template.from_ielist(256, ipfix.ie.spec_list(ELEMENTS))
    records = _tuples(count)
    octets = 0
    begun = time.perf_counter()
    message = ipfix.message.MessageBuffer()
    message.mtu = MESSAGE_BYTES
    message.begin_export(8304)
    message.add_template(template)
    message.export_new_set(256)
    for record in records:
        try:
            message.export_tuple(record)
        except ipfix.message.EndOfMessage:
            octets += len(message.to_bytes())
            message.begin_export(8304)
            message.export_ensure_set(256)
            message.export_tuple(record)
    octets += len(message.to_bytes())
    return time.perf_counter() - begun, octets


def _tuples(count: int) -> list[tuple[Any, ...]]:
    from datetime import UTC, datetime
    from ipaddress import IPv4Address

    begun = datetime.fromtimestamp(START / SECOND, UTC).replace(tzinfo=None)
    peer = IPv4Address("10.0.0.2")
    return [(begun, begun, IPv4Address(0x0A000000 + i), peer, 1000, 80, 6, 100, 1) for i in range(count)]


def read_back(content: bytes) -> int:
    """Flow records that python-ipfix finds."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import ipfix.reader

        import appliance.meter.ipfix  # noqa: F401

        reader = ipfix.reader.from_stream(io.BytesIO(content))
        return sum("protocolIdentifier" in record for record in reader.namedict_iterator())
