"""The decoder of anybody's IPFIX: values, templates and their end, sequence numbers, and what does no harm."""

from __future__ import annotations

import math
import struct
from typing import Any

import pytest
from hypothesis import given, settings, strategies as st
from meter.craft_ipfix import VARIABLE, a_set, field, message, options_template, template, variable

from appliance.meter.decode import Limits, MalformedMessageError, Message, Session
from appliance.meter.settings import ExportSettings, MeterSettings
from appliance.meter.templates import TemplateSet

PORTS = [(7, 2), (11, 2)]
NTP_1970 = 2_208_988_800


def shown(decoded: Message) -> list[dict[str, Any]]:
    return [records.template.shown(row) for records in decoded.sets for row in records.rows]


def one(*sets: bytes) -> dict[str, Any]:
    """The only record of a message."""
    (record,) = shown(Session().message(message(*sets)))
    return record


def value(element: tuple[int, ...], octets: bytes) -> Any:
    record = one(template(256, [element]), a_set(256, octets))
    (found,) = record.values()
    return found


# Values --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("element", "octets", "expected"),
    [
        ((1, 8), b"\0" * 7 + b"\5", 5),
        ((1, 3), b"\1\0\0", 65536),  # reduced-size encoding (RFC 7011, 6.2), of any length
        ((1, 5), b"\1\0\0\0\0", 1 << 32),
        ((434, 2), b"\xff\xfe", -2),  # mibObjectValueInteger, signed
        ((311, 4), struct.pack("!f", 0.5), 0.5),  # samplingProbability, a float64 in 4 octets
        ((311, 8), struct.pack("!d", math.inf), "inf"),
        ((276, 1), b"\1", True),  # dataRecordsReliability
        ((276, 1), b"\2", False),
        ((276, 1), b"\7", 7),
        ((8, 4), bytes([192, 0, 2, 1]), "192.0.2.1"),
        ((27, 16), bytes.fromhex("20010db8") + bytes(11) + b"\1", "2001:db8::1"),
        ((8, 3), b"abc", "616263"),  # no address has 3 octets
        ((56, 6), bytes(range(6)), "00:01:02:03:04:05"),
        ((82, 8), b"eth0\0\0\0\0", "eth0"),
        ((82, VARIABLE), variable("Gr\u00fcezi".encode()), "Gr\u00fcezi"),
        ((82, VARIABLE), variable(b"x" * 300), "x" * 300),
        ((82, 2), b"\xff\xfe", "\ufffd\ufffd"),
        ((150, 4), struct.pack("!I", 1_700_000_000), "2023-11-14T22:13:20Z"),
        ((152, 8), struct.pack("!Q", 1_700_000_000_123), "2023-11-14T22:13:20.123Z"),
        ((152, 8), b"\xff" * 8, "@18446744073709551.615"),
        ((154, 8), struct.pack("!II", NTP_1970 + 1_700_000_000, 1 << 31), "2023-11-14T22:13:20.500000Z"),
        ((156, 8), struct.pack("!II", NTP_1970 + 1_700_000_000, 4), "2023-11-14T22:13:20.000000001Z"),
        ((156, 8), struct.pack("!II", 10, 0), "2036-02-07T06:28:26.000000000Z"),  # the era that begins in 2036
        ((313, VARIABLE), variable(b"\1\2"), "0102"),
        ((999, 2), b"\1\2", "0102"),
    ],
)
def test_a_value_is_read_by_the_type_of_its_element(element: tuple[int, ...], octets: bytes, expected: Any) -> None:
    assert value(element, octets) == expected


def test_elements_are_named_and_unknown_ones_have_enterprise_and_number() -> None:
    elements = [(4, 1), (2, 8, 29305), (457, 2, 29305), (14, 1, 6871), (0x4000 | 14, 1, 6871), (5, 2, 99999), (999, 1)]
    record = one(template(256, elements), a_set(256, bytes(16)))
    assert list(record) == [
        "protocolIdentifier",
        "reversePacketDeltaCount",
        "reverseHttpStatusCode",
        "initialTCPFlags",
        "reverseInitialTCPFlags",
        "99999/5",
        "0/999",
    ]
    assert record["99999/5"] == "0000"


