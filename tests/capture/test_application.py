"""What payloads say: each protocol by its own rules, hostile ones, and bounds."""

from __future__ import annotations

import itertools
import math
import random
import struct
from collections import Counter

import pytest
from capture.payloads import (
    INITIAL_1,
    SECOND,
    START,
    alpn,
    client_hello,
    digests,
    extension,
    found,
    handshake,
    look,
    question,
    record,
    server_name,
    tcp,
    udp,
)
from formats.craft import Packet

from appliance.capture.application import Inspector, crypto_findings


def test_a_client_hello_says_server_name_and_protocols() -> None:
    assert look(tcp(client_hello())) == [found("tls", server_name="www.example.org", alpn="h2,http/1.1")]


def test_tls_is_known_on_any_port_and_without_a_name() -> None:
    assert look(tcp(client_hello("", ()), dport=12345)) == [found("tls")]


def test_a_server_hello_is_tls_and_application_data_is_nothing() -> None:
    hello = b"\x02" + (70).to_bytes(3, "big") + b"\x03\x03" + bytes(68)
    assert look(tcp(record(hello), 443, 40000), tcp(b"\x17\3\3\0\x20" + bytes(32))) == [found("tls"), None]


@pytest.mark.parametrize("cut", [12, 60, 200, -1])
def test_a_client_hello_in_two_segments_is_put_together(cut: int) -> None:
    whole = client_hello()
    first, second = look(tcp(whole[:cut]), tcp(whole[cut:], sequence=1000 + len(whole[:cut])))
    assert first is not None and first["partial"] and first["application"] == "tls"
    assert second == found("tls", server_name="www.example.org", alpn="h2,http/1.1")


def test_four_client_hellos_in_many_segments_are_put_together_beside_one_another() -> None:
    """Four, whatever places the hash gives them: its secrets are new in each process."""
    names = ("far.example", "other.example", "third.example", "fourth.example")
    hellos = [record(handshake(extension(21, bytes(3000)) + server_name(name.encode()))) for name in names]
    for _ in range(50):
        frames = [
            tcp(hello[at : at + 536], 40000 + number, sequence=at)
            for at in range(0, len(hellos[-1]), 536)
            for number, hello in enumerate(hellos)
        ]
        whole = [one for one in look(*frames) if one and not one["partial"]]
        assert whole == [found("tls", server_name=name) for name in names]


def test_of_more_client_hellos_than_a_set_of_places_has_the_longest_waiting_gives_way() -> None:
    hello = record(handshake(extension(21, bytes(900)) + server_name(b"far.example")))
    ports = range(20000, 20064)
    ended = []
    for _ in range(20):
        firsts = [tcp(hello[:500], port, sequence=0) for port in ports]
        last = tcp(hello[500:], ports[-1], sequence=500)
        ended.append(look(*firsts, last)[-1])
    assert ended == [found("tls", server_name="far.example")] * 20


def test_a_client_hello_whose_rest_is_lost_out_of_order_or_late_stays_partial() -> None:
    whole = record(handshake(extension(21, bytes(900)) + server_name(b"far.example")))
    first, rest = tcp(whole[:500], sequence=0), tcp(whole[500:], sequence=500)
    gap = tcp(whole[600:], sequence=600)
    assert look(first, gap) == [found("tls", partial=True), None]
    assert look(rest, first) == [None, found("tls", partial=True)]
    late = Packet(START + 3 * SECOND, rest)
    assert look(Packet(START, first), late) == [found("tls", partial=True), None]
    assert look(first, rest)[1] == found("tls", server_name="far.example")


def test_no_more_hellos_wait_than_there_are_places_and_all_else_goes_on() -> None:
    whole = record(handshake(extension(21, bytes(900)) + server_name(b"far.example")))
    inspector = Inspector()
    firsts = [tcp(whole[:500], port, sequence=0) for port in range(20000, 21000)]
    rests = [tcp(whole[500:], port, sequence=500) for port in range(20000, 21000)]
    assert all(one == found("tls", partial=True) for one in look(*firsts, inspector=inspector))
    ended = [one for one in look(*rests, inspector=inspector) if one is not None]
    assert 0 < len(ended) <= 64 and all(one["server_name"] == "far.example" for one in ended)


