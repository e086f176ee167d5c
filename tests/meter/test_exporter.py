"""Exporters against collectors of the tests' own: sessions, numbers, templates, queues, and what was not sent."""

from __future__ import annotations

import contextlib
import ctypes
import os
import resource
import select
import socket
import stat
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from meter.flow_packets import (
    SECOND,
    START,
    Decoded,
    Decoder,
    Memory,
    Packet,
    digests,
    flow_records,
    make_table,
)
from support.lab import Lab, requires_root

from appliance.counters import EXPORT_FIELDS, METER_FIELDS, CounterPages
from appliance.errors import CannotCreateError, ConfigError, MissingInputError
from appliance.meter import export_socket, export_udp
from appliance.meter.export_file import FileExporter
from appliance.meter.export_tcp import TcpExporter
from appliance.meter.export_udp import UdpExporter
from appliance.meter.exporter import Exporter, ExporterParts
from appliance.meter.exporters import make_exporter
from appliance.meter.metering import Metering
from appliance.meter.settings import ExportSettings, MeterSettings, parse_uri
from appliance.meter.table import FlowTable

COUNTS = {"ignored_packets": 0, "ignored_octets": 0}
TEMPLATES = 17


def expired(flows: int, *, octets: int = 100) -> FlowTable:
    table = make_table(max_flows=100_000, row_capacity=100_000)
    memory = Memory(digests(Packet(source_port=i & 0xFFFF, vlan=i >> 16, octets=octets) for i in range(flows)))
    assert table.update(memory.address, memory.length) == memory.length
    assert table.flush()
    return table


def export(exporter: Exporter, flows: int) -> None:
    table = expired(flows)
    exporter.export(table.rows_address, table.row_count)


def announced(messages: list[Decoded]) -> int:
    """Templates before the first flow record."""
    first = next((i for i, message in enumerate(messages) if flow_records([message])), len(messages))
    return sum(len(message.templates) for message in messages[:first])


class Clock:
    def __init__(self, now: float = 1_700_000_000.0) -> None:
        self.now = now

    def __call__(self) -> float:
        return self.now


def wait_until(condition: Callable[[], bool], exporter: Exporter | None = None) -> None:
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline, "gave up waiting"
        if exporter is not None:
            exporter.service(time.monotonic(), COUNTS)
        time.sleep(0.002)


# ---- UDP ----


@pytest.fixture
def udp_collector() -> Iterator[socket.socket]:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as collector:
        collector.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4 << 20)
        collector.bind(("127.0.0.1", 0))
        collector.settimeout(5)
        yield collector


def udp_uri(collector: socket.socket) -> str:
    return f"udp://127.0.0.1:{collector.getsockname()[1]}"


def received(collector: socket.socket) -> list[bytes]:
    messages = []
    while select.select([collector], [], [], 0)[0]:
        messages.append(collector.recv(65535))
    return messages


def udp_exporter(collector: socket.socket, **settings: Any) -> UdpExporter:
    exporter = make_exporter(MeterSettings(), ExportSettings(udp_uri(collector), **settings))
    assert isinstance(exporter, UdpExporter)
    return exporter


def check_sequence(messages: list[Decoded], first: int = 0) -> None:
    for message in messages:
        assert message.sequence == first & 0xFFFFFFFF
        first += len(message.records)


def test_udp_sends_templates_several_times_before_the_first_record(udp_collector: socket.socket) -> None:
    exporter = udp_exporter(udp_collector)
    export(exporter, 10)
    decoder = Decoder()
    messages = [decoder.message(data) for data in received(udp_collector)]
    first_data = next(i for i, message in enumerate(messages) if flow_records([message]))
    assert sum(len(message.templates) for message in messages[:first_data]) == 3 * TEMPLATES
    assert len(flow_records(messages)) == 10
    check_sequence(messages)
    assert max(message.length for message in messages) <= 1400
    assert exporter.page["records"] == sum(len(message.records) for message in messages)
    assert exporter.page["flow_records"] == 10 and exporter.page["bytes"] == sum(m.length for m in messages)


