"""The kernel's own counts of a packet socket, added up so that no death of ours costs one.

The kernel forgets what PACKET_STATISTICS has told (packet(7)). A worker that was killed between the answer and the
addition took those packets out of every balance. So the kernel writes its answer where it outlives us, in the
worker's counter page, next to the sum that it belongs to; what was received is that sum and that answer, at any moment:

1. The other half gets sum + answer of this one as its sum, and an answer of nothing.
2. It becomes the current half, by one store: the total is the same before and after.
3. The kernel answers into it. A signal ends us before that call or behind it, not in the middle.
"""
from libc.stdint cimport uint32_t, uint64_t
from libc.string cimport memset

cdef extern from "linux/if_packet.h" nogil:
    struct tpacket_stats_v3:
        unsigned int tp_packets  # the drops included
        unsigned int tp_drops
        unsigned int tp_freeze_q_cnt
    enum:
        PACKET_STATISTICS

cdef extern from "sys/socket.h" nogil:
    int getsockopt(int fd, int level, int name, void *value, uint32_t *length)
    enum:
        SOL_PACKET

cdef extern from *:
    """
    #define MAKE_CURRENT(account, half) __atomic_store_n(&(account)->current, half, __ATOMIC_RELEASE)
    """
    void MAKE_CURRENT(kernel_account *account, uint64_t half) nogil

cdef struct kernel_half:
    uint64_t received
    uint64_t dropped
    uint64_t freezes
    tpacket_stats_v3 answer
    uint32_t unused

cdef struct kernel_account:  # KERNEL_ACCOUNT_FIELDS of the counter page
    uint64_t current
    kernel_half halves[2]


cdef inline kernel_half kernel_total(kernel_account *account) noexcept nogil:
    """Everything that the kernel ever told, as the sums of a half."""
    cdef kernel_half total = account.halves[account.current & 1]
    total.received += total.answer.tp_packets
    total.dropped += total.answer.tp_drops
    total.freezes += total.answer.tp_freeze_q_cnt
    memset(&total.answer, 0, sizeof(total.answer))
    return total


cdef inline kernel_half kernel_collect(kernel_account *account, int fd) noexcept nogil:
    """Asks the kernel. Only the socket's one worker may: every answer is told once."""
    cdef uint64_t other = (account.current & 1) ^ 1
    cdef uint32_t length = sizeof(tpacket_stats_v3)
    account.halves[other] = kernel_total(account)
    MAKE_CURRENT(account, other)
    getsockopt(fd, SOL_PACKET, PACKET_STATISTICS, &account.halves[other].answer, &length)
    return kernel_total(account)
