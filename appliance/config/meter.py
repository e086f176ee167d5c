"""[meter] and [[meter.export]]: how packets become flows, and where their records go."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import AfterValidator, Field

from appliance.config.addresses import Destination, parse_destination
from appliance.config.values import Cpus, OptionalPath, Printable, RotateSeconds, Seconds, Table, between


def _export_uri(value: str) -> str:
    parse_destination(value)
    return value


ExportUri = Annotated[str, AfterValidator(_export_uri)]


class MeterExport(Table):
    """One destination of flow records."""

    uri: ExportUri = Field(
        description="udp://HOST:PORT, tcp://HOST:PORT, tls://HOST:PORT, file: (flows/ below the meter's directory) or "
        "file:DIRECTORY"
    )
    template_refresh_s: Seconds = Field(default=60, description="udp:// only: templates are sent again after this long")
    template_refresh_messages: Annotated[int, between(0, 1_000_000)] = Field(
        default=1000, description="udp:// only: ... or after this many messages; 0 = by time alone"
    )
    mtu_bytes: Annotated[int, between(512, 65535)] = Field(
        default=1400, description="longest message; over udp:// never longer than the path takes"
    )
    domain: Annotated[int, between(0, (1 << 32) - 1)] = Field(default=1, description="observation domain ID")
    biflow: bool = Field(
        default=True, description="both directions in one record (RFC 5103); false = one record for each direction"
    )
    nanoseconds: bool = Field(default=True, description="times in nanoseconds beside those in milliseconds")
    tcp_analysis: bool = Field(
        default=True,
        description="what tcp_analysis found is in the records; false = not here: at most 46 elements in one, not 70",
    )
    rotate_seconds: RotateSeconds = Field(
        default=60, description="file: only: a new file at every multiple of this many seconds; 0 = never"
    )
    tls_ca: OptionalPath = Field(
        default=None,
        description='tls:// only: the authorities that the collector\'s certificate must come from (PEM); "" = the '
        "system's",
    )
    tls_certificate: OptionalPath = Field(
        default=None, description='tls:// only: our certificate, for collectors that ask for one (PEM); "" = none'
    )
    tls_key: OptionalPath = Field(
        default=None, description='tls:// only: the key of tls_certificate (PEM); "" = in the same file'
    )
    tls_name: Printable = Field(
        default="", description='tls:// only: the name that the collector\'s certificate must hold; "" = HOST'
    )

    @property
    def destination(self) -> Destination:
        return parse_destination(self.uri)


class Meter(Table):
    """The flow meter: all interfaces, one flow table."""

    enabled: bool = Field(default=True, description="meter flows at all")
    directory: OptionalPath = Field(
        default=None, description='flows/ is made below it; "" = the directory of the first [[output]]'
    )
    idle_timeout_s: Seconds = Field(default=30, description="a flow ends after this long without a packet")
    active_timeout_s: Seconds = Field(default=300, description="a flow that goes on is reported this often")
    max_flows: Annotated[int, between(64, 100_000_000)] = Field(
        default=1_000_000, description="flows in the table; when it is full the one idle for longest is exported early"
    )
    vlan_in_key: bool = Field(
        default=True, description="packets of different VLANs are different flows; false = they may be one flow"
    )
    interface_in_key: bool = Field(
        default=False,
        description="packets of different interfaces are different flows; false = both halves of a tap meet in one",
    )
    tcp_analysis: bool = Field(
        default=True,
        description="count repeats, disorder, losses, stalls and round trips of TCP; 256 bytes more for each flow",
    )
    packet_sampling: Annotated[int, between(1, 1_000_000)] = Field(
        default=1, description="one packet of so many is metered, and tcp_analysis is off; 1 = all"
    )
    flow_sampling: Annotated[int, between(1, 1_000_000)] = Field(
        default=1, description="one flow of so many is metered; 1 = all"
    )
    packet_sequence: Annotated[int, between(0, 20)] = Field(
        default=0,
        description="of so many first packets of a flow: times, lengths, directions, TCP flags, in a record beside",
    )
    max_fragmented: Annotated[int, between(0, 1 << 24)] = Field(
        default=65_536,
        description="datagrams in fragments at once, whose later fragments get the ports of the first (64 bytes each); "
        "0 = they have none",
    )
    fragment_timeout_s: Seconds = Field(
        default=30, description="a datagram in fragments is forgotten this long after the last of them"
    )
    zero_length: Literal["field", "frame"] = Field(
        default="field",
        description='IP octets of a packet whose length field is 0 (BIG TCP, other offloads): "field" = 0 (IPv6: 40), '
        '"frame" = what its frame held',
    )
    tunnels: Literal["outer", "inner"] = Field(
        default="outer",
        description='the flow of a packet in a tunnel: "outer" = that of the tunnel, "inner" = that of the packet '
        "inside, as far as it can be read",
    )
    elements: tuple[Printable, ...] = Field(
        default=(),
        strict=False,
        description="elements of your own in every flow record, each NAME(ENTERPRISE/NUMBER)<TYPE> = a field of the "
        'flow table or a constant, e.g. ["siteNumber(99999/1)<unsigned16> = 7", '
        "\"siteName(99999/2)<string> = 'north'\", "
        '"longestPacket(99999/3)<unsigned16> = forward.max_length"]',
    )
    applications: bool = Field(
        default=False,
        description="look into payloads for the application of each flow and its names (TLS and QUIC server name and "
        "ALPN, DNS question, HTTP host, SSH versions); these tell what people do",
    )
    entropy: bool = Field(default=False, description="measure the entropy of each direction's first payload")
    name_bytes: Annotated[int, between(1 << 16, 4 << 30)] = Field(
        default=64 << 20,
        description="with applications: memory for names; flows for which none is left have no names, and are counted",
    )
    cpus: Cpus = Field(default=(), strict=False, description="CPUs that the meter runs on; [] = any")
    exports: tuple[MeterExport, ...] = Field(default=(), validation_alias="export", strict=False)