def test_udp_sends_templates_again_by_messages(udp_collector: socket.socket) -> None:
    exporter = udp_exporter(udp_collector, template_refresh_messages=5, template_copies=1, datagrams_per_s=0)
    export(exporter, 400)
    decoder = Decoder()
    messages = [decoder.message(data) for data in received(udp_collector)]
    since = 0
    for message in messages:
        since = 0 if message.templates else since + bool(flow_records([message]))
        assert since <= 5
    assert sum(256 in message.templates for message in messages) >= 6  # about 45 data messages


def test_udp_sends_templates_again_by_time_also_when_idle(udp_collector: socket.socket) -> None:
    exporter = udp_exporter(udp_collector, template_refresh_s=0.05, template_copies=1)
    exporter.service(time.monotonic(), COUNTS)
    received(udp_collector)
    due = exporter.next_deadline_s()
    assert due - time.monotonic() < 0.06
    exporter.service(due, COUNTS)
    decoder = Decoder()
    assert sum(len(decoder.message(data).templates) for data in received(udp_collector)) == TEMPLATES


def test_udp_sequence_wraps_at_32_bits(udp_collector: socket.socket) -> None:
    first = (1 << 32) - 3
    settings = ExportSettings(udp_uri(udp_collector), template_copies=1)
    exporter = UdpExporter(ExporterParts(MeterSettings(), settings, first_sequence=first))
    export(exporter, 100)
    decoder = Decoder()
    messages = [decoder.message(data) for data in received(udp_collector)]
    check_sequence(messages, first)
    assert messages[-1].sequence < 200


def test_udp_keeps_to_its_rate(udp_collector: socket.socket) -> None:
    exporter = udp_exporter(udp_collector, datagrams_per_s=1000, template_copies=1)
    export(exporter, 2000)
    sent_at_once = exporter.page["flow_records"]
    assert 64 * 9 <= sent_at_once < 2000
    assert exporter.poll_events() == [] and exporter.next_deadline_s() > time.monotonic()
    exporter.close(time.monotonic() + 10)
    assert exporter.page["flow_records"] == 2000 and exporter.page["queued_bytes"] == 0


def test_a_refused_datagram_is_sent_again_and_nothing_is_lost_to_it(udp_collector: socket.socket) -> None:
    uri = udp_uri(udp_collector)
    udp_collector.close()
    exporter = make_exporter(MeterSettings(), ExportSettings(uri))
    export(exporter, 100)
    assert exporter.page["send_errors"] > 3, "half of the sends are refused"
    assert exporter.page["flow_records"] == 100 and exporter.page["not_sent_flows"] == 0
    assert exporter.page["up"] == 0


def test_a_collector_that_comes_back_soon_gets_the_templates_soon(udp_collector: socket.socket) -> None:
    exporter = udp_exporter(udp_collector, template_refresh_s=3600)
    udp_collector.close()
    for _ in range(3):
        export(exporter, 1)
    assert exporter.next_deadline_s() < time.monotonic() + 2


def test_a_datagram_too_long_for_the_socket_is_counted_as_not_sent(udp_collector: socket.socket) -> None:
    exporter = udp_exporter(udp_collector, message_bytes=65535, template_copies=1)
    export(exporter, 600)
    exporter.message_bytes = 65535  # of which no UDP over IPv4 takes more than 65507
    exporter.packer = exporter.make_packer()
    export(exporter, 1000)
    sent, not_sent = exporter.page["flow_records"], exporter.page["not_sent_flows"]
    assert not_sent > 0 and sent + not_sent == 1600
    assert exporter.page["not_sent_packets"] == not_sent and exporter.page["not_sent_octets"] == 100 * not_sent
    export(exporter, 1000)
    assert exporter.page["flow_records"] == sent + 1000, "the packer has learned how much the path takes"


# ---- the path ----


