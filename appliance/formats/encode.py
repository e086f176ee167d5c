"""Headers and blocks that are written once per file or interface: pcap's file header, pcapng's SHB, IDB and ISB.

Sources: draft-ietf-opsawg-pcap (file header), draft-ietf-opsawg-pcapng (sections 3.5 options, 4.1 SHB, 4.2 IDB,
4.6 ISB). Everything is written in host byte order, with nanosecond time stamps. Packets are never touched here.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache

from appliance.errors import FormatError

SNAPLEN_MAX = 262_144  # the longest packet that any reader takes (libpcap's and Wireshark's limit)

PCAP_MAGIC_MICROSECONDS = 0xA1B2C3D4
PCAP_MAGIC_NANOSECONDS = 0xA1B23C4D
PCAP_HEADER_BYTES = 24

BLOCK_SECTION = 0x0A0D0D0A
BLOCK_INTERFACE = 1
BLOCK_STATISTICS = 5
SECTION_MAGIC = 0x1A2B3C4D

TSRESOL_MICROSECONDS = 6  # what an IDB without if_tsresol means
TSRESOL_NANOSECONDS = 9

_OPT_END = 0
_OPT_COMMENT = 1
_SHB_HARDWARE, _SHB_OS, _SHB_USERAPPL = 2, 3, 4
_IF_NAME, _IF_DESCRIPTION, _IF_SPEED, _IF_TSRESOL, _IF_FILTER, _IF_OS, _IF_FCSLEN = 2, 3, 8, 9, 11, 12, 13
_IF_TSOFFSET, _IF_HARDWARE = 14, 15
_ISB_STARTTIME, _ISB_ENDTIME, _ISB_IFRECV, _ISB_IFDROP, _ISB_FILTERACCEPT, _ISB_OSDROP, _ISB_USRDELIV = range(2, 9)
# Ours, in the codes that pcapng leaves to local use; in ring records only, never in a file.
_LOCAL_SOURCE_TSRESOL = 0x8009

_STRING_MAX_BYTES = 4096  # names come from files that others made, and a record must fit into a small ring


@dataclass(frozen=True, slots=True)
class InterfaceDescription:
    """What an Interface Description Block says (draft-ietf-opsawg-pcapng, section 4.2).

    `source_tsresol` and `source_tsoffset_s` are the source's own if_tsresol and if_tsoffset: times in records are
    always nanoseconds since 1970, and these tell what they were before.
    """

    linktype: int
    snaplen: int = SNAPLEN_MAX  # bytes; 0 = no limit
    name: str = ""
    description: str = ""
    speed_bps: int = 0  # 0 = not known
    filter: str = ""  # the filter's text, as libpcap takes it
    operating_system: str = ""
    hardware: str = ""
    comment: str = ""
    fcs_bits: int | None = None  # length of the frame check sequence at each packet's end; None = not said
    source_tsresol: int = TSRESOL_NANOSECONDS
    source_tsoffset_s: int = 0

    @property
    def needs_nanoseconds(self) -> bool:
        """Whether the source's times are finer than microseconds, so that a us file would lose digits."""
        exponent = self.source_tsresol & 0x7F
        return exponent > 19 if self.source_tsresol & 0x80 else exponent > 6

    @classmethod
    def parse(cls, block: bytes | memoryview, byte_order: str = "=") -> InterfaceDescription:
        """Read a whole IDB, a RECORD_INTERFACE of a ring or a block of a file (`byte_order`: struct's "=", "<", ">").

        Raises FormatError when a length points outside of the block.
        """
        block = memoryview(block)
        if len(block) < 20:
            raise FormatError(f"an interface description of {len(block)} bytes is too short")
        linktype, snaplen = struct.unpack_from(byte_order + "H2xI", block, 8)
        strings: dict[int, str] = {}
        numbers = {_IF_SPEED: 0, _IF_TSRESOL: TSRESOL_MICROSECONDS, _IF_TSOFFSET: 0}
        for code, value in options(block[16:-4], byte_order):
            if code in _STRING_OPTIONS:
                strings.setdefault(code, bytes(value[:_STRING_MAX_BYTES]).rstrip(b"\0").decode("utf-8", "replace"))
            elif code == _IF_FILTER and bytes(value[:1]) == b"\0":  # 1 is BPF byte code, which is not text
                strings[code] = bytes(value[1:_STRING_MAX_BYTES]).rstrip(b"\0").decode("utf-8", "replace")
            elif code in _NUMBER_OPTIONS:
                layout = byte_order + _NUMBER_OPTIONS[code]
                if len(value) != struct.calcsize(layout):
                    raise FormatError(f"option {code} of an interface description has {len(value)} bytes")
                (numbers[code],) = struct.unpack(layout, value)
        return cls(
            linktype=linktype,
            snaplen=snaplen,
            name=strings.get(_IF_NAME, ""),
            description=strings.get(_IF_DESCRIPTION, ""),
            speed_bps=numbers[_IF_SPEED],
            filter=strings.get(_IF_FILTER, ""),
            operating_system=strings.get(_IF_OS, ""),
            hardware=strings.get(_IF_HARDWARE, ""),
            comment=strings.get(_OPT_COMMENT, ""),
            fcs_bits=numbers.get(_IF_FCSLEN),
            source_tsresol=numbers.get(_LOCAL_SOURCE_TSRESOL, numbers[_IF_TSRESOL]),
            source_tsoffset_s=numbers[_IF_TSOFFSET],
        )


