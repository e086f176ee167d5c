"""`pcap:` and `int:` sources: through pypcap where it builds, else through our own binding of libpcap.

For hosts and interfaces that `ring:` cannot serve; slower, and one Python call a packet with pypcap. This file is the
only one that knows pypcap, and its traps: a file of the interface's name in the working directory is opened instead of
the interface; dispatch() waits for ever with the GIL held unless the handle is non-blocking; the wire length is hidden,
so that packets are taken whole and cut by us; warnings of libpcap are raised as errors.
"""

from __future__ import annotations

import os
import time
from typing import Protocol

from appliance.capture.application import Inspector
from appliance.capture.libpcap import LibpcapHandle, PacketSink
from appliance.config import Interface
from appliance.counters import CounterPage
from appliance.errors import ConfigError, InputOutputError, MissingInputError, MissingPermissionError
from appliance.ring.ring import Producer

SNAPLEN_MAX = 262144
BUFFER_BYTES = 64 << 20
BLOCK_TIMEOUT_MS = 10  # immediate mode would have room for 64 packets only
LINKTYPE_RAW = 101
DLT_RAW = 12
SETTLE_NS = 40_000_000  # between a packet's stamp and our reading it: the block time-out, and a busy machine
_U32 = 1 << 32


class Handle(Protocol):
    """What both bindings offer."""

    @property
    def linktype(self) -> int: ...
    def set_filter(self, text: str) -> None: ...
    def fileno(self) -> int: ...
    def read(self, sink: PacketSink) -> int: ...
    def stats(self) -> tuple[int, int]: ...


class PypcapHandle:
    """pypcap behind the same face as our own binding."""

    def __init__(self, interface: str, promiscuous: bool) -> None:
        import pcap

        if os.path.exists(interface):
            os.chdir("/")
        if os.path.exists(interface):
            raise InputOutputError(f"/{interface} is a file, and pypcap would open that, not the interface; use ring:")
        self._interface = interface
        try:
            self._pcap = pcap.pcap(
                interface,
                snaplen=SNAPLEN_MAX,
                promisc=promiscuous,
                timeout_ms=BLOCK_TIMEOUT_MS,
                timestamp_in_ns=True,
                buffer_size=BUFFER_BYTES,
            )
        except OSError as error:
            raise explained(interface, str(error)) from error
        self._pcap.setnonblock(True)

    @property
    def linktype(self) -> int:
        dlt = int(self._pcap.datalink())
        return LINKTYPE_RAW if dlt == DLT_RAW else dlt

    def set_filter(self, text: str) -> None:
        try:
            self._pcap.setfilter(text)
        except OSError as error:
            raise ConfigError(f"filter {text!r} on {self._interface}: {error}") from error

    def fileno(self) -> int:
        return int(self._pcap.fileno())

    def read(self, sink: PacketSink) -> int:
        def put(timestamp_ns: int, data: bytes) -> None:
            sink.put(timestamp_ns, data, len(data))

        return max(0, int(self._pcap.dispatch(-1, put)))

    def stats(self) -> tuple[int, int]:
        received, dropped, _by_interface = self._pcap.stats()
        return int(received), int(dropped)


def explained(interface: str, reason: str) -> MissingInputError | MissingPermissionError | InputOutputError:
    text = reason.lower()
    if "permission" in text or "permitted" in text:
        return MissingPermissionError(f"interface {interface}: capturing needs CAP_NET_RAW ({reason})")
    if "no such device" in text or "doesn't exist" in text or "that device" in text:
        return MissingInputError(f"interface {interface} does not exist ({reason})")
    return InputOutputError(f"interface {interface} cannot be opened: {reason}")


def open_handle(interface: Interface) -> Handle:
    """A handle with the filter set. Raises MissingInputError, MissingPermissionError, ConfigError, InputOutputError."""
    name = interface.source.target
    handle: Handle
    try:
        import pcap  # noqa: F401  only to learn whether it is there: it does not build for Python 3.12 and later

        handle = PypcapHandle(name, interface.promiscuous)
    except ImportError:
        handle = LibpcapHandle(name, SNAPLEN_MAX, interface.promiscuous)
    if interface.filter:
        handle.set_filter(interface.filter)
    return handle


class PcapCapture:
    """One `pcap:` source into its rings. `step` never waits; between steps the worker polls `fileno`."""

    def __init__(
        self,
        interface: Interface,
        records: Producer,
        digests: Producer | None,
        page: CounterPage,
        *,
        inner: bool = False,
        inspector: Inspector | None = None,
    ) -> None:
        self.handle = open_handle(interface)
        self.sink = PacketSink(
            records, digests, page, self.handle.linktype, interface.snaplen, inner=inner, inspector=inspector
        )
        self._reorder_ns = interface.reorder_us * 1000
        # The handle's own counts begin anew with every handle, and wrap at 2^32.
        self._base = (page["received_packets"], page["dropped_kernel_packets"])
        self._last = (0, 0)
        page["interface_up"] = 1

    def fileno(self) -> int:
        return self.handle.fileno()

    def step(self) -> int:
        """Takes what is there and publishes it. Returns the packets taken."""
        now_ns = time.time_ns()
        self.sink.take_requests()
        packets = self.handle.read(self.sink)
        received, dropped = self._counts()
        watermark_ns = self.sink.newest - self._reorder_ns if packets else now_ns - SETTLE_NS - self._reorder_ns
        self.sink.publish(max(0, watermark_ns), received, dropped)
        return packets

    def _counts(self) -> tuple[int, int]:
        counts = self.handle.stats()
        deltas = [(new - old) % _U32 for new, old in zip(counts, self._last, strict=True)]
        self._last = counts
        self._base = (self._base[0] + deltas[0], self._base[1] + deltas[1])
        return self._base