@contextlib.contextmanager
def inside(lab: Lab) -> Iterator[None]:
    """Sockets made here belong to the lab's network namespace."""
    libc = ctypes.CDLL(None, use_errno=True)
    with open("/proc/thread-self/ns/net") as home, open(f"/run/netns/{lab.namespace}") as there:
        assert libc.setns(there.fileno(), 0) == 0, os.strerror(ctypes.get_errno())
        try:
            yield
        finally:
            assert libc.setns(home.fileno(), 0) == 0


@pytest.fixture
def lab() -> Iterator[Lab]:
    with Lab() as made:
        yield made


@requires_root
@pytest.mark.parametrize("address", ["127.0.0.1", "[::1]"])
def test_messages_fit_the_path_also_when_it_becomes_narrower_and_none_is_lost(lab: Lab, address: str) -> None:
    family, headers_bytes = (socket.AF_INET6, 48) if ":" in address else (socket.AF_INET, 28)
    lab.run(["sysctl", "-qw", "net.ipv6.conf.all.disable_ipv6=0", "net.ipv6.conf.lo.disable_ipv6=0"])
    lab.ip("address", "replace", "::1/128", "dev", "lo")
    lab.ip("link", "set", "dev", "lo", "mtu", "1420")
    with inside(lab), socket.socket(family, socket.SOCK_DGRAM) as collector:
        collector.bind((address.strip("[]"), 0))
        uri = f"udp://{address}:{collector.getsockname()[1]}"
        exporter = make_exporter(MeterSettings(), ExportSettings(uri, template_copies=1))
        export(exporter, 100)
        before = received(collector)
        assert 1242 < max(map(len, before)) <= 1420 - headers_bytes
        exporter.queue.extend(message for message in exporter.packer.pack(*rows(expired(50))))
        lab.ip("link", "set", "dev", "lo", "mtu", "1290")
        exporter.drain()  # packed for more than the path takes now: in fragments
        in_fragments = received(collector)
        assert max(map(len, in_fragments)) > 1290 - headers_bytes
        export(exporter, 100)
        after = received(collector)
        assert max(map(len, after)) <= 1290 - headers_bytes
        messages = [decoder.message(data) for decoder in [Decoder()] for data in before + in_fragments + after]
        check_sequence(messages)
        assert len(flow_records(messages)) == 250 == exporter.page["flow_records"]
        assert exporter.page["not_sent_flows"] == 0


def rows(table: FlowTable) -> tuple[int, int]:
    KEPT.append(table)  # rows live as long as their table
    return table.rows_address, table.row_count


KEPT: list[FlowTable] = []