_STRING_OPTIONS = frozenset((_OPT_COMMENT, _IF_NAME, _IF_DESCRIPTION, _IF_OS, _IF_HARDWARE))
_NUMBER_OPTIONS = {_IF_SPEED: "Q", _IF_TSRESOL: "B", _IF_FCSLEN: "B", _IF_TSOFFSET: "q", _LOCAL_SOURCE_TSRESOL: "B"}


def pcap_header(linktype: int, *, nanoseconds: bool, snaplen: int = SNAPLEN_MAX) -> bytes:
    """The 24 bytes that begin a pcap file, version 2.4. `linktype`: a LINKTYPE_ number, below 65536."""
    magic = PCAP_MAGIC_NANOSECONDS if nanoseconds else PCAP_MAGIC_MICROSECONDS
    return struct.pack("=IHHiIIHH", magic, 2, 4, 0, 0, snaplen, linktype, 0)


def section_header(*, application: str = "", hardware: str = "", operating_system: str = "") -> bytes:
    """A Section Header Block of unknown section length; `application` is by default our own name and version."""
    fields = (
        (_SHB_HARDWARE, hardware),
        (_SHB_OS, operating_system),
        (_SHB_USERAPPL, application or application_name()),
    )
    body = struct.pack("=IHHq", SECTION_MAGIC, 1, 0, -1)
    return _block(BLOCK_SECTION, body, (_text(code, value) for code, value in fields if value))


def interface_description(interface: InterfaceDescription) -> bytes:
    """An Interface Description Block for a file, if_tsresol 9."""
    return _block(BLOCK_INTERFACE, _interface_body(interface), _interface_options(interface))


def interface_record(interface: InterfaceDescription) -> bytes:
    """The same block as a ring record (RECORD_INTERFACE): it also keeps `source_tsresol`, in option 0x8009."""

    def with_source() -> Iterator[bytes]:
        yield from _interface_options(interface)
        if interface.source_tsresol != TSRESOL_NANOSECONDS:
            yield _option(_LOCAL_SOURCE_TSRESOL, bytes((interface.source_tsresol,)))

    return _block(BLOCK_INTERFACE, _interface_body(interface), with_source())


