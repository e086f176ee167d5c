"""Input files, opened by what they hold and not by what they are called: plain or compressed; pcap, pcapng or ERF."""

from __future__ import annotations

import os
import stat
import struct
import sys
from collections.abc import Callable

from appliance.errors import ApplianceError, FormatError, InputOutputError, MissingInputError, MissingPermissionError
from appliance.formats.unpack import PIECE_BYTES, DamagedStreamError, Unpacker

STANDARD_INPUT = "-"
HEAD_BYTES = 64  # enough to tell all formats apart

_PCAP_MAGICS = tuple(
    struct.pack(order + "I", magic) for order in "<>" for magic in (0xA1B2C3D4, 0xA1B23C4D, 0xA1B2CD34)
)
_PCAPNG_MAGIC = b"\n\r\r\n"
_UNREAD_FORMATS = (
    (b"snoop\0\0\0", "a snoop file"),
    (b"btsnoop\0", "a Bluetooth snoop file"),
    (b"RTSS", "a Network Monitor file"),
    (b"GMBU", "a Network Monitor file"),
    (b"XCP\0", "a NetXray file"),
    (b"TRSNIFF data", "a Sniffer file"),
    (b"\x12\xcb\xe2\xa1", "a pcap file of netsniff-ng's own kind"),
    (b"\xa1\xe2\xcb\x12", "a pcap file of netsniff-ng's own kind"),
    (b"\xab\x01\x00\x1c", "an IXIA lcap file"),
    (b"\xac\x01\x00\x1c", "an IXIA lcap file"),
    (b"\x02!L\x18", "an lz4 file of the legacy format (lz4 -l); recompress it with lz4"),
    (b"PK\x03\x04", "a zip archive; unpack it first"),
    (b"7z\xbc\xaf\x27\x1c", "a 7z archive; unpack it first"),
    (b"\x1f\x9d", "a file of compress(1); unpack it first"),
    (b"\x89LZO", "an lzop file; unpack it first"),
    (b"\x5d\x00\x00", "an lzma file of the legacy format; recompress it with xz"),
)

Observer = Callable[[memoryview], None]


