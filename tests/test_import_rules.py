"""Who may import whom, so that the parts meet where the design says they meet."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

# A module belongs to the longest name here that it begins with. What lies at the bottom may be imported by all.
BOTTOM = {
    "appliance.config",
    "appliance.console",
    "appliance.counters",
    "appliance.disk",
    "appliance.errors",
    "appliance.formats",
    "appliance.logs",
    "appliance.process",
    "appliance.ring",
}
# part: what it may import beside itself and the bottom.
MAY_IMPORT: dict[str, set[str]] = {
    # The bottom knows only itself, but for the URIs: a plain parser, which the configuration checks its values with.
    "appliance.config": {"appliance.capture.uri"},
    "appliance.console": set(),
    "appliance.counters": set(),
    "appliance.disk": set(),
    "appliance.errors": set(),
    "appliance.formats": set(),
    # A user's end: URIs, files and compressors; interfaces.
    "appliance.formats.live_input": {"appliance.capture.pcap_live"},
    "appliance.formats.output_trace": {"appliance.capture.opener", "appliance.capture.uri"}
    | {"appliance.merge.compressor"},
    "appliance.logs": set(),
    "appliance.process": set(),
    "appliance.ring": set(),
    # The three stages of the data path meet in the rings alone.
    "appliance.capture": set(),
    "appliance.capture.uri": set(),
    "appliance.merge": set(),
    "appliance.meter": set(),
    "appliance.monitor": {"appliance.plan"},
    # Clients' filters are compiled here, so that no capture worker is held up by one.
    "appliance.monitor.ports": {"appliance.monitor", "appliance.capture.bpf", "appliance.capture.features"},
    # A process is made of the part that it is named after.
    "workers.capture": {"appliance.capture"},
    "workers.merge": {"appliance.merge"},
    "workers.meter": {"appliance.meter", "appliance.merge.order"},
    "workers.traceflow": {"appliance.meter", "appliance.merge.order", "appliance.capture.pairs"},
    "workers.monitor": {"appliance.monitor"},
    "workers.compress": set(),
    # What plans, starts and asks knows counters, never packets.
    "appliance.plan": {"appliance.capture.uri"},
    # Asks every stage, before there is a process, whether it could start.
    "appliance.prepare": {"appliance.capture", "appliance.merge", "appliance.plan"},
    "appliance.reload": set(),
    # The meter's tables of the configuration as its settings.
    "appliance.meter_settings": {"appliance.meter", "appliance.prepare"},
    # Makes of a plan what there is; with the preparation and the parts all that sees every stage at once.
    "appliance.wiring": {"appliance.capture", "appliance.merge", "appliance.monitor"}
    | {"appliance.meter_settings", "appliance.plan", "appliance.prepare"},
    "appliance.parts": {"appliance.merge", "appliance.meter", "appliance.monitor", "workers"}
    | {"appliance.meter_settings", "appliance.plan", "appliance.wiring"},
    "appliance.takeup": {"appliance.capture.bpf", "appliance.merge", "appliance.monitor", "appliance.plan"}
    | {"appliance.meter_settings", "appliance.reload", "appliance.wiring"},
    "appliance.supervisor": {"appliance.capture.opener", "appliance.monitor", "appliance.plan", "appliance.reload"}
    | {"appliance.parts", "appliance.takeup", "appliance.wiring"},
    # The user's ends wire whole parts together.
    "appliance.cli": {"appliance", "workers"},
    "appliance.start": {"appliance.cli", "appliance.flows_command"},
    "appliance.flows_command": {"appliance.meter.settings", "appliance.offline"},
    "appliance.mtracecap": {"appliance", "workers"},
    "appliance.offline": {"appliance.capture", "appliance.meter", "appliance.merge.order"},
    "appliance.traces": {"appliance.capture", "appliance.meter"},
    "appliance.doctor": {"appliance.capture", "appliance.monitor.listener", "appliance.plan", "appliance.prepare"},
    "appliance.lab": set(),
    "appliance.capturer": {"appliance.monitor.control"},
    "appliance.capture_command": {"appliance.capturer", "appliance.cli", "appliance.generator"},
    "appliance.generator": set(),
}
# Packages of others with traps of their own, and where those are met: nobody else imports them.
ADAPTERS: dict[str, set[str]] = {
    "ipfix": {"appliance.meter.ipfix", "appliance.meter.library"},
    "lz4": {"appliance.formats.unpack", "appliance.merge.salvage", "workers.compress"},
    "multiprocessing_logging": {"appliance.logs"},
    "pcap": {"appliance.capture.pcap_live"},
    "pyarrow": {"appliance.meter.records"},
    "prometheus_client": {"appliance.monitor"},
    "sdnotify": {"appliance.supervisor"},
    "starlette": {"appliance.monitor.web"},
    "uvicorn": {"appliance.monitor.web"},
    "zstandard": {"appliance.formats.unpack"},
}
# These know what a packet is; the supervisor and the monitor must do without. How full a ring is they may ask.
KNOWS_PACKETS = (
    "appliance.formats",
    "appliance.ring.digest",
    "appliance.ring.layout",
    "appliance.ring.ring.Consumer",
    "appliance.ring.ring.Producer",
)

_CYTHON_FROM = re.compile(r"^\s*from\s+([\w.]+)\s+c?import\s+(\([^)]*\)|[^\n#]+)", re.MULTILINE)
_CYTHON_IMPORT = re.compile(r"^\s*c?import\s+([\w.]+(?:\s*,\s*[\w.]+)*)", re.MULTILINE)


def module_name(path: Path, root: Path) -> str:
    return ".".join(path.relative_to(root).with_suffix("").parts).removesuffix(".__init__")


def imports_of(path: Path, root: Path) -> set[str]:
    """Absolute names of what a file imports; `from a import b` gives both `a` and `a.b`."""
    text = path.read_text()
    package = path.relative_to(root).parent.parts
    return set(_python_imports(text, package) if path.suffix == ".py" else _cython_imports(text, package))


def _python_imports(text: str, package: tuple[str, ...]) -> Iterator[str]:
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            yield from (name.name for name in node.names)
        elif isinstance(node, ast.ImportFrom):
            origin = _absolute("." * node.level + (node.module or ""), package)
            yield from (origin, *(f"{origin}.{name.name}" for name in node.names))


def _cython_imports(text: str, package: tuple[str, ...]) -> Iterator[str]:
    for match in _CYTHON_FROM.finditer(text):
        origin = _absolute(match[1], package)
        names = [name.split()[0] for name in match[2].strip("()").replace("\n", " ").split(",") if name.strip()]
        yield from (origin, *(f"{origin}.{name}" for name in names))
    for match in _CYTHON_IMPORT.finditer(text):
        yield from (name.strip() for name in match[1].split(","))


def _absolute(name: str, package: tuple[str, ...]) -> str:
    dots = len(name) - len(name.lstrip("."))
    above = package[: len(package) - dots + 1] if dots else ()
    return ".".join((*above, *filter(None, [name.lstrip(".")])))


def begins_with(name: str, part: str) -> bool:
    return name == part or name.startswith(f"{part}.")


def part_of(name: str) -> str | None:
    return max((part for part in MAY_IMPORT if begins_with(name, part)), key=len, default=None)


def sources(root: Path) -> list[Path]:
    return sorted(
        path
        for top in ("appliance", "workers")
        for path in (root / top).rglob("*")
        if path.suffix in (".py", ".pyx", ".pxd", ".pxi")
    )


def faults_of(name: str, imported: set[str]) -> Iterator[str]:
    """What `name` imports and may not."""
    part = part_of(name)
    for target in sorted(imported):
        for package, owners in ADAPTERS.items():
            if begins_with(target, package) and not any(begins_with(name, owner) for owner in owners):
                yield f"{name} imports {target}, which is the matter of {' and '.join(sorted(owners))}"
        if part is None or not (begins_with(target, "appliance") or begins_with(target, "workers")):
            continue
        allowed = BOTTOM | MAY_IMPORT[part] | {part}
        is_package_of_allowed = any(begins_with(other, target) for other in allowed)
        if not is_package_of_allowed and not any(begins_with(target, other) for other in allowed):
            yield f"{name} imports {target}"


def test_every_file_has_its_place_in_the_rules(project: Path) -> None:
    names = {module_name(path, project) for path in sources(project)}
    assert {name for name in names if part_of(name) is None} <= {"appliance", "workers"}


def test_no_file_imports_what_is_not_its_matter(project: Path) -> None:
    assert [
        fault for path in sources(project) for fault in faults_of(module_name(path, project), imports_of(path, project))
    ] == []


@pytest.mark.parametrize("part", ["appliance.supervisor", "appliance.plan", "appliance.monitor", "workers.monitor"])
def test_who_watches_knows_counters_and_never_packets(project: Path, part: str) -> None:
    files = [path for path in sources(project) if begins_with(module_name(path, project), part)]
    known = {(path.name, name) for path in files for name in imports_of(path, project)}
    assert [(file, name) for file, name in known if any(begins_with(name, packets) for packets in KNOWS_PACKETS)] == []


def test_the_top_level_has_no_module_beside_the_two_packages(project: Path) -> None:
    """`config` and `systemd` are names of other distributions' packages as well: there is no Python in them."""
    assert [path.name for path in project.glob("*.py")] == []
    assert [path for top in ("config", "systemd") for path in (project / top).rglob("*.py*")] == []
    docstring_only = ast.parse((project / "workers" / "__init__.py").read_text()).body
    assert [type(node).__name__ for node in docstring_only] == ["Expr"]


