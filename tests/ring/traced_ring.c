/* The real ring.h with every store of the producer written into a log, for tests that replay prefixes of it. */
#include <stdint.h>
#include <string.h>

struct store { uint64_t offset; uint64_t bytes; uint64_t value; };

static uint8_t *log_base;
static struct store log_entries[65536];
static uint64_t log_length;

static void log_store(const void *target, uint64_t bytes, uint64_t value)
{
    if (log_length < 65536)
        log_entries[log_length++] = (struct store){(uint64_t)((const uint8_t *)target - log_base), bytes, value};
}

static void copy_logged(uint8_t *target, const uint8_t *source, uint64_t bytes)
{
    for (uint64_t i = 0; i < bytes; i++) {
        target[i] = source[i];
        log_store(target + i, 1, source[i]);
    }
}

#define RING_STORE_RELEASE(target, value) \
    do { __atomic_store_n((target), (value), __ATOMIC_RELEASE); log_store((target), sizeof *(target), (uint64_t)(value)); } while (0)
#define RING_STORE_RELAXED(target, value) RING_STORE_RELEASE(target, value)
#define RING_COPY(target, source, bytes) copy_logged((target), (source), (bytes))
#include "ring.h"

/* `memory`: a whole ring file, header and data, NOT double-mapped: a caller keeps its records from crossing the end.
 * Writes records that lie one behind the other, rewinds if it is told to and may, publishes, and returns the number of
 * stores in the log. */
uint64_t traced_publish(uint8_t *memory, const uint8_t *records, uint64_t bytes, int64_t watermark_ns, uint64_t word,
                        int rewind)
{
    struct ring_view view = {0};
    uint64_t words[1] = {word};
    log_base = memory;
    log_length = 0;
    view.header = (struct ring_header *)memory;
    view.data = memory + RING_HEADER_BYTES;
    view.capacity = view.header->capacity;
    ring_resume_producer(&view);
    uint8_t *room = ring_reserve(&view, bytes);
    if (room == NULL)
        return 0;
    RING_COPY(room, records, bytes);
    ring_advance(&view, bytes);
    if (rewind)
        ring_rewind(&view);
    ring_publish(&view, view.position, watermark_ns, words, 1);
    return log_length;
}

const struct store *traced_log(void) { return log_entries; }
