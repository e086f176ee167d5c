"""The configuration: what is taken, what is refused, and how that is said."""

from __future__ import annotations

import struct
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings, strategies as st
from pydantic import ValidationError

from appliance.capture import uri
from appliance.config import Config, Destination, Interface, Meter, Output, expand_interfaces, keys, load, parse
from appliance.errors import ConfigError, MissingInputError, MissingPermissionError, UsageError

ONE = {"uri": "ring:eth0"}


def faults(tables: Mapping[str, Any]) -> dict[str, str]:
    """{key: what is said of it}"""
    with pytest.raises(ConfigError) as caught:
        parse(tables)
    head, *lines = str(caught.value).splitlines()
    found = dict(line.strip().split(": ", 1) for line in lines)
    assert head == f"configuration: {len(lines)} fault{'s' * (len(lines) > 1)}"
    assert len(found) == len(lines), "a key is named twice"
    return found


def test_an_interface_is_all_that_must_be_given() -> None:
    config = parse({"interface": [ONE]})
    assert [interface.label for interface in config.interfaces] == ["eth0"]
    assert config.outputs == (Output(),)
    assert config.output_of(config.interfaces[0]) is config.outputs[0]
    assert config.interfaces_of(config.outputs[0]) == config.interfaces
    assert config.flows_directory == Path("/var/lib/appliance/flows")
    assert config.monitor.address == ("127.0.0.1", 9750)


def test_a_configuration_can_be_built_without_a_file() -> None:
    config = Config(
        interfaces=(Interface(uri="pcapfile:/a/b.pcap.gz"), Interface(uri="pcapng:/c/b.pcapng")),
        outputs=(Output(compressor=("xz", "-0"), directory=Path("out")),),
        meter=Meter(enabled=False),
    )
    assert [interface.label for interface in config.interfaces] == ["b", "b-2"]
    assert config == parse(
        {
            "interface": [{"uri": "pcapfile:/a/b.pcap.gz"}, {"uri": "pcapng:/c/b.pcapng"}],
            "output": [{"compressor": ["xz", "-0"], "directory": "out"}],
            "meter": {"enabled": False},
        }
    )


def test_nothing_of_a_configuration_can_be_changed() -> None:
    config = parse({"interface": [ONE]})
    with pytest.raises(ValidationError, match="frozen"):
        config.interfaces[0].snaplen = 1


def test_all_faults_are_told_at_once_and_each_with_its_key() -> None:
    told = faults(
        {
            "interface": [{"uri": "ring:eth0", "snaplen": 12, "promiscous": True, "output": "mian"}, {"label": "b/c"}],
            "output": [{"format": "snoop", "compressor": "zstd", "rotate_bytes": 1}],
            "meter": {"enabled": 1, "export": [{"uri": "dtls://collector:4740"}]},
            "monitor": {"listen": "9750"},
            "memory": 5,
        }
    )
    assert told == {
        "interface[0].snaplen": "must be between 64 and 262144, is 12",
        "interface[0].promiscous": "unknown key; did you mean 'promiscuous'?",
        "interface[0].output": "there is no [[output]] called 'mian', only main",
        "interface[1].uri": "is missing",
        "interface[1].label": "must be 1 to 64 of A-Z a-z 0-9 _ . -, beginning with a letter, a digit or _, is 'b/c'",
        "output[0].format": "must be 'pcapng', 'pcap', 'pcap-us' or 'erf', is 'snoop'",
        "output[0].compressor": 'must be "none", "lz4" or a list of strings such as ["zstd", "-q", "-1"], is \'zstd\'',
        "output[0].rotate_bytes": f"must be 0 or between 4096 and {1 << 60}, is 1",
        "meter.enabled": "must be true or false, is 1",
        "meter.export[0].uri": "dtls:// is not supported; flow records go to udp:// tcp:// tls:// file:",
        "monitor.listen": "must be HOST:PORT or [IPV6]:PORT, is '9750'",
        "memory": "unknown key; did you mean 'memory_bytes'?",
    }


