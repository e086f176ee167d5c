/* The behaviour of a ring: one producer, one consumer, in two processes. layout.h has the layout.
 *
 * Memory order. The producer fills the data, then the commit slot, then stores `head` (release), then `watermark`
 * (release). The consumer loads `watermark` (acquire), then `head` (acquire): whoever sees a watermark sees every
 * record that was published before the promise. The other order would miss records. `rewound` is stored before the
 * `head` that is above it, and loaded after it: a rewinding that does not belong to a head that is seen is not seen.
 *
 * Sleeping. Who goes to sleep stores its flag, then a sequentially consistent fence, then looks once more; who
 * publishes stores its position, then the same fence, then looks at the flag. One of the two always sees the other.
 * A producer that waits for packets is woken for a watermark only; one that waits for room also when half is free.
 *
 * The other side is hostile: its position is checked each time, and a record's length is loaded once and checked
 * before it is used.
 */
#ifndef APPLIANCE_RING_RING_H
#define APPLIANCE_RING_RING_H

#include <string.h>

#include "layout.h"

/* A test that wants to see every store of a producer defines these itself, before it includes this file. */
#ifndef RING_STORE_RELEASE
#define RING_STORE_RELEASE(target, value) __atomic_store_n((target), (value), __ATOMIC_RELEASE)
#define RING_STORE_RELAXED(target, value) __atomic_store_n((target), (value), __ATOMIC_RELAXED)
#define RING_COPY(target, source, bytes) memcpy((target), (source), (bytes))
#endif
#define RING_LOAD_ACQUIRE(source) __atomic_load_n((source), __ATOMIC_ACQUIRE)
#define RING_LOAD_RELAXED(source) __atomic_load_n((source), __ATOMIC_RELAXED)

#define CACHE_LINE_BYTES 64u
#define PAGE_BYTES 4096u
#define RING_AHEAD_PAGES 4u

/* One side's own, private view of a ring. */
struct ring_view {
    struct ring_header *header;
    uint8_t *data;
    uint64_t capacity;
    uint64_t position;  /* producer: end of what is written; consumer: end of what is read; both ahead of the shared one */
    uint64_t published; /* producer: our head (but see `head`); consumer: our tail */
    uint64_t other;     /* the other side's position as last seen */
    uint64_t head;      /* producer: the shared head; below `published` between a rewinding and the next publish */
    uint64_t rewound;   /* producer: where it last went on at the start of the data */
};

enum ring_check { RING_OK = 0, RING_CORRUPT = -1 };

/* ---- producer ---- */

static inline uint64_t ring_free_bytes(struct ring_view *view)
{
    view->other = RING_LOAD_ACQUIRE(&view->header->tail);
    if (view->other < view->rewound)
        view->other = view->rewound;
    uint64_t used = view->position - view->other;
    return used > view->capacity ? 0 : view->capacity - used; /* a tail ahead of us is corrupt: no room, ever */
}

/* On the first lap each page costs a fault. One by reading maps the 64 KiB around it (fault-around of shared memory),
 * one by writing maps a single page: so each new 64 KiB are read from before they are written to. */
static inline void ring_touch(const uint8_t *at, uint64_t bytes)
{
    uintptr_t end = (uintptr_t)at + bytes;

    if (((uintptr_t)at ^ end) >> 16)
        (void)*(const volatile uint8_t *)(end & ~(uintptr_t)0xffff);
}

/* Contiguous room for `bytes` at the write position, or NULL when the ring is full. */
static inline uint8_t *ring_reserve(struct ring_view *view, uint64_t bytes)
{
    if (view->capacity - (view->position - view->other) < bytes && ring_free_bytes(view) < bytes)
        return NULL;
    uint8_t *at = view->data + (view->position & (view->capacity - 1));
    ring_touch(at, bytes);
    return at;
}

static inline void ring_advance(struct ring_view *view, uint64_t bytes)
{
    view->position += bytes;
}

/* After a sleep, nothing of a ring is near, and not even its pages' addresses. What a producer needs of it first is asked
 * for at once here, so that it comes together instead of one after the other. */
static inline void ring_fetch_ahead(const struct ring_view *view)
{
    const char *header = (const char *)view->header;

    for (size_t at = offsetof(struct ring_header, head); at < sizeof(struct ring_header); at += CACHE_LINE_BYTES)
        __builtin_prefetch(header + at, 1);
    for (uint64_t page = 0; page < RING_AHEAD_PAGES; page++)
        __builtin_prefetch(view->data + ((view->position + page * PAGE_BYTES) & (view->capacity - 1)), 1);
}

/* When everything published is consumed, and lies far enough from the start of the data: goes on there. What is written
 * and not published yet moves along. */
