# cython: language_level=3, boundscheck=False, wraparound=False, cdivision=True
"""Live capture through libpcap: our own small binding, and what it shares with pypcap (the way into the rings)."""
from libc.stdint cimport int64_t, uint8_t, uint16_t, uint32_t, uint64_t
from libc.string cimport memcpy, memset

from appliance.capture.application cimport Inspection, Inspector, inspection_of
from appliance.capture.headers cimport IGNORED_COUNTS, digest_packet
from appliance.ring.digest cimport DIGEST_EXTENDED_MAX_BYTES, DIGEST_MAX_BYTES
from appliance.ring.layout cimport *
from appliance.ring.ring cimport Producer

from appliance.counters import IGNORED_FIELDS
from appliance.errors import ConfigError, InputOutputError, MissingInputError, MissingPermissionError

cdef extern from "sys/time.h" nogil:
    struct timeval:
        long tv_sec
        long tv_usec

cdef extern from "pcap/pcap.h" nogil:
    ctypedef struct pcap_t:
        pass
    struct pcap_pkthdr:
        timeval ts
        uint32_t caplen
        uint32_t len
    struct pcap_stat:
        unsigned int ps_recv
        unsigned int ps_drop
    struct bpf_program:
        pass
    enum:
        PCAP_ERRBUF_SIZE
        PCAP_ERROR_PERM_DENIED
        PCAP_ERROR_PROMISC_PERM_DENIED
        PCAP_ERROR_NO_SUCH_DEVICE
        PCAP_TSTAMP_PRECISION_NANO
    pcap_t *pcap_create(const char *source, char *errbuf)
    int pcap_set_snaplen(pcap_t *handle, int snaplen)
    int pcap_set_promisc(pcap_t *handle, int promisc)
    int pcap_set_timeout(pcap_t *handle, int timeout_ms)
    int pcap_set_buffer_size(pcap_t *handle, int length)
    int pcap_set_tstamp_precision(pcap_t *handle, int precision)
    int pcap_get_tstamp_precision(pcap_t *handle)
    int pcap_activate(pcap_t *handle)
    int pcap_setnonblock(pcap_t *handle, int on, char *errbuf)
    int pcap_get_selectable_fd(pcap_t *handle)
    int pcap_datalink(pcap_t *handle)
    int pcap_next_ex(pcap_t *handle, pcap_pkthdr **header, const uint8_t **data)
    int pcap_stats(pcap_t *handle, pcap_stat *stats)
    int pcap_compile(pcap_t *handle, bpf_program *program, const char *text, int optimize, uint32_t netmask)
    int pcap_setfilter(pcap_t *handle, bpf_program *program)
    void pcap_freecode(bpf_program *program)
    char *pcap_geterr(pcap_t *handle)
    const char *pcap_statustostr(int error)
    void pcap_close(pcap_t *handle)

cdef uint32_t NETMASK_UNKNOWN = 0xFFFFFFFF

cdef enum:
    DLT_RAW = 12
    LINKTYPE_RAW = 101
    BUFFER_BYTES = 67108864
    BLOCK_TIMEOUT_MS = 10
    BATCH_PACKETS = 4096


