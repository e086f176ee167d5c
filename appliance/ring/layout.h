/* The layout of a ring in shared memory, and of the records in it. Layout only: ring.h has the behaviour.
 *
 *   0      header page (RING_HEADER_BYTES)
 *   4096   data, `capacity` bytes, a power of two; mapped twice in a row, so that no record is ever split
 *
 * Positions (head, tail) are monotonic byte counts; `position & (capacity - 1)` is the index into the data.
 * A producer that finds everything consumed may go on at the start of the data, at the next position whose index is 0:
 * what is used stays small, and in the cache, however large the ring is. Every cache line has one writer. All integers are in host byte order.
 */
#ifndef APPLIANCE_RING_LAYOUT_H
#define APPLIANCE_RING_LAYOUT_H

#include <stdint.h>
#include <stddef.h>

#define RING_MAGIC 0x31474e4952504143ULL /* "CAPRING1" */
#define RING_VERSION 2u
#define RING_HEADER_BYTES 4096u
#define RING_COMMIT_WORDS 30u
#define RING_REWIND_BYTES (1u << 20) /* nearer to the start it does not pay, unless the ring is small */

/* What a sleeper wants to be woken for. */
#define RING_AWAKE 0u
#define RING_SLEEPS 1u          /* a producer: the consumer wants a watermark; a consumer: there is something new */
#define RING_SLEEPS_FOR_ROOM 2u /* a producer: that, or there is room again */
#define RING_RESTS 3u           /* a consumer: a quarter of the ring is used */

/* What the producer must find again after its death, written before the head that it belongs to.
 * Two slots in turn: the slot whose `head` equals the ring's head is the valid one. `words` belong to the producer. */
struct ring_commit {
    uint64_t head;
    uint64_t sequence;
    uint64_t words[RING_COMMIT_WORDS];
};

/* Of `words`, the first is the same for all producers: packets (or digests) published up to `head`, ever. With those between
 * tail and head it tells exactly how many were consumed, whoever died in the meantime. */
#define COMMIT_WORD_PUBLISHED 0u

struct ring_header {
    /* written once, by the creator */
    uint64_t magic;
    uint32_t version;
    uint32_t header_bytes;
    uint64_t capacity;
    uint64_t generation;
    uint8_t pad0[96];
    /* written by the producer */
    uint64_t head;         /* bytes published */
    int64_t watermark_ns;  /* promise: no later record is older than this */
    uint32_t ended;        /* 1: nothing will follow (orderly end) */
    uint32_t producer_sleeping; /* RING_AWAKE, ... */
    uint64_t rewound;      /* nothing is between the tail and here, if this is not above `head` */
    uint8_t pad1[96];
    struct ring_commit commit[2];
    /* written by the consumer */
    uint64_t tail;              /* bytes consumed */
    uint32_t watermark_wanted;  /* 1: the consumer waits for this ring's watermark */
    uint32_t consumer_sleeping; /* RING_AWAKE, ... */
    uint8_t pad2[112];
};

_Static_assert(offsetof(struct ring_header, head) == 128, "producer line");
_Static_assert(offsetof(struct ring_header, commit) == 256, "commit slots");
_Static_assert(sizeof(struct ring_commit) == 256, "a commit slot is four cache lines");
_Static_assert(offsetof(struct ring_header, tail) == 768, "consumer line");
_Static_assert(sizeof(struct ring_header) == 896, "header size");

/* A record is a block in the framing of pcapng (draft-ietf-opsawg-pcapng, section 3.1): type, total length (a multiple
 * of 4), body, total length again. All records that carry a time start alike, so one merge orders them all:
 *
 *    0  type            u32
 *    4  length          u32   whole record
 *    8  interface       u32   the source's own numbering
 *   12  timestamp high  u32   nanoseconds since 1970
 *   16  timestamp low   u32
 *   20  ...
 *
 * Packets are Enhanced Packet Blocks, ready for a pcapng file but for the interface number. */
#define RECORD_PACKET 0x00000006u    /* Enhanced Packet Block: 20 captured length, 24 original length, 28 data, padding, options */
#define RECORD_INTERFACE 0x00000001u /* Interface Description Block, complete, if_tsresol 9; numbers count up per source */
/* Our own, in the range that pcapng leaves to local use. They never reach a file. */
#define RECORD_DIGEST 0x80000d16u   /* headers of one packet, see digest.h */
#define RECORD_COUNTERS 0x80000c07u /* the source's cumulative counters, see RECORD_COUNTERS_WORDS */
#define RECORD_EPOCH 0x80000e90u    /* the clock was set: 20 new offset REALTIME - MONOTONIC, s64 ns */

#define RECORD_PREFIX_BYTES 20u
#define RECORD_PACKET_DATA 28u
#define RECORD_PACKET_MIN 32u
#define RECORD_MAX_BYTES (1u << 20) /* longer is corrupt: the largest packet is 256 KiB and options are ours */

/* Body of RECORD_COUNTERS after the prefix: u64 words (unaligned), cumulative since the source's first start. */
#define RECORD_COUNTERS_WORDS 5u
#define COUNTERS_WORD_RECEIVED 0u       /* by the kernel, its drops included; or read from a file */
#define COUNTERS_WORD_DROPPED_KERNEL 1u /* by the kernel: its ring was full */
#define COUNTERS_WORD_DROPPED_FILTER 2u /* rejected by a filter in user space, or gated out */
#define COUNTERS_WORD_DROPPED_RING 3u   /* our ring was full */
#define COUNTERS_WORD_PUBLISHED 4u      /* written into our ring */
#define RECORD_COUNTERS_BYTES (RECORD_PREFIX_BYTES + 8u * RECORD_COUNTERS_WORDS + 4u)

#endif