def test_fields_of_one_name_are_a_list() -> None:
    record = one(template(256, [(323, 8), (7, 2), (323, 8)]), a_set(256, bytes(8) + b"\0\7" + b"\0" * 7 + b"\1"))
    assert record == {
        "observationTimeMilliseconds": ["1970-01-01T00:00:00.000Z", "1970-01-01T00:00:00.001Z"],
        "sourceTransportPort": 7,
    }


def test_padding_behind_records_and_templates_is_passed_over() -> None:
    padded_template = template(256, PORTS)
    padded_template = a_set(2, padded_template[4:] + b"\0\0\0")
    records = shown(Session().message(message(padded_template, a_set(256, b"\0\1\0\2\0\3\0\4" + b"\0\0\0"))))
    assert [tuple(record.values()) for record in records] == [(1, 2), (3, 4)]


def test_options_data_knows_its_scope() -> None:
    session = Session()
    decoded = session.message(
        message(options_template(300, 1, [(10, 4), (82, VARIABLE)]), a_set(300, b"\0\0\0\2\3eth"))
    )
    (records,) = decoded.sets
    assert records.template.is_options and records.template.scope_fields == 1
    assert shown(decoded) == [{"ingressInterface": 2, "interfaceName": "eth"}]


# Structured data (RFC 6313) ------------------------------------------------------------------------------------------


def test_a_basic_list_is_decoded_also_of_enterprise_elements_and_variable_lengths() -> None:
    numbers = b"\x03" + field((14, 1, 6871)) + b"\2\3\4"
    texts = b"\x04" + field((82, VARIABLE)) + variable(b"a") + variable(b"bc")
    record = one(
        template(256, [(7, 2), (291, VARIABLE), (291, VARIABLE)]),
        a_set(256, b"\0\7" + variable(numbers) + variable(texts)),
    )
    assert record["basicList"] == [
        {"semantic": "allOf", "element": "initialTCPFlags", "values": [2, 3, 4]},
        {"semantic": "ordered", "element": "interfaceName", "values": ["a", "bc"]},
    ]


def test_sub_template_lists_are_decoded_by_their_templates() -> None:
    stl = b"\xff" + struct.pack("!H", 257) + b"\0\1\0\2\0\3\0\4"
    stml = b"\x03" + struct.pack("!HH", 257, 8) + b"\0\5\0\6" + struct.pack("!HH", 999, 6) + b"\xab\xcd"
    record = one(
        template(257, PORTS),
        template(256, [(292, VARIABLE), (293, VARIABLE)]),
        a_set(256, variable(stl) + variable(stml)),
    )
    first, second, third = ({"sourceTransportPort": a, "destinationTransportPort": a + 1} for a in (1, 3, 5))
    assert record["subTemplateList"] == {"semantic": "undefined", "template": 257, "records": [first, second]}
    groups = [{"template": 257, "records": [third]}, {"template": 999, "octets": "abcd"}]
    assert record["subTemplateMultiList"] == {"semantic": "allOf", "groups": groups}


@pytest.mark.parametrize(
    "octets",
    [
        b"\3",
        b"\3\0\7",
        b"\3" + field((7, 2)) + b"\0",
        b"\3" + field((7, 0)) + b"\0\0",
        b"\3" + field((82, VARIABLE)) + b"\5a",
    ],
)
def test_a_list_that_is_not_one_is_shown_as_octets_and_counted(octets: bytes) -> None:
    session = Session()
    decoded = session.message(message(template(256, [(291, VARIABLE)]), a_set(256, variable(octets))))
    assert shown(decoded) == [{"basicList": octets.hex()}]
    assert session.counts.unread_lists == 1 and "basicList" in decoded.notes[0]


def test_lists_within_lists_end_somewhere() -> None:
    octets = b""
    for _ in range(200):
        octets = b"\3" + field((291, VARIABLE)) + variable(octets)
    session = Session()
    session.message(message(template(256, [(291, VARIABLE)]), a_set(256, variable(octets))))
    assert session.counts.unread_lists == 1


