"""Packet filters: what passes in user space and in the kernel, and what is refused."""

from __future__ import annotations

import ctypes
import socket
import struct

import pytest
from support.frames import Shape, numbered_frame
from support.lab import requires_root

from appliance.capture import bpf
from appliance.errors import ConfigError, MissingInputError

ETHERNET = 1
RAW = 101
UDP = numbered_frame(0, 7, Shape(sizes=(100,), udp=True))
TAGGED = numbered_frame(0, 7, Shape(sizes=(100,), vlan=5))
PLAIN = numbered_frame(0, 7, Shape(sizes=(100,)))


@pytest.mark.parametrize(
    ("text", "passing"),
    [
        ("udp", [UDP]),
        ("udp dst port 9", [UDP]),
        ("udp dst port 10", []),
        ("vlan 5", [TAGGED]),
        ("vlan 6", []),
        ("not ip", [TAGGED, PLAIN]),
        ("greater 100", [UDP, TAGGED, PLAIN]),
        ("greater 101", []),
    ],
)
def test_a_filter_passes_what_it_says(text: str, passing: list[bytes]) -> None:
    program = bpf.compile_offline(ETHERNET, text)
    assert [frame for frame in (UDP, TAGGED, PLAIN) if program.matches(frame)] == passing
    assert (program.text, program.live) == (text, False)


def test_the_original_length_of_a_cut_packet_counts() -> None:
    program = bpf.compile_offline(ETHERNET, "greater 1000")
    assert not program.matches(PLAIN)
    assert program.matches(PLAIN, 1000)


def test_a_packet_that_ends_before_what_the_filter_reads_does_not_pass() -> None:
    program = bpf.compile_offline(ETHERNET, "udp dst port 9")
    for length in range(len(UDP)):
        assert program.matches(UDP[:length], len(UDP)) == (length >= 38)
    assert not program.matches(b"")


@pytest.mark.parametrize("text", ["tcp port nonsense", "frobnicate", "host", "(", "ip proto 99999 and"])
def test_a_bad_filter_is_refused_with_its_text_and_its_place(text: str) -> None:
    with pytest.raises(ConfigError) as refusal:
        bpf.compile_offline(ETHERNET, text)
    assert repr(text) in str(refusal.value)
    assert "link type 1" in str(refusal.value)


def test_a_filter_that_the_link_type_does_not_know_is_refused() -> None:
    with pytest.raises(ConfigError):
        bpf.compile_offline(RAW, "ether host 02:00:00:00:00:01")


@requires_root
def test_a_live_filter_is_compiled_for_its_interface() -> None:
    program = bpf.compile_live("lo", "vlan 5", 96)
    assert program.live
    # On a live handle the tag stands beside the packet: other instructions than for a file.
    assert program.instructions != bpf.compile_offline(ETHERNET, "vlan 5", 96).instructions
    with pytest.raises(ConfigError, match="frobnicate"):
        bpf.compile_live("lo", "frobnicate", 96)
    with pytest.raises(MissingInputError, match="nowhere0"):
        bpf.compile_live("nowhere0", "udp", 96)


def test_a_socket_takes_what_its_program_passes() -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as receiver:
        receiver.bind(("127.0.0.1", 0))
        receiver.settimeout(5)
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sender:
            sender.connect(receiver.getsockname())
            sender.send(b"before")
            bpf.attach(receiver.fileno(), bpf.reject_all())
            sender.send(b"rejected")
            bpf.attach(receiver.fileno(), bpf.accept_all(8 + 5))  # a datagram's 8 bytes of header, and 5 more
            sender.send(b"after and cut")
        # What was accepted before the program came stays: that is how a capture stops without a loss.
        assert [receiver.recv(100), receiver.recv(100)] == [b"before", b"after"]


def test_a_program_that_the_kernel_refuses_is_an_error() -> None:
    with (
        socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock,
        pytest.raises(OSError, match="refuses the packet filter"),
    ):
        bpf.attach(sock.fileno(), b"\xff" * 8)


# ---- batches of records ----------------------------------------------------------------------------------------------


def packet_record(frame: bytes, original_length: int | None = None) -> bytes:
    """An Enhanced Packet Block, as in the rings."""
    padded = frame + bytes(-len(frame) % 4)
    total = 32 + len(padded)
    head = struct.pack("=IIIIIII", 6, total, 0, 0, 0, len(frame), len(frame) if original_length is None else 0)
    return head + padded + struct.pack("=I", total)


def other_record() -> bytes:
    return struct.pack("=IIIII", 0x80000C07, 24, 0, 0, 0) + struct.pack("=I", 24)


def kept(text: str, records: list[bytes]) -> tuple[list[bytes], int]:
    """What a filter leaves of a batch, and how many packets it rejected."""
    memory = bytearray(b"".join(records))
    address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    length, rejected = bpf.compile_offline(ETHERNET, text).keep_matching(address, len(memory))
    left, position = [], 0
    while position < length:
        size = struct.unpack_from("=I", memory, position + 4)[0]
        left.append(bytes(memory[position : position + size]))
        position += size
    return left, rejected


def test_a_batch_keeps_its_order_and_all_that_is_no_packet() -> None:
    udp, plain, other = packet_record(UDP), packet_record(PLAIN), other_record()
    assert kept("udp", [plain, udp, other, plain, plain, udp, other]) == ([udp, other, udp, other], 3)
    assert kept("udp", [udp, udp]) == ([udp, udp], 0)
    assert kept("udp", [plain]) == ([], 1)
    assert kept("udp", [other]) == ([other], 0)


@pytest.mark.parametrize("position", [4, -4])
def test_a_corrupt_record_of_a_batch_is_an_error(position: int) -> None:
    record = bytearray(packet_record(UDP))
    struct.pack_into("=I", record, position if position > 0 else len(record) + position, 20)
    with pytest.raises(ValueError, match="corrupt"):
        kept("udp", [packet_record(UDP), bytes(record)])


def test_a_packet_that_claims_to_be_longer_than_its_record_is_rejected() -> None:
    record = bytearray(packet_record(UDP))
    struct.pack_into("=I", record, 20, 100_000)
    assert kept("udp", [bytes(record)]) == ([], 1)
