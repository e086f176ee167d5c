"""The real server on an ephemeral port of loopback, asked over real sockets."""

from __future__ import annotations

import asyncio
import dataclasses
import http.client
import json
import re
import resource
import shutil
import socket
import subprocess
import threading
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
from monitor.pages import Appliance
from prometheus_client.parser import text_string_to_metric_families

from appliance.errors import CannotCreateError
from appliance.monitor import web
from appliance.monitor.listener import open_listener
from appliance.monitor.view import ExportInfo, Snapshot
from appliance.monitor.web import MAX_CONNECTIONS, WebServer, application


class Site:
    """The web server in a thread of its own. `counts` is what it counted."""

    def __init__(self, appliance: Appliance) -> None:
        self.counts: Counter[str] = Counter()

        def count(name: str) -> None:
            self.counts.update([name])

        self.listener = open_listener("127.0.0.1", 0)
        self.port = self.listener.getsockname()[1]
        self.server = WebServer(application(appliance.snapshot, count), count)
        self.loop = asyncio.new_event_loop()
        self.thread = threading.Thread(target=self.serve)
        self.thread.start()
        while not self.server.started:
            time.sleep(0.01)

    def serve(self) -> None:
        with asyncio.Runner(loop_factory=lambda: self.loop) as runner:
            runner.run(self.server.serve([self.listener]))

    def get(self, path: str, method: str = "GET", **headers: str) -> tuple[int, dict[str, str], bytes]:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=10)
        try:
            connection.request(method, path, headers=headers)
            response = connection.getresponse()
            return response.status, {k.lower(): v for k, v in response.getheaders()}, response.read()
        finally:
            connection.close()

    def connect(self) -> socket.socket:
        return socket.create_connection(("127.0.0.1", self.port), timeout=10)

    def stop(self) -> None:
        self.loop.call_soon_threadsafe(self.server.end)
        self.thread.join()


@pytest.fixture
def site(running: Appliance) -> Iterator[Site]:
    made = Site(running)
    yield made
    made.stop()


def test_a_scrape_holds_the_counters(site: Site) -> None:
    status, headers, body = site.get("/metrics")
    assert status == 200
    assert headers["content-type"].startswith("text/plain; version=0.0.4")
    families = {family.name: family for family in text_string_to_metric_families(body.decode())}
    received = {one.labels["interface"]: one.value for one in families["appliance_packets_received"].samples}
    assert received == {"uplink": 1000, "lo": 40}
    assert site.counts["scrapes"] == 1


def test_a_scrape_may_ask_for_openmetrics(site: Site) -> None:
    status, headers, body = site.get("/metrics", Accept="application/openmetrics-text; version=1.0.0")
    assert status == 200
    assert headers["content-type"].startswith("application/openmetrics-text")
    assert body.endswith(b"# EOF\n")


def test_healthy_is_200(site: Site) -> None:
    status, _, body = site.get("/healthz")
    assert (status, json.loads(body)) == (200, {"status": "ok", "reasons": []})


def test_a_hung_worker_is_503_with_its_name(site: Site, running: Appliance) -> None:
    running.pages["merge/main"]["heartbeat_ns"] -= 60 * 1_000_000_000
    status, _, body = site.get("/healthz")
    assert status == 503
    assert "worker merge/main gave its last sign of life 60 s ago" in json.loads(body)["reasons"][0]


def test_the_status_is_the_snapshot(site: Site, running: Appliance) -> None:
    status, headers, body = site.get("/status.json")
    assert status == 200
    assert headers["cache-control"] == "no-store"
    assert Snapshot.from_json(json.loads(body)) == running.snapshot()


def test_the_page_needs_nothing_from_elsewhere(site: Site) -> None:
    status, headers, body = site.get("/")
    page = body.decode()
    assert status == 200
    assert headers["content-type"] == "text/html; charset=utf-8"
    assert "default-src 'none'" in headers["content-security-policy"]
    urls = re.findall(r"(?:src|href|url)\s*[=(]\s*[\"']?([^\"')> ]+)", page)
    assert set(urls) == {"data:,", "status.json", "metrics", "healthz"}
    assert set(re.findall(r"https?://[^\"' ]+", page)) == {"http://www.w3.org/2000/svg"}  # a name, never fetched


@pytest.fixture
def browser() -> str:
    for name in ("chromium-headless-shell", "chromium", "google-chrome"):
        if found := shutil.which(name):
            return found
    pytest.skip("no Chromium is installed (package chromium-headless-shell)")


def shown_in(browser: str, url: str, profile: Path) -> str:
    """The document after its script has run for a while, and what the browser had to say."""
    done = subprocess.run(
        [
            browser,
            "--headless",
            "--no-sandbox",
            "--disable-gpu",
            "--enable-logging=stderr",
            f"--user-data-dir={profile}",
            "--virtual-time-budget=3000",
            "--dump-dom",
            url,
        ],
        capture_output=True,
        text=True,
        timeout=100,
        check=True,
    )
    assert "CONSOLE" not in done.stderr, done.stderr  # a script's error, or a breach of the content security policy
    return done.stdout


