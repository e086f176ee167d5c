"""TLS to collectors: a real one receives everything, and whoever is not who he should be receives nothing."""

from __future__ import annotations

import logging
import socket
import ssl
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from meter.certificates import HAS_OPENSSL, NO_OPENSSL, Authority, Identity
from meter.flow_packets import flow_records
from meter.test_collector import Collecting
from meter.test_exporter import TEMPLATES, announced, check_sequence, export, wait_until, whole_messages

from appliance.errors import ConfigError, MissingInputError
from appliance.meter import export_socket, export_tcp
from appliance.meter.exporter import Exporter
from appliance.meter.exporters import make_exporter
from appliance.meter.settings import ExportSettings, MeterSettings, parse_uri
from appliance.meter.tls import ServerTls, TlsExporter

pytestmark = pytest.mark.skipif(not HAS_OPENSSL, reason=NO_OPENSSL)


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority(tmp_path_factory.mktemp("certificates"), "authority")


@pytest.fixture
def quick_retries(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(export_socket, "RETRY_FIRST_S", 0.02)
    monkeypatch.setattr(export_socket, "RETRY_LONGEST_S", 0.04)


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port: int = probe.getsockname()[1]
        return port


class OpensslCollector:
    """`openssl s_server`, which writes what it receives into a file."""

    def __init__(self, directory: Path, identity: Identity, *options: str, port: int = 0) -> None:
        self.port = port or free_port()
        self.file = directory / f"received-{time.monotonic_ns()}"
        command = ["openssl", "s_server", "-accept", f"127.0.0.1:{self.port}", "-quiet", *options]
        command += ["-cert", str(identity.certificate), "-key", str(identity.key)]
        with self.file.open("wb") as out:
            self.process = subprocess.Popen(
                command, stdout=out, stderr=subprocess.PIPE, stdin=subprocess.PIPE, cwd=directory
            )
        wanted = f"0100007F:{self.port:04X} 00000000:0000 0A"
        wait_until(lambda: wanted in Path("/proc/net/tcp").read_text())

    @property
    def uri(self) -> str:
        return f"tls://localhost:{self.port}"

    def flows(self) -> int:
        return len(flow_records(whole_messages(self.file.read_bytes())))

    def stop(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.communicate()


@pytest.fixture
def openssl_collector(tmp_path: Path) -> Iterator[Callable[..., OpensslCollector]]:
    made: list[OpensslCollector] = []

    def make(*arguments: Any, **options: Any) -> OpensslCollector:
        made.append(OpensslCollector(tmp_path, *arguments, **options))
        return made[-1]

    yield make
    for one in made:
        one.stop()


def tls_exporter(uri: str, authority: Authority | None, **settings: Any) -> Exporter:
    ca = authority.certificate if authority else None
    exporter = make_exporter(MeterSettings(), ExportSettings(uri, tls_ca=ca, **settings))
    assert isinstance(exporter, TlsExporter)
    # Localhost may be ::1 too, where the tests' collectors do not listen.
    exporter.addresses = [(family, address) for family, address in exporter.addresses if family == socket.AF_INET]
    return exporter


@pytest.mark.parametrize("version", ["-tls1_2", "-tls1_3"])
def test_openssl_receives_every_record_after_both_have_shown_their_certificates(
    version: str, authority: Authority, openssl_collector: Callable[..., OpensslCollector]
) -> None:
    ours = authority.issue("exporter")
    collector = openssl_collector(
        authority.issue("collector"),
        version,
        "-Verify",
        "1",
        "-verify_return_error",
        "-CAfile",
        str(authority.certificate),
    )
    exporter = tls_exporter(collector.uri, authority, tls_certificate=ours.certificate, tls_key=ours.key)
    export(exporter, 2000)
    wait_until(lambda: not exporter.queue, exporter)
    exporter.close(time.monotonic() + 10)
    wait_until(lambda: collector.flows() == 2000)
    messages = whole_messages(collector.file.read_bytes())
    assert announced(messages) == TEMPLATES
    check_sequence(messages)
    assert exporter.page["flow_records"] == 2000 and exporter.page["tls_failures"] == 0


BAD = {
    "wrong name": ("Hostname mismatch", {"alternative": "DNS:elsewhere.example"}),
    "expired": ("certificate has expired", {"days": -1}),
    "unknown authority": ("unable to get local issuer certificate", {}),
}


@pytest.mark.usefixtures("quick_retries")
@pytest.mark.parametrize("fault", BAD)
def test_a_collector_that_is_not_who_it_should_be_gets_nothing(
    fault: str,
    authority: Authority,
    tmp_path: Path,
    openssl_collector: Callable[..., OpensslCollector],
    caplog: pytest.LogCaptureFixture,
) -> None:
    said, options = BAD[fault]
    issuer = Authority(tmp_path, "stranger") if fault == "unknown authority" else authority
    collector = openssl_collector(issuer.issue(fault.replace(" ", "-"), **options))
    exporter = tls_exporter(collector.uri, authority)
    exporter.page["up"] = 1  # the change is what is logged
    with caplog.at_level(logging.WARNING):
        export(exporter, 10)
        wait_until(lambda: exporter.page["tls_failures"] >= 2, exporter)
    assert f"collector {collector.uri}: its certificate is refused: {said}" in caplog.text.replace("\n", " ")
    assert exporter.page["up"] == 0 and exporter.page["connects"] == 0 and exporter.page["send_errors"] >= 2
    assert sum(message.flows for message in exporter.queue) == 10
    exporter.close(time.monotonic())
    assert exporter.page["not_sent_flows"] == 10 and exporter.page["flow_records"] == 0
    assert collector.file.read_bytes() == b""


def test_attempts_become_rare_when_they_fail(
    authority: Authority, openssl_collector: Callable[..., OpensslCollector]
) -> None:
    collector = openssl_collector(authority.issue("misnamed", "DNS:elsewhere.example"))
    exporter = tls_exporter(collector.uri, authority)
    wait_until(lambda: exporter.page["tls_failures"] == 1, exporter)
    assert isinstance(exporter, TlsExporter)
    assert exporter.poll_events() == [] and 0 < exporter.retry_at_s - time.monotonic() <= 1
    assert exporter.retry_s == 2.0
    exporter.close(time.monotonic())


def test_another_name_can_be_asked_for(
    authority: Authority, openssl_collector: Callable[..., OpensslCollector]
) -> None:
    collector = openssl_collector(authority.issue("named", "DNS:flows.example"))
    exporter = tls_exporter(collector.uri, authority, tls_name="flows.example")
    wait_until(lambda: exporter.page["up"] == 1, exporter)
    exporter.close(time.monotonic() + 5)


@pytest.mark.usefixtures("quick_retries")
@pytest.mark.parametrize("version", ["-tls1_2", "-tls1_3"])
def test_a_collector_that_refuses_us_says_why(
    version: str,
    authority: Authority,
    openssl_collector: Callable[..., OpensslCollector],
    caplog: pytest.LogCaptureFixture,
) -> None:
    options = ("-Verify", "1", "-verify_return_error", "-CAfile", str(authority.certificate))
    collector = openssl_collector(authority.issue("choosy"), version, *options)
    exporter = tls_exporter(collector.uri, authority)
    exporter.page["up"] = 1
    exporter.logged_at_s = -1e9
    with caplog.at_level(logging.WARNING):
        wait_until(lambda: exporter.page["tls_failures"] >= 1, exporter)
    assert "tls_certificate" in caplog.text


@pytest.mark.usefixtures("quick_retries")
def test_a_collector_that_was_restarted_gets_the_templates_first_and_a_new_sequence(
    authority: Authority, openssl_collector: Callable[..., OpensslCollector]
) -> None:
    identity = authority.issue("restarted")
    first = openssl_collector(identity)
    exporter = tls_exporter(first.uri, authority)
    export(exporter, 100)
    wait_until(lambda: not exporter.queue and first.flows() == 100, exporter)
    first.stop()
    wait_until(lambda: exporter.page["up"] == 0, exporter)
    export(exporter, 50)
    second = openssl_collector(identity, port=first.port)
    wait_until(lambda: not exporter.queue and second.flows() == 50, exporter)
    messages = whole_messages(second.file.read_bytes())
    assert announced(messages) == TEMPLATES
    check_sequence(messages)
    exporter.close(time.monotonic() + 5)


def test_a_handshake_that_does_not_go_on_holds_nobody_up(authority: Authority, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(export_tcp, "CONNECT_TIMEOUT_S", 0.2)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        exporter = tls_exporter(f"tls://127.0.0.1:{silent.getsockname()[1]}", authority)
        wait_until(lambda: isinstance(exporter, TlsExporter) and exporter.has_peer, exporter)
        ((_, events),) = exporter.poll_events()
        assert events & 4 == 0, "waiting for the collector's word, not for room to write"
        wait_until(lambda: exporter.page["send_errors"] == 1, exporter)
    assert exporter.page["connects"] == 0


def test_our_own_collector_hears_our_exporter(authority: Authority) -> None:
    identity, ours = authority.issue("own"), authority.issue("own-exporter")
    tls = ServerTls(identity.certificate, identity.key, authority.certificate)
    collector = Collecting("tls://127.0.0.1:0", tls=tls)
    try:
        uri = f"tls://localhost:{collector.address()[1]}"
        exporter = tls_exporter(uri, authority, tls_certificate=ours.certificate, tls_key=ours.key)
        export(exporter, 3000)
        wait_until(lambda: not exporter.queue, exporter)
        exporter.close(time.monotonic() + 10)
        collector.wait_for(lambda: sum(m.records for _, m in collector.messages) == exporter.page["records"])
        assert collector.told == []
    finally:
        collector.close()


def test_files_and_keys_that_are_wrong_are_named(authority: Authority, tmp_path: Path) -> None:
    with pytest.raises(MissingInputError, match=r"none\.pem: No such file"):
        make_exporter(MeterSettings(), ExportSettings("tls://localhost", tls_ca=tmp_path / "none.pem"))
    (tmp_path / "nonsense.pem").write_text("nonsense")
    with pytest.raises(ConfigError, match=r"nonsense\.pem: no certificates in PEM"):
        make_exporter(MeterSettings(), ExportSettings("tls://localhost", tls_ca=tmp_path / "nonsense.pem"))
    with pytest.raises(ConfigError, match="tls_key without tls_certificate"):
        ExportSettings("tls://localhost", tls_key=tmp_path / "key.pem")
    with pytest.raises(ConfigError, match="belong to tls:// alone"):
        ExportSettings("tcp://localhost", tls_ca=tmp_path / "ca.pem")


def test_nothing_older_than_tls_1_2_is_spoken(authority: Authority) -> None:
    exporter = tls_exporter("tls://localhost:1", authority)
    assert isinstance(exporter, TlsExporter)
    assert exporter.context.minimum_version == ssl.TLSVersion.TLSv1_2 and exporter.context.check_hostname
    assert exporter.context.verify_mode == ssl.CERT_REQUIRED
    assert parse_uri("tls://c.example").port == 4740