@pytest.mark.parametrize(
    ("tables", "key", "text"),
    [
        ({}, "interface", "there must be at least one [[interface]]"),
        ({"interface": []}, "interface", "there must be at least one [[interface]]"),
        ({"interface": {"uri": "ring:a"}}, "interface", "must be a list of tables, written [[interface]]"),
        ({"interface": ["ring:a"]}, "interface[0]", "must be a table, is 'ring:a'"),
        ({"interface": [ONE], "meter": 3}, "meter", "must be a table, is 3"),
        ({"interface": [{"uri": 3}]}, "interface[0].uri", 'must be text in "quotes", is 3'),
        ({"interface": [{**ONE, "snaplen": "96"}]}, "interface[0].snaplen", "must be a whole number, is '96'"),
        ({"interface": [{**ONE, "snaplen": True}]}, "interface[0].snaplen", "must be a whole number, is true"),
        ({"interface": [{**ONE, "rotate_bytes": 0}]}, "interface[0].rotate_bytes", "it belongs into [[output]]"),
        ({"interface": [{**ONE, "ring_bytes": 4096}]}, "interface[0].ring_bytes", "must be 0 or between"),
        ({"interface": [{**ONE, "ring_bytes": 1 << 63}]}, "interface[0].ring_bytes", "must be 0 or between"),
        ({"interface": [{**ONE, "filter": "tcp\0"}]}, "interface[0].filter", "must be printable"),
        ({"interface": [{"uri": "pcap:eth0", "fanout": 2}]}, "interface[0].fanout", "only ring: can have several"),
        ({"interface": [{**ONE, "speed": "recorded"}]}, "interface[0].speed", "only a file can be replayed"),
        ({"interface": [{"uri": "ring:*", "label": "x"}]}, "interface[0].label", "stands for several"),
        ({"interface": [{**ONE, "label": "a"}] * 2}, "interface[1].label", "interface[0] is called 'a' too"),
        ({"interface": [{"uri": "ring:*"}] * 2}, "interface[1].uri", "interface[0] takes every interface already"),
        ({"interface": [{"uri": "pcapfile:-"}] * 2}, "interface[1].uri", "takes standard input already"),
        ({"interface": [ONE], "output": []}, "output", "there must be at least one [[output]]"),
        (
            {"interface": [ONE], "output": [{}, {"name": "b", "directory": "b"}]},
            "output[1].name",
            'no interface has output = "b"',
        ),
        ({"interface": [ONE], "output": [{"directory": ""}]}, "output[0].directory", "must be a path"),
        ({"interface": [ONE], "output": [{"compressor": []}]}, "output[0].compressor", "must be"),
        ({"interface": [ONE], "output": [{"compressor": [""]}]}, "output[0].compressor", "must be"),
        ({"interface": [ONE], "output": [{"linktype": "raw"}]}, "output[0].linktype", "must be '' or 'sll2'"),
        ({"interface": [ONE], "monitor": {"control_socket": "/" + "s" * 107}}, "monitor.control_socket", "107 bytes"),
        ({"interface": [ONE], "meter": {"export": [{"uri": "udp://host"}]}}, "meter.export[0].uri", "HOST:PORT"),
        ({"interface": [ONE], "meter": {"export": [{"uri": "udp://h:70000"}]}}, "meter.export[0].uri", "HOST:PORT"),
        ({"interface": [ONE], "service": {"user": "a b"}}, "service.user", "must be 1 to 64"),
    ],
)
def test_a_fault_names_its_key_and_what_would_be_right(tables: Mapping[str, Any], key: str, text: str) -> None:
    told = faults(tables)
    assert list(told) == [key]
    assert text in told[key]


def test_outputs_have_names_and_directories_of_their_own() -> None:
    told = faults({"interface": [ONE], "output": [{"directory": "a"}, {"directory": "./a"}]})
    assert told == {
        "output[1].name": "output[0] is called 'main' too",
        "output[1].directory": "output[0] has 'a' too; each needs its own",
    }


