"""What a crash left behind: a capture file that was being written, cut anywhere, becomes a whole file again."""

from __future__ import annotations

import ctypes
import os
from dataclasses import dataclass, replace
from typing import BinaryIO, Literal

import lz4.frame

from appliance.errors import CannotCreateError, FormatError, InputOutputError
from appliance.formats.encode import InterfaceDescription
from appliance.formats.pcap import PcapDecoder
from appliance.formats.reader import BATCH_BYTES, CaptureReader
from appliance.formats.stream import InputStream
from appliance.formats.unpack import PIECE_BYTES

FILE_MODE = 0o640

Outcome = Literal["whole", "salvaged", "undecodable"]


@dataclass(frozen=True, slots=True)
class Salvage:
    """What became of a leftover file.

    "whole": nothing is missing, the file stays as it is; "salvaged": `output` holds everything up to the last whole
    record; "undecodable": not even its header can be read, nothing was written. `reason` says what is wrong with it.
    """

    outcome: Outcome
    reason: str = ""
    output: str = ""
    format: str = ""  # "pcap", "pcapng" or "erf"
    compression: str = ""  # of the leftover file
    packets: int = 0
    bytes: int = 0  # of the result, before compression
    captured_bytes: int = 0
    interfaces: tuple[InterfaceDescription, ...] = ()
    interface_packets: tuple[int, ...] = ()
    first_ns: int | None = None
    last_ns: int | None = None
    late_packets: int = 0
    lost_bytes: int = 0  # unpacked bytes behind the last whole record


def salvage(
    path: str | os.PathLike[str], output: str | os.PathLike[str], *, compress: bool, mode: int = FILE_MODE
) -> Salvage:
    """Reads the leftover `path` to its last whole record, and writes that much to the new file `output`.

    The result is byte for byte the beginning of the leftover: whatever else stands in it, statistics and comments,
    stays too. With `compress` it is one lz4 frame. It is written with O_EXCL and O_NOFOLLOW, with `mode`, and synced;
    the leftover is left alone. Memory is bounded, whatever the file claims.

    Raises CannotCreateError or InputOutputError when the result cannot be written (then no part of it remains), and
    MissingInputError or MissingPermissionError when the leftover cannot be read.
    """
    try:
        found, whole_bytes = _survey(path)
    except FormatError as error:
        return Salvage("undecodable", str(error))
    if found.outcome != "salvaged":
        return found
    _write_prefix(path, os.fspath(output), whole_bytes, compress, mode)
    return replace(found, output=os.fspath(output))


def _survey(path: str | os.PathLike[str]) -> tuple[Salvage, int]:
    """Decodes the file as far as it goes; returns what it holds, and the unpacked bytes up to there."""
    batch = bytearray(BATCH_BYTES)
    address = ctypes.addressof(ctypes.c_char.from_buffer(batch))
    outcome: Outcome = "whole"
    reason = ""
    end_bytes, size = _written_bytes(path)
    with CaptureReader(path, end_bytes=end_bytes) as reader:
        if isinstance(reader.counts, PcapDecoder):
            reader.counts.zeros_are_damage = True
        try:
            while not reader.fill(address, BATCH_BYTES).end:
                pass
        except FormatError as error:
            outcome = "salvaged" if reader.counts.whole_offset else "undecodable"
            reason = str(error)
        if end_bytes < size and outcome == "whole":
            outcome, reason = "salvaged", f"{path} has a hole at byte {end_bytes}: what was written there is lost"
        counts = reader.counts
        found = Salvage(
            outcome,
            reason,
            format=reader.stream.format,
            compression=reader.stream.compression,
            packets=counts.packets,
            bytes=counts.whole_offset,
            captured_bytes=counts.captured_bytes,
            interfaces=tuple(counts.interfaces),
            interface_packets=tuple(counts.interface_packets),
            first_ns=counts.first_ns,
            last_ns=counts.last_ns,
            late_packets=counts.late_packets,
            lost_bytes=reader.rest_bytes() + size - end_bytes,
        )
        return found, counts.whole_offset


def _written_bytes(path: str | os.PathLike[str]) -> tuple[int, int]:
    """Up to the file's first hole, and in all. We leave no holes. But what goes past the page cache (direct.pxd) is on
    the disk before what waits in the cache, so that a power failure can take a page out of the middle, and the rest
    would be read as if nothing were missing. OSError is the reader's matter: it says more about it."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return 0, 0
    try:
        return os.lseek(fd, 0, os.SEEK_HOLE), os.fstat(fd).st_size
    except OSError:
        return 0, 0
    finally:
        os.close(fd)


def _write_prefix(path: str | os.PathLike[str], output: str, prefix_bytes: int, compress: bool, mode: int) -> None:
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
    try:
        fd = os.open(output, flags, 0)
    except OSError as error:
        raise CannotCreateError(f"{output} cannot be created for what {path} still holds: {error.strerror}") from error
    try:
        with open(fd, "wb") as file:
            os.fchmod(file.fileno(), mode)  # whatever the umask
            _copy_prefix(path, file, prefix_bytes, compress)
            file.flush()
            os.fsync(file.fileno())
    except BaseException as error:
        os.unlink(output)
        if isinstance(error, OSError):
            raise InputOutputError(f"{output} cannot be written: {error.strerror}") from error
        raise


def _copy_prefix(path: str | os.PathLike[str], file: BinaryIO, prefix_bytes: int, compress: bool) -> None:
    """Unpacks the leftover again and writes its first `prefix_bytes` bytes."""
    compressor = lz4.frame.LZ4FrameCompressor(content_checksum=True) if compress else None
    piece = memoryview(bytearray(PIECE_BYTES))
    stream = InputStream(path)
    try:
        if compressor:
            file.write(compressor.begin())
        while prefix_bytes:
            count = stream.read_into(piece[: min(prefix_bytes, PIECE_BYTES)])
            if count == 0:
                raise InputOutputError(f"{path} became shorter while it was salvaged; nobody else may write to it")
            file.write(compressor.compress(piece[:count]) if compressor else piece[:count])
            prefix_bytes -= count
        if compressor:
            file.write(compressor.flush())
    finally:
        stream.close()
