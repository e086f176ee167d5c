# cython: language_level=3, boundscheck=False, wraparound=False, cdivision=True
"""Passes over batches of records that lie in memory one behind the other."""

from libc.stdint cimport uint8_t, uint32_t, uint64_t
from libc.string cimport memmove

from appliance.ring.layout cimport RECORD_PACKET, RECORD_PACKET_DATA, RECORD_PACKET_MIN
from appliance.ring.layout cimport record_check, record_set_u32, record_u32

from appliance.errors import FormatError


def count_packets(size_t address, size_t batch_bytes):
    cdef const uint8_t *at = <const uint8_t *> address
    cdef const uint8_t *end = at + batch_bytes
    cdef uint64_t packets = 0
    cdef uint32_t length = 1
    with nogil:
        while at < end:
            length = record_check(at, end - at)
            if length == 0:
                break
            packets += record_u32(at) == RECORD_PACKET
            at += length
    if length == 0:
        raise FormatError(f"a corrupt record at byte {at - <const uint8_t *> address} of a batch")
    return packets


def pcap_packet(bytes record, bint nanoseconds):
    cdef size_t record_bytes = len(record)
    cdef const uint8_t *at = record
    if record_check(at, record_bytes) != record_bytes or record_u32(at) != RECORD_PACKET:
        raise FormatError(f"{record_bytes} bytes are not a packet record")
    cdef bytearray out = bytearray(record_bytes)
    cdef uint8_t *out_at = out
    cdef size_t length = epb_to_pcap(at, out_at, nanoseconds)
    if length == 0:
        raise FormatError("a packet record's captured length points outside of it")
    return bytes(out[:length])


def clamp_snaplen(size_t address, size_t batch_bytes, uint32_t snaplen):
    cdef uint8_t *at = <uint8_t *> address
    cdef uint8_t *end = at + batch_bytes
    cdef uint8_t *out = at
    cdef uint64_t shortened = 0
    cdef uint32_t length = 1
    cdef uint32_t captured
    with nogil:
        while at < end:
            length = record_check(at, end - at)
            if length == 0:
                break
            captured = record_u32(at + 20)
            if record_u32(at) == RECORD_PACKET and captured > snaplen and captured <= length - RECORD_PACKET_MIN:
                shortened += 1
                out += shorten(out, at, length, captured, snaplen)
            else:
                if out != at:
                    memmove(out, at, length)
                out += length
            at += length
    if length == 0:
        raise FormatError(f"a corrupt record at byte {at - <uint8_t *> address} of a batch")
    return <size_t> (out - <uint8_t *> address), shortened


cdef uint32_t shorten(uint8_t *out, const uint8_t *record, uint32_t length, uint32_t captured,
                      uint32_t snaplen) noexcept nogil:
    """Moves one record down to `out` (at or below itself) with `snaplen` bytes of data, its options behind them."""
    cdef uint32_t options_offset = RECORD_PACKET_DATA + padded(captured)
    cdef uint32_t options_bytes = length - 4 - options_offset
    cdef uint32_t shorter = RECORD_PACKET_MIN + padded(snaplen) + options_bytes
    cdef uint32_t fill
    memmove(out, record, RECORD_PACKET_DATA + snaplen)
    for fill in range(snaplen, padded(snaplen)):
        out[RECORD_PACKET_DATA + fill] = 0
    memmove(out + RECORD_PACKET_DATA + padded(snaplen), record + options_offset, options_bytes)
    record_set_u32(out + 4, shorter)
    record_set_u32(out + 20, snaplen)
    record_set_u32(out + shorter - 4, shorter)
    return shorter
