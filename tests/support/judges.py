"""Judges of capture files: programs that we did not write, and an exact count of numbered frames.

The count reads plain pcap and pcapng with a small reader of its own, on purpose apart from the project's formats;
`packets_by_wireshark` lets Wireshark read the file instead. Compressed files go through the compressors' own programs,
whose exit status counts.
"""

from __future__ import annotations

import os
import struct
import subprocess
import tempfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from ipaddress import ip_address
from pathlib import Path
from typing import NamedTuple

from support.frames import COUNTED, ETHERTYPE_IPV4, ETHERTYPE_NUMBERED, ETHERTYPES_VLAN, HEADER, MAGIC

LINKTYPE_ETHERNET = 1
LINKTYPE_LINUX_SLL = 113
LINKTYPE_LINUX_SLL2 = 276

_DECOMPRESSORS = {
    b"\x04\x22\x4d\x18": ["lz4", "-dc"],
    b"\x28\xb5\x2f\xfd": ["zstd", "-dcq"],
    b"\xfd7zXZ\x00": ["xz", "-dc"],
    b"\x1f\x8b": ["gzip", "-dc"],
    b"BZh": ["bzip2", "-dc"],
}
_PCAP_MAGICS = {  # first four bytes -> byte order, nanoseconds per unit of the fraction
    b"\xd4\xc3\xb2\xa1": ("<", 1000),
    b"\xa1\xb2\xc3\xd4": (">", 1000),
    b"\x4d\x3c\xb2\xa1": ("<", 1),
    b"\xa1\xb2\x3c\x4d": (">", 1),
}
_PCAPNG_MAGIC = b"\x0a\x0d\x0d\x0a"

Pathlike = str | os.PathLike[str]


class JudgeError(AssertionError):
    """A judge refused a file; the message has the file and what the judge said."""


class Packet(NamedTuple):
    """One packet of a file. `data` is what was captured, `original_length` what was on the wire, both in bytes."""

    time_ns: int
    data: bytes | memoryview
    original_length: int
    linktype: int = LINKTYPE_ETHERNET
    interface: int = 0


# Programs


def _command(command: Sequence[str], path: Pathlike) -> bytes:
    done = subprocess.run(command, capture_output=True, check=False, timeout=120)
    if done.returncode != 0:
        said = done.stderr.decode(errors="replace").strip()
        raise JudgeError(f"{os.fspath(path)}: {command[0]} ended with {done.returncode}: {said}")
    return done.stdout


def decompressed(path: Pathlike) -> bytes:
    """The file's content, through the program that belongs to its first bytes; plain files as they are."""
    content = Path(path).read_bytes()
    for magic, command in _DECOMPRESSORS.items():
        if content.startswith(magic):
            return _command([*command, os.fspath(path)], path)
    return content


class _Plain:
    """The file, or a decompressed copy of it that lives as long as the `with` block."""

    def __init__(self, path: Pathlike) -> None:
        self._path = Path(path)
        self._copy: tempfile._TemporaryFileWrapper[bytes] | None = None

    def __enter__(self) -> str:
        with self._path.open("rb") as file:
            start = file.read(6)
        if not any(start.startswith(magic) for magic in _DECOMPRESSORS):
            return os.fspath(self._path)
        self._copy = tempfile.NamedTemporaryFile(prefix="judge-")
        self._copy.write(decompressed(self._path))
        self._copy.flush()
        return self._copy.name

    def __exit__(self, *_: object) -> None:
        if self._copy is not None:
            self._copy.close()


@dataclass(frozen=True)
class CapInfos:
    """What capinfos says. Times are as it prints them (seconds since 1970), None for a file without packets."""

    file_type: str
    encapsulation: str
    packets: int
    data_bytes: int
    first_time: str | None
    last_time: str | None
    in_order: bool | None


def capinfos(path: Pathlike) -> CapInfos:
    """Wireshark's own account of a file; JudgeError when it finds the file damaged."""
    with _Plain(path) as plain:
        wanted = ["-t", "-E", "-c", "-d", "-S", "-a", "-e", "-o"]
        line = _command(["capinfos", "-T", "-M", "-r", "-m", "-Q", *wanted, plain], path).decode().strip()
    # With -m and -Q: every field in double quotes, commas between them; the first is the file's name.
    fields = [word.strip('"') for word in line.split('","')]
    _, file_type, encapsulation, count, data_bytes, first, last, ordered = fields
    empty = int(count) == 0
    times = (None, None, None) if empty else (first, last, ordered == "True")
    return CapInfos(file_type, encapsulation, int(count), int(data_bytes), *times)


