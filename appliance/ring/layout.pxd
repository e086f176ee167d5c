"""The C side of a ring for Cython: layout.h (records, header) and ring.h (producer and consumer)."""
from libc.stdint cimport int64_t, uint8_t, uint32_t, uint64_t

cdef extern from "layout.h" nogil:
    const uint64_t RING_MAGIC
    const uint32_t RING_VERSION
    const uint32_t RING_HEADER_BYTES
    const uint32_t RING_COMMIT_WORDS
    const uint32_t RING_AWAKE
    const uint32_t RING_SLEEPS
    const uint32_t RING_SLEEPS_FOR_ROOM
    const uint32_t RING_RESTS
    const uint32_t COMMIT_WORD_PUBLISHED
    const uint32_t RECORD_PACKET
    const uint32_t RECORD_INTERFACE
    const uint32_t RECORD_DIGEST
    const uint32_t RECORD_COUNTERS
    const uint32_t RECORD_EPOCH
    const uint32_t RECORD_PREFIX_BYTES
    const uint32_t RECORD_PACKET_DATA
    const uint32_t RECORD_PACKET_MIN
    const uint32_t RECORD_MAX_BYTES
    const uint32_t RECORD_COUNTERS_WORDS
    const uint32_t RECORD_COUNTERS_BYTES

    struct ring_commit:
        uint64_t head
        uint64_t sequence
        uint64_t words[30]

    struct ring_header:
        uint64_t magic
        uint32_t version
        uint32_t header_bytes
        uint64_t capacity
        uint64_t generation
        uint64_t head
        int64_t watermark_ns
        uint32_t ended
        uint32_t producer_sleeping
        uint64_t rewound
        ring_commit commit[2]
        uint64_t tail
        uint32_t watermark_wanted
        uint32_t consumer_sleeping

cdef extern from "ring.h" nogil:
    struct ring_view:
        ring_header *header
        uint8_t *data
        uint64_t capacity
        uint64_t position
        uint64_t published
        uint64_t other
        uint64_t head
        uint64_t rewound

    enum:
        CACHE_LINE_BYTES
        PAGE_BYTES
    int RING_OK
    int RING_CORRUPT
    uint64_t ring_free_bytes(ring_view *view)
    uint8_t *ring_reserve(ring_view *view, uint64_t length)
    void ring_advance(ring_view *view, uint64_t length)
    int ring_wake_consumer(ring_view *view)
    void ring_publish(ring_view *view, uint64_t position, int64_t watermark_ns, const uint64_t *words,
                      uint32_t word_count)
    void ring_fetch_ahead(const ring_view *view)
    void ring_rewind(ring_view *view)
    uint64_t ring_rewound(const ring_header *header, uint64_t head)
    void ring_promise(ring_view *view, int64_t watermark_ns)
    void ring_end(ring_view *view)
    int ring_commit_slot(const ring_header *header, uint64_t head)
    const ring_commit *ring_resume_producer(ring_view *view)
    void ring_resume_consumer(ring_view *view)
    int ring_look(ring_view *view, int64_t *watermark_ns, uint32_t *ended)
    uint32_t record_u32(const uint8_t *at)
    void record_set_u32(uint8_t *at, uint32_t value)
    void record_copy(uint8_t *to, const uint8_t *from_, uint32_t bytes)
    uint64_t record_timestamp_ns(const uint8_t *record)
    void record_set_prefix(uint8_t *record, uint32_t type, uint32_t length, uint32_t interface, uint64_t timestamp_ns)
    uint32_t record_check(const uint8_t *at, uint64_t available)
    const uint8_t *ring_at(const ring_view *view, uint64_t position)
    int ring_release(ring_view *view, uint64_t position)
    void ring_consumer_sleeps(ring_view *view, uint32_t sleeping)
    void ring_producer_sleeps(ring_view *view, uint32_t how)
    int ring_want_watermark(ring_view *view)
    int ring_watermark_wanted(ring_view *view)
