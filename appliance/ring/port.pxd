"""The layout of port.h, and the monitor's end of a port."""
from libc.stdint cimport int64_t, uint8_t, uint32_t, uint64_t

cdef extern from "port.h" nogil:
    const uint64_t PORT_MAGIC
    const uint32_t PORT_VERSION
    const uint32_t PORT_FILTERS
    const uint32_t PORT_FILTER_INSTRUCTIONS
    const uint32_t PORT_FILTER_TEXT_BYTES
    const uint32_t PORT_STREAMS
    const uint32_t PORT_SETTINGS_OFFSET
    const uint32_t PORT_STREAMS_OFFSET
    const uint32_t PORT_DATA_OFFSET
    const uint32_t PORT_START_ON
    const uint32_t PORT_START_FCSERR
    const uint32_t PORT_START_FILTER
    const uint32_t PORT_START_PLDERR
    const uint32_t PORT_STOP_FULL
    const uint32_t PORT_STOP_FCSERR
    const uint32_t PORT_STOP_FILTER
    const uint32_t PORT_STOP_PLDERR
    const uint32_t PORT_STOP_USERSTOP
    const uint32_t PORT_KEEP_ALL
    const uint32_t PORT_KEEP_FCSERR
    const uint32_t PORT_KEEP_NOTPLD
    const uint32_t PORT_KEEP_TPLD
    const uint32_t PORT_KEEP_FILTER
    const uint32_t PORT_KEEP_PLDERR
    const uint32_t PORT_COMMAND_START
    const uint32_t PORT_COMMAND_STOP
    const uint32_t PORT_STOPPED
    const uint32_t PORT_WAITING
    const uint32_t PORT_CAPTURING
    const uint32_t PORT_BECAUSE_NOTHING
    const uint32_t PORT_BECAUSE_FULL
    const uint32_t PORT_BECAUSE_USER
    const uint32_t PORT_BECAUSE_TRIGGER
    const uint32_t PORT_BECAUSE_BAD_FILTER
    const int64_t PORT_NO_LATENCY
    const uint32_t PORT_FLAG_FCSERR
    const uint32_t PORT_FLAG_PLDERR
    const uint32_t PORT_FLAG_TPLD
    const uint32_t PORT_FLAG_MET_START
    const uint32_t PORT_FLAG_MET_STOP
    const uint32_t PORT_FLAG_PRETRIGGER
    const uint32_t PORT_FLAG_OUTGOING

    struct port_settings:
        uint32_t start_criterion
        uint32_t start_filter
        uint32_t stop_criterion
        uint32_t stop_filter
        uint32_t keep
        uint32_t keep_index
        uint32_t byte_count
        uint32_t pretrigger_packets
        uint32_t fcs_bytes
    struct port_filter:
        uint32_t instructions
        uint32_t text_bytes
        uint8_t *text
        uint64_t *code
    struct port_rules:
        port_settings settings
        port_filter *filters
    struct port_stream:
        uint64_t stream
        uint64_t packets
        uint64_t bytes
        uint64_t next_sequence
        uint64_t lost
        uint64_t misordered
        uint64_t payload_errors
        int64_t latency_min_ns
        int64_t latency_max_ns
        int64_t latency_sum_ns
        uint64_t latency_packets
    struct port_header:
        uint64_t magic
        uint32_t version
        uint64_t capacity
        uint64_t generation
        uint64_t request
        uint32_t command
        int64_t request_ns
        uint64_t answered
        uint32_t state
        uint32_t stopped_because
        uint32_t linktype
        uint64_t captures
        int64_t start_ns
        int64_t stop_ns
        int64_t last_packet_ns
        uint64_t head
        uint64_t tail
        uint64_t packets
        uint64_t seen_packets
        uint64_t overwritten_packets
        uint64_t unknown_streams
        uint64_t socket_serial
        uint64_t block_sequence
        uint64_t block_packets
    struct port_packet:
        uint32_t length
        uint32_t captured_length
        uint32_t original_length
        uint32_t flags
        uint64_t timestamp_ns
        uint64_t number
        uint64_t gap_ns
        int64_t latency_ns
        uint64_t sequence
        uint32_t stream
        uint32_t pad

    uint64_t load_u64 "PORT_LOAD"(uint64_t *at)
    uint32_t load_u32 "PORT_LOAD"(uint32_t *at)
    void store_u64 "PORT_STORE"(uint64_t *at, uint64_t value)
    void store_u32 "PORT_STORE"(uint32_t *at, uint32_t value)
    void PORT_FENCE()


cdef class PortMemory:
    cdef port_header *header
    cdef port_rules *rules
    cdef port_stream *streams
    cdef uint8_t *data
    cdef readonly uint64_t capacity
    cdef uint64_t mapped_bytes