# Templates -----------------------------------------------------------------------------------------------------------


def test_a_template_lasts_over_messages_and_belongs_to_its_domain() -> None:
    session = Session()
    session.message(message(template(256, PORTS), domain=1))
    data = a_set(256, b"\0\1\0\2")
    assert len(shown(session.message(message(data, domain=1)))) == 1
    other = session.message(message(data, domain=2))
    assert shown(other) == [] and other.notes == ["domain 2: no template 256 for 4 octets of data"]
    assert session.counts.unknown_sets == 1


def test_a_new_template_replaces_the_old_one_and_is_told() -> None:
    session = Session()
    session.message(message(template(256, PORTS)))
    decoded = session.message(message(template(256, [(4, 1)]), a_set(256, b"\6\21")))
    assert shown(decoded) == [{"protocolIdentifier": 6}, {"protocolIdentifier": 17}]
    assert decoded.notes == ["template 256: has new fields"]
    assert session.message(message(template(256, [(4, 1)]), sequence=2)).notes == []


def test_withdrawn_templates_are_gone() -> None:
    session = Session()
    session.message(message(template(256, PORTS), template(257, PORTS), options_template(300, 1, PORTS)))
    session.message(message(a_set(2, struct.pack("!HH", 256, 0))))
    assert session.template(1, 256) is None and session.template(1, 257) is not None
    session.message(message(a_set(2, struct.pack("!HH", 2, 0))))  # all templates
    assert session.template(1, 257) is None and session.template(1, 300) is not None
    session.message(message(a_set(3, struct.pack("!HHH", 300, 0, 0))))  # in the 6 octets that some write
    assert session.template_count == session.field_count == 0
    assert session.counts.withdrawals == 3


def test_over_udp_withdrawals_are_ignored() -> None:
    session = Session(datagrams=True)
    session.message(message(template(256, PORTS)))
    decoded = session.message(message(a_set(2, struct.pack("!HH", 256, 0))))
    assert session.template(1, 256) is not None and "ignored" in decoded.notes[0]


def test_a_template_can_be_withdrawn_and_defined_within_one_message() -> None:
    session = Session()
    session.message(message(template(256, PORTS)))
    records = shown(
        session.message(message(a_set(2, struct.pack("!HH", 256, 0)), template(256, [(4, 1)]), a_set(256, b"\6")))
    )
    assert records == [{"protocolIdentifier": 6}]


def test_the_least_used_templates_go_when_there_are_too_many() -> None:
    session = Session(limits=Limits(templates=3, fields=100))
    for template_id in (256, 257, 258):
        session.message(message(template(template_id, PORTS)))
    session.message(message(a_set(256, bytes(4))))  # 256 is in use
    session.message(message(template(259, PORTS)))
    assert {template_id for template_id, _ in session.known_ids(1)} == {256, 258, 259}
    assert session.counts.evicted_templates == 1
    session.message(message(template(260, PORTS * 49)))
    assert session.field_count <= 100 and session.template(1, 260) is not None
    refused = session.message(message(template(261, PORTS * 51)))
    assert session.template(1, 261) is None and "refused" in refused.notes[0]


def test_fields_without_octets_make_no_endless_records() -> None:
    session = Session()
    decoded = session.message(message(template(256, [(210, 0)] * 1000 + [(4, 1)]), a_set(256, bytes(1000))))
    assert shown(decoded) == [] and session.counts.refused_templates == session.counts.unknown_sets == 1


def test_type_information_names_the_elements_of_later_messages() -> None:
    session = Session()
    elements = [(346, 4), (303, 2), (339, 1), (341, VARIABLE)]
    record = struct.pack("!IHB", 99999, 5, 13) + variable(b"favouriteColour")
    hostile = struct.pack("!IHB", 99999, 6, 13) + variable(b"\x1b[2Jx")
    known = struct.pack("!IHB", 6871, 14, 13) + variable(b"notThat")
    session.message(message(options_template(301, 2, elements), a_set(301, record + hostile + known)))
    described = [(5, VARIABLE, 99999), (6, 2, 99999), (14, 1, 6871)]
    decoded = session.message(message(template(256, described), a_set(256, variable(b"red") + b"ab\2"), sequence=3))
    assert shown(decoded) == [{"favouriteColour": "red", "99999/6": "6162", "initialTCPFlags": 2}]


