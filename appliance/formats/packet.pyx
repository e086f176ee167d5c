# cython: language_level=3, boundscheck=False, wraparound=False, cdivision=True
"""Packets as objects, and lists of them from records and to the bytes of files and onto the wire."""

from cpython.bytearray cimport PyByteArray_AS_STRING, PyByteArray_FromStringAndSize, PyByteArray_Resize
from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_FromStringAndSize, PyBytes_GET_SIZE
from libc.errno cimport EAGAIN, EINTR, ENOBUFS, errno
from libc.stdint cimport int64_t, uint8_t, uint32_t, uint64_t
from libc.string cimport memcpy, memset

from appliance.formats.decoder cimport PACKET_MAX_BYTES
from appliance.formats.erf cimport erf_packet_at
from appliance.formats.record cimport packet_record, padded, pcap_packet_at
from appliance.ring.layout cimport (
    RECORD_PACKET, RECORD_PACKET_DATA, RECORD_PACKET_MIN, record_check, record_set_u32, record_timestamp_ns,
    record_u32,
)

import os

from appliance.errors import FormatError

PCAPNG, PCAP_NS, PCAP_US, ERF = range(4)
TIMESTAMP_MAX_NS = 2**63 - 2

cdef extern from "<poll.h>" nogil:
    struct pollfd:
        int fd
        short events
        short revents
    int POLLOUT
    int poll(pollfd *fds, unsigned long count, int timeout_ms)

cdef extern from "<sys/uio.h>" nogil:
    struct iovec:
        void *iov_base
        size_t iov_len

cdef extern from "<sys/socket.h>" nogil:
    struct msghdr:
        iovec *msg_iov
        size_t msg_iovlen
    struct mmsghdr:
        msghdr msg_hdr
        unsigned int msg_len
    int sendmmsg(int fd, mmsghdr *messages, unsigned int count, int flags)

cdef enum Layout:
    TO_PCAPNG
    TO_PCAP_NS
    TO_PCAP_US
    TO_ERF

cdef enum:
    SEND_AT_ONCE = 64
    SEND_TRIES = 200
    SEND_POLL_MS = 50


cdef class Packet:
    cdef readonly int64_t timestamp_ns
    cdef readonly uint32_t wire_length
    cdef readonly uint32_t link_type
    cdef readonly bytes data

    def __init__(self, timestamp_ns, bytes data not None, wire_length=None, link_type=1):
        if isinstance(timestamp_ns, float):
            raise TypeError("a packet's time is a whole number of nanoseconds: a float would lose digits")
        if not 0 <= timestamp_ns <= TIMESTAMP_MAX_NS:
            raise ValueError(f"a packet's time is 0 to {TIMESTAMP_MAX_NS} ns, not {timestamp_ns}")
        if len(data) > PACKET_MAX_BYTES:
            raise ValueError(f"a packet has at most {PACKET_MAX_BYTES} bytes, not {len(data)}")
        if wire_length is None:
            wire_length = len(data)
        if not len(data) <= wire_length <= 0xFFFFFFFF:
            raise ValueError(f"a packet of {len(data)} bytes cannot have been {wire_length} bytes long on the wire")
        if not 0 <= link_type <= 0xFFFF:
            raise ValueError(f"a link type is 0 to 65535, not {link_type}")
        self.timestamp_ns = timestamp_ns
        self.wire_length = wire_length
        self.link_type = link_type
        self.data = data

    def __repr__(self):
        return (f"Packet(timestamp_ns={self.timestamp_ns}, data=<{len(self.data)} bytes>, "
                f"wire_length={self.wire_length}, link_type={self.link_type})")

    def __eq__(self, other):
        if not isinstance(other, Packet):
            return NotImplemented
        return self._fields() == (<Packet> other)._fields()

    def __hash__(self):
        return hash(self._fields())

    def __reduce__(self):
        return Packet, (self.timestamp_ns, self.data, self.wire_length, self.link_type)

    cdef tuple _fields(self):
        return self.timestamp_ns, self.data, self.wire_length, self.link_type


cdef uint32_t whole_record(const uint8_t *at, const uint8_t *end, size_t batch, size_t interfaces) except 0:
    """Its length; FormatError names its offset in the batch. Of a packet, its data and its interface are there too."""
    cdef uint32_t length = record_check(at, end - at)
    if length == 0:
        raise FormatError(f"a corrupt record at byte {<size_t> at - batch} of a batch")
    if record_u32(at) == RECORD_PACKET:
        if record_u32(at + 20) > length - RECORD_PACKET_MIN or record_u32(at + 8) >= interfaces:
            raise FormatError(f"a corrupt packet at byte {<size_t> at - batch} of a batch")
    return length


def unpack(size_t address, size_t batch_bytes, linktypes):
    cdef const uint8_t *at = <const uint8_t *> address
    cdef const uint8_t *end = at + batch_bytes
    cdef uint32_t length, captured
    cdef list packets = []
    cdef list types = list(linktypes)
    cdef Packet packet
    while at < end:
        length = whole_record(at, end, address, len(types))
        if record_u32(at) == RECORD_PACKET:
            captured = record_u32(at + 20)
            packet = Packet.__new__(Packet)
            packet.timestamp_ns = record_timestamp_ns(at)
            packet.wire_length = max(captured, record_u32(at + 24))
            packet.link_type = types[record_u32(at + 8)]
            packet.data = PyBytes_FromStringAndSize(<const char *> at + RECORD_PACKET_DATA, captured)
            packets.append(packet)
        at += length
    return packets


