"""The bounded part of the fuzzing: the same targets, some thousand inputs from a fixed seed, and what was found."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given, settings, strategies as st
from support.judges import packets as packets_of

from fuzz.engine import mutate
from fuzz.seeds import packets, seeds, shared
from fuzz.targets import LINKTYPES, TARGETS, fuzz_headers, silence

INPUTS = {
    "headers": 20000,
    "reader": 2000,
    "salvage": 600,
    "ring": 1500,
    "table": 8000,
    "ipfix": 8000,
    "config": 500,
    "erf": 3000,
    "collector": 1500,
    "flows": 150,
    "traces": 300,
    "payload": 8000,
    "port": 1000,
    "application": 3000,
}
FOUND = Path(__file__).parent / "found"
OF_FILES = ("reader", "salvage", "flows", "traces")  # whose seeds are the captures
CAPTURED_BYTES_MAX = 200


@pytest.fixture(autouse=True)
def silent() -> Iterator[None]:
    with silence():
        yield


@pytest.mark.parametrize("name", TARGETS)
def test_no_bytes_make_a_target_fail(name: str) -> None:
    chance, corpus = random.Random(name), seeds(name)
    for data in corpus if name not in OF_FILES else corpus[:20]:
        TARGETS[name](data)
    for _ in range(INPUTS[name]):
        TARGETS[name](mutate(chance, corpus))


@pytest.mark.parametrize("name", TARGETS)
def test_nor_do_bytes_of_any_kind(name: str) -> None:
    @settings(max_examples=100, deadline=None, derandomize=True)
    @given(st.binary(max_size=400))
    def any_bytes(data: bytes) -> None:
        TARGETS[name](data)

    any_bytes()


def test_what_was_found_once_stays_mended() -> None:
    """A file's name begins with its target's."""
    for path in FOUND.glob("*.bin"):
        TARGETS[path.stem.partition("-")[0]](path.read_bytes())


def test_every_packet_is_parsed_alike_wherever_it_is_cut() -> None:
    for packet in packets():
        for length in range(len(packet) + 1):
            fuzz_headers(bytes([LINKTYPES.index(1)]) + packet[:length])


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_every_packet_of_the_real_captures_is_parsed_alike_wherever_it_is_cut(shared_data: Path) -> None:
    seen: set[bytes] = set()
    for path in sorted((shared_data / "captures").rglob("*.pcap")):
        if path.stat().st_size > 300_000:
            continue
        try:
            for packet in packets_of(path):
                data = bytes(packet.data[:CAPTURED_BYTES_MAX])
                if packet.linktype in LINKTYPES and data[:64] not in seen:
                    seen.add(data[:64])
                    for length in range(len(data) + 1):
                        fuzz_headers(bytes([LINKTYPES.index(packet.linktype)]) + data[:length])
        except (AssertionError, IndexError) as error:
            if "cut" in str(error) or ("file" not in str(error) and "pcap" not in str(error)):
                raise
    assert len(seen) > 100


def test_the_engine_makes_the_same_inputs_from_the_same_seed() -> None:
    corpus = packets()
    first, second = random.Random(5), random.Random(5)
    made = [mutate(first, corpus) for _ in range(200)]
    assert made == [mutate(second, corpus) for _ in range(200)]
    assert len(set(made)) > 190
    assert shared is not None
