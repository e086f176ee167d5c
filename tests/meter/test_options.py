"""Options data that explain the records, read by a reader that we did not write: types, interfaces."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest
from meter.flow_packets import Decoder, Memory, Packet, digests, make_table

from appliance.meter.exporters import make_exporter
from appliance.meter.ipfix import known_element
from appliance.meter.options import description, field, words
from appliance.meter.settings import ExportSettings, InterfaceName, MeterSettings
from appliance.meter.templates import TemplateSet

needs_ipfixdump = pytest.mark.skipif(shutil.which("ipfixDump") is None, reason="ipfixDump is not installed")
needs_tshark = pytest.mark.skipif(shutil.which("tshark") is None, reason="tshark is not installed")
INTERFACES = (InterfaceName(0, "uplink", "ring:eth0"), InterfaceName(1, "gr\u00fcn", "ring:eth1"))


def write_file(path: Path, meter: MeterSettings, packets: list[Packet]) -> Path:
    exporter = make_exporter(meter, ExportSettings(f"file:{path}", single_file=True))
    table = make_table()
    memory = Memory(digests(packets))
    table.update(memory.address, memory.length)
    table.flush()
    exporter.export(table.rows_address, table.row_count)
    exporter.close(0)
    return path


def dump(path: Path, *options: str) -> str:
    return subprocess.run(["ipfixDump", "-i", path, *options], capture_output=True, text=True, check=True).stdout


@needs_ipfixdump
def test_ipfixdump_names_enterprise_elements_by_our_type_information_alone(tmp_path: Path) -> None:
    path = write_file(tmp_path / "a.ipfix", MeterSettings(), [Packet(protocol=6, flags=2)])
    for name, number in (("initialTCPFlags", 14), ("reverseUnionTCPFlags", 16399)):
        named = re.compile(rf"ent: +6871 +id: +{number} +type: uint8 +len: +1 +{name}")
        assert named.search(dump(path, "--rfc5610")) and not named.search(dump(path))


@needs_ipfixdump
def test_ipfixdump_knows_the_names_of_interfaces(tmp_path: Path) -> None:
    told = dump(write_file(tmp_path / "a.ipfix", MeterSettings(interfaces=INTERFACES), [Packet()]))
    assert ("uplink" in told and "ring:eth1" in told and "(S)" in told.upper()) or "scope" in told.lower()


@needs_tshark
def test_tshark_shows_interface_names_of_their_scope(tmp_path: Path) -> None:
    path = write_file(tmp_path / "a.ipfix", MeterSettings(interfaces=INTERFACES), [Packet()])
    told = subprocess.run(
        ["tshark", "-n", "-o", "cflow.max_template_fields:0", "-r", path, "-V"],
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    assert re.search(r"IfName: uplink", told) and "ring:eth1" in told
    assert "Malformed" not in told and "Expert Info" not in told


def test_type_information_comes_in_an_earlier_message_and_has_nine_fields() -> None:
    messages = TemplateSet(MeterSettings(interfaces=INTERFACES), ExportSettings("file:")).announcement(65535)
    decoded = Decoder().stream(b"".join(bytes(message.data) for message in messages))
    assert [len(message.templates) for message in decoded] == [1, 17]
    assert len(decoded[0].templates[311]) == 9 and decoded[0].scopes == {311: 2}
    numbers = {int.from_bytes(record[0, 303], "big") for _, record in decoded[0].records}
    assert numbers >= {14, 15, 14 | 0x4000, 15 | 0x4000}
    names = [record[0, 82].decode() for template_id, record in decoded[1].records if template_id == 310]
    assert names == ["uplink", "gr\u00fcn"]


def test_a_description_is_what_the_element_is() -> None:
    assert description(known_element(6871, 14)) == (6871, 14, 1, 5, 0, 0, 255, "initialTCPFlags", "initial tcp flags")
    assert words("minTcpRttMilliseconds") == "min tcp rtt milliseconds"


def test_long_texts_are_cut_between_letters() -> None:
    assert field("\u00fc" * 100, 0) == bytes([128]) + ("\u00fc" * 64).encode()
    assert field("x" + "\u00fc" * 100, 0) == bytes([127]) + ("x" + "\u00fc" * 63).encode()
