"""Compressed input, a bounded piece at a time: gz, lz4 and zst frames, xz, bz2, each with any number of members.

Whatever a hostile file unpacks to, only one piece of it is ever held. A stream that is cut or damaged gives
everything before the damage, and then raises DamagedStreamError.
"""

from __future__ import annotations

import enum
import struct
from collections.abc import Callable
from typing import Protocol

# The packages that unpack are imported by the first file that needs them: most files are plain.

PIECE_BYTES = 262_144
# The largest window or dictionary that a decompressor may allocate: what `zstd` and `xz -9` accept by themselves.
DECODER_MEMORY_BYTES = 128 << 20

MAGICS = {
    "gz": b"\x1f\x8b",
    "lz4": b"\x04\x22\x4d\x18",
    "zst": b"\x28\xb5\x2f\xfd",
    "xz": b"\xfd7zXZ\0",
    "bz2": b"BZh",
}
_ZERO_PADDED = ("gz", "xz")
_WITH_SKIPPABLE_FRAMES = ("lz4", "zst")


class DamagedStreamError(Exception):
    """A compressed stream cannot be followed any further; the message says why."""


class Member(Protocol):
    """One compressed member (frame, stream) of a file, with the manners of bz2, lzma and lz4.frame."""

    @property
    def eof(self) -> bool: ...
    @property
    def needs_input(self) -> bool: ...
    @property
    def unused_data(self) -> bytes | None: ...
    def decompress(self, data: bytes, max_length: int) -> bytes: ...


class Unpacker:
    """The plain bytes of a compressed file. `head`: its first bytes; `read_raw(count)` gives the following ones."""

    def __init__(self, compression: str, head: bytes, read_raw: Callable[[int], bytes]) -> None:
        self._read_raw = read_raw
        self._pending = head  # read, but not yet given to a member
        self._member: Member | None = None
        self.compression = compression

    @classmethod
    def open(cls, head: bytes, read_raw: Callable[[int], bytes]) -> Unpacker | None:
        """The unpacker for a file that begins with `head` (8 bytes or more, or the whole file); None: it is plain."""
        for compression, magic in MAGICS.items():
            if head.startswith(magic):
                return cls(compression, head, read_raw)
        if skippable_bytes(head) is None:
            return None
        # lz4 and zstd files may both begin with a frame of user data: what follows it tells them apart.
        unpacker = cls("zst", head, read_raw)
        while (skip := skippable_bytes(unpacker._pending)) is not None:
            unpacker._skip(skip)
            unpacker._fill(8)
        if unpacker._pending.startswith(MAGICS["lz4"]):
            unpacker.compression = "lz4"
        return unpacker

    def read_into(self, buffer: memoryview) -> int:
        """Fills the beginning of `buffer`; returns how many bytes, 0 at the proper end."""
        while self._member is not None or self._next_member():
            data = self._unpack(len(buffer))
            if data:
                buffer[: len(data)] = data
                return len(data)
        return 0

    def _unpack(self, room: int) -> bytes:
        member = self._member
        assert member is not None
        if member.needs_input:
            self._fill(1)
            if not self._pending:
                raise DamagedStreamError(f"the {self.compression} stream ends too early")
        piece, self._pending = self._pending, b""
        try:
            data = member.decompress(piece, room)
        except _damages() as error:
            raise DamagedStreamError(f"the {self.compression} stream is damaged ({error})") from error
        if member.eof:
            self._pending = bytes(member.unused_data or b"")
            self._member = None
        return data

    def _next_member(self) -> bool:
        """Steps over padding and frames of user data to the next member; False at the end of the file."""
        self._fill(8)
        while self._pending:
            if self.compression in _ZERO_PADDED and self._pending[0] == 0:
                self._pending = self._pending.lstrip(b"\0")
            elif self.compression in _WITH_SKIPPABLE_FRAMES and (skip := skippable_bytes(self._pending)) is not None:
                self._skip(skip)
            elif self._pending.startswith(MAGICS[self.compression]):
                self._member = _MEMBERS[self.compression]()
                return True
            else:
                raise DamagedStreamError(
                    f"bytes that are not {self.compression} follow a whole {self.compression} stream"
                )
            self._fill(8)
        return False

    def _fill(self, count: int) -> None:
        while len(self._pending) < count and (piece := self._read_raw(PIECE_BYTES)):
            self._pending += piece

    def _skip(self, count: int) -> None:
        while count > len(self._pending):
            count -= len(self._pending)
            self._pending = self._read_raw(PIECE_BYTES)
            if not self._pending:
                raise DamagedStreamError(f"the {self.compression} stream ends inside a frame of user data")
        self._pending = self._pending[count:]


def _damages() -> tuple[type[Exception], ...]:
    """What the packages raise for a damaged stream."""
    import lzma
    import zlib

    import zstandard

    return (zlib.error, lzma.LZMAError, zstandard.ZstdError, OSError, RuntimeError, EOFError)


