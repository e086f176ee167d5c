"""What the meter and its exporters can be told, with the defaults of the service; and the URIs of collectors."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import urlsplit

from appliance.errors import ConfigError

DEFAULT_PORT = 4739  # IANA: ipfix, over UDP and TCP
DEFAULT_TLS_PORT = 4740  # IANA: ipfixs
MIN_MESSAGE_BYTES = 512  # RFC 7011, 10.3.3: what is safe when the path MTU is unknown
MAX_MESSAGE_BYTES = 65535


@dataclass(frozen=True, slots=True)
class ExportSettings:
    """One collector or file. `uri`: udp://HOST[:PORT], tcp://..., tls://..., file:DIRECTORY, or file: alone.

    Files are rotated: staged in `work/`, published in `flows/` below the directory (`directory` when the URI names
    none). With `single_file` the URI names one file, which appears when all is done.
    """

    uri: str
    domain: int = 1  # observation domain ID
    biflow: bool = True  # RFC 5103 records; False: one record for each direction, for collectors that ignore reverse
    nanoseconds: bool = True  # flowStart/EndNanoseconds beside the milliseconds
    tcp_analysis: bool = True  # its elements are in the records, if the meter analyses at all
    # Longest message, over UDP less when the path takes less; 0: 1400 over UDP, 16384 over TCP and TLS, 65535 in files.
    message_bytes: int = 0
    template_refresh_s: float = 60.0  # over UDP
    template_refresh_messages: int = 1000  # over UDP; 0: by time alone
    template_copies: int = 3  # over UDP, before the first record
    datagrams_per_s: int = 20_000  # over UDP: a burst would overrun the collector's socket; 0: no limit
    statistics_interval_s: float = (
        60.0  # options data: what was metered, ignored, sent and not sent; 0: only at the end
    )
    queue_bytes: int = 16 << 20  # waiting for the collector; what does not fit is counted as not sent
    rotate_seconds: int = 60  # of files, aligned to the clock; 0: never
    directory: Path | None = None
    single_file: bool = False
    tls_ca: Path | None = None  # PEM: whose certificates are believed; None: the system's authorities
    tls_certificate: Path | None = None  # PEM: ours, for collectors that ask for one
    tls_key: Path | None = None  # PEM: its key, when it is not in the same file
    tls_name: str = ""  # that the collector's certificate must hold; "": the host of the URI
    file_format: str = "ipfix"  # of a single file; or "json" (a flow a line), "csv", "parquet"

    def __post_init__(self) -> None:
        endpoint = parse_uri(self.uri)
        if endpoint.scheme != "file" and endpoint.port == 0:
            raise ConfigError(f"{self.uri}: port 0 cannot be sent to")
        if endpoint.scheme != "tls" and (self.tls_ca or self.tls_certificate or self.tls_key or self.tls_name):
            raise ConfigError(f"{self.uri}: tls_ca, tls_certificate, tls_key and tls_name belong to tls:// alone")
        if self.tls_key is not None and self.tls_certificate is None:
            raise ConfigError(f"{self.uri}: tls_key without tls_certificate")
        if self.message_bytes and not MIN_MESSAGE_BYTES <= self.message_bytes <= MAX_MESSAGE_BYTES:
            raise ConfigError(
                f"{self.uri}: message_bytes {self.message_bytes} is not 0 or {MIN_MESSAGE_BYTES} to {MAX_MESSAGE_BYTES}"
            )


@dataclass(frozen=True, slots=True)
class InterfaceName:
    """What is told to collectors about an interface. `number`: its ingressInterface."""

    number: int
    name: str
    description: str


@dataclass(frozen=True, slots=True)
class MeterSettings:
    idle_timeout_s: float = 30.0
    active_timeout_s: float = 300.0
    tcp_linger_s: float = 1.0  # how long an ended TCP flow waits for its last acknowledgement
    max_flows: int = 1_000_000
    vlan_in_key: bool = True
    interface_in_key: bool = False
    tcp_analysis: bool = True  # repeats, losses, round trips ...: TCP_ANALYSIS in templates.py
    packet_sampling: int = 1  # one packet of so many is metered
    flow_sampling: int = 1  # one flow of so many
    packet_sequence: int = 0  # of so many first packets of a flow: times, lengths, directions, TCP flags
    max_fragmented: int = 65_536  # datagrams in fragments at once; 0: later fragments have no ports
    fragment_timeout_s: float = 30.0  # after a datagram's last fragment so far
    zero_length: str = "field"  # or "frame": the octets of a packet whose IP length field is 0 (offloaded segments)
    tunnels: str = "outer"  # or "inner": which IP header of a tunnel the digests describe; whoever makes them heeds it
    applications: bool = False  # by what payloads say, with names; whoever makes the digests looks for them
    entropy: bool = False  # of the first payload of each direction; likewise
    name_bytes: int = 64 << 20  # memory for names; flows for which there is none have no names
    interfaces: tuple[InterfaceName, ...] = ()
    elements: tuple[str, ...] = ()  # of the user's own, in every flow record; see own.py
    export: tuple[ExportSettings, ...] = field(default=())

    @property
    def analyses_tcp(self) -> bool:
        """Of a connection that is seen in part the analysis would say nothing but losses."""
        return self.tcp_analysis and self.packet_sampling == 1


@dataclass(frozen=True, slots=True)
class Endpoint:
    scheme: str  # "udp", "tcp", "tls" or "file"
    host: str = ""
    port: int = 0
    path: str = ""  # of a file: URI, "" when it names none


def parse_uri(uri: str) -> Endpoint:
    """The parts of an exporter's URI; ConfigError says what is wrong with it."""
    scheme, colon, rest = uri.partition(":")
    if scheme == "file" and colon:
        return Endpoint("file", path=rest.removeprefix("//"))
    if scheme not in ("udp", "tcp", "tls") or not rest.startswith("//"):
        raise ConfigError(
            f"{uri}: not an exporter's URI; use udp://HOST:PORT, tcp://HOST:PORT, tls://HOST:PORT or file:DIRECTORY"
        )
    try:
        parts = urlsplit(uri)
        host, port = parts.hostname, parts.port
    except ValueError as error:
        raise ConfigError(f"{uri}: {error}") from None
    default_port = DEFAULT_TLS_PORT if scheme == "tls" else DEFAULT_PORT
    if not host or parts.path not in ("", "/") or parts.query or parts.fragment or parts.username is not None:
        raise ConfigError(
            f"{uri}: only a host and a port belong here, as in {scheme}://collector.example:{default_port}"
        )
    return Endpoint(scheme, host=host, port=default_port if port is None else port)