# The test of the test: rules that nothing can break hold nothing.
@pytest.mark.parametrize(
    ("name", "text", "fault"),
    [
        ("appliance.capture.replay", "from appliance.merge import order\n", "appliance.merge"),
        ("appliance.merge.order", "from appliance.capture.headers cimport (\n    parse,\n)\n", "appliance.capture"),
        ("appliance.merge.order", "cimport appliance.meter.table\n", "appliance.meter.table"),
        ("appliance.meter.table", "import appliance.capture.afpacket\n", "appliance.capture.afpacket"),
        ("appliance.ring.memory", "from ..merge.order import Merge\n", "appliance.merge.order"),
        ("appliance.monitor.web", "def f():\n    import workers.merge\n", "workers.merge"),
        ("appliance.supervisor", "from ipfix import message\n", "ipfix"),
        ("workers.capture", "from appliance import merge\n", "appliance.merge"),
        ("workers.merge", "from . import capture\n", "workers.capture"),
    ],
)
def test_a_forbidden_import_is_found(tmp_path: Path, name: str, text: str, fault: str) -> None:
    path = tmp_path.joinpath(*name.split(".")).with_suffix(".pyx" if "cimport" in text else ".py")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    assert any(fault in line for line in faults_of(name, imports_of(path, tmp_path)))