cdef class PacketSink:
    """See libpcap.pyi."""
    cdef Producer records
    cdef Producer digests
    cdef object page
    cdef uint16_t linktype
    cdef uint32_t snaplen
    cdef uint64_t newest_ns
    cdef uint64_t read_packets, read_bytes, dropped_ring, published, published_bytes, truncated, late
    cdef uint64_t digests_written, digests_dropped
    cdef uint64_t ignored[IGNORED_COUNTS]
    cdef bint inner
    cdef Inspector inspector  # None: payloads are not looked at
    cdef Inspection *inspection
    cdef uint32_t digest_room  # the longest digest

    def __cinit__(self, Producer records not None, Producer digests, page, int linktype, uint32_t snaplen,
                  *, bint inner=False, Inspector inspector=None):
        self.records = records
        self.digests = digests
        self.page = page
        self.linktype = linktype
        self.snaplen = snaplen
        self.inner = inner
        self.inspector = inspector
        self.inspection = inspection_of(inspector)
        self.digest_room = DIGEST_MAX_BYTES if inspector is None else DIGEST_EXTENDED_MAX_BYTES
        # A successor counts on from what its predecessor had published; what it had only read is lost with it.
        self.published = records.words[COMMIT_WORD_PUBLISHED]
        self.read_packets = page["read_packets"]
        self.read_bytes = page["read_bytes"]
        self.dropped_ring = page["dropped_ring_packets"]
        self.published_bytes = page["published_bytes"]
        self.truncated = page["truncated_packets"]
        self.late = page["late_packets"]
        self.digests_written = page["digests_published"]
        self.digests_dropped = page["digests_dropped"]
        for i in range(IGNORED_COUNTS):
            self.ignored[i] = page[IGNORED_FIELDS[i]]

    def put(self, uint64_t timestamp_ns, const uint8_t[::1] data not None, uint32_t original_length):
        if data.shape[0]:
            self.copy(timestamp_ns, &data[0], <uint32_t>data.shape[0], original_length)

    cdef void copy(self, uint64_t timestamp_ns, const uint8_t *data, uint32_t captured,
                   uint32_t original) noexcept nogil:
        cdef uint32_t padded, length
        cdef uint8_t *room
        self.read_packets += 1
        self.read_bytes += original
        if captured > self.snaplen:
            captured = self.snaplen
        if timestamp_ns < self.newest_ns:
            self.late += 1
        else:
            self.newest_ns = timestamp_ns
        if self.digests is not None:
            self.digest(timestamp_ns, data, captured, original)
        padded = (captured + 3) & ~<uint32_t>3
        length = RECORD_PACKET_MIN + padded
        room = ring_reserve(&self.records.view, length)
        if room == NULL:
            self.dropped_ring += 1
            return
        record_set_u32(room + 20, captured)
        record_set_u32(room + 24, original)
        memcpy(room + RECORD_PACKET_DATA, data, captured)
        memset(room + RECORD_PACKET_DATA + captured, 0, padded - captured)
        record_set_prefix(room, RECORD_PACKET, length, 0, timestamp_ns)
        ring_advance(&self.records.view, length)
        self.published += 1
        self.published_bytes += captured
        if captured < original:
            self.truncated += 1

    cdef void digest(self, uint64_t timestamp_ns, const uint8_t *data, uint32_t captured,
                     uint32_t original) noexcept nogil:
        cdef uint32_t length
        cdef uint8_t *room = ring_reserve(&self.digests.view, self.digest_room)
        if room == NULL:
            self.digests_dropped += 1
            return
        length = digest_packet(data, captured, original, self.linktype, 0, timestamp_ns, 0, self.inner, self.inspection,
                               room, self.ignored)
        if length:
            ring_advance(&self.digests.view, length)
            self.digests_written += 1

    def publish(self, int64_t watermark_ns, uint64_t received, uint64_t dropped):
        """Everything put so far becomes visible; see libpcap.pyi."""
        self.add_counters_record(received, dropped)
        if watermark_ns < self.records.view.header.watermark_ns:
            watermark_ns = self.records.view.header.watermark_ns
        self.records.words[COMMIT_WORD_PUBLISHED] = self.published
        ring_publish(&self.records.view, self.records.view.position, watermark_ns, self.records.words, 1)
        if self.digests is not None:
            ring_publish(&self.digests.view, self.digests.view.position, watermark_ns, &self.digests_written, 1)
            self.digests.wake()
        self.records.wake()
        self.store_counters(received, dropped)

    cdef void add_counters_record(self, uint64_t received, uint64_t dropped):
        cdef uint64_t words[RECORD_COUNTERS_WORDS]
        cdef uint8_t *room
        if self.records.view.position == self.records.view.published:
            return  # nothing new: the watermark alone is worth no record
        room = ring_reserve(&self.records.view, RECORD_COUNTERS_BYTES)
        if room == NULL:
            return
        words[0] = received
        words[1] = dropped
        words[2] = 0
        words[3] = self.dropped_ring
        words[4] = self.published
        memcpy(room + RECORD_PREFIX_BYTES, words, sizeof(words))
        record_set_prefix(room, RECORD_COUNTERS, RECORD_COUNTERS_BYTES, 0, self.newest_ns)
        ring_advance(&self.records.view, RECORD_COUNTERS_BYTES)

    cdef void store_counters(self, uint64_t received, uint64_t dropped):
        page = self.page
        page["received_packets"] = received
        page["dropped_kernel_packets"] = dropped
        page["read_packets"] = self.read_packets
        page["read_bytes"] = self.read_bytes
        page["dropped_ring_packets"] = self.dropped_ring
        page["published_packets"] = self.published
        page["published_bytes"] = self.published_bytes
        page["truncated_packets"] = self.truncated
        page["late_packets"] = self.late
        page["last_packet_ns"] = self.newest_ns
        page["digests_published"] = self.digests_written
        page["digests_dropped"] = self.digests_dropped
        for i in range(IGNORED_COUNTS):
            page[IGNORED_FIELDS[i]] = self.ignored[i]

    @property
    def newest(self):
        return self.newest_ns

    @property
    def watermark_wanted(self):
        return (
            self.records.view.header.watermark_wanted != 0
            or (self.digests is not None and self.digests.view.header.watermark_wanted != 0)
        )

    def take_requests(self):
        """The requests for a watermark are answered by what is published now."""
        ring_watermark_wanted(&self.records.view)
        if self.digests is not None:
            ring_watermark_wanted(&self.digests.view)