def test_the_name_stands_where_the_first_segment_has_it_though_the_rest_never_comes() -> None:
    whole = record(handshake(server_name(b"near.example") + extension(21, bytes(6000))))
    assert look(tcp(whole[:1400])) == [found("tls", partial=True, server_name="near.example")]


def test_names_are_printable_whatever_they_are_and_a_backslash_is_escaped() -> None:
    hello = record(handshake(server_name(b"a\x1b[31m\n\xff\\b") + alpn(b"x,y", b"\x0a\x0a")))
    assert look(tcp(hello)) == [found("tls", server_name="a\\027[31m\\010\\255\\092b", alpn="x\\044y,\\010\\010")]


def test_names_are_cut_to_254_octets_and_said_to_be() -> None:
    assert look(tcp(record(handshake(server_name(b"a" * 300))))) == [found("tls", partial=True, server_name="a" * 254)]
    escaped = look(tcp(record(handshake(server_name(b"\0" * 64)))))[0]
    assert escaped is not None and escaped["server_name"] == "\\000" * 63 and escaped["partial"]


def test_the_first_host_name_counts_and_other_kinds_of_names_do_not() -> None:
    other_kind = extension(0, b"\0\6\1\0\3abc")
    assert look(tcp(record(handshake(other_kind + server_name(b"b"))))) == [found("tls")]
    assert look(tcp(record(handshake(server_name(b"a") + server_name(b"b"))))) == [found("tls", server_name="a")]


# QUIC -----------------------------------------------------------------------------------------------------------------


def test_the_initial_packet_of_the_standard_says_its_server_name() -> None:
    assert look(udp(INITIAL_1)) == [found("quic", server_name="example.com", alpn="alpn")]


def test_an_initial_packet_that_was_changed_is_quic_without_a_name() -> None:
    changed = INITIAL_1[:600] + bytes([INITIAL_1[600] ^ 1]) + INITIAL_1[601:]
    assert look(udp(changed)) == [found("quic")]


def test_short_datagrams_other_versions_and_other_types_are_not_quic() -> None:
    frames = [INITIAL_1[:1199], b"\xc0\0\0\0\2" + INITIAL_1[5:], b"\xd0" + INITIAL_1[1:], b"\x40" + INITIAL_1[1:]]
    assert look(*map(udp, frames)) == [None] * 4


# DNS ------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("port", [53, 5353, 5355])
def test_a_question_says_its_name_and_type(port: int) -> None:
    expected = [found("dns", dns_name="www.Example.com", dns_type=28)]
    assert look(udp(question("www.Example.com", 28), 999, port)) == expected
    assert look(udp(question("www.Example.com", 28, 0x8180), port, 999)) == expected


def test_dns_over_tcp_has_a_length_before_it() -> None:
    message = question("example.net", 252)
    framed = len(message).to_bytes(2, "big") + message
    assert look(tcp(framed, dport=53)) == [found("dns", dns_name="example.net", dns_type=252)]


def test_dns_names_are_those_of_zone_files() -> None:
    assert look(udp(question(""), dport=53)) == [found("dns", dns_name=".", dns_type=1)]
    labels = [b"a.b", b"c\\d", b"\x00\xe4"]
    assert look(udp(question(labels), dport=53)) == [found("dns", dns_name="a\\046b.c\\092d.\\000\\228", dns_type=1)]


def test_what_is_no_dns_message_is_nothing() -> None:
    good = question("example.org")
    loop = good[:12] + b"\xc0\x0c" + b"\0\1\0\1"
    without_end = good[:12] + b"\x3f" + b"a" * 63
    endless = good[:12] + (b"\1a" * 128) + b"\0\0\1\0\1"
    wrong = [good[:11], good[:-1], good[:2] + b"\x78" + good[3:], loop, without_end, endless, good[:12]]
    assert look(*(udp(one, dport=53) for one in wrong)) == [None] * len(wrong)
    assert look(udp(good, dport=54)) == [None]


