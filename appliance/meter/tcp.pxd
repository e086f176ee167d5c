# cython: language_level=3, boundscheck=False, wraparound=False, cdivision=True
"""What a TCP connection's headers say about it: repeats, disorder, losses, stalls, round trips.

Each segment is judged by what both sides had sent before it. The names and their definitions are those of Wireshark's
analysis of sequence numbers (Wireshark User's Guide, TCP Analysis); tests/meter/test_tcp_analysis.py holds the rules
that differ. The state of a connection has one size, whatever is sent: of missing ranges the newest are remembered, of
round trips at most two are waited for.

A direction is named by who sends: its counts tell of its own segments, its round trips of the way from here to the
receiver and back.
"""

from libc.stdint cimport int32_t, int64_t, uint8_t, uint16_t, uint32_t, uint64_t
from libc.string cimport memset

from appliance.ring.digest cimport *

cdef enum:
    TCP_FIN = 0x01
    TCP_SYN = 0x02
    TCP_RST = 0x04
    TCP_ACK = 0x10

    HOLES = 2  # missing ranges that are remembered; further ones are joined with the last
    HEARD_SHIFT = 10
    FAST = 20000000 >> HEARD_SHIFT  # 20 ms: so soon after the last of two duplicate acknowledgements a repeat is fast
    DISORDER_NS = 3000000  # what comes later than this fills no hole but is a repeat, while no round trip is known

    # bits of TcpHalf.state
    HALF_KNOWN = 0x01  # next_sequence is
    HALF_ACKNOWLEDGED = 0x02  # `acknowledged` and `window` are
    HALF_SYN = 0x04  # its SYN was seen
    HALF_PENDING = 0x08  # something that it sent was not acknowledged yet
    HALF_SAMPLE = 0x10  # the answer to sample_sequence gives a round trip
    HALF_RESENT = 0x20  # round trips mean nothing until sample_sequence is acknowledged (Karn)
    HALF_KEEP_ALIVE = 0x40  # its newest segment was one
    HALF_STALLED = 0x80  # its window is closed

    # what a segment may be, as bits; TCP_EVENTS of them
    TCP_RETRANSMISSION = 0x001
    TCP_FAST_RETRANSMISSION = 0x002
    TCP_SPURIOUS_RETRANSMISSION = 0x004
    TCP_OUT_OF_ORDER = 0x008
    TCP_LOST_SEGMENT = 0x010  # something before it was not seen
    TCP_DUPLICATE_ACK = 0x020
    TCP_KEEP_ALIVE = 0x040
    TCP_KEEP_ALIVE_ACK = 0x080
    TCP_ZERO_WINDOW = 0x100
    TCP_ZERO_WINDOW_PROBE = 0x200
    TCP_EVENTS = 10
    TCP_REPEATED = 0x400  # beside one of the above: nothing of it was missing

    TCP_RESENT = TCP_RETRANSMISSION | TCP_FAST_RETRANSMISSION | TCP_SPURIOUS_RETRANSMISSION

cdef struct TcpHalf:  # one side's state: one cache line, which every segment of either side touches
    uint64_t advanced_ns  # time stamp of the segment that moved next_sequence last
    uint64_t sample_ns  # of the segment that ends at sample_sequence
    uint32_t heard  # of its newest segment, in units of 2^HEARD_SHIFT ns
    uint32_t first_sequence  # of its SYN, or of what must have been it
    uint32_t next_sequence  # behind the highest octet that it sent
    uint32_t acknowledged
    uint32_t sample_sequence
    uint32_t max_window  # octets
    uint32_t rtt_min_us
    uint32_t rtt_last_us
    uint32_t rtt_samples
    uint32_t initial_rtt_us  # of the connection, in the first half: SYN to the acknowledgement that ends the handshake
    uint16_t window  # as it stands in the header
    uint16_t mss  # of its SYN
    uint8_t duplicate_acks  # in a row; counted to 2
    uint8_t window_scale  # + 1; 0: none declared, or no SYN seen
    uint8_t state
    uint8_t has_counts  # in the first half: both sides' counts are valid