def test_a_file_and_a_live_interface_are_neither_merged_nor_metered_together() -> None:
    both = [ONE, {"uri": "pcapfile:a.pcap"}]
    assert set(faults({"interface": both})) == {"interface[1].uri", "meter.enabled"}
    apart = [ONE, {"uri": "pcapfile:a.pcap", "output": "files"}]
    outputs = [{}, {"name": "files", "directory": "files"}]
    assert set(faults({"interface": apart, "output": outputs})) == {"meter.enabled"}
    parse({"interface": apart, "output": outputs, "meter": {"enabled": False}})


@settings(deadline=None)  # a busy machine is no fault
@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
        lambda children: (
            st.lists(children) | st.dictionaries(st.sampled_from([key.name for key in keys()]) | st.text(), children)
        ),
    ),
    st.sampled_from(["interface", "output", "meter", "monitor", "service", "memory_bytes"]),
)
def test_any_tables_are_taken_or_refused_cleanly(value: Any, section: str) -> None:
    try:
        parse({"interface": [ONE], section: value})
    except ConfigError as error:
        assert section in str(error)


# Files ---------------------------------------------------------------------------------------------------------------


def test_a_file_that_does_not_exist_is_missing_input(tmp_path: Path) -> None:
    with pytest.raises(MissingInputError, match=r"no\.toml: there is no such configuration file"):
        load(tmp_path / "no.toml")


@pytest.mark.parametrize(
    ("content", "text"),
    [
        (b'[[interface]]\nuri = "ring:eth0\n', "is not TOML: .*line 2"),
        (b"# \xff\n", "is not UTF-8 text: byte 2"),
        (b'[[interface]]\nuri = "ring:a"\nsnap = 1\n', r"1 fault\n  interface\[0\]\.snap: unknown key; .*'snaplen'"),
    ],
)
def test_a_faulty_file_is_named_with_the_place_of_the_fault(tmp_path: Path, content: bytes, text: str) -> None:
    path = tmp_path / "x.toml"
    path.write_bytes(content)
    with pytest.raises(ConfigError, match=text) as caught:
        load(path)
    assert str(path) in str(caught.value)


def test_a_directory_is_no_configuration(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="Is a directory"):
        load(tmp_path)


def test_a_file_that_may_not_be_read_is_a_matter_of_permission(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("builtins.open", refuse)  # root may read everything
    with pytest.raises(MissingPermissionError, match="check its mode"):
        load(tmp_path / "x.toml")


def test_the_example_names_every_key_with_its_default_and_its_meaning(project: Path) -> None:
    path = project / "config" / "appliance.toml"
    load(path)
    text = path.read_text()
    tables = tomllib.loads(text)
    words = " ".join(text.replace("\n# ", " ").split())
    for key in keys():
        table: Any = tables
        for part in filter(None, key.section.split(".")):
            table = table[part][0] if isinstance(table[part], list) else table[part]
        assert key.name in table, f"{key.section}.{key.name} is not in the example"
        if key.default is not None:
            assert table[key.name] == key.default, f"{key.section}.{key.name}"
        assert " ".join(key.help.split()) in words, f"the example does not explain {key.section}.{key.name}"


def test_the_quickstart_takes_every_interface_and_writes_below_var(project: Path) -> None:
    config = load(project / "config" / "quickstart.toml")
    assert [interface.source.is_every_interface for interface in config.interfaces] == [True]
    assert (config.outputs[0].directory, config.outputs[0].rotate_seconds) == (Path("var"), 10)
    assert config.meter.exports[0].destination == Destination("file")
    assert config.flows_directory == Path("var/flows")
    assert config.monitor.listen.startswith("127.0.0.1:")


# URIs ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", ["ring:eth0", "pcap:br-1.100", "int:lo", "ring:*"])
def test_a_live_uri_names_an_interface(text: str) -> None:
    source = uri.parse(text)
    assert (str(source), source.is_live) == (text, True)


@pytest.mark.parametrize("text", ["pcapfile:/a b/c:d.pcap", "pcapng:x", "pcapfile:-"])
def test_a_file_uri_names_a_path(text: str) -> None:
    source = uri.parse(text)
    assert (str(source), source.is_live, source.is_every_interface) == (text, False, False)


@pytest.mark.parametrize(
    "name", ["a;id", "../x", "-i", ".", "a b", "a/b", "sixteen-chars-xx", "a\n", "é", "$(id)", "a*"]
)
def test_a_hostile_interface_name_is_refused(name: str) -> None:
    with pytest.raises(UsageError, match="no interface name"):
        uri.parse(f"ring:{name}")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("dag:/dev/dag0", "dag: needs a DAG card; record on the card's host, and read the file here: erf:PATH"),
        ("rt:host:3435", "rt: needs a sender"),
        ("duck:/x", "read the trace beside it: erf:PATH"),
        ("bpf:em0", "on Linux use ring:INTERFACE"),
        ("xdp:eth0", "ring:INTERFACE"),
        ("pfring:eth0", "ring:INTERFACE"),
        ("dpdk:0000:01:00.0", "ring:INTERFACE"),
        ("ndag:eth0,225.0.0.225,9001", "erf:PATH"),
        ("tzsplive:0.0.0.0:37008", "ring:INTERFACE with filter udp port 37008"),
        ("etsilive:0.0.0.0:9999", "lawful interception"),
        ("legacynzix:/x", "traceconvert legacynzix:PATH pcapfile:NEW"),
        ("atmhdr:/x", "traceconvert atmhdr:PATH erf:NEW"),
        ("pcapfle:x", "unknown scheme; did you mean pcapfile:?"),
        ("eth0", "say e.g. ring:eth0"),
        ("ring:", "names no interface"),
        ("pcapng:", "names no path"),
        ("pcapfile:a\0b", "zero byte"),
    ],
)
def test_a_uri_that_is_not_read_is_refused_by_name(text: str, message: str) -> None:
    with pytest.raises(UsageError) as caught:
        uri.parse(text)
    assert message in str(caught.value)