def test_an_answer_without_a_question_is_dns() -> None:
    answer = b"\0\0\x84\0\0\0\0\1\0\0\0\0" + b"\4name\5local\0" + b"\0\1\0\1\0\0\0\1\0\4abcd"
    assert look(udp(answer, 5353, 5353)) == [found("dns")]


# HTTP and SSH ---------------------------------------------------------------------------------------------------------


def test_a_request_says_method_and_host() -> None:
    request = b"POST /x?y HTTP/1.1\r\nAccept: */*\r\nhOsT: \t example.org:8080 \r\n\r\n"
    assert look(tcp(request, dport=8080)) == [found("http", http_method="POST", http_host="example.org:8080")]


def test_a_request_without_a_host_and_one_that_is_cut() -> None:
    assert look(tcp(b"GET / HTTP/1.0\r\n\r\nHost: no\r\n")) == [found("http", http_method="GET")]
    assert look(tcp(b"GET / HTTP/1.1\r\nHost: exam")) == [found("http", partial=True, http_method="GET")]
    assert look(tcp(b"GET /" + b"a" * 1000)) == [found("http", partial=True, http_method="GET")]


def test_a_response_is_http() -> None:
    assert look(tcp(b"HTTP/1.1 200 OK\r\nServer: x\r\n\r\n", 80)) == [found("http")]


@pytest.mark.parametrize(
    "payload",
    [b"GET", b"GET ", b"GET /", b"GET / HTTP/2.0\r\n", b"GET / HTTP/1.1\n", b"GET  HTTP/1.1\r\n", b"get / HTTP/1.1\r\n",
     b"A B HTTP/1.1\r\n", b"NOTHING HERE\r\n", b"HTTP/1.1 900 x\r\n", b"A" * 30 + b" / HTTP/1.1\r\n", b"GETT" * 400],
)  # fmt: skip
def test_what_is_no_request_is_nothing(payload: bytes) -> None:
    assert look(tcp(payload)) == [None]


def test_both_sides_of_ssh_say_who_they_are() -> None:
    client, server = b"SSH-2.0-OpenSSH_9.2p1 Debian-2\r\n", b"SSH-1.99-Cisco-1.25\n"
    assert look(tcp(client, dport=2222), tcp(server, 2222)) == [
        found("ssh", ssh_version="SSH-2.0-OpenSSH_9.2p1 Debian-2"),
        found("ssh", ssh_version="SSH-1.99-Cisco-1.25"),
    ]
    assert look(tcp(b"SSH-2.0-cut"), tcp(b"SSH-" + b"2" * 10), tcp(b"SSH-2.0-" + b"a" * 300 + b"\r\n")) == [
        found("ssh", partial=True, ssh_version="SSH-2.0-cut"),
        None,
        None,
    ]


# Entropy --------------------------------------------------------------------------------------------------------------


def shannon(payload: bytes) -> int:
    payload = payload[:1024]
    bits = -sum(n / len(payload) * math.log2(n / len(payload)) for n in Counter(payload).values())
    return int(bits / 8 * 255 + 0.5)


@pytest.mark.parametrize(
    "payload", [b"a", b"ab", bytes(2000), bytes(range(256)) * 4, random.Random(1).randbytes(1300), b"some text " * 30]
)
def test_entropy_is_shannons_of_the_first_kibibyte(payload: bytes) -> None:
    (one,) = look(udp(payload), applications=False, entropy=True)
    assert one == {"application": "", "partial": False, "entropy": shannon(payload)}


def test_entropy_is_measured_once_a_second_for_each_direction() -> None:
    there, back = udp(b"abc"), udp(b"aab", 443, 40000, bytes([10, 0, 0, 2, 10, 0, 0, 1]))
    frames = [Packet(START, there), Packet(START + 1, there), Packet(START + 2, back), Packet(START + 3, back)]
    frames += [Packet(START + SECOND, there)]
    seen = look(*frames, applications=False, entropy=True)
    assert [one and one["entropy"] for one in seen] == [shannon(b"abc"), None, shannon(b"aab"), None, shannon(b"abc")]