cdef class LibpcapHandle:
    """See libpcap.pyi."""
    cdef pcap_t *handle
    cdef bint nanoseconds
    cdef str interface

    def __cinit__(self, str interface, uint32_t snaplen, bint promiscuous):
        cdef char error[PCAP_ERRBUF_SIZE]
        self.interface = interface
        self.handle = pcap_create(interface.encode(), error)
        if self.handle == NULL:
            raise MissingInputError(f"interface {interface}: {error.decode(errors='replace')}")
        pcap_set_snaplen(self.handle, snaplen)
        pcap_set_promisc(self.handle, promiscuous)
        # Not immediate mode: that has one slot for the longest packet each, 64 packets in all of this buffer.
        pcap_set_timeout(self.handle, BLOCK_TIMEOUT_MS)
        pcap_set_buffer_size(self.handle, BUFFER_BYTES)
        pcap_set_tstamp_precision(self.handle, PCAP_TSTAMP_PRECISION_NANO)
        self.activate()
        if pcap_setnonblock(self.handle, 1, error) != 0:
            raise InputOutputError(f"interface {interface}: {error.decode(errors='replace')}")
        self.nanoseconds = pcap_get_tstamp_precision(self.handle) == PCAP_TSTAMP_PRECISION_NANO

    def activate(self):
        cdef int status = pcap_activate(self.handle)
        if status >= 0:
            return
        if status == PCAP_ERROR_PERM_DENIED or status == PCAP_ERROR_PROMISC_PERM_DENIED:
            raise MissingPermissionError(f"interface {self.interface}: capturing needs CAP_NET_RAW")
        if status == PCAP_ERROR_NO_SUCH_DEVICE:
            raise MissingInputError(f"interface {self.interface} does not exist")
        reason = pcap_geterr(self.handle).decode(errors="replace") or pcap_statustostr(status).decode()
        raise InputOutputError(f"interface {self.interface} cannot be opened: {reason}")

    def __dealloc__(self):
        if self.handle != NULL:
            pcap_close(self.handle)

    def set_filter(self, str text):
        cdef bpf_program program
        cdef int status = pcap_compile(self.handle, &program, text.encode(), 1, NETMASK_UNKNOWN)
        if status == 0:
            status = pcap_setfilter(self.handle, &program)
            pcap_freecode(&program)
        if status != 0:
            reason = pcap_geterr(self.handle).decode(errors="replace")
            raise ConfigError(f"filter {text!r} on {self.interface}: {reason}")

    def fileno(self):
        return pcap_get_selectable_fd(self.handle)

    @property
    def linktype(self):
        dlt = pcap_datalink(self.handle)
        return LINKTYPE_RAW if dlt == DLT_RAW else dlt

    def read(self, PacketSink sink not None):
        """At most BATCH_PACKETS packets into the sink, without waiting. Returns how many."""
        cdef pcap_pkthdr *header
        cdef const uint8_t *data
        cdef int status = 0
        cdef uint32_t packets = 0
        cdef uint64_t fraction
        with nogil:
            while packets < BATCH_PACKETS:
                status = pcap_next_ex(self.handle, &header, &data)
                if status != 1:
                    break
                fraction = header.ts.tv_usec if self.nanoseconds else header.ts.tv_usec * 1000
                sink.copy(<uint64_t>header.ts.tv_sec * 1000000000 + fraction, data, header.caplen, header.len)
                packets += 1
        if status < 0:
            raise InputOutputError(f"interface {self.interface}: {pcap_geterr(self.handle).decode(errors='replace')}")
        return packets

    def stats(self):
        """(received, dropped by the kernel) since the handle was opened."""
        cdef pcap_stat stats
        if pcap_stats(self.handle, &stats) != 0:
            return 0, 0
        return stats.ps_recv, stats.ps_drop
