"""`pcap:` sources: both bindings of libpcap put the same packets into the rings, and count what the kernel counted."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator

import pytest
from support.lab import Lab, requires_root

FRAMES = 2000

# Runs inside the laboratory's namespace; the binding is chosen by hiding pypcap or not.
PROBE = """
import json, os, select, struct, sys, time
interface, binding, snaplen, expected, text = sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4]), sys.argv[5]
if binding == "own":
    sys.modules["pcap"] = None
from appliance.capture.pcap_live import LibpcapHandle, PcapCapture, PypcapHandle
from appliance.config import Interface
from appliance.counters import CAPTURE_FIELDS, CounterPages
from appliance.ring import memory
from appliance.ring.ring import Consumer, Producer, initialise

fd = memory.allocate(1 << 22, "probe")
initialise(fd, 1 << 22, 1)
page = CounterPages([("capture/x", CAPTURE_FIELDS)])["capture/x"]
capture = PcapCapture(
    Interface(uri=f"pcap:{interface}", snaplen=snaplen, filter=text, promiscuous=True), Producer(fd, 1), None, page
)
assert isinstance(capture.handle, LibpcapHandle if binding == "own" else PypcapHandle), type(capture.handle)
consumer = Consumer(fd, 1)
print("ready", flush=True)
lengths, times = [], []
deadline = time.monotonic() + 20
while len(lengths) < expected and time.monotonic() < deadline:
    select.select([capture.fileno()], [], [], 0.05)
    capture.step()
    while (record := consumer.pop()) is not None:
        if record[0] == 6:
            high, low, captured, original = struct.unpack_from("=IIII", record, 12)
            lengths.append((captured, original))
            times.append(high << 32 | low)
    consumer.release()
capture.step()
print(json.dumps({
    "packets": len(lengths), "lengths": sorted(set(lengths)), "ordered": times == sorted(times),
    "age_s": abs(time.time() - times[-1] / 1e9) if times else None, "counters": page.snapshot(),
    "watermark_ns": consumer.watermark_ns, "newest_ns": max(times, default=0),
}))
"""

BINDINGS = ["own"] + (["pypcap"] if sys.version_info < (3, 12) else [])


@pytest.fixture
def lab() -> Iterator[Lab]:
    with Lab() as laboratory:
        yield laboratory


def probe(lab: Lab, binding: str, *, snaplen: int, expected: int, text: str = "") -> dict[str, object]:
    interface, peer = lab.veth("a")
    argv = [sys.executable, "-c", PROBE, interface, binding, str(snaplen), str(expected), text]
    process = lab.popen(argv, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    lab.send([peer], frames=FRAMES, rate=10_000, sizes=(100,))
    answer: dict[str, object] = json.loads(process.communicate(timeout=30)[0])
    return answer


@requires_root
@pytest.mark.parametrize("binding", BINDINGS)
def test_every_frame_reaches_the_ring_with_its_time_and_length(lab: Lab, binding: str) -> None:
    found = probe(lab, binding, snaplen=262144, expected=FRAMES)
    assert found["packets"] == FRAMES
    assert found["lengths"] == [[100, 100]]
    assert found["ordered"]
    counters = found["counters"]
    assert isinstance(counters, dict)
    assert counters["received_packets"] == counters["read_packets"] == counters["published_packets"] == FRAMES
    assert counters["dropped_kernel_packets"] == counters["dropped_ring_packets"] == 0
    assert isinstance(found["age_s"], float) and found["age_s"] < 30


@requires_root
@pytest.mark.parametrize("binding", BINDINGS)
def test_packets_are_cut_to_the_snaplen_and_keep_their_original_length(lab: Lab, binding: str) -> None:
    found = probe(lab, binding, snaplen=64, expected=FRAMES)
    assert found["lengths"] == [[64, 100]]
    counters = found["counters"]
    assert isinstance(counters, dict)
    assert counters["truncated_packets"] == FRAMES


@requires_root
@pytest.mark.parametrize("binding", BINDINGS)
def test_a_filter_keeps_out_what_does_not_match(lab: Lab, binding: str) -> None:
    found = probe(lab, binding, snaplen=262144, expected=FRAMES, text="ether proto 0x88b5 and greater 90")
    assert found["packets"] == FRAMES


@requires_root
@pytest.mark.parametrize("binding", BINDINGS)
def test_a_bad_filter_is_an_error_that_names_filter_and_interface(lab: Lab, binding: str) -> None:
    interface, _ = lab.veth("a")
    argv = [sys.executable, "-c", PROBE, interface, binding, "262144", "0", "tcp port"]
    result = lab.popen(argv, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    error = result.communicate(timeout=30)[1]
    assert result.returncode != 0
    assert "ConfigError" in error and "'tcp port'" in error and interface in error
