/* Port capture: what the capture worker of one interface and the monitor share. Layout only, as in layout.h.
 *
 *   0                     header; each group of fields has one writer
 *   PORT_SETTINGS_OFFSET  settings and filters: written by the monitor while nothing is captured
 *   PORT_STREAMS_OFFSET   counts per stream of test payloads: written by the worker
 *   PORT_DATA_OFFSET      captured packets, `capacity` bytes, a power of two, as a circle: written by the worker
 *
 * Positions (head, tail) are byte counts that only grow; `position & (capacity - 1)` is the place in the data, and a
 * packet may wrap around its end. The worker moves the tail before it overwrites what lay there: a reader copies, looks
 * at the tail again, and throws away what has gone meanwhile. All integers are in host byte order.
 */
#ifndef APPLIANCE_RING_PORT_H
#define APPLIANCE_RING_PORT_H

#include <stddef.h>
#include <stdint.h>

#define PORT_MAGIC 0x3154524f50504143ULL /* "CAPPORT1" */
#define PORT_VERSION 1u
#define PORT_FILTERS 16u
#define PORT_FILTER_INSTRUCTIONS 512u
#define PORT_FILTER_TEXT_BYTES 1024u
#define PORT_STREAMS 256u
#define PORT_SETTINGS_OFFSET 4096u
#define PORT_STREAMS_OFFSET (PORT_SETTINGS_OFFSET + 90112u)
#define PORT_DATA_OFFSET (PORT_STREAMS_OFFSET + 24576u)

/* The numbers of the reference's enums. */
#define PORT_START_ON 0u
#define PORT_START_FCSERR 1u
#define PORT_START_FILTER 2u
#define PORT_START_PLDERR 3u
#define PORT_STOP_FULL 0u
#define PORT_STOP_FCSERR 1u
#define PORT_STOP_FILTER 2u
#define PORT_STOP_PLDERR 3u
#define PORT_STOP_USERSTOP 4u
#define PORT_KEEP_ALL 0u
#define PORT_KEEP_FCSERR 1u
#define PORT_KEEP_NOTPLD 2u
#define PORT_KEEP_TPLD 3u
#define PORT_KEEP_FILTER 4u
#define PORT_KEEP_PLDERR 5u

#define PORT_COMMAND_START 1u
#define PORT_COMMAND_STOP 2u

#define PORT_STOPPED 0u
#define PORT_WAITING 1u /* for the packet that meets the start criterion */
#define PORT_CAPTURING 2u

#define PORT_BECAUSE_NOTHING 0u /* it runs, or never ran */
#define PORT_BECAUSE_FULL 1u
#define PORT_BECAUSE_USER 2u
#define PORT_BECAUSE_TRIGGER 3u
#define PORT_BECAUSE_BAD_FILTER 4u /* a program in the settings is none: nothing was captured */

struct port_settings {
    uint32_t start_criterion, start_filter;
    uint32_t stop_criterion, stop_filter;
    uint32_t keep, keep_index;
    uint32_t byte_count;         /* bytes kept of each packet; 0 and UINT32_MAX: all */
    uint32_t pretrigger_packets; /* kept from before the one that met the start criterion */
    uint32_t fcs_bytes;          /* 4: frames end with their check sequence; 0: they have none */
    uint32_t pad;
};

struct port_filter { /* an expression, and its BPF program as the kernel takes it */
    uint32_t instructions;
    uint32_t text_bytes; /* 0: there is no such filter */
    uint8_t text[PORT_FILTER_TEXT_BYTES];
    uint64_t code[PORT_FILTER_INSTRUCTIONS];
};

struct port_rules {
    struct port_settings settings;
    struct port_filter filters[PORT_FILTERS];
};

struct port_stream {
    uint64_t stream;
    uint64_t packets; /* 0: the place is free */
    uint64_t bytes;   /* original lengths */
    uint64_t next_sequence;
    uint64_t lost;
    uint64_t misordered; /* came after a later one, or twice */
    uint64_t payload_errors;
    int64_t latency_min_ns;
    int64_t latency_max_ns;
    int64_t latency_sum_ns;
    uint64_t latency_packets;
    uint64_t pad;
};

struct port_header {
    /* written once, by the creator */
    uint64_t magic;
    uint32_t version;
    uint32_t pad_version;
    uint64_t capacity;
    uint64_t generation;
    uint8_t pad0[96];
    /* written by the monitor */
    uint64_t request; /* counts the commands */
    uint32_t command;
    uint32_t pad_command;
    int64_t request_ns; /* CLOCK_REALTIME */
    uint8_t pad1[104];
    /* written by the worker */
    uint64_t answered; /* the last `request` that is carried out */
    uint32_t state;
    uint32_t stopped_because;
    uint32_t linktype;
    uint32_t pad_linktype;
    uint64_t captures; /* counts the starts */
    int64_t start_ns;  /* of the last one */
    int64_t stop_ns;   /* USERSTOP: packets up to here belong to it; 0: nobody asked */
    int64_t last_packet_ns;
    uint64_t head;
    uint64_t tail;
    uint64_t packets;          /* in the buffer */
    uint64_t seen_packets;     /* since the start, kept or not */
    uint64_t overwritten_packets;
    uint64_t unknown_streams;  /* packets of streams that the table has no room for */
    /* How far the kernel's blocks are seen, for a successor. */
    uint64_t socket_serial;
    uint64_t block_sequence;
    uint64_t block_packets;
};

_Static_assert(offsetof(struct port_header, request) == 128, "monitor's line");
_Static_assert(offsetof(struct port_header, answered) == 256, "worker's lines");
_Static_assert(sizeof(struct port_rules) <= PORT_STREAMS_OFFSET - PORT_SETTINGS_OFFSET, "room for the rules");
_Static_assert(PORT_STREAMS * sizeof(struct port_stream) <= PORT_DATA_OFFSET - PORT_STREAMS_OFFSET, "room for streams");
_Static_assert(PORT_DATA_OFFSET % 4096 == 0, "data begins with a page");

/* Each captured packet, 8-byte aligned, its data behind it. */
struct port_packet {
    uint32_t length; /* with header and padding, a multiple of 8 */
    uint32_t captured_length;
    uint32_t original_length; /* on the wire */
    uint32_t flags;
    uint64_t timestamp_ns;
    uint64_t number;   /* of the packets seen since the start, from 0 */
    uint64_t gap_ns;   /* since the packet before it on this interface, kept or not; 0 for the first */
    int64_t latency_ns; /* PORT_NO_LATENCY: no test payload */
    uint64_t sequence; /* of its stream */
    uint32_t stream;
    uint32_t pad;
};

#define PORT_NO_LATENCY INT64_MIN
#define PORT_FLAG_FCSERR 1u
#define PORT_FLAG_PLDERR 2u
#define PORT_FLAG_TPLD 4u
#define PORT_FLAG_MET_START 8u
#define PORT_FLAG_MET_STOP 16u
#define PORT_FLAG_PRETRIGGER 32u
#define PORT_FLAG_OUTGOING 64u

#define PORT_LOAD(at) __atomic_load_n(at, __ATOMIC_ACQUIRE)
#define PORT_STORE(at, value) __atomic_store_n(at, value, __ATOMIC_RELEASE)
#define PORT_FENCE() __atomic_thread_fence(__ATOMIC_SEQ_CST)

#endif
