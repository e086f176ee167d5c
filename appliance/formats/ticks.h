/* Time stamps of capture files: ticks of any resolution (if_tsresol, if_tsoffset) to nanoseconds since 1970. */
#ifndef APPLIANCE_FORMATS_TICKS_H
#define APPLIANCE_FORMATS_TICKS_H

#include <stdint.h>

/* Below INT64_MAX, which stays free to mean "never". It is in the year 2262. */
#define TIMESTAMP_MAX_NS 0x7ffffffffffffffeLL

/* nanoseconds = ((ticks * multiplier / divisor) >> shift) + offset_s * 10^9, held in [0, TIMESTAMP_MAX_NS] */
struct tick_scale {
    uint64_t multiplier;
    uint64_t divisor;
    uint64_t plain_end; /* below it one multiplication is the whole conversion, and cannot overflow */
    int64_t offset_s;
    uint8_t shift;
};

/* `tsresol`: draft-ietf-opsawg-pcapng, section 4.2: the high bit tells 2^-n from 10^-n. */
static inline void tick_scale_set(struct tick_scale *scale, uint8_t tsresol, int64_t offset_s)
{
    unsigned exponent = tsresol & 0x7fu;

    scale->multiplier = 1;
    scale->divisor = 1;
    scale->shift = 0;
    scale->offset_s = offset_s;
    if (tsresol & 0x80u) {
        scale->multiplier = 1000000000u;
        scale->shift = (uint8_t)exponent;
    } else if (exponent > 28) { /* a divisor beyond 10^19: 64 bits of such ticks do not make one nanosecond */
        scale->multiplier = 0;
    } else {
        for (unsigned i = exponent; i < 9; i++)
            scale->multiplier *= 10;
        for (unsigned i = 9; i < exponent; i++)
            scale->divisor *= 10;
    }
    scale->plain_end = 0;
    if (scale->multiplier && scale->divisor == 1 && scale->shift == 0 && offset_s == 0)
        scale->plain_end = (uint64_t)TIMESTAMP_MAX_NS / scale->multiplier + 1;
}

static inline int64_t ticks_to_ns_exactly(uint64_t ticks, const struct tick_scale *scale, uint64_t *clamped)
{
    unsigned __int128 scaled = ((unsigned __int128)ticks * scale->multiplier / scale->divisor) >> scale->shift;
    __int128 timestamp_ns = (__int128)scaled + (__int128)scale->offset_s * 1000000000;

    if (timestamp_ns >= 0 && timestamp_ns <= TIMESTAMP_MAX_NS)
        return (int64_t)timestamp_ns;
    ++*clamped;
    return timestamp_ns < 0 ? 0 : TIMESTAMP_MAX_NS;
}

static inline int64_t ticks_to_ns(uint64_t ticks, const struct tick_scale *scale, uint64_t *clamped)
{
    if (__builtin_expect(ticks < scale->plain_end, 1))
        return (int64_t)(ticks * scale->multiplier);
    return ticks_to_ns_exactly(ticks, scale, clamped);
}

#endif