def test_a_browser_shows_the_figures(site: Site, browser: str, tmp_path: Path) -> None:
    document = shown_in(browser, f"http://127.0.0.1:{site.port}/", tmp_path / "profile")
    assert '<span id="health" role="status" class="ok">healthy</span>' in document
    assert "<td>1,000</td><td>700</td>" in document
    assert "foreign 3, filter 7, kernel 100, ring 50, merge 10, writer 30, unclean 5" in document


def test_a_name_is_text_and_never_markup(running: Appliance, browser: str, tmp_path: Path) -> None:
    hostile = "udp://<img src=x onerror=alert(1)>"
    running.topology = dataclasses.replace(running.topology, exports=(ExportInfo(hostile),))
    running.pages["meter"]["heartbeat_ns"] = 0
    site = Site(running)
    try:
        document = shown_in(browser, f"http://127.0.0.1:{site.port}/", tmp_path / "profile")
    finally:
        site.stop()
    assert "udp://&lt;img src=x onerror=alert(1)&gt;" in document
    assert '<span id="health" role="status" class="failing">failing</span>' in document
    assert "<li>worker meter has not started yet</li>" in document


def test_nothing_can_be_changed_over_http(site: Site) -> None:
    for path in ("/", "/metrics", "/healthz", "/status.json"):
        assert site.get(path, "POST")[0] == 405
    assert site.get("/rotate")[0] == 404


def test_500_idle_connections_do_not_stop_a_scrape(site: Site) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard != resource.RLIM_INFINITY and hard < 1200:
        pytest.skip(f"needs 1200 open files, the hard limit is {hard}")
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, 1200), hard))
    idle = [site.connect() for _ in range(500)]
    for connection in idle[::2]:
        connection.send(b"GET /metrics HTTP/1.1\r\nHost: slow")
    began = time.monotonic()
    status, _, body = site.get("/metrics")
    took_s = time.monotonic() - began
    assert status == 200
    assert b"appliance_packets_received_total" in body
    assert took_s < 1
    assert site.counts["rejected_connections"] >= 500 - MAX_CONNECTIONS
    for connection in idle:
        connection.close()
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def closed_by_server(connection: socket.socket) -> bool:
    try:
        while connection.recv(1 << 16):
            pass
    except ConnectionResetError:
        pass
    except TimeoutError:
        return False
    return True


def test_a_header_that_trickles_in_does_not_hold_its_connection(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(web, "EXCHANGE_TIMEOUT_S", 0.3)
    with site.connect() as connection:
        began = time.monotonic()
        try:
            while time.monotonic() - began < 10:
                connection.send(b"X")
                time.sleep(0.05)
        except (BrokenPipeError, ConnectionResetError):
            pass
        assert time.monotonic() - began < 5
    assert site.counts["rejected_connections"] == 1


def test_a_silent_connection_is_closed(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(web, "EXCHANGE_TIMEOUT_S", 0.3)
    with site.connect() as connection:
        assert closed_by_server(connection)


def test_a_client_that_does_not_read_is_closed(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(web, "EXCHANGE_TIMEOUT_S", 0.3)
    connection = socket.socket()
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    connection.settimeout(10)
    connection.connect(("127.0.0.1", site.port))
    with connection:
        connection.setblocking(False)
        request = b"GET /status.json HTTP/1.1\r\nHost: a\r\n\r\n"
        began = time.monotonic()
        while not site.counts["rejected_connections"] and time.monotonic() - began < 20:
            try:
                connection.send(request * 50)  # pipelined, until the responses fill every buffer on the way
            except BlockingIOError:
                time.sleep(0.05)
            except (BrokenPipeError, ConnectionResetError):
                break
    assert site.counts["rejected_connections"] == 1
    assert site.get("/healthz")[0] == 200


def test_nonsense_is_refused_and_the_next_client_served(site: Site) -> None:
    with site.connect() as connection:
        connection.sendall(b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + b"\0" * 200 + b"\r\n\r\n")
        assert closed_by_server(connection)
    assert site.get("/healthz")[0] == 200


def test_a_kept_connection_serves_again(site: Site) -> None:
    connection = http.client.HTTPConnection("127.0.0.1", site.port, timeout=10)
    for _ in range(3):
        connection.request("GET", "/healthz")
        response = connection.getresponse()
        assert response.status == 200
        response.read()
    connection.close()
    assert site.counts["rejected_connections"] == 0


def test_an_address_that_is_taken_is_named(site: Site) -> None:
    with pytest.raises(CannotCreateError, match=rf"monitor\.listen 127\.0\.0\.1:{site.port}: .*another service has it"):
        open_listener("127.0.0.1", site.port)


def test_an_address_of_another_host_is_named() -> None:
    with pytest.raises(CannotCreateError, match=r"monitor\.listen 192\.0\.2\.1:9750: .*an address of this host"):
        open_listener("192.0.2.1", 9750)
