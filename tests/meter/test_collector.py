"""Collecting from files and sockets: whole messages out of any stream, sessions that end, and who is refused."""

from __future__ import annotations

import io
import socket
import ssl
import struct
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from meter.certificates import HAS_OPENSSL, NO_OPENSSL, Authority
from meter.craft_ipfix import a_set, message, template

from appliance.errors import ConfigError, FormatError, InputOutputError, MissingInputError
from appliance.meter.collector import CollectorLimits, Framer, Listener, read_stream
from appliance.meter.decode import MalformedMessageError, Message, Session
from appliance.meter.tls import ServerTls

PORTS = [(7, 2), (11, 2)]
FIRST = message(template(256, PORTS))


def data(*ports: int, sequence: int = 0) -> bytes:
    return message(a_set(256, b"".join(struct.pack("!HH", port, 80) for port in ports)), sequence=sequence)


def ports_of(decoded: Message) -> list[int]:
    return [row[0] for records in decoded.sets for row in records.rows]


# Files ---------------------------------------------------------------------------------------------------------------


class Trickle(io.RawIOBase):
    """A pipe that gives a few octets at a time."""

    def __init__(self, content: bytes) -> None:
        self._content = io.BytesIO(content)

    def read(self, size: int = -1) -> bytes:
        return self._content.read(min(size, 3))


@pytest.mark.parametrize("kind", [io.BytesIO, Trickle])
def test_a_stream_is_read_to_its_end(kind: Callable[[bytes], Any]) -> None:
    content = FIRST + data(1, 2) + data(3, sequence=2)
    decoded = list(read_stream(kind(content), "name", Session()))
    assert [ports_of(one) for one in decoded] == [[], [1, 2], [3]]
    assert not any(one.notes for one in decoded)


@pytest.mark.parametrize("cut", [1, 10, 17])
def test_a_file_that_is_cut_off_gives_its_whole_messages_and_says_where_it_ends(cut: int) -> None:
    content = FIRST + data(1, 2)
    reading = read_stream(io.BytesIO(content + data(3)[:cut]), "a.ipfix", Session())
    assert [ports_of(next(reading)) for _ in range(2)] == [[], [1, 2]]
    with pytest.raises(FormatError, match=rf"a\.ipfix: at octet {len(content)}: .*; 2 whole messages before"):
        next(reading)


@pytest.mark.parametrize(
    ("octets", "said"),
    [
        (b"\x0c\xa5" + bytes(40), "a file of nfdump"),
        (b"\xd4\xc3\xb2\xa1" + bytes(40), "`appliance flows` meters it"),
        (b"\x1f\x8b" + bytes(40), "zcat"),
        (b"\0\x09" + bytes(40), "version 9"),
        (b"\0\x0a\0\x03" + bytes(40), "a message of 3 octets"),
    ],
)
def test_what_is_no_ipfix_is_named(octets: bytes, said: str) -> None:
    with pytest.raises(FormatError, match=said):
        list(read_stream(io.BytesIO(octets), "x", Session()))


def test_messages_are_cut_out_of_a_stream_wherever_it_is_split() -> None:
    content = FIRST + data(1) + data(2)
    for split in range(len(content)):
        framer = Framer()
        assert [*framer.feed(content[:split]), *framer.feed(content[split:])] == [FIRST, data(1), data(2)]
        assert framer.waiting == 0
    with pytest.raises(MalformedMessageError):
        list(Framer().feed(b"GET / HTTP/1.1\r\n\r\n"))


# Sockets -------------------------------------------------------------------------------------------------------------


class Collecting:
    """A listener on a thread of its own."""

    def __init__(self, *uris: str, **options: Any) -> None:
        self.messages: list[tuple[str, Message]] = []
        self.told: list[str] = []
        self._ended = False
        self.listener = Listener(uris, lambda name, one: self.messages.append((name, one)), self.told.append, **options)
        self._thread = threading.Thread(target=lambda: self.listener.run(lambda: self._ended))
        self._thread.start()

    def address(self, number: int = 0) -> tuple[str, int]:
        host, _, port = self.listener.addresses[number].partition("://")[2].rpartition(":")
        return host, int(port)

    @property
    def ports(self) -> list[int]:
        return [port for _, one in self.messages for port in ports_of(one)]

    def wait_for(self, condition: Callable[[], bool]) -> None:
        deadline = time.monotonic() + 20
        while not condition():
            assert time.monotonic() < deadline, f"gave up waiting; told: {self.told}"
            time.sleep(0.005)

    def close(self) -> None:
        if not self._ended:
            self._ended = True
            self._thread.join(timeout=20)
            self.listener.close()


