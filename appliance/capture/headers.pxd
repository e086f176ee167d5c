"""One parser from packet bytes to digest records, for compiled callers. See headers.pyi for the rules."""

from libc.stdint cimport uint8_t, uint16_t, uint32_t, uint64_t

from appliance.capture.application cimport Inspection
from appliance.formats.record cimport PacketReference

# What is counted of packets that are not metered, in the order of counters.IGNORED_FIELDS: why, and their octets.
cdef enum:
    IGNORED_NOT_IP = 0
    IGNORED_TRUNCATED = 1
    IGNORED_MALFORMED = 2
    IGNORED_TOO_MANY_LAYERS = 3
    IGNORED_LINK_TYPE = 4
    IGNORED_REASON_COUNT = 5
    IGNORED_OCTETS = IGNORED_REASON_COUNT  # original lengths: what was on the wire
    IGNORED_COUNTS

# What one call of digest_records did; all counts are of that call.
cdef struct DigestBatch:
    uint64_t consumed_bytes  # of the records
    uint64_t written_bytes  # of the digests
    uint64_t packets  # seen: digests + ignored
    uint64_t digests

# The link types of a file's interfaces, by their number, as they become known.
cdef class LinkTypes:
    cdef uint16_t *types
    cdef uint32_t count
    cdef int learn(self, list interfaces) except -1

# Writes the digest of one packet to `out` (room for DIGEST_MAX_BYTES, aligned to 4) and returns its length.
# 0: not metered, and ignored[reason] and ignored[IGNORED_OCTETS], of IGNORED_COUNTS, went up. `status` takes bits of
# DIGEST_CALLER_STATUS. With `inner` the digest describes the innermost IP header of a tunnel, otherwise the outermost.
# With an `inspection` (NULL: none) it has an extension where the payload says something, and `out` has room for
# DIGEST_EXTENDED_MAX_BYTES.
cdef uint32_t digest_packet(
    const uint8_t* packet,
    uint32_t captured_length,
    uint32_t original_length,
    uint16_t linktype,
    uint32_t interface,
    uint64_t timestamp_ns,
    uint32_t status,
    bint inner,
    Inspection* inspection,
    uint8_t* out,
    uint64_t* ignored,
) noexcept nogil

# The same for a buffer of whole records in the framing of layout.h: Enhanced Packet Blocks become digests, other
# records are passed over. Ends with the buffer, or early, at a record's border, when `out` cannot take another digest.
# An interface at or above `linktype_count` counts as an unknown link type. False: damaged framing at consumed_bytes.
cdef bint digest_records(
    const uint8_t* records,
    uint64_t record_bytes,
    const uint16_t* linktypes,
    uint32_t linktype_count,
    bint inner,
    Inspection* inspection,
    uint8_t* out,
    uint64_t out_room,
    uint64_t* ignored,
    DigestBatch* batch,
) noexcept nogil

# The same for packets that still lie in their reader's buffer; every digest gets the interface `source`. Returns how
# many references were taken: all, or as many as `out` has room for the digests of.
cdef uint64_t digest_references(
    const PacketReference* packets,
    uint64_t count,
    const uint16_t* linktypes,
    uint32_t linktype_count,
    uint32_t source,
    bint inner,
    Inspection* inspection,
    uint8_t* out,
    uint64_t out_room,
    uint64_t* ignored,
    DigestBatch* batch,
) noexcept nogil