def test_where_the_path_is_unknown_messages_have_512_octets(
    udp_collector: socket.socket, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(export_udp.PATH_MTU, socket.AF_INET, (socket.IPPROTO_IP, 10, 9999, 28))
    exporter = udp_exporter(udp_collector)
    export(exporter, 100)
    messages = received(udp_collector)
    assert max(map(len, messages)) <= 512 and exporter.page["flow_records"] == 100


# ---- where a name leads ----


class Names:
    """Stands in for the name servers: `collector.test` leads where `address` says."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.address = "127.0.0.1"
        self.asked = 0
        self._resolve = socket.getaddrinfo
        monkeypatch.setattr(socket, "getaddrinfo", self)

    def __call__(self, host: str, *arguments: Any, **options: Any) -> Any:
        if host != "collector.test":
            return self._resolve(host, *arguments, **options)
        self.asked += 1
        if not self.address:
            raise socket.gaierror(socket.EAI_AGAIN, "Temporary failure in name resolution")
        return self._resolve(self.address, *arguments, **options)


@pytest.mark.usefixtures("quick_retries")
def test_a_collector_that_moved_is_found_again_over_tcp(
    tcp_collector: TcpCollector, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = Names(monkeypatch)
    exporter = make_exporter(MeterSettings(), ExportSettings(f"tcp://collector.test:{tcp_collector.port}"))
    wait_until(lambda: exporter.page["up"] == 1, exporter)
    tcp_collector.read()
    names.address = ""  # for a while nobody knows: the old address is tried on
    tcp_collector.close()
    wait_until(lambda: names.asked >= 3, exporter)
    moved = TcpCollector.__new__(TcpCollector)
    moved.listener = socket.create_server(("127.0.0.2", tcp_collector.port))
    moved.listener.setblocking(False)
    moved.connections, moved.sessions = [], []
    names.address = "127.0.0.2"
    export(exporter, 10)
    wait_until(lambda: not exporter.queue, exporter)
    exporter.close(time.monotonic() + 5)
    moved.read()
    assert len(flow_records(whole_messages(moved.sessions[0]))) == 10
    moved.close()


def test_a_collector_that_moved_is_found_again_over_udp_and_begins_with_templates(
    udp_collector: socket.socket, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = Names(monkeypatch)
    port = udp_collector.getsockname()[1]
    settings = ExportSettings(f"udp://collector.test:{port}", template_refresh_s=0.01, template_copies=1)
    exporter = make_exporter(MeterSettings(), settings)
    export(exporter, 10)
    with socket.socket(type=socket.SOCK_DGRAM) as moved:
        moved.bind(("127.0.0.2", port))
        names.address = "127.0.0.2"
        wait_until(lambda: bool(select.select([moved], [], [], 0)[0]), exporter)
        export(exporter, 5)
        decoder = Decoder()
        messages = [decoder.message(data) for data in received(moved)]
    assert announced(messages) == TEMPLATES and len(flow_records(messages)) == 5
    check_sequence(messages)


def test_a_name_server_that_does_not_answer_holds_nobody_up(
    udp_collector: socket.socket, monkeypatch: pytest.MonkeyPatch
) -> None:
    answer = threading.Event()
    names = Names(monkeypatch)
    settings = ExportSettings(f"udp://collector.test:{udp_collector.getsockname()[1]}", template_refresh_s=0.01)
    exporter = make_exporter(MeterSettings(), settings)
    asked = names.asked

    def slow(host: str, *arguments: Any, **options: Any) -> Any:
        assert answer.wait(60)
        return names(host, *arguments, **options)

    monkeypatch.setattr(socket, "getaddrinfo", slow)
    for _ in range(5):
        time.sleep(0.02)
        exporter.service(time.monotonic(), COUNTS)
    export(exporter, 10)
    assert exporter.page["flow_records"] == 10 and names.asked == asked
    answer.set()


def test_an_unknown_collector_is_named() -> None:
    with pytest.raises(MissingInputError, match=r"no-such-host\.invalid"):
        make_exporter(MeterSettings(), ExportSettings("udp://no-such-host.invalid:4739"))


# ---- TCP ----


class TcpCollector:
    """Listens, and reads only when told to."""

    def __init__(self, port: int = 0) -> None:
        self.listener = socket.create_server(("127.0.0.1", port), reuse_port=False)
        self.port = self.listener.getsockname()[1]
        self.listener.setblocking(False)
        self.connections: list[socket.socket] = []
        self.sessions: list[bytearray] = []

    @property
    def uri(self) -> str:
        return f"tcp://127.0.0.1:{self.port}"

    def read(self) -> None:
        while select.select([self.listener], [], [], 0)[0]:
            connection, _ = self.listener.accept()
            connection.setblocking(False)
            self.connections.append(connection)
            self.sessions.append(bytearray())
        for connection, session in zip(self.connections, self.sessions, strict=True):
            while True:
                try:
                    data = connection.recv(1 << 20)
                except (BlockingIOError, OSError):
                    break
                if not data:
                    break
                session += data

    def hang_up(self) -> None:
        for connection in self.connections:
            connection.close()

    def close(self) -> None:
        self.hang_up()
        self.listener.close()


@pytest.fixture
def tcp_collector() -> Iterator[TcpCollector]:
    collector = TcpCollector()
    yield collector
    collector.close()


@pytest.fixture
def quick_retries(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(export_socket, "RETRY_FIRST_S", 0.01)
    monkeypatch.setattr(export_socket, "RETRY_LONGEST_S", 0.02)


def whole_messages(session: bytes | bytearray) -> list[Decoded]:
    """All but a last message that was cut by the end of the session."""
    end = 0
    while end + 4 <= len(session) and end + int.from_bytes(session[end + 2 : end + 4], "big") <= len(session):
        end += int.from_bytes(session[end + 2 : end + 4], "big")
    return Decoder().stream(bytes(session[:end]))


def test_tcp_begins_with_all_templates_and_counts_from_zero(tcp_collector: TcpCollector) -> None:
    exporter = make_exporter(MeterSettings(), ExportSettings(tcp_collector.uri))
    export(exporter, 1000)
    wait_until(lambda: not exporter.queue, exporter)
    exporter.close(time.monotonic() + 5)
    tcp_collector.read()
    messages = whole_messages(tcp_collector.sessions[0])
    assert announced(messages) == TEMPLATES
    check_sequence(messages)
    assert len(flow_records(messages)) == 1000 == exporter.page["flow_records"]


@pytest.mark.usefixtures("quick_retries")
def test_every_tcp_connection_is_a_session_of_its_own(tcp_collector: TcpCollector) -> None:
    exporter = make_exporter(MeterSettings(), ExportSettings(tcp_collector.uri))
    export(exporter, 100)
    wait_until(lambda: not exporter.queue, exporter)
    wait_until(lambda: tcp_collector.read() is None and bool(tcp_collector.sessions))
    tcp_collector.hang_up()
    wait_until(lambda: exporter.page["connects"] == 2, exporter)
    export(exporter, 50)
    wait_until(lambda: not exporter.queue, exporter)
    tcp_collector.connections.clear()
    tcp_collector.sessions.clear()
    exporter.close(time.monotonic() + 5)
    tcp_collector.read()
    messages = whole_messages(tcp_collector.sessions[-1])
    check_sequence(messages)
    assert announced(messages) == TEMPLATES and len(flow_records(messages)) == 50


@pytest.mark.usefixtures("quick_retries")
def test_records_wait_for_a_collector_that_is_not_there_yet() -> None:
    collector = TcpCollector()
    collector.close()
    exporter = make_exporter(MeterSettings(), ExportSettings(collector.uri))
    export(exporter, 100)
    for _ in range(5):
        exporter.service(time.monotonic(), COUNTS)
        time.sleep(0.01)
    assert exporter.page["up"] == 0 and exporter.page["queued_bytes"] > 0 and exporter.page["send_errors"] > 0
    collector = TcpCollector(collector.port)
    wait_until(lambda: not exporter.queue, exporter)
    exporter.close(time.monotonic() + 5)
    collector.read()
    assert len(flow_records(whole_messages(collector.sessions[0]))) == 100
    collector.close()


def test_a_stalled_collector_costs_no_more_than_the_queue_and_every_lost_record_is_counted(
    tcp_collector: TcpCollector,
) -> None:
    exporter = make_exporter(MeterSettings(), ExportSettings(tcp_collector.uri, queue_bytes=1 << 20))
    wait_until(lambda: exporter.page["up"] == 1, exporter)
    table = expired(2000)
    for _ in range(100):
        exporter.export(table.rows_address, table.row_count)
        assert exporter.queued_bytes <= 1 << 20
    page = exporter.page
    waiting = sum(message.flows for message in exporter.queue)
    assert page["not_sent_flows"] > 0
    assert page["flow_records"] + page["not_sent_flows"] + waiting == 200_000
    exporter.close(time.monotonic())
    assert page["flow_records"] + page["not_sent_flows"] == 200_000
    assert page["not_sent_packets"] == page["not_sent_flows"]
    tcp_collector.read()
    messages = whole_messages(tcp_collector.sessions[0])
    check_sequence(messages)
    assert len(flow_records(messages)) == page["flow_records"]


# ---- files ----


def file_exporter(directory: Path, clock: Callable[[], float] = time.time, **settings: Any) -> FileExporter:
    exporter = make_exporter(MeterSettings(), ExportSettings("file:", directory=directory, **settings), None, clock)
    assert isinstance(exporter, FileExporter)
    return exporter


def published(directory: Path) -> list[Path]:
    return sorted((directory / "flows").iterdir())


def test_files_appear_when_their_time_is_over_and_each_can_be_read_alone(tmp_path: Path) -> None:
    clock = Clock()
    exporter = file_exporter(tmp_path, clock, rotate_seconds=10)
    export(exporter, 10)
    clock.now += 5
    export(exporter, 20)
    assert published(tmp_path) == [] and len(list((tmp_path / "work").iterdir())) == 1
    clock.now += 5  # no record needed: the clock alone ends a file
    exporter.service(time.monotonic(), COUNTS)
    wait_until(lambda: len(published(tmp_path)) == 1)
    export(exporter, 5)
    exporter.close(0)
    first, second = published(tmp_path)
    assert list((tmp_path / "work").iterdir()) == []
    for path, flows in ((first, 30), (second, 5)):
        messages = Decoder().stream(path.read_bytes())
        check_sequence(messages)
        assert announced(messages) == TEMPLATES and len(flow_records(messages)) == flows
    assert first.name == "flows-20231114T221320Z-000001.ipfix"
    assert stat.S_IMODE(first.stat().st_mode) == 0o640


def test_files_have_their_mode_under_any_umask(tmp_path: Path) -> None:
    old = os.umask(0)
    try:
        exporter = file_exporter(tmp_path)
        export(exporter, 1)
        (work,) = (tmp_path / "work").iterdir()
        assert stat.S_IMODE(work.stat().st_mode) == 0o640
        exporter.close(0)
    finally:
        os.umask(old)


def test_quiet_times_make_no_files(tmp_path: Path) -> None:
    clock = Clock()
    exporter = file_exporter(tmp_path, clock, rotate_seconds=10, statistics_interval_s=0.001)
    for _ in range(5):
        clock.now += 10
        exporter.service(time.monotonic(), COUNTS)
    exporter.close(0)
    assert published(tmp_path) == []


def test_a_name_that_is_taken_is_never_overwritten(tmp_path: Path) -> None:
    clock = Clock()
    exporter = file_exporter(tmp_path, clock)
    taken = tmp_path / "flows" / "flows-20231114T221320Z-000001.ipfix"
    taken.write_bytes(b"somebody's")
    trap = tmp_path / "work" / "flows-20231114T221320Z-000002.ipfix"
    trap.symlink_to(tmp_path / "victim")
    export(exporter, 1)
    exporter.close(0)
    assert taken.read_bytes() == b"somebody's" and not (tmp_path / "victim").exists()
    assert (tmp_path / "flows" / "flows-20231114T221320Z-000003.ipfix").exists()


def test_what_a_killed_meter_left_is_published_up_to_its_last_whole_message(tmp_path: Path) -> None:
    exporter = file_exporter(tmp_path)
    export(exporter, 200)
    (work,) = (tmp_path / "work").iterdir()
    content = work.read_bytes()
    exporter.files.discard()
    leftover = tmp_path / "work" / "flows-20230101T000000Z-000009.ipfix"
    leftover.write_bytes(content + content[:37])
    only_templates = tmp_path / "work" / "flows-20230101T000000Z-000010.ipfix"
    only_templates.write_bytes(content[:100])
    file_exporter(tmp_path)
    (path,) = published(tmp_path)
    assert path.name == leftover.name and path.read_bytes() == content
    assert list((tmp_path / "work").iterdir()) == []


def test_a_file_that_another_meter_is_writing_is_left_alone(tmp_path: Path) -> None:
    first = file_exporter(tmp_path)
    export(first, 10)
    second = file_exporter(tmp_path)
    assert published(tmp_path) == []
    export(second, 10)
    first.close(0)
    second.close(0)
    assert len(published(tmp_path)) == 2


def test_a_full_disk_costs_only_what_did_not_fit_and_the_file_stays_whole(tmp_path: Path) -> None:
    exporter = file_exporter(tmp_path)
    export(exporter, 100)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (30_000, limits[1]))
    try:
        export(exporter, 1000)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    page = exporter.page
    assert page["not_sent_flows"] > 0 and page["up"] == 0
    assert page["flow_records"] + page["not_sent_flows"] == 1100
    export(exporter, 7)
    assert page["up"] == 1
    exporter.close(0)
    messages = Decoder().stream(published(tmp_path)[0].read_bytes())
    check_sequence(messages)
    assert len(flow_records(messages)) == page["flow_records"]


def test_one_file_appears_when_all_is_done_also_without_flows(tmp_path: Path) -> None:
    path = tmp_path / "out.ipfix"
    for flows in (0, 3):
        exporter = make_exporter(MeterSettings(), ExportSettings(f"file:{path}", single_file=True))
        if flows:
            export(exporter, flows)
        assert not path.exists()
        exporter.close(0)
        assert len(flow_records(Decoder().stream(path.read_bytes()))) == flows
        with pytest.raises(CannotCreateError, match=r"out\.ipfix: exists already"):
            make_exporter(MeterSettings(), ExportSettings(f"file:{path}", single_file=True))
        path.unlink()
    assert list(tmp_path.iterdir()) == []


def test_places_that_cannot_be_written_are_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(CannotCreateError, match="file/work"):
        make_exporter(MeterSettings(), ExportSettings(f"file:{tmp_path}/file"))
    with pytest.raises(CannotCreateError, match="does not exist"):
        make_exporter(MeterSettings(), ExportSettings(f"file:{tmp_path}/none/out.ipfix", single_file=True))
    with pytest.raises(ConfigError, match="names no directory"):
        make_exporter(MeterSettings(), ExportSettings("file:"))


# ---- URIs ----


@pytest.mark.parametrize(
    ("uri", "said"),
    [
        ("dtls://host:4740", "not an exporter's URI"),
        ("http://host", "not an exporter's URI"),
        ("udp:host:4739", "not an exporter's URI"),
        ("udp://", "only a host and a port"),
        ("udp://host:70000", "70000|[Pp]ort"),
        ("udp://host:0", "port 0"),
        ("tcp://host/path", "only a host and a port"),
    ],
)
def test_a_wrong_uri_is_refused_and_named(uri: str, said: str) -> None:
    with pytest.raises(ConfigError, match=said) as caught:
        ExportSettings(uri)
    assert uri in str(caught.value)


def test_uris_have_a_default_port_and_take_ipv6() -> None:
    assert (parse_uri("udp://[::1]").host, parse_uri("udp://[::1]").port) == ("::1", 4739)
    assert parse_uri("tcp://c.example:99").port == 99
    assert (parse_uri("file:/a/b").path, parse_uri("file:///a/b").path, parse_uri("file:").path) == ("/a/b", "/a/b", "")


def test_a_message_length_out_of_range_is_refused() -> None:
    with pytest.raises(ConfigError, match="message_bytes 100"):
        ExportSettings("udp://host", message_bytes=100)


# ---- all together ----


def test_metering_accounts_for_every_packet_over_all_exporters(tmp_path: Path, udp_collector: socket.socket) -> None:
    pages = CounterPages([("meter", METER_FIELDS), ("export/0", EXPORT_FIELDS), ("export/1", EXPORT_FIELDS)])
    exports = (ExportSettings("file:", directory=tmp_path), ExportSettings(udp_uri(udp_collector), biflow=False))
    settings = MeterSettings(max_flows=500, export=exports)
    metering = Metering(settings, pages["meter"], [pages["export/0"], pages["export/1"]], ignored=lambda: (17, 1700))
    meter = pages["meter"]
    packet = Packet()
    for round_ in range(30):
        packets = []
        for i in range(100):
            there = replace(packet, source_port=round_ * 50 + i, time_ns=START + round_ * SECOND)
            packets += [there, replace(there, **there.back)]
        memory = Memory(digests(packets))
        metering.feed(memory.address, memory.length)
        metering.service(time.monotonic())
        assert meter["observed_packets"] == meter["metered_packets"] == 200 * (round_ + 1)
        assert meter["metered_packets"] == meter["exported_packets"] + meter["active_flow_packets"]
    assert meter["flows_lack_of_resources"] > 0
    metering.advance(START + 40 * SECOND)
    metering.finish()
    assert meter["active_flows"] == meter["active_flow_packets"] == 0
    assert meter["exported_packets"] == 6000
    in_file = flow_records(Decoder().stream(published(tmp_path)[0].read_bytes()))
    assert sum(int.from_bytes(r[0, 2], "big") + int.from_bytes(r.get((29305, 2), b""), "big") for r in in_file) == 6000
    assert pages["export/0"]["flow_records"] == meter["exported_flows"]
    decoder = Decoder()
    messages = [decoder.message(data) for data in received(udp_collector)]
    check_sequence(messages)
    assert sum(int.from_bytes(r[0, 2], "big") for r in flow_records(messages)) == 6000
    assert {r[0, 164] for m in messages for t, r in m.records if t == 301} == {(17).to_bytes(8, "big")}


def test_counters_outlive_a_restart_of_the_meter() -> None:
    pages = CounterPages([("meter", METER_FIELDS)])
    for _ in range(2):
        metering = Metering(MeterSettings(), pages["meter"])
        memory = Memory(digests([Packet()] * 5))
        metering.feed(memory.address, memory.length)
        metering.finish()
    assert pages["meter"]["metered_packets"] == pages["meter"]["exported_packets"] == 10


def test_a_meter_without_exporters_asks_for_no_service() -> None:
    metering = Metering(MeterSettings())
    assert metering.next_deadline_s() == float("inf") and metering.poll_events() == []


def test_the_tcp_exporter_is_polled_for_writing_only_when_it_has_something(tcp_collector: TcpCollector) -> None:
    exporter = make_exporter(MeterSettings(), ExportSettings(tcp_collector.uri))
    assert isinstance(exporter, TcpExporter)
    wait_until(lambda: exporter.page["up"] == 1 and not exporter.announced, exporter)
    ((_, events),) = exporter.poll_events()
    assert events == select.POLLIN


def test_several_exporters_have_sessions_domains_and_sequences_of_their_own(
    tmp_path: Path, udp_collector: socket.socket, tcp_collector: TcpCollector
) -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as second:
        second.bind(("127.0.0.1", 0))
        second.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4 << 20)
        exports = (
            ExportSettings(udp_uri(udp_collector), domain=1),
            ExportSettings(udp_uri(second), domain=2, biflow=False, nanoseconds=False, template_copies=1),
            ExportSettings(tcp_collector.uri, domain=3, queue_bytes=1 << 16),
            ExportSettings("file:", domain=4, directory=tmp_path),
        )
        metering = Metering(MeterSettings(max_flows=2000, export=exports))
        packets = [Packet(source_port=port, time_ns=START + port) for port in range(1000)]
        packets += [replace(packet, **packet.back, time_ns=packet.time_ns + SECOND) for packet in packets]
        memory = Memory(digests(packets))
        metering.feed(memory.address, memory.length)
        metering.finish()
        tcp_collector.read()
        decoder, other = Decoder(), Decoder()
        sessions = [
            [decoder.message(data) for data in received(udp_collector)],
            [other.message(data) for data in received(second)],
            whole_messages(tcp_collector.sessions[0]),
            Decoder().stream(published(tmp_path)[0].read_bytes()),
        ]
    for number_, (messages, exporter) in enumerate(zip(sessions, metering.exporters, strict=True), start=1):
        assert {message.domain for message in messages} == {number_}
        check_sequence(messages)
        flows, page = len(flow_records(messages)), exporter.page
        assert flows == page["flow_records"]
        assert page["flow_records"] + page["not_sent_flows"] == (2000 if number_ == 2 else 1000)
    assert [exporter.page["not_sent_flows"] for exporter in metering.exporters] == [0, 0, 0, 0]