def link_types(list packets):
    cdef list found = []
    cdef uint32_t last = 0xFFFFFFFFU
    for entry in packets:
        if type(entry) is not Packet:
            raise TypeError(f"{entry!r:.80} is not a Packet")
        if (<Packet> entry).link_type != last:
            last = (<Packet> entry).link_type
            if last not in found:
                found.append(last)
    return found


def encode(list packets, int layout, dict numbers):
    cdef Packet packet
    cdef size_t room = 0, written, total = 0
    cdef uint8_t *out
    cdef uint32_t number = 0, last = 0xFFFFFFFFU
    link_types(packets)
    for entry in packets:
        room += RECORD_PACKET_MIN + padded(<uint32_t> PyBytes_GET_SIZE((<Packet> entry).data))
    result = PyByteArray_FromStringAndSize(NULL, room)
    out = <uint8_t *> PyByteArray_AS_STRING(result)
    for entry in packets:
        packet = <Packet> entry
        if packet.link_type != last:
            last = packet.link_type
            number = numbers[last]
        written = encode_one(out + total, <Layout> layout, number, last, packet.timestamp_ns,
                             <uint32_t> PyBytes_GET_SIZE(packet.data), packet.wire_length,
                             <const uint8_t *> PyBytes_AS_STRING(packet.data))
        if written == 0:
            raise ValueError(f"{packet!r} cannot be held by this format")
        total += written
    PyByteArray_Resize(result, total)
    return result


def encode_records(size_t address, size_t batch_bytes, int layout, linktypes, numbers):
    cdef const uint8_t *at = <const uint8_t *> address
    cdef const uint8_t *end = at + batch_bytes
    cdef uint32_t length, captured, interface
    cdef size_t written, total = 0, packets = 0
    cdef uint8_t *out
    cdef list types = list(linktypes)
    cdef list targets = list(numbers)
    cdef uint32_t last = 0xFFFFFFFFU, linktype = 0, number = 0
    result = PyByteArray_FromStringAndSize(NULL, batch_bytes)
    out = <uint8_t *> PyByteArray_AS_STRING(result)
    while at < end:
        length = whole_record(at, end, address, len(targets))
        if record_u32(at) == RECORD_PACKET:
            captured = record_u32(at + 20)
            interface = record_u32(at + 8)
            if interface != last:
                last = interface
                linktype, number = types[interface], targets[interface]
            if layout == TO_PCAPNG:
                memcpy(out + total, at, length)
                record_set_u32(out + total + 8, number)
                written = length
            else:
                written = encode_one(out + total, <Layout> layout, number, linktype, record_timestamp_ns(at), captured,
                                     record_u32(at + 24), at + RECORD_PACKET_DATA)
            if written == 0:
                raise ValueError(f"a packet of link type {linktype} cannot be held by this format")
            total += written
            packets += 1
        at += length
    PyByteArray_Resize(result, total)
    return result, packets


cdef inline size_t encode_one(uint8_t *out, Layout layout, uint32_t number, uint32_t linktype, uint64_t timestamp_ns,
                              uint32_t captured, uint32_t original, const uint8_t *data) noexcept nogil:
    """One packet, at most as long as its record would be; 0: the format cannot hold it."""
    if layout == TO_PCAPNG:
        packet_record(out, number, timestamp_ns, captured, original, data, 0)
        return RECORD_PACKET_MIN + padded(captured)
    if layout == TO_ERF:
        return erf_packet_at(out, number, linktype, timestamp_ns, captured, original, data)
    return pcap_packet_at(out, timestamp_ns, captured, original, data, layout == TO_PCAP_NS)


def send(int fd, list packets):
    cdef size_t count = len(packets), done = 0
    cdef unsigned int batch, i
    cdef int sent, tries = 0
    cdef pollfd waiting
    cdef iovec[SEND_AT_ONCE] pieces
    cdef mmsghdr[SEND_AT_ONCE] messages
    link_types(packets)
    while done < count:
        batch = <unsigned int> min(<size_t> SEND_AT_ONCE, count - done)
        memset(messages, 0, sizeof(messages))
        for i in range(batch):
            data = (<Packet> packets[done + i]).data
            pieces[i].iov_base = <void *> PyBytes_AS_STRING(data)
            pieces[i].iov_len = PyBytes_GET_SIZE(data)
            messages[i].msg_hdr.msg_iov = &pieces[i]
            messages[i].msg_hdr.msg_iovlen = 1
        with nogil:
            sent = sendmmsg(fd, messages, batch, 0)
        if sent > 0:
            done += sent
            tries = 0
        elif errno not in (EINTR, EAGAIN, ENOBUFS) or tries == SEND_TRIES:
            return done, os.strerror(errno)
        else:
            tries += 1
            waiting = pollfd(fd, <short> POLLOUT, 0)
            with nogil:
                poll(&waiting, 1, SEND_POLL_MS)
    return done, ""