def test_an_output_is_a_format_and_a_path() -> None:
    assert uri.parse_output("pcapfile:/tmp/a.pcap").target == "/tmp/a.pcap"
    assert str(uri.parse_output("erf:/tmp/a.erf")) == "erf:/tmp/a.erf"
    assert str(uri.parse_output("rawerf:/tmp/a.erf")) == "erf:/tmp/a.erf"
    assert str(uri.parse_output("pcap:/tmp/a.pcap")) == "pcapfile:/tmp/a.pcap"
    for text in ("ring:eth0", "tsh:x", "legacyeth:x"):
        with pytest.raises(UsageError, match="is only read; The appliance writes pcapfile: pcapng: erf:"):
            uri.parse_output(text)


@pytest.mark.parametrize("scheme", ["legacyeth", "legacypos", "legacyatm", "tsh", "fr+", "erf", "rawerf"])
def test_what_a_file_does_not_tell_itself_its_uri_tells(scheme: str) -> None:
    parsed = uri.parse(f"{scheme}:/a:b")
    assert (parsed.target, parsed.is_live, parsed.told_format) == ("/a:b", False, scheme.removeprefix("raw"))
    assert uri.parse("pcapfile:/a").told_format == ""


def test_libtraces_names_of_libpcap_mean_an_interface_or_a_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert str(uri.parse("pcapint:eth0")) == "pcap:eth0"
    assert str(uri.parse("pcap:eth0")) == "pcap:eth0"
    assert str(uri.parse("pcap:/tmp/a.pcap")) == "pcapfile:/tmp/a.pcap"
    monkeypatch.chdir(tmp_path)
    Path("a.pcap").touch()
    Path("lo").touch()
    assert str(uri.parse("pcap:a.pcap")) == "pcapfile:a.pcap"
    assert str(uri.parse("pcap:lo")) == "pcap:lo"


def test_a_compressed_file_is_not_taken_for_what_its_compressed_bytes_look_like(tmp_path: Path) -> None:
    path = tmp_path / "a.gz"
    path.write_bytes(b"\x1f\x8b\x08\0" + struct.pack("<I", 1_700_000_000) + bytes((2, 3, 0x40, 0x10)) + bytes(40))
    assert str(uri.guess(str(path))) == f"pcapfile:{path}"
    path.write_bytes(b"\0\0\0\0" + struct.pack("<I", 1_700_000_000) + bytes((2, 4, 0, 76)) + bytes(70))
    assert str(uri.guess(str(path))) == f"erf:{path}"