class _GzipMember:
    """zlib's object with the manners of the others."""

    def __init__(self) -> None:
        import zlib

        self._object = zlib.decompressobj(wbits=31)

    @property
    def eof(self) -> bool:
        return self._object.eof

    @property
    def needs_input(self) -> bool:
        return not self._object.unconsumed_tail

    @property
    def unused_data(self) -> bytes:
        return self._object.unused_data

    def decompress(self, data: bytes, max_length: int) -> bytes:
        return self._object.decompress(self._object.unconsumed_tail + data, max_length)


class _Part(enum.Enum):
    """The parts of a zstd frame, in order."""

    HEADER = enum.auto()
    BLOCK = enum.auto()
    CHECKSUM = enum.auto()
    END = enum.auto()


class _ZstdFrame:
    """One zstd frame (RFC 8878, section 3.1.1), handed to the library block by block.

    The library's own objects either unpack all they are given at once, without bound, or do not tell a frame that
    ended from one that was cut. A block never unpacks to more than 128 KiB.
    """

    def __init__(self) -> None:
        import zstandard

        self._object = zstandard.ZstdDecompressor(max_window_size=DECODER_MEMORY_BYTES).decompressobj()
        self._input = b""
        self._offset = 0  # of the next part in `_input`
        self._output = memoryview(b"")
        self._part = _Part.HEADER
        self._has_checksum = False

    @property
    def eof(self) -> bool:
        return self._part is _Part.END and not self._output

    @property
    def needs_input(self) -> bool:
        return not self._output and self._part_bytes() is None

    @property
    def unused_data(self) -> bytes:
        return self._input[self._offset :]

    def decompress(self, data: bytes, max_length: int) -> bytes:
        if data:
            self._input = self._input[self._offset :] + data
            self._offset = 0
        while not self._output and self._part is not _Part.END and (part_bytes := self._part_bytes()) is not None:
            following = self._following()
            piece = self._input[self._offset : self._offset + part_bytes]
            self._output = memoryview(self._object.decompress(piece))
            self._offset += part_bytes
            self._part = following
        result, self._output = bytes(self._output[:max_length]), self._output[max_length:]
        return result

    def _part_bytes(self) -> int | None:
        """Length of the next part, or None when it is not all there yet."""
        left = len(self._input) - self._offset
        if self._part is _Part.HEADER:
            count = self._header_bytes() if left >= 5 else 5
        elif self._part is _Part.BLOCK:
            count = self._block_bytes() if left >= 3 else 3
        else:
            count = 4 if self._part is _Part.CHECKSUM else 0
        return count if left >= count else None

    def _following(self) -> _Part:
        if self._part is _Part.HEADER:
            self._has_checksum = bool(self._input[self._offset + 4] & 4)
            return _Part.BLOCK
        if self._part is _Part.BLOCK and not self._block_header() & 1:
            return _Part.BLOCK
        return _Part.CHECKSUM if self._part is _Part.BLOCK and self._has_checksum else _Part.END

    def _header_bytes(self) -> int:
        descriptor = self._input[self._offset + 4]
        single_segment = descriptor >> 5 & 1
        content_size_bytes = (single_segment, 2, 4, 8)[descriptor >> 6]
        return 5 + (1 - single_segment) + (0, 1, 2, 4)[descriptor & 3] + content_size_bytes

    def _block_bytes(self) -> int:
        header = self._block_header()
        is_one_byte_repeated = header >> 1 & 3 == 1
        return 3 + (1 if is_one_byte_repeated else header >> 3)

    def _block_header(self) -> int:
        low, high = struct.unpack_from("<HB", self._input, self._offset)
        return int(low | high << 16)


def _lz4_frame() -> Member:
    import lz4.frame

    frame: Member = lz4.frame.LZ4FrameDecompressor()
    return frame


def _xz_stream() -> Member:
    import lzma

    return lzma.LZMADecompressor(lzma.FORMAT_XZ, memlimit=DECODER_MEMORY_BYTES)


def _bz2_stream() -> Member:
    import bz2

    return bz2.BZ2Decompressor()


_MEMBERS: dict[str, Callable[[], Member]] = {
    "gz": _GzipMember,
    "lz4": _lz4_frame,
    "zst": _ZstdFrame,
    "xz": _xz_stream,
    "bz2": _bz2_stream,
}


def skippable_bytes(head: bytes) -> int | None:
    """Length of the skippable frame that `head` begins with (RFC 8878, section 3.1.2; lz4 has the same), or None."""
    if len(head) < 8 or head[1:4] != b"\x2a\x4d\x18" or head[0] & 0xF0 != 0x50:
        return None
    return 8 + int.from_bytes(head[4:8], "little")
