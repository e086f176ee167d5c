"""A file's digests are those of its records, whatever the file is; damage tells itself behind the last whole packet."""

from __future__ import annotations

import ctypes
import struct
from pathlib import Path

import pytest
from craft import END_OF_OPTIONS, Packet, block, enhanced, interface, option_list, pcap_file, section
from meter.flow_packets import NO_SHARED, SHARED, capture_digests

from appliance.capture.digestfile import DigestFile
from appliance.counters import IGNORED_FIELDS
from appliance.errors import FormatError

S = 10**9
ETHERNET = bytes(12) + b"\x08\x00"
UDP = bytes.fromhex("45000020000000004011000a0a000001 0a000002 03e8 0050 000c 0000".replace(" ", "")) + b"test"
FRAME = ETHERNET + UDP
ORDERS = ("<", ">")
DIGEST_BYTES = 128


def flags(order: str, value: int) -> list[tuple[int, bytes]]:
    return [(1, b"note"), (2, struct.pack(order + "I", value)), END_OF_OPTIONS]


def pcapng(order: str) -> bytes:
    return b"".join((
        section(order),
        interface(order, options=[(9, b"\x09"), END_OF_OPTIONS]),
        interface(order, 101),
        enhanced(Packet(5 * S, FRAME), order, 1, flags(order, 1)),
        enhanced(Packet(6 * S, UDP, 99, 1), order, 1000, flags(order, 2)),
        block(order, 4, bytes(20)),
        block(order, 3, struct.pack(order + "I", len(FRAME)) + FRAME),
        block(order, 2, struct.pack(order + "HHIIII", 1, 7, 0, 7_000_000, len(UDP), len(UDP)) + UDP),
        section(order),
        interface(order, 113),
        enhanced(Packet(9 * S, FRAME), order),
    ))  # fmt: skip


def with_broken_options(order: str) -> bytes:
    ticks = struct.pack(order + "IIIII", 0, 0, 1_000_000, len(UDP), len(UDP))
    listed = option_list(order, [(2, struct.pack(order + "I", 1))]) + struct.pack(order + "HH", 1, 400)
    return section(order) + interface(order, 101) + block(order, 6, ticks + UDP + listed)


def digests(path: Path, room: int = 1 << 20) -> tuple[bytes, list[int], FormatError | None]:
    """(all digests with the interface 0, the ignored packets, the damage)"""
    memory = (ctypes.c_uint64 * (room // 8))()
    found = b""
    file = DigestFile(path)
    damage = None
    try:
        while length := file.fill(ctypes.addressof(memory), room):
            assert length % DIGEST_BYTES == 0
            found += bytes(memory)[:length]
        assert file.ended
    except FormatError as error:
        damage = error
    finally:
        file.close()
    return found, file.ignored, damage


def digests_of_records(path: Path) -> tuple[bytes, list[int]]:
    found, counts = b"", [0] * len(IGNORED_FIELDS)
    try:
        for records, ignored in capture_digests(path):
            found += b"".join(
                records[at : at + 8] + bytes(4) + records[at + 12 : at + DIGEST_BYTES]
                for at in range(0, len(records), DIGEST_BYTES)
            )
            counts = [sum(pair) for pair in zip(counts, ignored.values(), strict=True)]
    except FormatError:
        pass  # what was whole counts
    return found, counts


def written(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    return path


@pytest.mark.parametrize("order", ORDERS)
def test_pcap_gives_the_digests_of_its_records(order: str, tmp_path: Path) -> None:
    packets = [Packet(i * S, FRAME, 100 * i) for i in range(1, 20)] + [Packet(3 * S, b"short"), Packet(4 * S, b"")]
    path = written(tmp_path / "a.pcap", pcap_file(packets, order=order))
    found, ignored, damage = digests(path)
    assert (found, ignored) == digests_of_records(path)
    assert damage is None and len(found) == 19 * DIGEST_BYTES
    assert (sum(ignored[:-1]), ignored[-1]) == (2, len(b"short"))


@pytest.mark.parametrize("content", [pcapng, with_broken_options])
@pytest.mark.parametrize("order", ORDERS)
def test_pcapng_gives_the_digests_of_its_records(content: object, order: str, tmp_path: Path) -> None:
    path = written(tmp_path / "a.pcapng", content(order))  # type: ignore[operator]
    found, ignored, damage = digests(path)
    assert found and (found, ignored) == digests_of_records(path)
    assert damage is None


def test_packet_flags_tell_the_direction(tmp_path: Path) -> None:
    found, _, _ = digests(written(tmp_path / "a.pcapng", pcapng("<")))
    (first, second) = (struct.unpack_from("=H", found, 94 + i * DIGEST_BYTES)[0] for i in range(2))
    assert first & 0x0008 and second & 0x0004  # DIGEST_INCOMING, DIGEST_OUTGOING


@pytest.mark.parametrize("room", [DIGEST_BYTES, 5 * DIGEST_BYTES + 8, 1 << 20])
def test_the_room_does_not_change_the_digests(room: int, tmp_path: Path) -> None:
    packets = [Packet(i * 1000, FRAME) for i in range(10_000)]
    path = written(tmp_path / "a.pcap", pcap_file(packets[:500] if room == DIGEST_BYTES else packets))
    assert digests(path, room)[0] == digests_of_records(path)[0]


def test_every_digest_has_the_source_that_was_asked_for(tmp_path: Path) -> None:
    memory = (ctypes.c_uint64 * 1024)()
    file = DigestFile(written(tmp_path / "a.pcapng", pcapng("<")), 7)
    length = file.fill(ctypes.addressof(memory), 8192)
    file.close()
    numbers = {struct.unpack_from("=I", bytes(memory), at + 8)[0] for at in range(0, length, DIGEST_BYTES)}
    assert length and numbers == {7}


@pytest.mark.parametrize("room", [DIGEST_BYTES, 1 << 20])
def test_a_cut_file_gives_its_whole_packets_and_then_the_damage(room: int, tmp_path: Path) -> None:
    path = written(tmp_path / "a.pcap", pcap_file([Packet(i * 1000, FRAME) for i in range(100)])[:-3])
    found, _, damage = digests(path, room)
    assert len(found) == 99 * DIGEST_BYTES
    assert damage is not None and "a.pcap is damaged" in str(damage) and damage.packets == 99


def captures() -> list[str]:
    directory = SHARED / "captures"
    return sorted(str(path.relative_to(directory)) for path in directory.rglob("*") if path.is_file())


@pytest.mark.parametrize("name", captures() or [pytest.param("", marks=pytest.mark.skip(reason=NO_SHARED))])
def test_real_captures_give_the_digests_of_their_records(name: str) -> None:
    path = SHARED / "captures" / name
    try:
        DigestFile(path).close()
    except FormatError:
        pytest.skip("not a capture that is read")
    found, ignored, _ = digests(path)
    assert (found, ignored) == digests_of_records(path)
