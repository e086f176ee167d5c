"""TLS for IPFIX (RFC 7011, 11.3): contexts of both ends, and the exporter that checks whom it talks to.

TLS 1.2 or later; the collector's certificate and name are checked always, ours is shown when it is configured.
"""

from __future__ import annotations

import contextlib
import select
import socket
import ssl
import time
from dataclasses import dataclass
from pathlib import Path

from appliance.errors import ConfigError, MissingInputError, MissingPermissionError
from appliance.meter.export_tcp import TcpExporter
from appliance.meter.exporter import ExporterParts
from appliance.meter.settings import ExportSettings, parse_uri

GOODBYE_S = 1.0  # for the collector's answer to our end: closing before it would throw away what it has not read


@dataclass(frozen=True, slots=True)
class ServerTls:
    """The listener's certificate, and whose exporters it takes. PEM files; `ca` None: exporters need no certificate."""

    certificate: Path
    key: Path
    ca: Path | None = None


def server_context(tls: ServerTls) -> ssl.SSLContext:
    """ConfigError, MissingInputError or MissingPermissionError names the file that is wrong."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    load_certificate(context, tls.certificate, tls.key)
    if tls.ca is not None:
        load_authorities(context, tls.ca)
        context.verify_mode = ssl.CERT_REQUIRED
    return context


def client_context(settings: ExportSettings) -> ssl.SSLContext:
    """As `server_context`. Without `tls_ca` the system's authorities are trusted."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)  # checks certificate and host name
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    if settings.tls_ca is not None:
        load_authorities(context, settings.tls_ca)
    else:
        context.load_default_certs()
    if settings.tls_certificate is not None:
        load_certificate(context, settings.tls_certificate, settings.tls_key or settings.tls_certificate)
    return context


def load_certificate(context: ssl.SSLContext, certificate: Path, key: Path) -> None:
    for path in (certificate, key):
        _check_readable(path)
    try:
        context.load_cert_chain(certificate, key, password=lambda: "")
    except OSError as error:
        raise ConfigError(
            f"{certificate}, {key}: no certificate with its (not encrypted) key in PEM ({reason_of(error)})"
        ) from None


def load_authorities(context: ssl.SSLContext, ca: Path) -> None:
    _check_readable(ca)
    try:
        context.load_verify_locations(ca)
    except OSError as error:
        raise ConfigError(f"{ca}: no certificates in PEM ({reason_of(error)})") from None


def _check_readable(path: Path) -> None:
    try:
        with path.open("rb"):
            pass
    except PermissionError:
        raise MissingPermissionError(f"{path}: may not be read by the user of this process") from None
    except OSError as error:
        raise MissingInputError(f"{path}: {error.strerror}") from None


def reason_of(error: OSError) -> str:
    if isinstance(error, ssl.SSLCertVerificationError):
        return error.verify_message.rstrip(".")
    if isinstance(error, ssl.SSLError) and error.reason:
        return error.reason.replace("_", " ").lower()
    return error.strerror or str(error)


class TlsExporter(TcpExporter):
    """TCP with TLS in it; nothing is sent before the collector has proved who it is."""

    not_yet = (BlockingIOError, ssl.SSLWantReadError, ssl.SSLWantWriteError)

    def __init__(self, parts: ExporterParts) -> None:
        settings = parts.settings
        self.context = client_context(settings)
        self.server_name = settings.tls_name or parse_uri(settings.uri).host
        super().__init__(parts)

    def wrap(self, connected: socket.socket) -> socket.socket:
        return self.context.wrap_socket(connected, do_handshake_on_connect=False, server_hostname=self.server_name)

    def handshake(self) -> bool:
        assert isinstance(self.socket, ssl.SSLSocket)
        try:
            self.socket.do_handshake()
        except ssl.SSLWantReadError:
            self.connecting_events = select.POLLIN
        except ssl.SSLWantWriteError:
            self.connecting_events = select.POLLOUT
        except OSError as error:
            self.lost(error)
        else:
            return True
        return False

    def lost(self, error: OSError) -> None:
        if isinstance(error, ssl.SSLError):
            self.page.add("tls_failures")
        if isinstance(error, ssl.SSLCertVerificationError):
            self.disconnect(f"its certificate is refused: {reason_of(error)}")
        elif isinstance(error, ssl.SSLError) and "ALERT" in (error.reason or ""):
            self.disconnect(f"it refused us: {reason_of(error)}; see tls_certificate and tls_key")
        else:
            self.disconnect(f"TLS ended ({reason_of(error)})")

    def close_session(self, deadline_s: float) -> None:
        """Says goodbye, and waits shortly for the answer."""
        if not isinstance(self.socket, ssl.SSLSocket) or self.connecting_since_s is not None:
            return
        deadline_s = min(deadline_s, time.monotonic() + GOODBYE_S)
        with contextlib.suppress(OSError, ValueError):
            while True:
                try:
                    self.socket.unwrap()
                    return
                except ssl.SSLWantReadError:
                    left_s = deadline_s - time.monotonic()
                    if left_s <= 0 or not select.select([self.socket], [], [], left_s)[0]:
                        return
