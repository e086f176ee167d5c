"""What each extra of the meter costs by itself: in the flow table, in the header parser, and on the way to a collector.

Everything is in this process, over memory; the transports send to a process that throws away what it gets, and only
our own thread's CPU time counts.
"""

from __future__ import annotations

import contextlib
import select
import shutil
import socket
import ssl
import struct
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from capture.crafted import ethernet, inner_ethernet, ipv4, over_udp, vxlan
from meter.certificates import Authority, Identity
from meter.flow_packets import ACK, SECOND, TCP, Memory, Packet
from support.captures import write_pcap

from appliance.capture import headers
from appliance.meter.exporter import Exporter
from appliance.meter.exporters import make_exporter
from appliance.meter.fragments import FragmentTable
from appliance.meter.pack import Packer
from appliance.meter.settings import ExportSettings, MeterSettings
from appliance.meter.table import FlowTable
from appliance.meter.templates import TemplateSet
from bench.context import Bench
from bench.results import Picture, RowResult, Table
from bench.rows.ipfix_pack import MESSAGE_BYTES
from bench.rows.offline_flows import discard_port
from bench.rows.stages import DIGEST_BYTES, ROUNDS, DigestsInMemory, best, digest_file_ns, digests_of_flows

NAME = "meter-extras"
TITLE = "What each extra of the meter costs"
NEEDS_ROOT = False

FLOWS = (1_000, 100_000)
IN_THE_TABLE: dict[str, dict[str, Any]] = {
    "nothing more": {},
    "TCP analysis": {"tcp_analysis": True},
    "first 10 packets": {"packet_sequence": 10},
    "TCP analysis, first 10 packets": {"tcp_analysis": True, "packet_sequence": 10},
    "VLANs not in the key": {"vlan_in_key": False},
    "interface in the key": {"interface_in_key": True},
    "fragment table": {"fragments": 65_536},
    "one packet of 10": {"packet_sampling": 10},
    "one flow of 8": {"flow_sampling": 8},
}
OWN_ELEMENTS = ("site(99999/1)<unsigned16> = 7", "longest(99999/2)<unsigned16> = forward.max_length")
MORE_MACS = ("from(99999/3)<macAddress> = source_mac", "to(99999/4)<macAddress> = destination_mac")
IN_THE_RECORD: dict[str, tuple[MeterSettings, ExportSettings]] = {
    "everything": (MeterSettings(), ExportSettings("file:")),
    "one record a direction": (MeterSettings(), ExportSettings("file:", biflow=False)),
    "no nanoseconds": (MeterSettings(), ExportSettings("file:", nanoseconds=False)),
    "no TCP analysis": (MeterSettings(), ExportSettings("file:", tcp_analysis=False)),
    "first packets in a record beside": (MeterSettings(packet_sequence=10), ExportSettings("file:")),
    "two more elements of one's own": (MeterSettings(elements=OWN_ELEMENTS), ExportSettings("file:")),
    "two more MAC addresses": (MeterSettings(elements=MORE_MACS), ExportSettings("file:")),
}
FRAGMENTED = 20_000  # datagrams, of two fragments each
SENT_AT_ONCE = 4096  # records, as the flow table hands them over
SEND_DEADLINE_S = 60.0
QUEUE_BYTES = 1 << 30
NOTHING_IGNORED = {"ignored_packets": 0, "ignored_octets": 0}


