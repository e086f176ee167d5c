# cython: language_level=3, boundscheck=False, wraparound=False
"""Packet filters: compiled by libpcap, run by the kernel or, for files, by libpcap in user space."""
from libc.errno cimport errno
from libc.stdint cimport uint8_t, uint32_t, uint64_t
from libc.string cimport memset, strerror

from appliance.ring.layout cimport *

from appliance.errors import ConfigError, MissingInputError, MissingPermissionError

cdef extern from "pcap/pcap.h" nogil:
    ctypedef struct pcap_t:
        pass
    struct bpf_insn:
        pass
    struct bpf_program:
        unsigned int bf_len
        bpf_insn *bf_insns
    enum:
        PCAP_ERRBUF_SIZE
        PCAP_NETMASK_UNKNOWN
        PCAP_ERROR_PERM_DENIED
        PCAP_ERROR_PROMISC_PERM_DENIED
        PCAP_ERROR_NO_SUCH_DEVICE
        PCAP_ERROR_IFACE_NOT_UP
    pcap_t *pcap_create(const char *source, char *errbuf)
    pcap_t *pcap_open_dead(int linktype, int snaplen)
    int pcap_set_snaplen(pcap_t *handle, int snaplen)
    int pcap_activate(pcap_t *handle)
    int pcap_compile(pcap_t *handle, bpf_program *program, const char *text, int optimize, uint32_t netmask)
    char *pcap_geterr(pcap_t *handle)
    const char *pcap_statustostr(int error)
    void pcap_freecode(bpf_program *program)
    void pcap_close(pcap_t *handle)
    unsigned int bpf_filter(const bpf_insn *code, const uint8_t *packet, unsigned int length, unsigned int captured)

cdef extern from "linux/filter.h" nogil:
    struct sock_filter:
        pass
    struct sock_fprog:
        unsigned short len
        sock_filter *filter

cdef extern from "sys/socket.h" nogil:
    int setsockopt(int fd, int level, int name, const void *value, uint32_t length)
    enum:
        SOL_SOCKET
        SO_ATTACH_FILTER

cdef enum:
    INSTRUCTION_BYTES = 8


cdef class Filter:
    """A compiled program. `live` says that it reads VLAN tags where the kernel keeps them, beside the packet."""
    cdef bpf_program program
    cdef readonly str text
    cdef readonly bint live

    def __cinit__(self):
        memset(&self.program, 0, sizeof(self.program))

    def __dealloc__(self):
        pcap_freecode(&self.program)

    @property
    def instructions(self):
        """The program as bytes, 8 an instruction, as the kernel takes it (struct sock_filter)."""
        return (<uint8_t *>self.program.bf_insns)[: self.program.bf_len * INSTRUCTION_BYTES]

    def matches(self, const uint8_t[::1] packet not None, original_length=None):
        """Whether a packet of a file passes (user space)."""
        cdef unsigned int captured = packet.shape[0]
        cdef unsigned int length = captured if original_length is None else original_length
        if captured == 0:
            return False
        return bpf_filter(self.program.bf_insns, &packet[0], length, captured) != 0

    def keep_matching(self, uint64_t address, uint64_t length):
        """Filters a batch of packet records in place; other records stay.

        `address`, `length`: whole records, as a decoder wrote them. Returns (bytes kept, packets rejected).
        """
        cdef uint8_t *records = <uint8_t *>address
        cdef uint64_t at = 0
        cdef uint64_t kept = 0
        cdef uint64_t rejected = 0
        cdef uint32_t size, captured
        with nogil:
            while at < length:
                size = record_check(records + at, length - at)
                if size == 0:
                    break
                if record_u32(records + at) == RECORD_PACKET:
                    captured = record_u32(records + at + 20)
                    if captured > size - RECORD_PACKET_MIN or bpf_filter(
                            self.program.bf_insns, records + at + RECORD_PACKET_DATA,
                            record_u32(records + at + 24), captured) == 0:
                        rejected += 1
                        at += size
                        continue
                if kept != at:
                    move(records + kept, records + at, size)
                kept += size
                at += size
        if at < length:
            raise ValueError("records: a record is corrupt")
        return kept, rejected


cdef extern from "string.h" nogil:
    void move "memmove"(void *target, const void *source, size_t length)


def compile_live(str interface, str text, int snaplen):
    """Compiles for a live interface, on an activated handle of it, because only that knows where VLAN tags are.

    The program returns `snaplen` for packets that pass. Raises ConfigError for a bad expression, MissingInputError for
    an interface that does not exist, MissingPermissionError without CAP_NET_RAW.
    """
    cdef char error[PCAP_ERRBUF_SIZE]
    cdef pcap_t *handle = pcap_create(interface.encode(), error)
    cdef int status
    if handle == NULL:
        raise MissingInputError(f"interface {interface}: {error.decode(errors='replace')}")
    try:
        pcap_set_snaplen(handle, snaplen)
        status = pcap_activate(handle)
        if status == PCAP_ERROR_PERM_DENIED or status == PCAP_ERROR_PROMISC_PERM_DENIED:
            raise MissingPermissionError(f"interface {interface}: CAP_NET_RAW is missing")
        if status == PCAP_ERROR_NO_SUCH_DEVICE:
            raise MissingInputError(f"interface {interface} does not exist")
        if status < 0 and status != PCAP_ERROR_IFACE_NOT_UP:
            reason = pcap_geterr(handle).decode(errors="replace") or pcap_statustostr(status).decode()
            raise MissingInputError(f"interface {interface} cannot be opened: {reason}")
        return compiled(handle, text, interface, True)
    finally:
        pcap_close(handle)


def compile_offline(int linktype, str text, int snaplen=262144):
    """Compiles for packets of a file. Raises ConfigError for a bad expression."""
    cdef pcap_t *handle = pcap_open_dead(linktype, snaplen)
    if handle == NULL:
        raise MemoryError
    try:
        return compiled(handle, text, f"link type {linktype}", False)
    finally:
        pcap_close(handle)


cdef Filter compiled(pcap_t *handle, str text, str where, bint live):
    cdef Filter result = Filter()
    if pcap_compile(handle, &result.program, text.encode(), 1, PCAP_NETMASK_UNKNOWN) != 0:
        raise ConfigError(f"filter {text!r} on {where}: {pcap_geterr(handle).decode(errors='replace')}")
    result.text = text
    result.live = live
    return result


def attach(int fd, bytes instructions not None):
    """Makes the kernel run a program (8 bytes an instruction) on a socket. OSError when it refuses."""
    cdef sock_fprog program
    program.len = len(instructions) // INSTRUCTION_BYTES
    program.filter = <sock_filter *><uint8_t *>instructions
    if setsockopt(fd, SOL_SOCKET, SO_ATTACH_FILTER, &program, sizeof(program)) != 0:
        raise OSError(errno, "the kernel refuses the packet filter: " + strerror(errno).decode())


def accept_all(uint32_t snaplen):
    """A program that passes every packet, cut to `snaplen`: `ret snaplen`."""
    return (0x06).to_bytes(2, "little") + b"\0\0" + snaplen.to_bytes(4, "little")


def reject_all():
    """A program that passes nothing: the way to stop a socket without losing what it holds."""
    return accept_all(0)
