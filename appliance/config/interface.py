"""[[interface]]: where packets come from, and which of them are recorded."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import AfterValidator, Field

from appliance.capture import uri as capture_uri
from appliance.config.values import GIB, KIB, MIB, TIB, Cpus, Label, Name, Printable, Table, between, zero_or_between
from appliance.errors import UsageError

MAX_SNAPLEN = 262144  # libpcap's MAXIMUM_SNAPLEN: more is refused by the readers
MIN_RING_BYTES = MIB  # the longest record must fit (RECORD_MAX_BYTES in ring/layout.h)
MAX_CAPTURE_FILTERS, MAX_CAPTURE_FILTER_BYTES = 16, 1024  # PORT_FILTERS, PORT_FILTER_TEXT_BYTES of ring/port.h


def _capture_uri(value: str) -> str:
    try:
        capture_uri.parse(value)
    except UsageError as error:
        raise ValueError(str(error)) from None
    return value


def _short(value: str) -> str:
    if len(value.encode()) > MAX_CAPTURE_FILTER_BYTES:
        raise ValueError(f"must have at most {MAX_CAPTURE_FILTER_BYTES} bytes")
    return value


def _at_most_filters(values: tuple[str, ...]) -> tuple[str, ...]:
    if len(values) > MAX_CAPTURE_FILTERS:
        raise ValueError(f"there can be {MAX_CAPTURE_FILTERS} filters, not {len(values)}")
    return values


CaptureUri = Annotated[str, AfterValidator(_capture_uri)]
CaptureFilter = Annotated[Printable, AfterValidator(_short)]
CaptureFilters = Annotated[tuple[CaptureFilter, ...], AfterValidator(_at_most_filters)]
RingBytes = Annotated[int, zero_or_between(MIN_RING_BYTES, TIB)]


class RecordingTrigger(Table):
    """From which packet to which one an interface is recorded."""

    start: Literal["on", "filter", "fcserr", "plderr"] = Field(
        default="on",
        description='recorded from the first packet on ("on"), or from one that matches start_filter ("filter"), has a '
        'wrong check sequence ("fcserr": needs rx-fcs) or a wrong checksum ("plderr")',
    )
    start_filter: CaptureFilter = Field(default="", description="BPF filter")
    stop: Literal["userstop", "filter", "fcserr", "plderr"] = Field(
        default="userstop", description='recorded to the end ("userstop"), or up to such a packet, which is the last'
    )
    stop_filter: CaptureFilter = Field(default="", description="BPF filter")
    repeat: bool = Field(default=True, description='after a stop, start can be met again (not "on")')


class RecordingKeep(Table):
    """Which of those packets are recorded."""

    kind: Literal["all", "filter", "tpld", "notpld", "fcserr", "plderr"] = Field(
        default="all",
        description='"all", those that match filter ("filter"), with our test payload of one stream ("tpld") or with '
        'none ("notpld"), with a wrong check sequence ("fcserr") or a wrong checksum ("plderr")',
    )
    filter: CaptureFilter = Field(default="", description="BPF filter")
    stream: Annotated[int, between(0, (1 << 32) - 1)] = Field(default=0, description='the stream of "tpld"')


class Interface(Table):
    """One source of packets, read by `fanout` capture workers."""

    uri: CaptureUri = Field(
        description="where packets come from: ring:IF (fast, Linux), ring:* (every interface that is up, without "
        "bridge ports and container veths), pcap:IF or int:IF (through libpcap), or a file: pcapfile:PATH, "
        "pcapng:PATH, erf:PATH (what it is, its content tells), legacyeth:, legacypos:, legacyatm:, tsh:, fr+:"
    )
    label: Label = Field(default="", description='its name in files, metrics and messages; "" = from the uri')
    filter: Printable = Field(default="", description='BPF filter, as for tcpdump; "" = every packet')
    snaplen: Annotated[int, between(64, MAX_SNAPLEN)] = Field(
        default=MAX_SNAPLEN, description="bytes kept of each packet; the original length is always recorded"
    )
    promiscuous: bool = Field(default=True, description="also take frames that are addressed to others")
    ring_bytes: RingBytes = Field(
        default=0, description="shared memory between capture and merge; 0 = a share of memory_bytes"
    )
    kernel_ring_bytes: Annotated[int, between(MIB, 16 * GIB)] = Field(
        default=64 * MIB, description="the kernel's own ring (ring: only); locked memory, not part of memory_bytes"
    )
    block_timeout_ms: Annotated[int, zero_or_between(1, 1000)] = Field(
        default=0,
        description="the kernel hands over a block that is not full after this long, and wakes the capture worker "
        "(ring: only); 0 = 8, and two or more capture workers take what comes steadily together, every 32 ms at most",
    )
    reorder_us: Annotated[int, between(0, 1_000_000)] = Field(
        default=1000, description="disorder between receive CPUs that is put right; what is later is counted as late"
    )
    fanout: Annotated[int, between(1, 64)] = Field(default=1, description="capture workers (ring: only)")
    cpus: Cpus = Field(
        default=(),
        strict=False,
        description="CPUs that the capture workers run on, and whose memory their rings take; [] = any",
    )
    speed: Literal["full", "recorded"] = Field(
        default="full", description='files only: as fast as it goes, or "recorded" = with the pauses of the recording'
    )
    output: Name = Field(default="main", description="the name of the [[output]] that records it")
    capture_buffer_bytes: Annotated[int, zero_or_between(64 * KIB, 4 * GIB)] = Field(
        default=16 * MIB,
        description="port capture (ring: only): memory for captured packets, taken when one is started; 0 = none",
    )
    capture_filters: CaptureFilters = Field(
        default=(), strict=False, description="port capture: BPF filters that triggers and keep rules name by index"
    )

    trigger: RecordingTrigger = RecordingTrigger()
    keep: RecordingKeep = RecordingKeep()

    @property
    def gates_recording(self) -> bool:
        """Whether triggers or keep rules leave packets out of the recording."""
        return self.trigger != RecordingTrigger() or self.keep != RecordingKeep()

    @property
    def source(self) -> capture_uri.Uri:
        return capture_uri.parse(self.uri)
