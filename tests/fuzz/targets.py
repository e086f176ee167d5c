"""Everything that reads bytes of others: a target takes any bytes, and fails only for a fault of ours."""

from __future__ import annotations

import contextlib
import ctypes
import io
import json
import logging
import mmap
import os
import struct
import tempfile
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from merge.rings import DATA_OFFSET, DIGEST, PACKET, PLAIN_BODY_BYTES, Source, blocks, make_merge, record

from appliance.capture import headers, payload
from appliance.capture.application import Inspector, crypto_findings, findings
from appliance.capture.trigger import Gate, PortTap
from appliance.capturer import CaptureError, parse_captured
from appliance.config import parse
from appliance.errors import ApplianceError, ConfigError
from appliance.formats.fixed import LAYOUTS
from appliance.formats.reader import CaptureReader, read_records
from appliance.merge import order
from appliance.merge.salvage import salvage
from appliance.meter.collector import Framer, read_stream
from appliance.meter.decode import Limits, MalformedMessageError, Session
from appliance.meter.files import whole_messages
from appliance.meter.present import JsonLines, TableLines
from appliance.meter.settings import MeterSettings
from appliance.meter.table import FlowTable
from appliance.offline import meter_files
from appliance.ring import port
from appliance.traces import TraceSettings, trace_files

LINKTYPES = (0, 1, 9, 50, 101, 104, 108, 113, 147, 228, 229, 276)
TAILS = (b"\x00", b"\xff", b"\x45")
PACKET_BYTES_MAX = 2048
BATCHES_MAX = 20
PAYLOADS_MAX = 16
PORTS = (443, 53, 5353, 80)
DIGEST_BYTES, EXTENSION_AT, EXTENSION_BYTES_MAX = 128, 124, 520  # appliance/ring/digest.h
RING_TURNS = 300
FORMATS = ("erf", *LAYOUTS)
TRACE_FORMATS = ("pcap", "json", "plist", "tree")
TEMPLATES_MAX, FIELDS_MAX = 20, 200
PACKET_COUNTERS = ("packetDeltaCount", "reversePacketDeltaCount")
PORT_BYTES = port.MIN_CAPACITY_BYTES
PORT_GENERATION = 9
SINKS = (order.SINK_PCAPNG, order.SINK_PCAP_NS, order.SINK_DIGESTS)


@contextlib.contextmanager
def silence() -> Iterator[None]:
    """Damaged files are told of in the log, at length."""
    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        yield
    finally:
        logging.disable(before)


def fuzz_headers(data: bytes) -> None:
    """The first byte is the link type. Two ways of parsing and three tails behind the packet have the same result."""
    if not data:
        return
    linktype, packet = LINKTYPES[data[0] % len(LINKTYPES)], data[1 : 1 + PACKET_BYTES_MAX]
    results = [
        headers.parse(packet + tail * 80, linktype, len(packet) + 4, len(packet), plain=plain)
        for tail in TAILS
        for plain in (True, False)
    ]
    assert all(result == results[0] for result in results), (linktype, packet.hex())


@contextlib.contextmanager
def as_file(data: bytes) -> Iterator[str]:
    fd = os.memfd_create("fuzz")
    try:
        os.write(fd, data)
        yield f"/proc/self/fd/{fd}"
    finally:
        os.close(fd)


def fuzz_reader(data: bytes) -> None:
    """A capture file of any format and compression: whole records come out, or an error of ours."""
    with as_file(data) as path, contextlib.suppress(ApplianceError):
        for number, batch in enumerate(read_records(path)):
            whole_packets(bytes(batch))
            if number > BATCHES_MAX:
                break


def whole_packets(records: bytes) -> None:
    for block in blocks(records):
        assert block[0] != PACKET or block[5] <= len(block[7])


def fuzz_erf(data: bytes) -> None:
    """ERF, or one of the formats that no first bytes tell; the first byte says which. As for the reader, and however
    little room there is."""
    if not data:
        return
    batch = bytearray(1 << 20)
    address = ctypes.addressof(ctypes.c_char.from_buffer(batch))
    with as_file(data[1:]) as path, contextlib.suppress(ApplianceError):
        with CaptureReader(path, format=FORMATS[data[0] % len(FORMATS)]) as reader:
            room = 4096
            while not (filled := reader.fill(address, room)).end:
                whole_packets(bytes(batch[: filled.produced_bytes]))
                assert filled.produced_bytes <= room
                room = max(room, filled.needed_room)