def test_a_syn_begins_a_new_measurement() -> None:
    frames = [tcp(b"abc"), tcp(b"aaa"), tcp(b"", flags=2), tcp(b"aab")]
    seen = look(*frames, applications=False, entropy=True)
    assert [one and one["entropy"] for one in seen] == [shannon(b"abc"), None, None, shannon(b"aab")]


def test_packets_without_payload_or_with_a_cut_one_say_what_is_there() -> None:
    whole = tcp(client_hello())
    assert look(tcp(b""), Packet(START, whole[:54], len(whole)), entropy=True) == [None, None]
    cut = look(Packet(START, whole[:80], len(whole)))[0]
    assert cut == found("tls", partial=True)


# All of them ----------------------------------------------------------------------------------------------------------

MESSAGES = {
    "tls": tcp(client_hello()),
    "quic": udp(INITIAL_1),
    "dns": udp(question("www.example.com"), dport=53),
    "http": tcp(b"GET / HTTP/1.1\r\nHost: example.org\r\n\r\n", dport=80),
    "ssh": tcp(b"SSH-2.0-x\r\n", dport=22),
}


def test_without_an_inspector_digests_have_no_extension() -> None:
    assert [len(one) for one in digests(MESSAGES.values(), None)] == [128] * len(MESSAGES)


@pytest.mark.parametrize("name", MESSAGES)
def test_no_octet_behind_the_capture_matters(name: str) -> None:
    frame = MESSAGES[name]
    for length in range(42, len(frame), 7):
        packet = Packet(START, frame[:length], len(frame))
        assert look(packet, entropy=True) == look(packet, entropy=True)


@pytest.mark.parametrize("name", MESSAGES)
def test_the_application_is_that_of_the_message(name: str) -> None:
    (one,) = look(MESSAGES[name])
    assert one is not None and one["application"] == name


def varint(value: int) -> bytes:
    return struct.pack(">H", 0x4000 | value)


def crypto(message: bytes, start: int, end: int) -> bytes:
    piece = message[start:end]
    return b"\x06" + varint(start) + varint(len(piece)) + piece


def test_crypto_frames_in_any_order_between_pings_and_padding_are_put_together() -> None:
    hello = handshake(server_name(b"quic.example") + alpn(b"h3"))
    cuts = [0, 3, 10, 40, 41, 60, len(hello)]
    frames = [crypto(hello, start, end) for start, end in itertools.pairwise(cuts)]
    random.Random(5).shuffle(frames)
    whole = found("quic", server_name="quic.example", alpn="h3")
    assert crypto_findings(b"\0\0\x01".join(frames) + bytes(50)) == whole
    assert crypto_findings(*frames) == whole  # in as many packets


def test_crypto_frames_with_a_gap_say_what_stands_before_it() -> None:
    hello = handshake(server_name(b"quic.example") + extension(21, bytes(200)) + alpn(b"h3"))
    before, behind = crypto(hello, 0, 100), crypto(hello, 150, len(hello))
    assert crypto_findings(behind + before) == found("quic", partial=True, server_name="quic.example")


def test_acknowledgements_are_passed_over_and_unknown_frames_end_the_packet() -> None:
    frame = crypto(handshake(server_name(b"a")), 0, 1000)
    ack, ack_ecn = b"\x02\5\0\1\0\0\0", b"\x03\5\0\0\0\1\2\3"
    assert crypto_findings(ack + ack_ecn + frame)["server_name"] == "a"
    for wrong in (b"\x1f" + frame, b"\x02\5", b"\x06\0\x7f\xff", b"\x06\x80\0\0\0\x40\x01a" + b"\xff"):
        assert "server_name" not in crypto_findings(wrong)


def test_crypto_frames_beyond_the_room_are_cut_off() -> None:
    hello = handshake(server_name(b"a") + extension(21, bytes(5000)) + alpn(b"h3"))
    assert crypto_findings(*(crypto(hello, at, at + 1000) for at in range(0, len(hello), 1000))) == found(
        "quic", partial=True, server_name="a"
    )
