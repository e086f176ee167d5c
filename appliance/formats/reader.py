"""Capture files of every kind that is read here, as batches of ring records."""

from __future__ import annotations

import ctypes
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Self

from appliance.errors import FormatError
from appliance.formats.decoder import (
    NEVER_NS,
    STATUS_DAMAGED,
    STATUS_END,
    STATUS_NEED_INPUT,
    STATUS_NOT_YET,
    STATUS_OUTPUT_FULL,
    Decoder,
)
from appliance.formats.encode import InterfaceDescription
from appliance.formats.erf import ErfDecoder
from appliance.formats.fixed import LAYOUTS, FixedDecoder
from appliance.formats.pcap import PcapDecoder
from appliance.formats.pcapng import PcapngDecoder
from appliance.formats.stream import InputStream, Observer

RECORD_MAX_BYTES = 1 << 20
READ_BYTES = 262_144  # at a time: small enough to stay in the cache between reading and decoding
BATCH_BYTES = 1 << 20
_DECODERS: dict[str, type[Decoder]] = {"pcap": PcapDecoder, "pcapng": PcapngDecoder, "erf": ErfDecoder}


@dataclass(frozen=True, slots=True)
class Filled:
    """What one `fill` did."""

    produced_bytes: int
    end: bool = False  # the file is over, and whole
    next_ns: int | None = None  # the next packet is later than `until_ns`; this is its time
    needed_room: int = 0  # the next record needs so many bytes


class CaptureReader:
    """One capture file, read from its beginning to its end. `counts` has the packets, times and interfaces so far."""

    def __init__(
        self,
        path: str | os.PathLike[str],
        observer: Observer | None = None,
        *,
        by_reference: bool = False,
        format: str = "",
        end_bytes: int = sys.maxsize,
    ) -> None:
        """Opens the file ("-" is standard input) and recognises it by its first bytes, or takes it for a `format` that
        nothing in the file tells: one of fixed.LAYOUTS, or "erf" for a file that may be empty.

        Raises MissingInputError, MissingPermissionError or InputOutputError when it cannot be read, and FormatError
        when it is nothing that is read here. `observer` gets each piece of the file as it is on disk.

        With `by_reference`, `fill` gives a PacketReference (record.pxd) for each packet and nothing else: they point
        into this reader's buffer, and are valid until the next `fill`. The file is taken to end at `end_bytes`.
        """
        self.stream = InputStream(path, observer, format, end_bytes)
        self.counts = _decoder(self.stream.format, by_reference)
        self._buffer = bytearray(RECORD_MAX_BYTES + READ_BYTES)
        self._view = memoryview(self._buffer)
        self._address = _address(self._buffer)
        self._begin = 0  # the bytes [begin, end) of the buffer are not decoded yet
        self._end = 0
        self._read_bytes = 0
        self._input_ended = False

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self.stream.close()

    @property
    def interfaces(self) -> list[InterfaceDescription]:
        """Those announced so far, by their number."""
        return self.counts.interfaces

    def fill(self, address: int, room: int, until_ns: int = NEVER_NS) -> Filled:
        """Decodes whole records into `room` bytes of memory at `address`.

        It returns when the room is full, and also when a piece of the file is done and records were produced: a slow
        pipe does not hold them back. Room for 1 MiB is always enough for a record.

        A file that is cut or damaged gives all its whole records first; the call after them raises FormatError,
        which says where, and how many packets were whole.
        """
        produced = 0
        while True:
            status, consumed, written = self.counts.decode(
                self._address + self._begin,
                self._end - self._begin,
                address + produced,
                room - produced,
                self._input_ended,
                until_ns,
            )
            self._begin += consumed
            produced += written
            if status != STATUS_NEED_INPUT:
                break
            if produced:
                return Filled(produced)
            self._refill()
        if status == STATUS_OUTPUT_FULL:
            return Filled(produced, needed_room=self.counts.needed_room)
        if status == STATUS_NOT_YET:
            return Filled(produced, next_ns=self.counts.next_ns)
        if produced:
            return Filled(produced)
        if status == STATUS_DAMAGED or self.stream.damage:
            raise FormatError(self._damage(), self.counts.packets)
        assert status == STATUS_END
        return Filled(0, end=True)

    def rest_bytes(self) -> int:
        """Unpacked bytes behind the last whole record. Reads the file to its end, so nothing can be filled after it."""
        while count := self.stream.read_into(self._view):
            self._read_bytes += count
        return self._read_bytes - self.counts.whole_offset

    def _refill(self) -> None:
        """Moves what is not decoded to the buffer's front and reads a piece behind it."""
        left = self._end - self._begin
        if self._begin:
            self._view[:left] = self._view[self._begin : self._end]
        self._begin, self._end = 0, left
        count = self.stream.read_into(self._view[left : left + READ_BYTES])
        self._end += count
        self._read_bytes += count
        self._input_ended = count == 0

    def _damage(self) -> str:
        """What is wrong and where; a compressed stream's own damage comes first, because the rest follows from it."""
        where = "of its unpacked bytes " if self.stream.compression else ""
        reason = self.stream.damage or self.counts.damage
        return (
            f"{self.stream.name} is damaged behind byte {self.counts.whole_offset} {where}"
            f"({self.counts.packets} packets are whole): {reason}"
        )


def _decoder(format: str, by_reference: bool) -> Decoder:
    if format not in LAYOUTS:
        return _DECODERS[format](by_reference)
    decoder = FixedDecoder(by_reference)
    decoder.use(format)
    return decoder


def read_records(path: str | os.PathLike[str]) -> Iterator[memoryview]:
    """The records of a capture file in batches; each batch is whole records, valid until the next one is asked for.

    Raises what CaptureReader raises; FormatError for damage comes behind the last whole record.
    """
    batch = bytearray(BATCH_BYTES)
    address = _address(batch)
    view = memoryview(batch)
    with CaptureReader(path) as reader:
        while not (filled := reader.fill(address, BATCH_BYTES)).end:
            yield view[: filled.produced_bytes]


def read_interfaces(path: str | os.PathLike[str], format: str = "") -> list[InterfaceDescription]:
    """The interfaces that a file describes before its first packet (in a pcap file the only one)."""
    batch = bytearray(BATCH_BYTES)
    address = _address(batch)
    with CaptureReader(path, format=format) as reader:
        filled = reader.fill(address, BATCH_BYTES, until_ns=-1)
        while not filled.end and filled.next_ns is None and reader.counts.packets == 0:
            filled = reader.fill(address, BATCH_BYTES, until_ns=-1)
        return reader.interfaces


def _address(buffer: bytearray) -> int:
    return ctypes.addressof(ctypes.c_char.from_buffer(buffer))