static inline void ring_rewind(struct ring_view *view)
{
    uint64_t index = view->published & (view->capacity - 1);
    uint64_t unpublished = view->position - view->published;

    if (index < RING_REWIND_BYTES && index < view->capacity / 8)
        return;
    if (unpublished > index || index + unpublished > view->capacity)
        return; /* the copy would run into what it copies */
    if (RING_LOAD_ACQUIRE(&view->header->tail) != view->published)
        return;
    RING_COPY(view->data, view->data + index, unpublished);
    view->published += view->capacity - index;
    view->position = view->published + unpublished;
    view->other = view->rewound = view->published;
    RING_STORE_RELEASE(&view->header->rewound, view->rewound);
}

/* Whether the consumer sleeps and must be woken (once: the flag is taken down). */
static inline int ring_wake_consumer(struct ring_view *view)
{
    __atomic_thread_fence(__ATOMIC_SEQ_CST);
    uint32_t how = RING_LOAD_RELAXED(&view->header->consumer_sleeping);
    if (how == RING_AWAKE)
        return 0;
    if (how == RING_RESTS && ring_free_bytes(view) > view->capacity - view->capacity / 4)
        return 0;
    return (int)__atomic_exchange_n(&view->header->consumer_sleeping, 0u, __ATOMIC_RELAXED);
}

/* The commit slot that belongs to `head`, or -1. Two publishes of the same head leave two: the later one counts. */
static inline int ring_commit_slot(const struct ring_header *header, uint64_t head)
{
    int found = -1;
    for (int i = 0; i < 2; i++)
        if (header->commit[i].sequence != 0 && header->commit[i].head == head &&
            (found < 0 || header->commit[i].sequence > header->commit[found].sequence))
            found = i;
    return found;
}

/* The position before which nothing is left, as far as it belongs to `head`; 0: there is none. */
static inline uint64_t ring_rewound(const struct ring_header *header, uint64_t head)
{
    uint64_t rewound = RING_LOAD_ACQUIRE(&header->rewound);
    return rewound <= head ? rewound : 0;
}

/* Publishes everything up to `position`, together with what the producer must find again after its death. */
static inline void ring_publish(struct ring_view *view, uint64_t position, int64_t watermark_ns, const uint64_t *words,
                                uint32_t word_count)
{
    struct ring_header *header = view->header;
    int valid = ring_commit_slot(header, view->head);
    struct ring_commit *slot = &header->commit[valid == 0 ? 1 : 0]; /* never the valid one: it must outlive our death */
    uint64_t sequence = valid < 0 ? 1u : header->commit[valid].sequence + 1u;

    if (word_count > RING_COMMIT_WORDS)
        word_count = RING_COMMIT_WORDS;
    /* A slot that is being written must not match the ring's head. No head is ever all ones. */
    RING_STORE_RELAXED(&slot->head, ~0ull);
    __atomic_thread_fence(__ATOMIC_RELEASE);
    RING_STORE_RELAXED(&slot->sequence, sequence);
    for (uint32_t i = 0; i < word_count; i++)
        RING_STORE_RELAXED(&slot->words[i], words[i]);
    RING_STORE_RELEASE(&slot->head, position);
    RING_STORE_RELEASE(&header->rewound, view->rewound); /* a predecessor's may be above its head, and void */
    RING_STORE_RELEASE(&header->head, position);
    RING_STORE_RELEASE(&header->watermark_ns, watermark_ns);
    view->head = view->published = position;
}

static inline void ring_promise(struct ring_view *view, int64_t watermark_ns)
{
    RING_STORE_RELEASE(&view->header->watermark_ns, watermark_ns);
}

static inline void ring_end(struct ring_view *view)
{
    RING_STORE_RELEASE(&view->header->ended, 1u);
}

/* A producer's start, or its restart after a death: takes up the published head. Unpublished bytes are gone.
 * Returns the commit slot of that head, or NULL when nothing was ever published with one. */
static inline const struct ring_commit *ring_resume_producer(struct ring_view *view)
{
    struct ring_header *header = view->header;

    view->position = view->published = view->head = RING_LOAD_ACQUIRE(&header->head);
    view->other = RING_LOAD_ACQUIRE(&header->tail);
    view->rewound = ring_rewound(header, view->head);
    int valid = ring_commit_slot(header, view->position);
    return valid < 0 ? NULL : &header->commit[valid];
}

/* ---- consumer ---- */

static inline void ring_resume_consumer(struct ring_view *view)
{
    view->position = view->published = RING_LOAD_ACQUIRE(&view->header->tail);
    view->other = view->position;
}

/* Looks at the producer: the watermark first, then the head. RING_CORRUPT when the head cannot be. */
static inline int ring_look(struct ring_view *view, int64_t *watermark_ns, uint32_t *ended)
{
    uint32_t over = RING_LOAD_ACQUIRE(&view->header->ended);
    int64_t promise = RING_LOAD_ACQUIRE(&view->header->watermark_ns);
    uint64_t head = RING_LOAD_ACQUIRE(&view->header->head);
    uint64_t rewound = ring_rewound(view->header, head);

    if (view->position < rewound) {
        if (view->position != view->other)
            return RING_CORRUPT; /* it may only rewind what we have read */
        view->position = view->other = rewound;
    }
    if (head - view->position > view->capacity || head < view->other)
        return RING_CORRUPT;
    view->other = head;
    *watermark_ns = promise;
    *ended = over;
    return RING_OK;
}