def packet_count(paths: Iterable[Pathlike]) -> int:
    """Packets of all files together, counted by capinfos."""
    return sum(capinfos(path).packets for path in paths)


def tshark_fields(path: Pathlike, *names: str, display_filter: str = "") -> list[tuple[str, ...]]:
    """`tshark -T fields`: one tuple of strings per packet."""
    command = ["tshark", "-n", "-T", "fields", *(word for name in names for word in ("-e", name))]
    with _Plain(path) as plain:
        chosen = ["-Y", display_filter] if display_filter else []
        output = _command([*command, *chosen, "-r", plain], path).decode()
    return [tuple(line.split("\t")) for line in output.splitlines()]


class IpHeader(NamedTuple):
    """An IP header as tshark shows it. `octets`: its length field, 40 more for IPv6. `ports`: of the UDP, TCP or SCTP
    header behind it, None without one."""

    source: bytes
    destination: bytes
    octets: int
    ports: tuple[int, int] | None


def ip_headers(path: Pathlike, *decode_as: str) -> list[list[IpHeader]]:
    """For every packet its IP headers from the outermost to the innermost, without what ICMP errors quote. Nothing is
    put together from fragments. `decode_as`: rules of tshark's -d, as `udp.port==8472,vxlan`."""
    names = ("ip.src", "ip.dst", "ip.len", "ipv6.src", "ipv6.dst", "ipv6.plen")
    names += tuple(f"{protocol}.{end}port" for protocol in ("tcp", "udp", "sctp") for end in ("src", "dst"))
    command = ["tshark", "-n", "-o", "ip.defragment:FALSE", "-o", "ipv6.defragment:FALSE", "-T", "fields"]
    command += ["-o", "tcp.desegment_tcp_streams:FALSE", "-E", "occurrence=a", "-E", "aggregator=,"]
    command += [word for rule in decode_as for word in ("-d", rule)]
    command += [word for name in ("frame.protocols", *names) for word in ("-e", name)]
    with _Plain(path) as plain:
        output = _command([*command, "-r", plain], path).decode()
    return [_ip_headers(names, line.split("\t")) for line in output.splitlines()]


def _ip_headers(names: Sequence[str], row: Sequence[str]) -> list[IpHeader]:
    values = {name: iter(cell.split(",")) for name, cell in zip(names, row[1:], strict=True)}
    found: list[IpHeader] = []
    for protocol in row[0].split(":"):
        if protocol in ("icmp", "icmpv6"):
            break
        if protocol in ("ip", "ipv6"):
            source, destination = (ip_address(next(values[f"{protocol}.{end}"])).packed for end in ("src", "dst"))
            length = int(next(values["ip.len"])) if protocol == "ip" else 40 + int(next(values["ipv6.plen"]))
            found.append(IpHeader(source, destination, length, None))
        elif protocol in ("tcp", "udp", "sctp") and found:
            ports = int(next(values[f"{protocol}.srcport"])), int(next(values[f"{protocol}.dstport"]))
            found[-1] = found[-1]._replace(ports=ports)
    return found


def packets_by_wireshark(path: Pathlike) -> list[Packet]:
    """The file's packets as Wireshark reads them: editcap writes them as nanosecond pcap, which is trivial to read."""
    with _Plain(path) as plain, tempfile.TemporaryDirectory(prefix="judge-") as directory:
        copy = f"{directory}/copy.pcap"
        _command(["editcap", "-F", "nsecpcap", plain, copy], path)
        return list(packets(copy))


# A reader for tests


def packets(path: Pathlike) -> Iterator[Packet]:
    """The packets of a pcap or pcapng file, compressed or not. JudgeError when the file ends inside a record."""
    content = memoryview(decompressed(path))
    start = bytes(content[:4])
    if start in _PCAP_MAGICS:
        yield from _pcap(content, path)
    elif start == _PCAPNG_MAGIC:
        yield from _pcapng(content, path)
    else:
        raise JudgeError(f"{os.fspath(path)}: neither pcap nor pcapng (first bytes {start.hex()})")


def _pcap(content: memoryview, path: Pathlike) -> Iterator[Packet]:
    order, unit_ns = _PCAP_MAGICS[bytes(content[:4])]
    if len(content) < 24:
        raise JudgeError(f"{os.fspath(path)}: ends inside the file header")
    linktype = struct.unpack_from(order + "I", content, 20)[0] & 0x0FFFFFFF
    record = struct.Struct(order + "IIII")
    position, end = 24, len(content)
    while position < end:
        if position + 16 > end:
            raise JudgeError(f"{os.fspath(path)}: ends inside a record header at {position}")
        seconds, fraction, captured, original = record.unpack_from(content, position)
        position += 16
        if position + captured > end:
            raise JudgeError(f"{os.fspath(path)}: ends inside a packet at {position}")
        time_ns = seconds * 1_000_000_000 + fraction * unit_ns
        yield Packet(time_ns, content[position : position + captured], original, linktype)
        position += captured