cdef struct TcpHole:
    uint32_t start
    uint32_t end

cdef struct TcpCounts:  # one side's; one cache line, touched when something happens
    uint64_t repeated_octets  # payload that it had sent before
    uint32_t retransmitted_packets  # of all three kinds
    uint32_t out_of_order_packets
    uint32_t lost_segments  # times that something before a segment was missing
    uint32_t duplicate_acks
    uint32_t zero_windows
    uint32_t stalls  # times that its window closed
    uint32_t keep_alives
    uint32_t hole_count
    TcpHole[HOLES] holes
    uint64_t unused

cdef struct TcpFlow:  # where a connection's two halves and its counts stand: most connections never need the latter
    TcpHalf* halves
    TcpCounts* counts


cdef struct Segment:
    uint64_t time_ns
    uint32_t sequence
    uint32_t end  # SYN and FIN take one of the sequence space
    uint32_t acknowledgement
    uint32_t payload_octets
    uint16_t flags
    uint16_t window
    uint16_t mss
    uint16_t window_scale  # + 1; 0: none


cdef inline void take_digest(Segment* s, const digest* d, uint64_t time_ns) noexcept nogil:
    cdef uint32_t flags = d.tcp_flags & DIGEST_TCP_FLAGS
    s.time_ns = time_ns
    s.sequence = d.tcp_sequence
    s.acknowledgement = d.tcp_acknowledgement
    s.payload_octets = d.payload_octets
    if d.payload_offset != 0 and d.original_length >= d.payload_offset:  # an IP length may exceed its frame
        s.payload_octets = min(d.payload_octets, d.original_length - d.payload_offset)
    s.end = s.sequence + s.payload_octets + ((flags & (TCP_SYN | TCP_FIN)) != 0)
    s.flags = <uint16_t>flags
    s.window = d.tcp_window
    s.mss = d.tcp_mss
    s.window_scale = d.tcp_flags >> DIGEST_WINDOW_SCALE_SHIFT


cdef inline int32_t ahead_of(uint32_t a, uint32_t b) noexcept nogil:
    """How far `a` lies behind `b` in sequence space; negative: it comes before (RFC 9293, 3.4)."""
    return <int32_t>(a - b)