def interface_statistics(
    interface: int,
    timestamp_ns: int,
    *,
    start_ns: int | None = None,
    end_ns: int | None = None,
    received: int | None = None,
    dropped: int | None = None,
    filter_accepted: int | None = None,
    os_dropped: int | None = None,
    delivered: int | None = None,
) -> bytes:
    """An Interface Statistics Block. `interface`: the IDB's number in the file; what is None is left out.

    isb_ifrecv is `received`, isb_ifdrop `dropped` (by the interface), isb_osdrop `os_dropped` (by the kernel, and by
    the program that writes the file), isb_usrdeliv `delivered`.
    """
    times = ((_ISB_STARTTIME, start_ns), (_ISB_ENDTIME, end_ns))
    counts = (
        (_ISB_IFRECV, received),
        (_ISB_IFDROP, dropped),
        (_ISB_FILTERACCEPT, filter_accepted),
        (_ISB_OSDROP, os_dropped),
        (_ISB_USRDELIV, delivered),
    )
    fields = [_option(code, _time(value)) for code, value in times if value is not None]
    fields += [_option(code, struct.pack("=Q", value)) for code, value in counts if value is not None]
    return _block(BLOCK_STATISTICS, struct.pack("=I", interface) + _time(timestamp_ns), iter(fields))


def options(region: memoryview, byte_order: str) -> Iterator[tuple[int, memoryview]]:
    """The (code, value) pairs of a block's options up to opt_endofopt or the region's end.

    Raises FormatError when an option is longer than what is left of the block.
    """
    offset = 0
    while offset + 4 <= len(region):
        code, length = struct.unpack_from(byte_order + "HH", region, offset)
        if code == _OPT_END:
            return
        offset += 4
        if length > len(region) - offset:
            raise FormatError(f"option {code} claims {length} bytes, its block has {len(region) - offset} left")
        yield code, region[offset : offset + length]
        offset += length + 3 & ~3


@cache
def application_name() -> str:
    """What shb_userappl says: `capture-appliance 1.2.3`. Asked once: a file's head needs no other file than that."""
    from importlib.metadata import PackageNotFoundError, version  # costs more than all of this module

    try:
        return f"capture-appliance {version('capture-appliance')}"
    except (PackageNotFoundError, OSError):  # run from a source tree; or the disk fails
        return "capture-appliance"


def _interface_body(interface: InterfaceDescription) -> bytes:
    return struct.pack("=HHI", interface.linktype, 0, interface.snaplen)


def _interface_options(interface: InterfaceDescription) -> Iterator[bytes]:
    for code, text in (
        (_OPT_COMMENT, interface.comment),
        (_IF_NAME, interface.name),
        (_IF_DESCRIPTION, interface.description),
        (_IF_OS, interface.operating_system),
        (_IF_HARDWARE, interface.hardware),
    ):
        if text:
            yield _text(code, text)
    if interface.speed_bps:
        yield _option(_IF_SPEED, struct.pack("=Q", interface.speed_bps))
    if interface.filter:
        yield _option(_IF_FILTER, b"\0" + _encoded(interface.filter))
    if interface.fcs_bits is not None:
        yield _option(_IF_FCSLEN, bytes((interface.fcs_bits,)))
    yield _option(_IF_TSRESOL, bytes((TSRESOL_NANOSECONDS,)))


def _block(block_type: int, body: bytes, encoded_options: Iterator[bytes]) -> bytes:
    tail = b"".join(encoded_options)
    if tail:
        tail += bytes(4)  # opt_endofopt
    length = 12 + len(body) + len(tail)
    return struct.pack("=II", block_type, length) + body + tail + struct.pack("=I", length)


def _option(code: int, value: bytes) -> bytes:
    return struct.pack("=HH", code, len(value)) + value + bytes(-len(value) % 4)


def _text(code: int, text: str) -> bytes:
    return _option(code, _encoded(text))


def _encoded(text: str) -> bytes:
    # Cut at a character's border: half a character is not UTF-8.
    return text.encode("utf-8", "replace")[:_STRING_MAX_BYTES].decode("utf-8", "ignore").encode()


def _time(timestamp_ns: int) -> bytes:
    return struct.pack("=II", timestamp_ns >> 32 & 0xFFFFFFFF, timestamp_ns & 0xFFFFFFFF)