@pytest.fixture
def collecting() -> Iterator[Callable[..., Collecting]]:
    made: list[Collecting] = []

    def make(*uris: str, **options: Any) -> Collecting:
        made.append(Collecting(*uris, **options))
        return made[-1]

    yield make
    for one in made:
        one.close()


def test_datagrams_of_every_exporter_are_a_session_of_their_own(collecting: Callable[..., Collecting]) -> None:
    collector = collecting("udp://127.0.0.1:0")
    with socket.socket(type=socket.SOCK_DGRAM) as first, socket.socket(type=socket.SOCK_DGRAM) as second:
        for exporter, elements in ((first, PORTS), (second, [(11, 2), (7, 2)])):
            exporter.connect(collector.address())
            exporter.send(message(template(256, elements)))
            exporter.send(data(7))
        collector.wait_for(lambda: len(collector.messages) == 4)
        first.send(b"nonsense")
        first.send(data(8, sequence=5))
        collector.wait_for(lambda: len(collector.messages) == 5)
    assert len({name for name, _ in collector.messages}) == 2 and collector.listener.totals.sessions == 2
    assert "8 octets are no message" in collector.told[0] and "4 records before it did not come" in collector.told[1]
    collector.close()
    counts = collector.listener.totals.counts
    assert (counts.messages, counts.malformed_messages, counts.lost_records) == (5, 1, 4)


def test_silent_exporters_over_udp_are_forgotten_when_there_are_too_many(collecting: Callable[..., Collecting]) -> None:
    collector = collecting("udp://127.0.0.1:0", limits=CollectorLimits(sessions=2))
    for i in range(5):
        with socket.socket(type=socket.SOCK_DGRAM) as exporter:
            exporter.sendto(FIRST, collector.address())
            collector.wait_for(lambda i=i: len(collector.messages) == i + 1)
    assert len(collector.listener._datagram_sessions) == 2
    collector.close()
    assert collector.listener.totals.counts.messages == 5


def test_a_connection_is_a_session_and_its_messages_may_come_in_pieces(collecting: Callable[..., Collecting]) -> None:
    collector = collecting("tcp://127.0.0.1:0")
    content = FIRST + data(1, 2) + data(3, sequence=2)
    with socket.create_connection(collector.address()) as exporter:
        exporter.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for i in range(0, len(content), 7):
            exporter.sendall(content[i : i + 7])
        collector.wait_for(lambda: collector.ports == [1, 2, 3])
        exporter.sendall(data(4)[:5])
    collector.wait_for(lambda: bool(collector.told))
    assert "in the middle of a message (5 octets)" in collector.told[0]


def test_a_connection_that_brings_nonsense_is_closed(collecting: Callable[..., Collecting]) -> None:
    collector = collecting("tcp://127.0.0.1:0")
    for nonsense in (b"GET / HTTP/1.1\r\n\r\n", message(b"\1\0\0\0")):
        with socket.create_connection(collector.address()) as exporter:
            exporter.settimeout(10)
            exporter.sendall(FIRST + nonsense)
            try:
                assert exporter.recv(10) == b""
            except ConnectionResetError:
                pass
    collector.close()
    assert collector.listener.totals.counts.malformed_messages == 2


def test_too_many_and_too_silent_connections_are_closed(collecting: Callable[..., Collecting]) -> None:
    limits = CollectorLimits(connections=2, silence_s=0.2)
    collector = collecting("tcp://127.0.0.1:0", limits=limits)
    exporters = [socket.create_connection(collector.address()) for _ in range(3)]
    collector.wait_for(lambda: collector.listener.totals.refused_connections == 1)
    for exporter in exporters:
        exporter.settimeout(20)
        assert exporter.recv(10) == b""
        exporter.close()
    assert sum("silent" in text for text in collector.told) == 2


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    if not HAS_OPENSSL:
        pytest.skip(NO_OPENSSL)
    return Authority(tmp_path_factory.mktemp("certificates"), "authority")