def test_a_session_learns_no_more_names_than_it_may() -> None:
    session = Session(limits=Limits(learned=10))
    elements = [(346, 4), (303, 2), (341, VARIABLE)]
    records = b"".join(struct.pack("!IH", 99999, i) + variable(b"name%d" % i) for i in range(1000))
    session.message(message(options_template(301, 2, elements), a_set(301, records)))
    assert len(session._learned) == 10


# Sequence numbers ----------------------------------------------------------------------------------------------------


def data(records: int, sequence: int, domain: int = 1) -> bytes:
    return message(a_set(256, bytes(4 * records)), sequence=sequence, domain=domain)


def follow(*messages: bytes, datagrams: bool = True) -> Session:
    session = Session(datagrams=datagrams)
    session.message(message(template(256, PORTS), domain=1, sequence=0xFFFF_FFF0))
    session.message(message(template(256, PORTS), domain=2, sequence=5))
    for one_message in messages:
        session.message(one_message)
    return session


def test_a_sequence_without_gaps_loses_nothing_also_over_its_end() -> None:
    session = follow(
        data(10, 0xFFFF_FFF0), data(3, 5, domain=2), data(10, 0xFFFF_FFFA), data(1, 4), data(1, 8, domain=2)
    )
    assert (session.counts.lost_records, session.counts.late_messages, session.counts.restarts) == (0, 0, 0)


def test_a_gap_is_counted_in_records_and_told() -> None:
    session = follow(data(10, 0xFFFF_FFF0))
    decoded = session.message(data(1, 4 + 7))
    assert decoded.notes == ["domain 1, sequence 11: 17 records before it did not come"]
    assert session.counts.lost_records == 17


def test_a_message_that_was_overtaken_is_late_and_not_lost() -> None:
    session = follow(data(10, 0xFFFF_FFF0), data(5, 0), data(6, 0xFFFF_FFFA), data(1, 5))
    assert (session.counts.lost_records, session.counts.late_messages, session.counts.restarts) == (0, 1, 0)


def test_an_exporter_that_begins_anew_loses_nothing() -> None:
    session = follow(data(10, 0xFFFF_FFF0), data(10, 0xFFFF_FFFA), data(10, 4), data(2, 0), data(2, 2))
    assert (session.counts.lost_records, session.counts.restarts, session.counts.late_messages) == (0, 1, 0)


def test_records_that_could_not_be_counted_make_no_gap() -> None:
    session = follow(message(a_set(999, bytes(40)), sequence=0xFFFF_FFF0), data(1, 3), data(1, 4))
    assert session.counts.lost_records == 0 and session.counts.unknown_sets == 1


def test_no_more_domains_are_followed_than_allowed() -> None:
    session = Session(datagrams=True, limits=Limits(domains=10))
    for domain in range(1000):
        session.message(message(a_set(4, b""), domain=domain))
    assert len(session._sequences) == 10


# Hostile octets ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("octets", "said"),
    [
        (b"", "0 octets"),
        (b"\0\x0a", "2 octets"),
        (message()[:2] + b"\0\x20" + message()[4:], "32 octets in 16"),
        (b"\0\x09" + message()[2:], "NetFlow v9"),
        (message(b"\1\0\0\0"), "set 256 of 0 octets"),  # a loop without end for some readers
        (message(b"\1\0\0\3"), "set 256 of 3 octets"),
        (message(b"\1\0\0\x09aaaa"), "set 256 of 9 octets"),
        (message(b"\1\0"), "2 octets behind the last set"),
        (message(a_set(2, struct.pack("!HH", 256, 3) + field((7, 2)))), "cut off"),
        (message(a_set(2, struct.pack("!HHHH", 256, 1, 0x8007, 2))), "cut off"),
        (message(a_set(2, struct.pack("!HHHH", 255, 1, 7, 2))), "reserved"),
        (message(options_template(256, 0, PORTS)), "0 scope fields"),
        (message(options_template(256, 3, PORTS)), "3 scope fields"),
        (message(template(256, [(82, VARIABLE)]), a_set(256, b"\5abc")), "cut off"),
        (message(template(256, [(82, VARIABLE)]), a_set(256, b"\xff\0")), "cut off"),
    ],
)
def test_a_malformed_message_is_discarded_whole(octets: bytes, said: str) -> None:
    session = Session()
    session.message(message(template(300, PORTS)))
    with pytest.raises(MalformedMessageError, match=said):
        session.message(octets)
    assert session.counts.malformed_messages == 1
    assert session.template_count == 1 and session.template(1, 256) is None