def _pcapng(content: memoryview, path: Pathlike) -> Iterator[Packet]:
    order = "<"
    interfaces: list[tuple[int, Callable[[int], int]]] = []  # link type, time in nanoseconds
    position, end = 0, len(content)
    while position < end:
        if position + 12 > end:
            raise JudgeError(f"{os.fspath(path)}: ends inside a block header at {position}")
        if bytes(content[position : position + 4]) == _PCAPNG_MAGIC:
            order = "<" if bytes(content[position + 8 : position + 12]) == b"\x4d\x3c\x2b\x1a" else ">"
            interfaces = []
        kind, length = struct.unpack_from(order + "II", content, position)
        if length < 12 or length % 4 or position + length > end:
            raise JudgeError(f"{os.fspath(path)}: block at {position} has a length of {length}, {end - position} left")
        if struct.unpack_from(order + "I", content, position + length - 4)[0] != length:
            raise JudgeError(f"{os.fspath(path)}: block at {position} ends with another length than it begins with")
        if kind == 1:
            linktype = struct.unpack_from(order + "H", content, position + 8)[0]
            interfaces.append((linktype, _resolution(content[position + 16 : position + length - 4], order)))
        elif kind == 6:
            interface, high, low, captured, original = struct.unpack_from(order + "IIIII", content, position + 8)
            if interface >= len(interfaces) or 32 + captured > length:
                raise JudgeError(f"{os.fspath(path)}: packet block at {position} contradicts itself")
            linktype, to_ns = interfaces[interface]
            data = content[position + 28 : position + 28 + captured]
            yield Packet(to_ns(high << 32 | low), data, original, linktype, interface)
        position += length


def _resolution(options: memoryview, order: str) -> Callable[[int], int]:
    """From an interface block's options (if_tsresol 9, if_tsoffset 14): units to nanoseconds since 1970."""
    exponent, offset_s, position = 6, 0, 0
    while position + 4 <= len(options):
        code, length = struct.unpack_from(order + "HH", options, position)
        if code == 9:
            exponent = options[position + 4]
        elif code == 14:
            offset_s = struct.unpack_from(order + "q", options, position + 4)[0]
        elif code == 0:
            break
        position += 4 + (length + 3) // 4 * 4
    units_per_s = 1 << (exponent & 0x7F) if exponent & 0x80 else 10**exponent
    if units_per_s == 1_000_000_000 and offset_s == 0:
        return int
    return lambda units: units * 1_000_000_000 // units_per_s + offset_s * 1_000_000_000


# Numbered frames


@dataclass
class InterfaceReport:
    """One interface's frames. `sequences` holds every number that arrived whole."""

    sequences: set[int] = field(default_factory=set)
    duplicates: int = 0
    corrupt: int = 0  # the checksum is wrong
    truncated: int = 0  # captured too short for its checksum; counted as arrived when the number was captured
    disordered: int = 0  # a number below an earlier one of the same interface
    highest: int = -1

    @property
    def received(self) -> int:
        return len(self.sequences)

    def missing(self, count: int, first: int = 0) -> list[tuple[int, int]]:
        """The numbers of `first` .. `first` + `count` - 1 that did not arrive, as ranges (from, to), both included."""
        return _ranges(sorted(set(range(first, first + count)) - self.sequences))

    def unexpected(self, count: int, first: int = 0) -> list[tuple[int, int]]:
        """Numbers that arrived and were never sent, as ranges."""
        return _ranges(sorted(number for number in self.sequences if not first <= number < first + count))