class InputStream:
    """The plain bytes of one input file, in order, without seeking, so that pipes work too.

    `compression` is "" or one of gz, lz4, zst, xz, bz2; `format` is "pcap", "pcapng" or "erf", or what the
    caller says of a file that does not tell it itself. After the end `damage` is ""
    or says why the compressed stream has no proper end. `observer` sees each piece of the file as it is on disk.

    A plain file is read, not mapped: whoever cuts a mapped file short kills its readers with SIGBUS. With `end_bytes`
    it is taken to end there.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        observer: Observer | None = None,
        format: str = "",
        end_bytes: int = sys.maxsize,
    ) -> None:
        self.path = os.fspath(path)
        self.name = "standard input" if self.path == STANDARD_INPUT else self.path
        self.damage = ""
        self._observer = observer
        self._left_bytes = end_bytes
        self._fd = self._open()
        try:
            self._head = self._first_bytes(may_be_empty=bool(format))
            self._unpacker = Unpacker.open(self._head, self._read_raw)
            self.compression = self._unpacker.compression if self._unpacker else ""
            if self._unpacker:
                self._head = self._first_plain_bytes()
            self.format = self._told(format, self._head) if format else self._recognise(self._head)
        except DamagedStreamError as damage:
            self.close()
            raise FormatError(f"{self.name}: {damage}") from damage
        except BaseException:
            self.close()
            raise

    def read_into(self, buffer: memoryview) -> int:
        """Fills the beginning of `buffer` (bytes, writable); returns how many, 0 at the end."""
        if self._head:
            count = min(len(buffer), len(self._head))
            buffer[:count] = self._head[:count]
            self._head = self._head[count:]
            return count
        return self._read_plain(buffer)

    def drain(self) -> None:
        """Reads the file to its end without unpacking it, for the observer's sake."""
        while self._read_raw(PIECE_BYTES):
            pass

    def close(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def _open(self) -> int:
        try:
            if self.path == STANDARD_INPUT:
                return os.dup(0)
            fd = os.open(self.path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOCTTY)
        except OSError as error:
            raise _open_error(self.name, error) from error
        if stat.S_ISDIR(os.fstat(fd).st_mode):
            os.close(fd)
            raise MissingInputError(f"{self.name} is a directory; name a capture file")
        return fd

    def _read_raw(self, count: int) -> bytes:
        try:
            piece = os.read(self._fd, min(count, self._left_bytes))
        except OSError as error:
            raise InputOutputError(f"{self.name} cannot be read: {error.strerror}") from error
        self._left_bytes -= len(piece)
        if self._observer is not None:
            self._observer(memoryview(piece))
        return piece

    def _read_file(self, buffer: memoryview) -> int:
        try:
            count = os.readv(self._fd, [buffer[: self._left_bytes]])
        except OSError as error:
            raise InputOutputError(f"{self.name} cannot be read: {error.strerror}") from error
        self._left_bytes -= count
        if self._observer is not None:
            self._observer(buffer[:count])
        return count

    def _first_bytes(self, may_be_empty: bool) -> bytes:
        head = b""
        while len(head) < 16 and (piece := self._read_raw(HEAD_BYTES)):
            head += piece
        if not head and not may_be_empty:
            raise FormatError(f"{self.name} is empty: not even a file header is in it")
        return head

    def _first_plain_bytes(self) -> bytes:
        head = bytearray()
        piece = memoryview(bytearray(HEAD_BYTES))
        while len(head) < 16 and (count := self._read_plain(piece)):
            head += piece[:count]
        return bytes(head)

    def _read_plain(self, buffer: memoryview) -> int:
        if self._unpacker is None:
            return self._read_file(buffer)
        if self.damage:
            return 0
        try:
            return self._unpacker.read_into(buffer)
        except DamagedStreamError as damage:
            self.damage = str(damage)
            return 0

    def _told(self, format: str, head: bytes) -> str:
        """ERF has no mark that would outweigh those of the others; the formats of fixed records have none at all."""
        if format != "erf" or not head.startswith((*_PCAP_MAGICS, _PCAPNG_MAGIC)):
            return format
        return self._recognise(head)

    def _recognise(self, head: bytes) -> str:
        if head.startswith(_PCAP_MAGICS):
            return "pcap"
        if head.startswith(_PCAPNG_MAGIC):
            return "pcapng"
        if looks_like_erf(head):
            return "erf"
        if self.damage:
            raise FormatError(f"{self.name}: {self.damage}")
        if not head:
            raise FormatError(f"{self.name} is an empty {self.compression} file")
        raise FormatError(f"{self.name} {_refusal(head)}")


def _refusal(head: bytes) -> str:
    """Why a file that begins like this is not read, as the end of a sentence about it."""
    for magic, kind in _UNREAD_FORMATS:
        if head.startswith(magic):
            return f"is {kind}: only pcap, pcapng and ERF are read by their content"
    return f"is neither pcap nor pcapng nor ERF: it begins with {head[:8].hex(' ')}"


def looks_like_erf(head: bytes) -> bool:
    """ERF has no magic: a little-endian time between 1990 and 2100, a known type, sensible lengths."""
    if len(head) < 16:
        return False
    seconds = int.from_bytes(head[4:8], "little")
    record_type, record_bytes = head[8] & 0x7F, int.from_bytes(head[10:12], "big")
    return 631_152_000 < seconds < 4_102_444_800 and 1 <= record_type <= 48 and record_bytes >= 16


def _open_error(name: str, error: OSError) -> ApplianceError:
    if isinstance(error, PermissionError):
        return MissingPermissionError(f"{name} may not be read by this user: make it readable, or become its owner")
    if isinstance(error, FileNotFoundError | NotADirectoryError):
        return MissingInputError(f"{name} does not exist")
    return InputOutputError(f"{name} cannot be opened: {error.strerror}")
