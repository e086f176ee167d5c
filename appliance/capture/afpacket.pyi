"""A live interface through the kernel's memory-mapped ring (TPACKET_V3)."""

from appliance.capture.application import Inspector
from appliance.capture.trigger import Gate, PortTap
from appliance.counters import CounterPage
from appliance.ring.ring import Producer

COMMITTED_FIELDS: tuple[str, ...]
"""Counters of CAPTURE_FIELDS that are stored with each publish, so that they always match the ring's content."""

class LiveCapture:
    """Walks the kernel's ring of one socket into a packet ring and, when `digests` is given, a digest ring.

    The socket is set up and bound already (appliance.capture.opener); `block_bytes` and `block_count` are those of its
    PACKET_RX_RING. `socket_serial` (from 1) numbers the openings of the interface: with the same number a successor
    goes on at the very packet where its predecessor stopped publishing. `cooked` says that the socket is SOCK_DGRAM:
    each packet then gets a LINUX_SLL2 header. `port`, if there is one, is shown every packet while it
    captures; `gate` says which packets are recorded, and all are metered. Raises OSError when the kernel's ring cannot
    be mapped.
    """

    def __init__(
        self,
        fd: int,
        block_bytes: int,
        block_count: int,
        records: Producer,
        digests: Producer | None,
        page: CounterPage,
        *,
        socket_serial: int,
        linktype: int,
        cooked: bool,
        snaplen: int,
        ifindex: int,
        reorder_us: int,
        block_timeout_ms: int = 1,
        turn_ms: int = 0,
        step_ms: int = 50,
        inner: bool = False,
        inspector: Inspector | None = None,
        port: PortTap | None = None,
        gate: Gate | None = None,
    ) -> None: ...
    def pump(self) -> int:
        """Takes up to 32 kernel blocks, publishes what is in order. Returns the packets taken. GIL released.

        Never blocks. A full packet ring drops the newest packets and counts them; the kernel's ring is never held up.
        """
    def serve(self, wake_fd: int, channel_fd: int, limit_ms: int) -> bool:
        """`pump` again and again, with sleeps until the kernel hands a block over, `wake_fd` (an eventfd) is signalled
        or a tail's time has come; the page gets a heartbeat each turn. GIL released.

        With a `turn_ms`, a turn that took packets, and no more than an eighth of the kernel's ring, is followed by one
        at the next multiple of `turn_ms` of CLOCK_MONOTONIC, whatever the kernel hands over and consumers want until
        then: so all capture workers turn at once, and a machine is not woken for each of them. They then publish up to
        one and the same time, which is as old as a packet in a kernel's block can get.

        True: `channel_fd` is readable or the socket reports an error, and somebody must look. False: `limit_ms` are
        over."""
    turn_ms: int
    """What is stored here counts from the next turn on, which is one of this worker's own."""
    def finish(self) -> None:
        """Publishes the whole tail, in whatever order it is: before the socket is given up, or at the end."""
    is_drained: bool
    """Nothing waits in the kernel's ring and nothing is unpublished."""
