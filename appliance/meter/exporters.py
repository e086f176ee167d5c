"""The exporter for a URI. What only some need, TLS and other formats than IPFIX, is imported when it is asked for."""

from __future__ import annotations

import time
from collections.abc import Callable

from appliance.counters import CounterPage
from appliance.meter.export_file import FileExporter
from appliance.meter.export_tcp import TcpExporter
from appliance.meter.export_udp import UdpExporter
from appliance.meter.exporter import Exporter, ExporterParts
from appliance.meter.settings import ExportSettings, MeterSettings, parse_uri


def make_exporter(
    meter: MeterSettings,
    settings: ExportSettings,
    page: CounterPage | None = None,
    clock: Callable[[], float] = time.time,
    first_sequence: int = 0,
) -> Exporter:
    """The exporter for `settings.uri`; see ExporterParts. Raises ConfigError, MissingInputError or CannotCreateError,
    which name it."""
    return _kind(settings)(ExporterParts(meter, settings, page, clock, first_sequence))


def _kind(settings: ExportSettings) -> type[Exporter]:
    if settings.file_format != "ipfix":
        from appliance.meter.records import RecordExporter

        return RecordExporter
    scheme = parse_uri(settings.uri).scheme
    if scheme == "tls":
        from appliance.meter.tls import TlsExporter

        return TlsExporter
    kinds: dict[str, type[Exporter]] = {"udp": UdpExporter, "tcp": TcpExporter, "file": FileExporter}
    return kinds[scheme]