def test_a_dash_is_standard_input_of_any_kind() -> None:
    assert (uri.guess("-").target, uri.guess("-").is_live, uri.guess("-").told_format) == ("-", False, "")


def test_a_bare_name_is_a_file_before_it_is_an_interface(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert uri.guess("lo") == uri.parse("ring:lo")
    monkeypatch.chdir(tmp_path)
    Path("lo").write_bytes(b"\xd4\xc3\xb2\xa1")
    Path("ng").write_bytes(b"\x0a\x0d\x0d\x0a")
    assert uri.guess("lo") == uri.parse("pcapfile:lo")
    assert uri.guess("ng") == uri.parse("pcapng:ng")
    with pytest.raises(UsageError, match="neither a file nor an interface"):
        uri.guess("nothing")


# Every interface -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Host:
    name: str
    left_out_because: str = ""


def test_every_interface_stands_for_those_of_the_host_that_have_no_block_of_their_own() -> None:
    config = parse({"interface": [{"uri": "ring:*", "snaplen": 96}, {"uri": "pcap:eth1", "label": "eth0"}]})
    hosts = [Host("lo"), Host("eth0"), Host("eth1"), Host("veth1", "leads into a container")]
    expanded = expand_interfaces(config, hosts)
    assert [(interface.uri, interface.label, interface.snaplen) for interface in expanded.interfaces] == [
        ("ring:lo", "lo", 96),
        ("ring:eth0", "eth0-2", 96),
        ("pcap:eth1", "eth0", 262144),
    ]
    assert expanded.outputs == config.outputs


def test_every_interface_of_a_host_without_any_is_missing_input() -> None:
    config = parse({"interface": [{"uri": "ring:*"}]})
    with pytest.raises(MissingInputError, match=r"ring:\* finds no interface to record \(lo: is down\)"):
        expand_interfaces(config, [Host("lo", "is down")])


def test_a_configuration_without_wildcard_stays_as_it_is() -> None:
    config = parse({"interface": [ONE]})
    assert expand_interfaces(config, []) is config


def test_a_criterion_by_filter_has_its_filter_and_no_other_has_one() -> None:
    told = faults(
        {
            "interface": [
                ONE | {"trigger": {"start": "filter", "stop_filter": "tcp"}},
                {"uri": "ring:eth1", "keep": {"kind": "filter"}},
                {"uri": "ring:eth2", "keep": {"kind": "none"}, "trigger": {"stopp": "filter"}},
            ]
        }
    )
    assert told["interface[0].trigger.start_filter"] == "is missing"
    assert told["interface[0].trigger.stop_filter"] == 'is given, and the criterion is "userstop"'
    assert told["interface[1].keep.filter"] == "is missing"
    assert told["interface[2].keep.kind"].startswith("must be 'all', 'filter'")
    assert told["interface[2].trigger.stopp"] == "unknown key; did you mean 'stop'?"


def test_a_recording_is_gated_where_one_worker_sees_all_its_packets() -> None:
    trigger = {"trigger": {"start": "plderr"}}
    told = faults({"interface": [{"uri": "pcap:eth0"} | trigger, {"uri": "ring:eth1", "fanout": 2} | trigger]})
    assert told["interface[0].trigger"] == "only a ring: source is recorded by triggers, not pcap:eth0"
    assert told["interface[1].trigger"] == "a trigger needs all packets in one worker: fanout must be 1"
    assert parse({"interface": [{"uri": "ring:eth0", "fanout": 2, "keep": {"kind": "notpld"}}]})


def test_filters_of_port_capture_are_few_and_short() -> None:
    told = faults(
        {"interface": [ONE | {"capture_filters": ["tcp"] * 17}, {"uri": "ring:b", "capture_filters": ["x" * 1025]}]}
    )
    assert told["interface[0].capture_filters"] == "there can be 16 filters, not 17"
    assert "must have at most 1024 bytes" in told["interface[1].capture_filters[0]"]