def fuzz_salvage(data: bytes) -> None:
    """A staging file after a crash: what is salvaged can be read to its end, and holds what was said."""
    with tempfile.TemporaryDirectory(dir="/dev/shm", prefix="fuzz-") as directory:
        path, output = Path(directory) / "leftover", Path(directory) / "output"
        path.write_bytes(data)
        with contextlib.suppress(ApplianceError):
            found = salvage(path, output, compress=False)
            if found.outcome == "salvaged":
                assert output.stat().st_size == found.bytes
                assert packets_of(output) == found.packets


def packets_of(path: Path) -> int:
    batch = bytearray(1 << 20)
    address = ctypes.addressof(ctypes.c_char.from_buffer(batch))
    with CaptureReader(path) as reader:
        while not reader.fill(address, len(batch)).end:
            pass
        return reader.counts.packets


def fuzz_ring(data: bytes) -> None:
    """Shared memory that a mad producer wrote: whole blocks come out, and the consumer comes to rest."""
    if len(data) < 12:
        return
    sink = SINKS[data[0] % len(SINKS)]
    kind = DIGEST if sink == order.SINK_DIGESTS else PACKET
    source = Source()
    try:
        body = (20, PLAIN_BODY_BYTES if kind == DIGEST else 20)
        source.write(*(record(kind, struct.pack("=II", 20, 20) + bytes(body[n % 2] + n // 2), n) for n in range(8)))
        if data[1] & 1:
            source.poke(128 + data[2] % 24, data[4:12])  # head, watermark, and what is beside them
        source.poke(DATA_OFFSET + 4 * (data[3] % 64), data[12 : 12 + 4096])
        turn(make_merge([source], sink=sink, out_bytes=4096), sink)
    finally:
        source.close()


def turn(merge: order.Merge, sink: int) -> None:
    for _ in range(RING_TURNS):
        status = merge.fill()
        if sink == order.SINK_PCAPNG:
            for block in blocks(bytes(merge.output())):
                assert block[5] <= len(block[7])
        merge.release()
        merge.emptied()
        if status == order.CONTROL:
            merge.control_done()
        elif status == order.EPOCH:
            merge.next_epoch()
        elif status in (order.IDLE, order.ENDED):
            return
    raise AssertionError("it never comes to rest")


def fuzz_table(data: bytes) -> None:
    """A digest ring's content in the flow table: metered within bounds, or refused."""
    length = len(data) & ~3
    if not length:
        return
    buffer = ctypes.create_string_buffer(data[:length] + bytes(8))
    base = ctypes.addressof(buffer)
    timeouts = {"idle_timeout_ns": 10**9, "active_timeout_ns": 10**10, "tcp_linger_ns": 10**9}
    table = FlowTable(max_flows=64, **timeouts, entropy=True, name_bytes=2048)
    done = 0
    with contextlib.suppress(ValueError):
        while done < length:
            step = table.update(base + done, length - done)
            table.clear_rows()
            assert 0 <= step <= length - done
            if not step:
                break
            done += step
    while not table.flush():
        table.clear_rows()


def fuzz_ipfix(data: bytes) -> None:
    """A flow file after a crash: cut to whole messages, each of which lies within the file."""
    with as_file(data) as path:
        fd = os.open(path, os.O_RDONLY)
        try:
            length, _ = whole_messages(fd)
            assert 0 <= length <= len(data)
            at = 0
            while at < length:
                at += int.from_bytes(data[at + 2 : at + 4], "big")
            assert at == length
        finally:
            os.close(fd)


def fuzz_collector(data: bytes) -> None:
    """Any exporter's octets, as a file and as a stream in pieces: the same records, shown as JSON and as a table,
    within the bounds of a session."""
    limits = Limits(templates=TEMPLATES_MAX, fields=FIELDS_MAX, domains=4, learned=20)
    session, streamed = Session(limits=limits), Session(limits=limits)
    as_json, as_table = io.StringIO(), io.StringIO()
    writers = JsonLines(as_json), TableLines(as_table)
    with contextlib.suppress(ApplianceError):
        for message in read_stream(io.BytesIO(data), "fuzz", session):
            for writer in writers:
                writer.write("", message)
            assert session.template_count <= TEMPLATES_MAX
            assert session.field_count <= FIELDS_MAX
    for line in as_json.getvalue().splitlines():
        json.loads(line)
    assert all(line.isprintable() for line in as_table.getvalue().split("\n"))
    framer = Framer()
    with contextlib.suppress(MalformedMessageError):
        for at in range(0, len(data), 700):
            for whole in framer.feed(data[at : at + 700]):
                streamed.message(whole)
    assert streamed.counts == session.counts


def fuzz_flows(data: bytes) -> None:
    """A capture file all the way to IPFIX records, each extra switched by a bit of the first byte: every packet that
    was read is metered or ignored, and every one that was metered is in a record."""
    if not data:
        return
    settings = MeterSettings(
        tunnels="inner" if data[0] & 1 else "outer",
        packet_sequence=5 if data[0] & 2 else 0,
        zero_length="frame" if data[0] & 4 else "field",
        interface_in_key=bool(data[0] & 8),
        max_fragmented=4 if data[0] & 16 else 0,
        max_flows=8,
    )
    with tempfile.TemporaryDirectory(dir="/dev/shm", prefix="fuzz-") as directory, as_file(data[1:]) as path:
        output = Path(directory) / "flows.ipfix"
        with contextlib.suppress(ApplianceError):
            counts = meter_files([path], str(output), settings)
            assert counts.packets == counts.metered_packets + sum(counts.ignored.values())
            exported = packets_in_records(output)
            assert counts.metered_packets == exported, (counts, exported)


def packets_in_records(flows: Path) -> int:
    packets = 0
    with flows.open("rb") as stream:
        for message in read_stream(stream, "fuzz", Session()):
            for records in (records for records in message.sets if not records.template.is_options):
                places = dict(records.template.columns)
                counters = [places[name] for name in PACKET_COUNTERS if name in places]
                packets += sum(row[where[0]] for row in records.rows for where in counters)
    return packets


def fuzz_traces(data: bytes) -> None:
    """A capture file cut into TCP flows; the first byte chooses format and direction."""
    if not data:
        return
    settings = TraceSettings(
        format=TRACE_FORMATS[data[0] % 4], bidirectional=bool(data[0] & 4), max_flows=8, frames=bool(data[0] & 8)
    )
    with tempfile.TemporaryDirectory(dir="/dev/shm", prefix="fuzz-") as directory, as_file(data[1:]) as path:
        with contextlib.suppress(ApplianceError):
            counts = trace_files([path], directory, settings)
            assert counts.packets == counts.tcp_packets + counts.other_packets


def fuzz_payload(data: bytes) -> None:
    """Checksums, test payloads and the gate's criteria: what stands behind the packet changes nothing."""
    if len(data) < 3:
        return
    linktype, packet = LINKTYPES[data[0] % len(LINKTYPES)], data[2 : 2 + PACKET_BYTES_MAX]
    start, stop, keep = data[1] % 4, 1 + data[1] // 4 % 4, data[1] // 16 % 6
    program = struct.pack("=HBBI", 0x28, 0, 0, 12) + struct.pack("=HBBI", 0x16, 0, 0, 0)  # ldh [12]; ret A
    seen = set()
    for _ in range(2):
        copy = bytearray(packet)  # memory of its own: AddressSanitizer sees a read behind it
        gate = Gate(linktype, start, program, stop, program, keep, program, stream=1, fcs=bool(data[0] & 128))
        verdict = gate.lets_pass(copy), gate.state
        seen.add((verdict, payload.has_wrong_fcs(copy), payload.has_wrong_checksum(copy, linktype)))
        payload.parse_test_payload(copy)
    assert len(seen) == 1


def fuzz_port(data: bytes) -> None:
    """A port's memory that somebody wrote into: its worker and its monitor stay within their bounds."""
    if len(data) < 16:
        return
    fd = port.allocate(PORT_BYTES, PORT_GENERATION, "fuzz")
    try:
        port.PortMemory.provide(fd)
        memory, tap = port.PortMemory(fd, PORT_GENERATION), PortTap(fd, PORT_GENERATION)
        tap.attach(1, 1)
        with mmap.mmap(fd, 0) as whole:
            for at in range(0, min(len(data) - 12, 240), 12):  # eight octets somewhere, mostly in the header
                offset = int.from_bytes(data[at : at + 4], "big")
                offset = 128 + offset % 400 if offset & 1 << 31 else offset % (len(whole) - 8)
                whole[offset : offset + 8] = data[at + 4 : at + 12]
            for n in range(4):
                tap.show(data[: 1 + 60 * n], n)
                tap.rest(n)
        with contextlib.suppress(CaptureError, ValueError):  # what `read` says of positions without sense
            for _ in parse_captured(memory.read(memory.figures()["tail"], 1 << 20)[1]):
                pass
        memory.streams_seen()
        memory.filters()
    finally:
        os.close(fd)


def fuzz_config(data: bytes) -> None:
    """A configuration: taken, or refused by our own error."""
    with contextlib.suppress(UnicodeDecodeError, tomllib.TOMLDecodeError, ConfigError, RecursionError):
        parse(tomllib.loads(data.decode()))


def fuzz_application(data: bytes) -> None:
    """The first octet says over what and to which port; then come payloads of one connection, each behind two octets
    of its length. Whatever is found is printable, within its bounds, and does not depend on what follows the packet."""
    if not data:
        return
    inspectors = [Inspector(entropy=True) for _ in TAILS]
    kind, at, sequence = data[0], 1, 0
    while at + 2 <= len(data) and at < PAYLOADS_MAX * PACKET_BYTES_MAX:
        length = int.from_bytes(data[at : at + 2], "big") % PACKET_BYTES_MAX
        said = data[at + 2 : at + 2 + length]
        frame = frame_of(kind, sequence, said)
        found = [what_is_found(frame, tail, one) for tail, one in zip(TAILS, inspectors, strict=True)]
        assert all(one == found[0] for one in found), (kind, said.hex())
        at, sequence = at + 2 + length, sequence + len(said)
    check_findings(crypto_findings(data[1:]))


def frame_of(kind: int, sequence: int, said: bytes) -> bytes:
    to = PORTS[kind >> 1 & 3]
    if kind & 1:
        head = struct.pack(">HHIIBBHHH", 40000, to, sequence, 0, 0x50, 0x18, 1, 0, 0)
    else:
        head = struct.pack(">HHHH", 40000, to, 8 + len(said), 0)
    total = 20 + len(head) + len(said)
    ip = struct.pack(">BBHHHBBH", 0x45, 0, total, 0, 0, 64, 6 if kind & 1 else 17, 0) + bytes(8)
    return bytes(12) + b"\x08\x00" + ip + head + said


def what_is_found(frame: bytes, tail: bytes, inspector: Inspector) -> bytes:
    body = struct.pack("=II", len(frame), len(frame) + 4) + frame + tail * (-len(frame) % 4)
    content, _ = headers.digests(record(PACKET, body), [1], inspector=inspector)
    assert len(content) <= DIGEST_BYTES + EXTENSION_BYTES_MAX
    extension = content[EXTENSION_AT:-4]
    if extension:
        check_findings(findings(extension))
    return extension


def check_findings(found: dict[str, Any]) -> None:
    texts = [value for value in found.values() if isinstance(value, str)]
    assert all(text.isprintable() and text.isascii() and len(text) <= 254 for text in texts), texts


TARGETS: dict[str, Callable[[bytes], None]] = {
    "headers": fuzz_headers,
    "application": fuzz_application,
    "reader": fuzz_reader,
    "salvage": fuzz_salvage,
    "ring": fuzz_ring,
    "table": fuzz_table,
    "ipfix": fuzz_ipfix,
    "config": fuzz_config,
    "erf": fuzz_erf,
    "collector": fuzz_collector,
    "flows": fuzz_flows,
    "traces": fuzz_traces,
    "payload": fuzz_payload,
    "port": fuzz_port,
}
