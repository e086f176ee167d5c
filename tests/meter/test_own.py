"""Elements of the user's own: defined in the configuration, in every flow record, and shown by others' programs."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest
from meter.flow_packets import ACK, SYN, TCP, Decoder, Packet, flow_records, number
from meter.test_duties import Told, needs, of_file, run

from appliance.config import load
from appliance.errors import ConfigError
from appliance.meter.own import own_elements
from appliance.meter.settings import MeterSettings
from appliance.meter_settings import meter_settings

ELEMENTS = (
    "siteNumber(77777/1)<unsigned16> = 7",
    "siteName(77777/2)<string> = 'north'",
    "longestPacket(77777/3)<unsigned16> = forward.max_length",
    "began(77777/4)<dateTimeMilliseconds> = start_ns",
    "sender(77777/5)<macAddress> = source_mac",
    "probe(77777/6)<ipv4Address> = 192.0.2.9",
    "share(77777/7)<float32> = 0.25",
    "offset(77777/8)<signed16> = -2",
    "flag(77777/9)<boolean> = true",
    "blob(77777/10)<octetArray>[3] = 0a0b0c",
)
METER = MeterSettings(elements=ELEMENTS)
THERE = Packet(protocol=TCP, flags=SYN, status=0x180, octets=60)
BACK = replace(THERE, **THERE.back, flags=SYN | ACK, octets=1500)


def test_every_record_has_the_constants_and_the_fields(tmp_path: Path) -> None:
    content = of_file(tmp_path, [THERE, BACK, Packet(octets=333)], METER)
    first, second = sorted(flow_records(Decoder().stream(content)), key=lambda record: number(record, 4))
    assert (number(first, 3, 77777), number(second, 3, 77777)) == (60, 333)
    for record in (first, second):
        assert (record[77777, 1], record[77777, 2]) == (b"\0\7", b"north")
        assert record[77777, 4] == record[0, 152] and record[77777, 5] == record[0, 56]
        assert (record[77777, 6], record[77777, 7]) == (bytes([192, 0, 2, 9]), b"\x3e\x80\0\0")
        assert [record[77777, i] for i in (8, 9, 10)] == [b"\xff\xfe", b"\1", b"\x0a\x0b\x0c"]


def test_records_of_the_reverse_direction_take_fields_from_there(tmp_path: Path) -> None:
    records = flow_records(Decoder().stream(of_file(tmp_path, [THERE, BACK], METER, biflow=False)))
    assert {(number(record, 7), number(record, 3, 77777)) for record in records} == {(1000, 60), (80, 1500)}


@needs("tshark")
def test_tshark_shows_the_values(tmp_path: Path) -> None:
    told = Told(tmp_path, [of_file(tmp_path, [Packet(octets=333)], METER)]).text
    assert "PEN: (Unknown) (77777)" in told
    values = dict(re.findall(r"Enterprise Private entry: .* Type (\d+): Value \(hex bytes\): (.*)", told))
    assert (values["1"], values["3"], bytes.fromhex(values["2"])) == ("00 07", "01 4d", b"north")


@needs("ipfixDump")
def test_ipfixdump_names_and_types_them_by_our_type_information(tmp_path: Path) -> None:
    told = run("ipfixDump", "-i", Told(tmp_path, [of_file(tmp_path, [Packet(octets=333)], METER)]).path, "--rfc5610")
    found = dict(re.findall(r"\(77777/\d+\) +(\w+) : (.*)", told))
    assert found["siteNumber"] == "7" and found["longestPacket"] == "333" and found["siteName"].endswith("north")
    assert found["probe"] == "192.0.2.9" and found["offset"] == "-2"


@pytest.mark.parametrize(
    ("definition", "said"),
    [
        ("siteNumber = 7", "must be NAME"),
        ("siteNumber(77777/1)<unsigned16>", "must be NAME"),
        ("site(77777/11)<unsigned9> = 7", "unsigned9"),
        ("site(0/11)<unsigned16> = 7", "0/11"),
        ("site(29305/11)<unsigned16> = 7", "29305/11"),
        ("site(77777/40000)<unsigned16> = 7", "1 to 32767"),
        ("otherName(6871/14)<unsigned8> = 7", "is initialTCPFlags<unsigned8> already"),
        ("octetDeltaCount(77777/12)<unsigned64> = 7", "another element is called octetDeltaCount"),
        ("site13(77777/13)<unsigned8> = 256", "256 is neither a field of the flow table nor a value of unsigned8"),
        ("site14(77777/14)<unsigned16> = forward.no_such", "neither a field"),
        ("site15(77777/15)<string> = forward.octets", "it needs a constant"),
        ("site16(77777/16)<dateTimeMilliseconds> = flow_id", "there are end_ns"),
        ("site17(77777/17)<string> = north", "neither a field"),
        ("site18(77777/18)<octetArray>[2] = 0a0b0c", "nor a value of octetArray"),
        ("site19(77777/19)<unsigned16>[9] = 1", "RLE"),
        (f"site20(77777/20)<string> = '{'x' * 65}'", "65 octets"),
    ],
)
def test_a_definition_that_is_wrong_is_named(definition: str, said: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(said)) as caught:
        own_elements([definition])
    assert definition in str(caught.value)


def test_too_many_and_doubled_elements_are_refused() -> None:
    with pytest.raises(ConfigError, match="together 100 octets"):
        own_elements([f"text{i}(77777/{100 + i})<string> = '{'x' * 50}'" for i in range(2)])
    with pytest.raises(ConfigError, match="there twice"):
        own_elements(["siteNumber(77777/1)<unsigned16> = 7"] * 2)


def test_the_configuration_has_them_and_names_a_mistake(tmp_path: Path) -> None:
    path = tmp_path / "appliance.toml"
    text = '[[interface]]\nuri = "ring:eth0"\n[meter]\nelements = [{}]\n'
    path.write_text(text.format('"siteNumber(77777/1)<unsigned16> = 7"'))
    assert meter_settings(load(path)).elements == ("siteNumber(77777/1)<unsigned16> = 7",)
    path.write_text(text.format('"siteNumber(77777/1)<unsigned16> = seven"'))
    with pytest.raises(ConfigError, match="seven is neither"):
        meter_settings(load(path))


@needs("tshark")
def test_check_config_names_a_mistake(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    from appliance.cli import run_command

    path = tmp_path / "appliance.toml"
    path.write_text('[[interface]]\nuri = "ring:lo"\n[meter]\nelements = ["x = 1"]\n')
    assert run_command(["check-config", "-c", str(path)]) == 78
    assert "meter.elements: 'x = 1'" in capfd.readouterr().err
