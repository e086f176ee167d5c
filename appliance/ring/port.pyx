# cython: language_level=3, boundscheck=False, wraparound=False, cdivision=True
"""A port's memory, and the monitor's end of it: commands, rules, figures, and the captured bytes as they lie there."""
from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_FromStringAndSize
from libc.errno cimport errno
from libc.string cimport memcpy, memset, strerror
from posix.mman cimport MAP_FAILED, MAP_SHARED, PROT_READ, PROT_WRITE, mmap, munmap

from appliance.ring.port cimport *

import fcntl
import os

COMMAND_START = PORT_COMMAND_START
COMMAND_STOP = PORT_COMMAND_STOP
FILTERS = PORT_FILTERS
FILTER_INSTRUCTIONS = PORT_FILTER_INSTRUCTIONS
FILTER_TEXT_BYTES = PORT_FILTER_TEXT_BYTES
MIN_CAPACITY_BYTES = 1 << 16
STATES = ("stopped", "waiting", "capturing")
STOPPED_BECAUSE = ("", "full", "user", "trigger", "bad filter")
PACKET_HEADER_BYTES = sizeof(port_packet)
NO_LATENCY = PORT_NO_LATENCY


def allocate(uint64_t capacity, uint64_t generation, str name):
    """A memfd for a port with a buffer of `capacity` bytes, a power of two of at least 64 KiB. Nobody can change its
    size; only its first page exists (see PortMemory.provide)."""
    cdef port_header header
    if capacity < MIN_CAPACITY_BYTES or capacity & (capacity - 1):
        raise ValueError(f"a port's buffer is a power of two of at least 64 KiB, not {capacity}")
    fd = os.memfd_create(f"port-{name}"[:200], os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        os.ftruncate(fd, PORT_DATA_OFFSET + capacity)
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL)
        memset(&header, 0, sizeof(header))
        header.magic = PORT_MAGIC
        header.version = PORT_VERSION
        header.capacity = capacity
        header.generation = generation
        os.pwrite(fd, (<uint8_t *>&header)[:sizeof(header)], 0)
    except OSError:
        os.close(fd)
        raise
    return fd