cdef inline uint32_t microseconds(uint64_t later_ns, uint64_t earlier_ns) noexcept nogil:
    """At least 1, so that 0 stays for what is unknown; 0 when the clock went backwards."""
    if later_ns < earlier_ns:
        return 0
    return <uint32_t>max(<uint64_t>1, min((later_ns - earlier_ns) // 1000, <uint64_t>0xFFFFFFFF))


cdef inline TcpCounts* counts_of(TcpFlow* t, int side) noexcept nogil:
    """To write into; zero at first."""
    if not t.halves[0].has_counts:
        t.halves[0].has_counts = True
        memset(t.counts, 0, 2 * sizeof(TcpCounts))
    return &t.counts[side]


cdef inline void forget_counts(TcpFlow* t) noexcept nogil:
    """A record has left and the next one begins; what is known of the connection stays."""
    cdef int side
    for side in range(2):
        t.halves[side].max_window = 0
        t.halves[side].rtt_min_us = t.halves[side].rtt_last_us = t.halves[side].rtt_samples = 0
        if t.halves[0].has_counts:
            t.counts[side].repeated_octets = 0
            t.counts[side].retransmitted_packets = t.counts[side].out_of_order_packets = 0
            t.counts[side].lost_segments = t.counts[side].duplicate_acks = 0
            t.counts[side].zero_windows = t.counts[side].stalls = t.counts[side].keep_alives = 0


cdef inline void forget_state(TcpFlow* t, int side) noexcept nogil:
    """A new connection on the same ports; what was counted stays."""
    t.halves[side].state = 0
    t.halves[side].duplicate_acks = 0
    if t.halves[0].has_counts:
        t.counts[side].hole_count = 0


cdef inline void take_syn(TcpFlow* t, int side, const Segment* s) noexcept nogil:
    """What a SYN declares. A sequence number of its own begins a new connection; the same one is a repeat, and the
    handshake is timed from the last of them."""
    cdef TcpHalf* half = &t.halves[side]
    if half.state & HALF_KNOWN and half.first_sequence != s.sequence:
        forget_state(t, side)
        if not s.flags & TCP_ACK:
            forget_state(t, 1 - side)
            t.halves[0].initial_rtt_us = 0
    elif half.state & HALF_KNOWN and half.next_sequence == s.sequence + 1:
        half.advanced_ns = s.time_ns
    half.state |= HALF_SYN
    half.first_sequence = s.sequence
    half.mss = s.mss
    half.window_scale = <uint8_t>s.window_scale


cdef inline void open_hole(TcpCounts* c, uint32_t start, uint32_t end) noexcept nogil:
    if c.hole_count < HOLES:
        c.holes[c.hole_count].start = start
        c.holes[c.hole_count].end = end
        c.hole_count += 1
    else:
        c.holes[HOLES - 1].end = end


cdef inline bint fills_hole(TcpCounts* c, uint32_t start, uint32_t end) noexcept nogil:
    """Whether any of it was missing; what comes to the border of a hole makes it smaller."""
    cdef int i = 0
    cdef bint fills = False
    cdef TcpHole* hole
    while i < c.hole_count:
        hole = &c.holes[i]
        if ahead_of(start, hole.end) < 0 and ahead_of(end, hole.start) > 0:
            fills = True
            if ahead_of(start, hole.start) <= 0:
                hole.start = end
            elif ahead_of(end, hole.end) >= 0:
                hole.end = start
            if ahead_of(hole.start, hole.end) >= 0:
                c.hole_count -= 1
                hole[0] = c.holes[c.hole_count]
                continue
        i += 1
    return fills


cdef inline bint was_acknowledged(const TcpHalf* other, const Segment* s) noexcept nogil:
    """The other side has all of this segment's data already."""
    return (
        s.payload_octets != 0 and other.state & HALF_ACKNOWLEDGED != 0
        and ahead_of(s.sequence + s.payload_octets, other.acknowledged) <= 0
    )


cdef inline uint32_t judge_repeat(
    TcpFlow* t, int side, const Segment* s,
) noexcept nogil:
    """Of a segment that occupies sequence space, and begins before the end of what was sent already."""
    cdef TcpHalf* half = &t.halves[side]
    cdef const TcpHalf* other = &t.halves[1 - side]
    cdef int64_t disorder_ns = DISORDER_NS
    cdef uint32_t since_heard = <uint32_t>(s.time_ns >> HEARD_SHIFT) - other.heard
    if other.duplicate_acks >= 2 and other.acknowledged == s.sequence and since_heard < FAST:
        return TCP_FAST_RETRANSMISSION
    if t.halves[0].initial_rtt_us != 0:
        disorder_ns = <int64_t>t.halves[0].initial_rtt_us * 1000
    if <int64_t>(s.time_ns - half.advanced_ns) < disorder_ns and s.end != half.next_sequence:
        return TCP_OUT_OF_ORDER
    return TCP_RETRANSMISSION


cdef inline uint32_t judge_acknowledgement(TcpFlow* t, int side, const Segment* s) noexcept nogil:
    """Of a segment without data that stands where its sender's next octet is expected."""
    cdef TcpHalf* half = &t.halves[side]
    if (
        not half.state & HALF_ACKNOWLEDGED or s.acknowledgement != half.acknowledged
        or s.window != half.window or s.window == 0
    ):
        return 0
    if t.halves[1 - side].state & HALF_KEEP_ALIVE:
        return TCP_KEEP_ALIVE_ACK
    if half.duplicate_acks < 2:
        half.duplicate_acks += 1
    return TCP_DUPLICATE_ACK


cdef inline void take_acknowledgement(TcpHalf* sender, uint32_t acknowledged, uint64_t time_ns) noexcept nogil:
    """Round trips of what `sender` sent: from the segment whose end is acknowledged, when nothing was sent twice."""
    cdef uint32_t rtt_us = 0
    if not sender.state & (HALF_PENDING | HALF_SAMPLE | HALF_RESENT):
        return
    if not sender.state & HALF_RESENT:
        if sender.state & HALF_PENDING and acknowledged == sender.next_sequence:
            rtt_us = microseconds(time_ns, sender.advanced_ns)
        elif sender.state & HALF_SAMPLE and acknowledged == sender.sample_sequence:
            rtt_us = microseconds(time_ns, sender.sample_ns)
        if rtt_us != 0:
            sender.rtt_last_us = rtt_us
            if sender.rtt_samples == 0 or rtt_us < sender.rtt_min_us:
                sender.rtt_min_us = rtt_us
            sender.rtt_samples += 1
    if sender.state & (HALF_SAMPLE | HALF_RESENT) and ahead_of(acknowledged, sender.sample_sequence) >= 0:
        sender.state &= <uint8_t>~(HALF_SAMPLE | HALF_RESENT)
    if ahead_of(acknowledged, sender.next_sequence) >= 0:
        sender.state &= <uint8_t>~HALF_PENDING


cdef inline void advance_half(TcpHalf* half, uint32_t end, bint occupies, uint64_t time_ns) noexcept nogil:
    half.next_sequence = end
    half.advanced_ns = time_ns
    half.state |= HALF_KNOWN
    if not occupies:
        return
    half.state |= HALF_PENDING
    if half.state & HALF_RESENT:
        return
    if not half.state & HALF_SAMPLE:
        half.state |= HALF_SAMPLE
        half.sample_sequence = end
        half.sample_ns = time_ns


cdef inline void take_window(TcpFlow* t, int side, const Segment* s) noexcept nogil:
    cdef TcpHalf* half = &t.halves[side]
    cdef uint32_t octets = s.window
    if half.window_scale != 0 and t.halves[1 - side].window_scale != 0 and not s.flags & TCP_SYN:
        octets <<= half.window_scale - 1  # declared by both (RFC 7323, 2.2)
    half.max_window = max(half.max_window, octets)
    half.window = s.window
    if not s.flags & (TCP_SYN | TCP_FIN | TCP_RST):
        if s.window != 0:
            half.state &= <uint8_t>~HALF_STALLED
        elif not half.state & HALF_STALLED:
            half.state |= HALF_STALLED
            counts_of(t, side).stalls += 1


cdef inline void count_events(
    TcpFlow* t, int side, const Segment* s, uint32_t events, uint32_t sent_before,
) noexcept nogil:
    """`sent_before`: what next_sequence was before this segment."""
    cdef TcpCounts* c = counts_of(t, side)
    cdef TcpHalf* half = &t.halves[side]
    c.retransmitted_packets += (events & TCP_RESENT) != 0
    c.out_of_order_packets += (events & TCP_OUT_OF_ORDER) != 0
    c.lost_segments += (events & TCP_LOST_SEGMENT) != 0
    c.duplicate_acks += (events & TCP_DUPLICATE_ACK) != 0
    c.zero_windows += (events & TCP_ZERO_WINDOW) != 0
    c.keep_alives += (events & TCP_KEEP_ALIVE) != 0
    if events & TCP_REPEATED:
        c.repeated_octets += min(s.payload_octets, sent_before - s.sequence)
    if events & (TCP_RESENT | TCP_OUT_OF_ORDER | TCP_LOST_SEGMENT):
        half.sample_sequence = half.next_sequence
        half.state = (half.state & <uint8_t>~HALF_SAMPLE) | HALF_RESENT


cdef inline void take_handshake(TcpFlow* t, int side, const Segment* s) noexcept nogil:
    """The first acknowledgement by the side that sent the SYN."""
    if (
        t.halves[0].initial_rtt_us == 0 and t.halves[side].state & HALF_SYN
        and t.halves[side].next_sequence == t.halves[side].first_sequence + 1
        and not t.halves[side].state & HALF_ACKNOWLEDGED
    ):
        t.halves[0].initial_rtt_us = microseconds(s.time_ns, t.halves[side].advanced_ns)


cdef inline uint32_t judge(TcpFlow* t, int side, const Segment* s) noexcept nogil:
    """What this segment is, by the state before it."""
    cdef TcpHalf* half = &t.halves[side]
    cdef const TcpHalf* other = &t.halves[1 - side]
    cdef bint plain = not s.flags & (TCP_SYN | TCP_FIN | TCP_RST)
    cdef int32_t ahead = ahead_of(s.sequence, half.next_sequence)
    cdef uint32_t events = TCP_ZERO_WINDOW if plain and s.window == 0 else 0
    if not half.state & HALF_KNOWN:
        return events
    if ahead > 0:
        if not s.flags & TCP_RST:
            events |= TCP_LOST_SEGMENT
            open_hole(counts_of(t, side), half.next_sequence, s.sequence)
    elif ahead == 0:
        if s.payload_octets == 1 and other.state & HALF_ACKNOWLEDGED and other.window == 0:
            events = TCP_ZERO_WINDOW_PROBE
        elif plain and s.payload_octets == 0:
            return events | judge_acknowledgement(t, side, s)
    elif ahead == -1 and plain and s.payload_octets <= 1:
        return events | TCP_KEEP_ALIVE | TCP_REPEATED
    elif s.end == s.sequence:
        return events
    elif not t.halves[0].has_counts or not fills_hole(&t.counts[side], s.sequence, s.end):
        events |= TCP_REPEATED
    if was_acknowledged(other, s):
        events |= TCP_SPURIOUS_RETRANSMISSION
    # One octet before the end and more than one of them: it carries on where a probe of a closed window had been.
    elif ahead < 0 and not (ahead == -1 and s.payload_octets > 1):
        events |= judge_repeat(t, side, s)
    return events


cdef inline uint32_t analyse(TcpFlow* t, int side, const Segment* s) noexcept nogil:
    """Takes a segment of `side` (0 or 1) in. The bits TCP_* of what it was."""
    cdef TcpHalf* half = &t.halves[side]
    cdef uint32_t events, sent_before
    if s.flags & TCP_SYN:
        take_syn(t, side, s)
    elif not half.state & HALF_KNOWN:
        half.first_sequence = s.sequence - 1
    events = judge(t, side, s)
    if s.flags & TCP_ACK:
        if s.flags & (TCP_SYN | TCP_RST) == 0:
            take_handshake(t, side, s)
        if s.acknowledgement != half.acknowledged:
            half.duplicate_acks = 0
        take_acknowledgement(&t.halves[1 - side], s.acknowledgement, s.time_ns)
        half.acknowledged = s.acknowledgement
        half.heard = <uint32_t>(s.time_ns >> HEARD_SHIFT)
        half.state |= HALF_ACKNOWLEDGED
    take_window(t, side, s)
    sent_before = half.next_sequence
    if not half.state & HALF_KNOWN or (
        ahead_of(s.end, half.next_sequence) > 0 and not events & TCP_ZERO_WINDOW_PROBE
    ):
        advance_half(half, s.end, s.end != s.sequence, s.time_ns)
    half.state &= <uint8_t>~HALF_KEEP_ALIVE
    if events != 0:
        if events & TCP_KEEP_ALIVE:
            half.state |= HALF_KEEP_ALIVE
        count_events(t, side, s, events, sent_before)
    return events & ~<uint32_t>TCP_REPEATED