static inline uint32_t record_u32(const uint8_t *at)
{
    uint32_t value;
    memcpy(&value, at, sizeof value);
    return value;
}

static inline void record_set_u32(uint8_t *at, uint32_t value)
{
    memcpy(at, &value, sizeof value);
}

/* memcpy, without a call for the lengths that most packets have. */
static inline void record_copy(uint8_t *restrict to, const uint8_t *restrict from, uint32_t bytes)
{
    if (bytes < 32 || bytes > 128) {
        memcpy(to, from, bytes);
        return;
    }
    /* From the front and from the end; the pieces overlap in the middle. */
    memcpy(to, from, 32);
    if (bytes > 64) {
        memcpy(to + 32, from + 32, 32);
        memcpy(to + bytes - 64, from + bytes - 64, 32);
    }
    memcpy(to + bytes - 32, from + bytes - 32, 32);
}

static inline uint64_t record_timestamp_ns(const uint8_t *record)
{
    return ((uint64_t)record_u32(record + 12) << 32) | record_u32(record + 16);
}

static inline void record_set_prefix(uint8_t *record, uint32_t type, uint32_t length, uint32_t interface,
                                     uint64_t timestamp_ns)
{
    record_set_u32(record, type);
    record_set_u32(record + 4, length);
    record_set_u32(record + 8, interface);
    record_set_u32(record + 12, (uint32_t)(timestamp_ns >> 32));
    record_set_u32(record + 16, (uint32_t)timestamp_ns);
    record_set_u32(record + length - 4, length);
}

/* The length of the whole record at `at`, of which `available` bytes are published; 0 when it is corrupt. */
static inline uint32_t record_check(const uint8_t *at, uint64_t available)
{
    if (available < RECORD_PREFIX_BYTES + 4u)
        return 0;
    uint32_t length = record_u32(at + 4);
    if (length < RECORD_PREFIX_BYTES + 4u || (length & 3u) || length > RECORD_MAX_BYTES || length > available)
        return 0;
    if (record_u32(at + length - 4) != length)
        return 0;
    return length;
}

static inline const uint8_t *ring_at(const struct ring_view *view, uint64_t position)
{
    return view->data + (position & (view->capacity - 1));
}

/* Gives everything up to `position` back to the producer. Returns 1 when it sleeps for room and must be woken: when
 * half of the ring is free, so that one wake is worth its price. */
static inline int ring_release(struct ring_view *view, uint64_t position)
{
    RING_STORE_RELEASE(&view->header->tail, position);
    view->published = position;
    __atomic_thread_fence(__ATOMIC_SEQ_CST);
    if (RING_LOAD_RELAXED(&view->header->producer_sleeping) != RING_SLEEPS_FOR_ROOM)
        return 0;
    if (RING_LOAD_RELAXED(&view->header->head) - position > view->capacity / 2)
        return 0;
    return (int)__atomic_exchange_n(&view->header->producer_sleeping, 0u, __ATOMIC_RELAXED);
}

/* `how`: RING_AWAKE, RING_SLEEPS or RING_RESTS. */
static inline void ring_consumer_sleeps(struct ring_view *view, uint32_t how)
{
    RING_STORE_RELAXED(&view->header->consumer_sleeping, how);
    __atomic_thread_fence(__ATOMIC_SEQ_CST);
}

/* `how`: RING_AWAKE, RING_SLEEPS or RING_SLEEPS_FOR_ROOM. */
static inline void ring_producer_sleeps(struct ring_view *view, uint32_t how)
{
    RING_STORE_RELAXED(&view->header->producer_sleeping, how);
    __atomic_thread_fence(__ATOMIC_SEQ_CST);
}

/* The consumer asks for a fresh watermark. Returns 1 when the producer sleeps and must be woken. */
static inline int ring_want_watermark(struct ring_view *view)
{
    RING_STORE_RELAXED(&view->header->watermark_wanted, 1u);
    __atomic_thread_fence(__ATOMIC_SEQ_CST);
    if (!RING_LOAD_RELAXED(&view->header->producer_sleeping))
        return 0;
    return (int)__atomic_exchange_n(&view->header->producer_sleeping, 0u, __ATOMIC_RELAXED);
}

/* The producer's answer is due (once: the flag is taken down before the promise is made). */
static inline int ring_watermark_wanted(struct ring_view *view)
{
    if (!RING_LOAD_RELAXED(&view->header->watermark_wanted))
        return 0;
    return (int)__atomic_exchange_n(&view->header->watermark_wanted, 0u, __ATOMIC_ACQUIRE);
}

#endif