def real_messages() -> list[bytes]:
    """Ours, with templates, options and data, and one with everything that is not in ours."""
    templates = TemplateSet(MeterSettings(), ExportSettings("file:"))
    ours = [bytes(m.data) for m in templates.announcement(1400)]
    everything = message(
        template(256, [(82, VARIABLE), (291, VARIABLE), (8, 4)]),
        options_template(257, 1, [(346, 4), (303, 2), (341, VARIABLE)]),
        a_set(257, struct.pack("!IH", 9999, 1) + variable(b"name")),
        a_set(256, variable(b"text") + variable(b"\3" + field((7, 2)) + b"\0\1\0\2") + bytes(4)),
        a_set(2, struct.pack("!HH", 256, 0)),
    )
    return [*ours, everything]


@pytest.mark.parametrize("datagrams", [True, False])
def test_no_truncation_of_any_message_does_harm(datagrams: bool) -> None:
    for whole in real_messages():
        Session(datagrams=datagrams).message(whole)
        for end in range(len(whole)):
            session = Session(datagrams=datagrams)
            with pytest.raises(MalformedMessageError):
                session.message(whole[:end])
            cut = whole[:2] + end.to_bytes(2, "big") + whole[4:end]  # also with a length that fits
            try:
                session.message(cut)
            except MalformedMessageError:
                assert session.template_count == 0


ELEMENTS = st.tuples(
    st.sampled_from([1, 2, 8, 27, 82, 152, 154, 156, 276, 291, 292, 293, 303, 311, 341, 346, 9999]),
    st.sampled_from([0, 1, 2, 3, 4, 8, 16, 33, 200, VARIABLE]),
)
SETS = st.one_of(
    st.builds(template, st.integers(254, 259), st.lists(ELEMENTS, max_size=6)),
    st.builds(options_template, st.integers(254, 259), st.integers(0, 3), st.lists(ELEMENTS, max_size=6)),
    st.builds(a_set, st.integers(0, 260), st.binary(max_size=80)),
    st.binary(max_size=40),
)


@settings(max_examples=300, deadline=None)
@given(st.lists(st.tuples(st.lists(SETS, max_size=5), st.integers(0, 2**32 - 1)), max_size=5), st.booleans())
def test_whatever_comes_is_decoded_or_discarded_and_what_is_kept_stays_bounded(
    messages: list[tuple[list[bytes], int]], datagrams: bool
) -> None:
    limits = Limits(templates=3, fields=8, domains=2, learned=2)
    session = Session(datagrams=datagrams, limits=limits)
    for sets, sequence in messages:
        try:
            decoded = session.message(message(*sets, sequence=sequence, domain=sequence % 5))
        except MalformedMessageError:
            continue
        assert len(shown(decoded)) == decoded.records <= decoded.octets
        assert session.template_count <= 3 and session.field_count <= 8 and len(session._learned) <= 2
    assert session.counts.messages + session.counts.malformed_messages == len(messages)


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_flipped_octets_do_no_harm(data: st.DataObject) -> None:
    session = Session()
    for whole in real_messages():
        changed = bytearray(whole)
        for place in data.draw(st.lists(st.integers(16, len(whole) - 1), max_size=4)):
            changed[place] = data.draw(st.integers(0, 255))
        try:
            shown(session.message(bytes(changed)))
        except MalformedMessageError:
            pass