def client_context(authority: Authority) -> ssl.SSLContext:
    return ssl.create_default_context(cafile=str(authority.certificate))


def test_tls_exporters_are_heard(collecting: Callable[..., Collecting], authority: Authority) -> None:
    identity = authority.issue("collector")
    collector = collecting("tls://127.0.0.1:0", tls=ServerTls(identity.certificate, identity.key))
    many = b"".join(data(i, sequence=i) for i in range(5000))  # more than one record of TLS at a time
    with socket.create_connection(collector.address()) as plain:
        with client_context(authority).wrap_socket(plain, server_hostname="localhost") as exporter:
            exporter.sendall(FIRST + many)
            collector.wait_for(lambda: len(collector.ports) == 5000)
    assert collector.told == []


def test_an_exporter_without_a_certificate_is_refused_where_one_is_asked_for(
    collecting: Callable[..., Collecting], authority: Authority
) -> None:
    identity, known = authority.issue("strict"), authority.issue("exporter")
    tls = ServerTls(identity.certificate, identity.key, authority.certificate)
    collector = collecting("tls://127.0.0.1:0", tls=tls)
    for certificate in (None, known):
        context = client_context(authority)
        if certificate is not None:
            context.load_cert_chain(certificate.certificate, certificate.key)
        try:
            with socket.create_connection(collector.address()) as plain:
                with context.wrap_socket(plain, server_hostname="localhost") as exporter:
                    exporter.sendall(FIRST)
                    if certificate is None:
                        exporter.recv(1)
                    else:
                        collector.wait_for(lambda: len(collector.messages) == 1)
        except (ssl.SSLError, ConnectionError):
            assert certificate is None
    collector.wait_for(lambda: any("certificate" in text for text in collector.told))
    assert len(collector.messages) == 1


def test_a_handshake_that_never_ends_is_ended(collecting: Callable[..., Collecting], authority: Authority) -> None:
    identity = authority.issue("patient")
    tls = ServerTls(identity.certificate, identity.key)
    limits = replace(CollectorLimits(), handshake_s=0.2)
    collector = collecting("tls://127.0.0.1:0", tls=tls, limits=limits)
    with socket.create_connection(collector.address()) as silent:
        silent.settimeout(20)
        assert silent.recv(10) == b""


@pytest.mark.parametrize(
    ("uri", "error", "said"),
    [
        ("file:/tmp/x", ConfigError, "not a place to listen"),
        ("udp://no-such-host.invalid", MissingInputError, "cannot be resolved"),
        ("tcp://192.0.2.1:1", InputOutputError, "cannot listen there"),
        ("tls://127.0.0.1:0", ConfigError, "--certificate"),
    ],
)
def test_a_place_where_nobody_can_listen_is_named(uri: str, error: type[Exception], said: str) -> None:
    with pytest.raises(error, match=said) as caught:
        Listener([uri], lambda *_: None, print)
    assert uri in str(caught.value)


def test_wrong_certificate_files_are_named(tmp_path: Path, authority: Authority) -> None:
    identity = authority.issue("other")
    nonsense = tmp_path / "nonsense.pem"
    nonsense.write_text("no certificate")
    for tls, error, said in (
        (ServerTls(tmp_path / "none.pem", identity.key), MissingInputError, r"none\.pem: No such file"),
        (ServerTls(nonsense, identity.key), ConfigError, r"nonsense\.pem"),
        (ServerTls(identity.certificate, authority.issue("another").key), ConfigError, r"another\.key"),
        (ServerTls(identity.certificate, identity.key, nonsense), ConfigError, r"nonsense\.pem: no certificates"),
    ):
        with pytest.raises(error, match=said):
            Listener(["tls://127.0.0.1:0"], lambda *_: None, print, tls=tls)