def run_row(bench: Bench) -> RowResult:
    packets = 200_000 if bench.quick else 800_000
    records = 20_000 if bench.quick else 200_000
    with bench.directory() as directory:
        tables = [
            in_the_table(bench, directory, packets),
            in_the_parser(bench, directory, packets // 4),
            in_the_record(bench, records),
            on_the_way(bench, directory, records),
        ]
    return RowResult(NAME, TITLE, tables, conditions=f"one process, not pinned; the fastest of {ROUNDS} passes")


# In the flow table ----------------------------------------------------------------------------------------------------


def in_the_table(bench: Bench, directory: Path, packets: int) -> Table:
    table = Table(
        f"{NAME}-table",
        "In the flow table, ns per packet; flows are there already",
        ("extra", *(f"{flows:,} flows" for flows in FLOWS)),
        pictures=[Picture(f"{FLOWS[0]:,} flows", "extra", "extra")],
    )
    traffic = [digests_of_flows(directory, flows, packets) for flows in FLOWS]
    for extra, settings in IN_THE_TABLE.items():
        bench.progress.step(f"flow table: {extra}")
        table.add(extra, *(one.update_ns(with_table(settings)) for one in traffic))
    bench.progress.step("flow table: fragments")
    records = b"".join(block(frame) for i in range(FRAGMENTED) for frame in two_fragments(i))
    fragments = DigestsInMemory(headers.digests(records, [1])[0], 2 * FRAGMENTED)
    for extra, settings in (("fragments, no table", {}), ("fragments, ports of the first", {"fragments": 65_536})):
        table.add(extra, None, fragments.update_ns(with_table(settings)))
    table.notes.append(f"fragments: {FRAGMENTED:,} datagrams of two, each a flow or, without the table, two")
    return table


def with_table(settings: dict[str, Any]) -> dict[str, Any]:
    """A fragment table in place of its size."""
    if "fragments" not in settings:
        return settings
    return settings | {"fragments": FragmentTable(max_datagrams=settings["fragments"], timeout_ns=30 * SECOND)}


def two_fragments(number: int) -> tuple[bytes, bytes]:
    """The halves of a UDP datagram of its own addresses."""
    ends = struct.pack(">II", 0x0A000000 + number, 0x0B000000)
    ports = struct.pack(">HHHH", 1024 + number % 50_000, 53, 48, 0)
    return (
        ethernet(0x0800, ipv4(17, ports + bytes(16), fragment=0x2000, ends=ends)),
        ethernet(0x0800, ipv4(17, bytes(24), fragment=0x0003, ends=ends)),
    )


def block(frame: bytes) -> bytes:
    """An Enhanced Packet Block."""
    body = frame + bytes(-len(frame) % 4)
    length = 32 + len(body)
    head = struct.pack("=7I", 6, length, 0, *divmod(1_700_000_000 * SECOND, 1 << 32), len(frame), len(frame))
    return head + body + struct.pack("=I", length)


# In the header parser -------------------------------------------------------------------------------------------------


def in_the_parser(bench: Bench, directory: Path, packets: int) -> Table:
    table = Table(
        f"{NAME}-parser",
        "A file to digests, ns per packet",
        ("packets", "outer flow key", "inner flow key"),
    )
    in_vxlan = over_udp(4789, vxlan(inner_ethernet()))
    frames = {
        "TCP over IPv4": inner_ethernet(),
        "the same in VXLAN": ethernet(0x0800, in_vxlan),
        "the same in VXLAN in MPLS": ethernet(0x8847, struct.pack(">I", 16 << 12 | 1 << 8 | 64) + in_vxlan),
    }
    for name, frame in frames.items():
        bench.progress.step(f"header parser: {name}")
        path = write_pcap(directory / "frames.pcap", [(i, frame) for i in range(packets)])
        table.add(name, *(digesting_ns(path, inner) / packets for inner in (False, True)))
        path.unlink()
    return table


def digesting_ns(path: Path, inner: bool) -> float:
    return best(lambda: digest_file_ns(path, inner=inner))


# In the record --------------------------------------------------------------------------------------------------------


def in_the_record(bench: Bench, count: int) -> Table:
    table = Table(
        f"{NAME}-record",
        f"Packing {count:,} records of TCP connections, both directions",
        ("record", "ns a record", "octets a record"),
        pictures=[Picture("ns a record", "record", "record")],
    )
    memory = connections(count)
    for name, (meter, export) in IN_THE_RECORD.items():
        bench.progress.step(f"record: {name}")
        octets: list[int] = []
        found = [pack(memory, meter, export, octets) for _ in range(ROUNDS)]
        table.add(name, min(found) / count, octets[-1] / count)
    return table


def connections(count: int) -> Memory:
    """Digests of so many TCP flows, of one packet each way."""
    there = Packet(protocol=TCP, flags=ACK, status=0x180)
    both = (there, replace(there, **there.back))
    return Memory(
        b"".join(
            replace(packet, **{side: struct.pack(">I", 0x0A000000 + i)}).digest
            for i in range(count)
            for packet, side in zip(both, ("source", "destination"), strict=True)
        )
    )


def full_table(memory: Memory, meter: MeterSettings) -> FlowTable:
    table = FlowTable(
        max_flows=max(64, memory.length // DIGEST_BYTES),
        idle_timeout_ns=30 * SECOND,
        active_timeout_ns=300 * SECOND,
        tcp_linger_ns=SECOND,
        tcp_analysis=meter.analyses_tcp,
        packet_sequence=meter.packet_sequence,
        row_capacity=SENT_AT_ONCE,
    )
    done = 0
    while done < memory.length:
        done += table.update(memory.address + done, memory.length - done)
    return table


def each_handful(table: FlowTable, take: Callable[[int, int], None]) -> None:
    """`take` gets the address and the number of rows, until the table is empty."""
    complete = False
    while not complete:
        complete = table.flush()
        take(table.rows_address, table.row_count)
        table.clear_rows()


def pack(memory: Memory, meter: MeterSettings, export: ExportSettings, octets: list[int]) -> float:
    """ns for packing all; `octets` gets the length of all messages."""
    templates = TemplateSet(meter, export)
    packer = Packer(
        templates.plans,
        biflow=export.biflow,
        observation_domain=export.domain,
        message_bytes=MESSAGE_BYTES,
        constants=templates.constants,
    )
    spent_ns, length = 0.0, 0

    def take(address: int, rows: int) -> None:
        nonlocal spent_ns, length
        begun = time.perf_counter_ns()
        messages = packer.pack(address, rows)
        spent_ns += time.perf_counter_ns() - begun
        length += sum(len(message.data) for message in messages)

    each_handful(full_table(memory, meter), take)
    octets.append(length)
    return spent_ns


# On the way to the collector ------------------------------------------------------------------------------------------


def on_the_way(bench: Bench, directory: Path, count: int) -> Table:
    table = Table(
        f"{NAME}-transport",
        f"Packing and sending {count:,} records, ns of our CPU a record, the kernel's part in it",
        ("to", "ns a record"),
        pictures=[Picture("ns a record", "to", "to")],
    )
    memory = connections(count)
    transports: dict[str, Callable[[], contextlib.AbstractContextManager[ExportSettings]]] = {
        "file": lambda: to_files(directory),
        "UDP": to_udp,
        "TCP": to_tcp,
    }
    if shutil.which("openssl"):
        authority = Authority(directory, "authority")
        ours = authority.issue("collector")
        transports["TLS"] = lambda: to_tcp(ours, authority.certificate)
    for name, transport in transports.items():
        bench.progress.step(f"transport: {name}")
        table.add(name, min(sending_ns(memory, transport) for _ in range(ROUNDS)) / count)
    return table


def sending_ns(memory: Memory, transport: Callable[[], contextlib.AbstractContextManager[ExportSettings]]) -> float:
    meter = MeterSettings()
    with transport() as settings:
        exporter = make_exporter(meter, settings)
        wait_for(exporter, lambda: exporter.page["up"] == 1)
        spent_ns = 0

        def take(address: int, rows: int) -> None:
            nonlocal spent_ns
            begun = time.thread_time_ns()
            exporter.export(address, rows)
            wait_for(exporter, lambda: not exporter.queue)
            spent_ns += time.thread_time_ns() - begun

        each_handful(full_table(memory, meter), take)
        exporter.close(time.monotonic() + SEND_DEADLINE_S)
    return spent_ns


def wait_for(exporter: Exporter, condition: Callable[[], bool]) -> None:
    """Sleeps while the collector is slower than we are."""
    deadline_s = time.monotonic() + SEND_DEADLINE_S
    while not condition():
        if time.monotonic() > deadline_s:
            raise TimeoutError(f"{exporter.settings.uri}: {len(exporter.queue)} messages are not sent")
        poller = select.poll()
        for fd, events in exporter.poll_events():
            poller.register(fd, events)
        poller.poll(10)
        exporter.service(time.monotonic(), NOTHING_IGNORED)


@contextlib.contextmanager
def to_files(directory: Path) -> Iterator[ExportSettings]:
    yield ExportSettings("file:", directory=directory, statistics_interval_s=0, rotate_seconds=0)
    shutil.rmtree(directory / "flows")


@contextlib.contextmanager
def to_udp() -> Iterator[ExportSettings]:
    with discard_port() as port:
        uri = f"udp://127.0.0.1:{port}"
        yield ExportSettings(uri, statistics_interval_s=0, datagrams_per_s=0, queue_bytes=QUEUE_BYTES)


@contextlib.contextmanager
def to_tcp(tls: Identity | None = None, ca: Path | None = None) -> Iterator[ExportSettings]:
    scheme = "tcp" if tls is None else "tls"
    with socket.create_server(("127.0.0.1", 0)) as listener:
        taker = get_context("fork").Process(target=take_all, args=(listener, tls), daemon=True)
        taker.start()
        uri = f"{scheme}://127.0.0.1:{listener.getsockname()[1]}"
        try:
            yield ExportSettings(uri, statistics_interval_s=0, tls_ca=ca, queue_bytes=QUEUE_BYTES)
        finally:
            taker.join(timeout=10)
            taker.kill()


def take_all(listener: socket.socket, tls: Identity | None) -> None:
    """One session, to its end."""
    session, _ = listener.accept()
    if tls is not None:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(tls.certificate, tls.key)
        session = context.wrap_socket(session, server_side=True)
    with session:
        while session.recv(1 << 16):
            pass