cdef class PortMemory:
    """A port's memory in this process. See port.pyi."""

    def __cinit__(self, int fd, uint64_t expected_generation):
        cdef uint64_t file_bytes = os.fstat(fd).st_size
        cdef uint8_t *base
        if file_bytes < PORT_DATA_OFFSET + MIN_CAPACITY_BYTES:
            raise ValueError("a port's memory is too small to be one")
        self.capacity = file_bytes - PORT_DATA_OFFSET
        if self.capacity & (self.capacity - 1):
            raise ValueError("a port's capacity is not a power of two")
        base = <uint8_t *>mmap(NULL, file_bytes, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0)
        if base == <uint8_t *>MAP_FAILED:
            raise OSError(errno, "a port's memory cannot be mapped: " + strerror(errno).decode())
        self.mapped_bytes = file_bytes
        self.header = <port_header *>base
        self.rules = <port_rules *>(base + PORT_SETTINGS_OFFSET)
        self.streams = <port_stream *>(base + PORT_STREAMS_OFFSET)
        self.data = base + PORT_DATA_OFFSET
        if (
            self.header.magic != PORT_MAGIC or self.header.version != PORT_VERSION
            or self.header.capacity != self.capacity or self.header.generation != expected_generation
        ):
            raise ValueError("a port's header does not match: another version, another run, or not a port")

    def __dealloc__(self):
        if self.mapped_bytes:
            munmap(self.header, self.mapped_bytes)

    @staticmethod
    def provide(int fd):
        """All of the memory exists from now on: a page that could not be had later would end the worker."""
        os.posix_fallocate(fd, 0, os.fstat(fd).st_size)

    def command(self, uint32_t number, int64_t now_ns):
        """Tells the worker; returns the number of the request, for `is_answered`. The caller wakes it."""
        self.header.command = number
        self.header.request_ns = now_ns
        store_u64(&self.header.request, self.header.request + 1)
        return self.header.request

    def is_answered(self, uint64_t request):
        return load_u64(&self.header.answered) >= request

    def configure(self, uint32_t start_criterion, uint32_t start_filter, uint32_t stop_criterion, uint32_t stop_filter,
                  uint32_t keep, uint32_t keep_index, uint32_t byte_count, uint32_t pretrigger_packets,
                  uint32_t fcs_bytes):
        """What the next start goes by. ValueError: out of range."""
        cdef port_settings *settings = &self.rules.settings
        if (start_criterion > PORT_START_PLDERR or stop_criterion > PORT_STOP_USERSTOP or keep > PORT_KEEP_PLDERR
                or start_filter >= PORT_FILTERS or stop_filter >= PORT_FILTERS or fcs_bytes not in (0, 4)):
            raise ValueError("a criterion is out of range")
        settings.start_criterion = start_criterion
        settings.start_filter = start_filter
        settings.stop_criterion = stop_criterion
        settings.stop_filter = stop_filter
        settings.keep = keep
        settings.keep_index = keep_index
        settings.byte_count = byte_count
        settings.pretrigger_packets = pretrigger_packets
        settings.fcs_bytes = fcs_bytes

    def set_filter(self, uint32_t index, bytes text not None, bytes program not None):
        """The filter with this index; an empty text removes it. ValueError: too many, too long."""
        cdef port_filter *target
        if index >= PORT_FILTERS or len(text) > PORT_FILTER_TEXT_BYTES or len(program) % 8 or (
                len(program) > PORT_FILTER_INSTRUCTIONS * 8):
            raise ValueError("a filter is out of range")
        target = &self.rules.filters[index]
        target.instructions = <uint32_t>(len(program) // 8)
        target.text_bytes = <uint32_t>len(text)
        memcpy(<void *>target.text, PyBytes_AS_STRING(text), len(text))
        memcpy(<void *>target.code, PyBytes_AS_STRING(program), len(program))

    def filters(self):
        """{index: expression}"""
        cdef uint32_t i
        found = {}
        for i in range(PORT_FILTERS):
            if 0 < self.rules.filters[i].text_bytes <= PORT_FILTER_TEXT_BYTES:
                found[i] = bytes(self.rules.filters[i].text[:self.rules.filters[i].text_bytes])
        return found

    @property
    def settings(self):
        """What was configured last, in the order of `configure`."""
        cdef port_settings *s = &self.rules.settings
        return (s.start_criterion, s.start_filter, s.stop_criterion, s.stop_filter, s.keep, s.keep_index,
                s.byte_count, s.pretrigger_packets, s.fcs_bytes)

    def figures(self):
        """What the worker says of itself, as {name: number}; `state` and `stopped_because` as text."""
        cdef port_header *h = self.header
        return {
            "state": STATES[min(load_u32(&h.state), 2)],
            "stopped_because": STOPPED_BECAUSE[min(h.stopped_because, 4)],
            "linktype": h.linktype,
            "captures": h.captures,
            "start_ns": h.start_ns,
            "packets": h.packets,
            "seen_packets": h.seen_packets,
            "overwritten_packets": h.overwritten_packets,
            "unknown_stream_packets": h.unknown_streams,
            "head": load_u64(&h.head),
            "tail": load_u64(&h.tail),
            "buffer_bytes": self.capacity,
        }

    def streams_seen(self):
        """A dictionary for each stream of test payloads since the start."""
        cdef uint32_t i
        cdef port_stream *s
        found = []
        for i in range(PORT_STREAMS):
            s = &self.streams[i]
            if s.packets:
                found.append({
                    "stream": s.stream, "packets": s.packets, "bytes": s.bytes, "lost": s.lost,
                    "misordered": s.misordered, "payload_errors": s.payload_errors,
                    "latency_packets": s.latency_packets, "latency_min_ns": s.latency_min_ns,
                    "latency_max_ns": s.latency_max_ns, "latency_sum_ns": s.latency_sum_ns,
                })
        return sorted(found, key=lambda one: one["stream"])

    def read(self, uint64_t position, uint64_t limit):
        """(position, bytes): at most `limit` bytes from `position` on, or from the tail if that has moved past it.

        Empty at the head. The tail is always the beginning of a packet."""
        cdef uint64_t head = load_u64(&self.header.head)
        cdef uint64_t tail = load_u64(&self.header.tail)
        cdef uint64_t length, first
        cdef bytes copied
        if tail > head or head - tail > self.capacity:
            raise ValueError("a port's positions are damaged")
        if position < tail or position > head:
            position = tail
        length = min(head - position, limit)
        copied = PyBytes_FromStringAndSize(NULL, length)
        first = min(length, self.capacity - (position & (self.capacity - 1)))
        memcpy(PyBytes_AS_STRING(copied), self.data + (position & (self.capacity - 1)), first)
        memcpy(PyBytes_AS_STRING(copied) + first, self.data, length - first)
        PORT_FENCE()
        tail = load_u64(&self.header.tail)
        if position >= tail:
            return position, copied
        if tail - position >= length:
            return tail, b""
        return tail, copied[tail - position:]
