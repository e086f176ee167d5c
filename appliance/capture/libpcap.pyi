"""Live capture through libpcap: our own small binding, and what it shares with pypcap (the way into the rings)."""

from typing_extensions import Buffer

from appliance.capture.application import Inspector
from appliance.counters import CounterPage
from appliance.ring.ring import Producer

class PacketSink:
    """Packets of any origin into a packet ring and, if given, a digest ring. A full ring drops, and counts."""

    def __init__(
        self,
        records: Producer,
        digests: Producer | None,
        page: CounterPage,
        linktype: int,
        snaplen: int,
        *,
        inner: bool = False,
        inspector: Inspector | None = None,
    ) -> None: ...
    newest: int
    """The newest timestamp put, in ns."""
    watermark_wanted: bool
    def put(self, timestamp_ns: int, data: Buffer, original_length: int) -> None:
        """One packet, cut to the snaplen; visible with the next `publish`."""
    def publish(self, watermark_ns: int, received: int, dropped: int) -> None:
        """Makes everything put visible, promises that nothing older follows, stores the counters.

        `received` (drops included) and `dropped`: the kernel's own cumulative counts.
        """
    def take_requests(self) -> None:
        """The consumers' requests for a watermark are answered by the next publish."""

class LibpcapHandle:
    """An activated, non-blocking handle: 64 MiB of buffer, packets within 10 ms, nanoseconds where libpcap has them.

    Raises MissingInputError (no such interface), MissingPermissionError, InputOutputError.
    """

    def __init__(self, interface: str, snaplen: int, promiscuous: bool) -> None: ...
    linktype: int
    def set_filter(self, text: str) -> None:
        """Raises ConfigError."""
    def fileno(self) -> int: ...
    def read(self, sink: PacketSink) -> int:
        """At most 4096 packets into the sink, without waiting and without the GIL. Returns how many."""
    def stats(self) -> tuple[int, int]:
        """(received, dropped by the kernel) since the handle was opened; 32-bit in libpcap."""