@dataclass
class NumberedReport:
    """All frames of some files, in the order given. Inversions are packets older than one before them."""

    interfaces: dict[int, InterfaceReport] = field(default_factory=dict)
    packets: int = 0
    foreign: int = 0  # packets that are no numbered frames
    unreadable: int = 0  # begin like a numbered frame, and have no whole number
    inversions: int = 0
    worst_inversion_ns: int = 0
    first_ns: int | None = None
    latest_ns: int | None = None

    def __getitem__(self, interface_id: int) -> InterfaceReport:
        return self.interfaces.get(interface_id, InterfaceReport())

    @property
    def received(self) -> int:
        return sum(interface.received for interface in self.interfaces.values())

    def faults(self, sent: Mapping[int, int], first: int = 0) -> list[str]:
        """Whatever is not "every frame sent, exactly once, in order, and nothing else", in words."""
        found = []
        for interface_id in sorted(sent.keys() | self.interfaces.keys()):
            report, count = self[interface_id], sent.get(interface_id, 0)
            if missing := report.missing(count, first):
                lost = sum(last - start + 1 for start, last in missing)
                found.append(f"interface {interface_id}: {lost} of {count} missing: {_shown(missing)}")
            if unexpected := report.unexpected(count, first):
                found.append(f"interface {interface_id}: never sent: {_shown(unexpected)}")
            for name in ("duplicates", "corrupt", "disordered"):
                if number := getattr(report, name):
                    found.append(f"interface {interface_id}: {number} {name}")
        if self.inversions:
            found.append(f"{self.inversions} inversions, the worst {self.worst_inversion_ns} ns back")
        if self.foreign or self.unreadable:
            found.append(f"{self.foreign} foreign and {self.unreadable} unreadable packets")
        return found

    def assert_exact(self, sent: Mapping[int, int], first: int = 0) -> None:
        """AssertionError unless every frame sent (count per interface id) is there exactly once and in order."""
        if found := self.faults(sent, first):
            raise AssertionError("; ".join(found))


def check_numbered(paths: Iterable[Pathlike]) -> NumberedReport:
    """Counts the numbered frames of the files, one after the other in the given order."""
    report = NumberedReport()
    latest_ns = -1
    for path in paths:
        for packet in packets(path):
            if packet.time_ns < latest_ns:
                report.inversions += 1
                report.worst_inversion_ns = max(report.worst_inversion_ns, latest_ns - packet.time_ns)
            else:
                latest_ns = packet.time_ns
            if report.packets == 0:
                report.first_ns = packet.time_ns
            report.packets += 1
            _count(report, packet)
    report.latest_ns = latest_ns if report.packets else None
    return report


def _count(report: NumberedReport, packet: Packet) -> None:
    data = packet.data
    offset = _payload_offset(data, packet.linktype)
    if offset is None or data[offset : offset + 4] != MAGIC[: max(0, len(data) - offset)]:
        report.foreign += 1
        return
    if len(data) < offset + HEADER.size - 4:
        report.unreadable += 1
        return
    _, interface_id, sequence = COUNTED.unpack_from(data, offset)
    interface = report.interfaces.get(interface_id)
    if interface is None:
        interface = report.interfaces[interface_id] = InterfaceReport()
    if len(data) < packet.original_length:
        interface.truncated += 1
    elif not _checksum_holds(data, offset):
        interface.corrupt += 1
        return
    if sequence in interface.sequences:
        interface.duplicates += 1
        return
    interface.sequences.add(sequence)
    if sequence < interface.highest:
        interface.disordered += 1
    else:
        interface.highest = sequence


def _checksum_holds(data: bytes | memoryview, offset: int) -> bool:
    end = offset + HEADER.size
    if len(data) < end:
        return False
    counted = zlib.crc32(data[offset : end - 4], zlib.crc32(data[end:]))
    return bool(counted == int.from_bytes(data[end - 4 : end], "big"))


def _payload_offset(data: bytes | memoryview, linktype: int) -> int | None:
    """Where the numbered payload begins, or None when the packet is of another kind."""
    if linktype == LINKTYPE_ETHERNET:
        ethertype_at, offset = 12, 14
    elif linktype == LINKTYPE_LINUX_SLL:
        ethertype_at, offset = 14, 16
    elif linktype == LINKTYPE_LINUX_SLL2:
        ethertype_at, offset = 0, 20
    else:
        return None
    ethertype = int.from_bytes(data[ethertype_at : ethertype_at + 2], "big")
    while ethertype in ETHERTYPES_VLAN:
        ethertype = int.from_bytes(data[offset + 2 : offset + 4], "big")
        offset += 4
    if ethertype == ETHERTYPE_NUMBERED:
        return offset
    if ethertype == ETHERTYPE_IPV4 and len(data) > offset + 9 and data[offset + 9] == 17:
        return offset + (data[offset] & 0x0F) * 4 + 8
    return None


def _ranges(numbers: Sequence[int]) -> list[tuple[int, int]]:
    ranges: list[tuple[int, int]] = []
    for number in numbers:
        if ranges and ranges[-1][1] == number - 1:
            ranges[-1] = (ranges[-1][0], number)
        else:
            ranges.append((number, number))
    return ranges


def _shown(ranges: Sequence[tuple[int, int]], limit: int = 5) -> str:
    words = [str(first) if first == last else f"{first}-{last}" for first, last in ranges[:limit]]
    return ", ".join(words) + (", ..." if len(ranges) > limit else "")
