"""A power failure between any two file operations of a running service: the operations are recorded, each beginning of
them is replayed without what was not synced, and the recovery must make whole files of what it finds."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from merge.outputs import make_pages
from support.faults import lab_with_wires
from support.fileops import STRACE, Operation, after_every_operation, operations
from support.identities import Traffic, balance
from support.judges import JudgeError, capinfos, check_numbered
from support.lab import Lab, requires_root, requires_tool
from support.service import Service

from appliance.config import Output
from appliance.merge.compressor import compressor_suffix
from appliance.merge.ledger import Ledger
from appliance.merge.naming import ApplianceNaming, prepare_directories
from appliance.merge.recovery import Recovery

pytestmark = [requires_root, requires_tool("capinfos", "lz4", "strace")]

FILES = 3
FRAMES = 40  # of each file


def record(lab: Lab, directory: Path, compressor: str) -> list[Operation]:
    """The operations of a service from its start to its end; it publishes some files, the last one at its end."""
    out, trace = directory / "out", directory / "trace"
    traffic = Traffic(lab, lab_with_wires(lab, "a"))
    service = Service(
        lab,
        directory,
        [{"uri": "ring:a"}],
        output={"directory": str(out), "compressor": compressor, "rotate_seconds": 0, "rotate_packets": FRAMES},
        prefix=[*STRACE, "-o", str(trace)],
        service={"heartbeat_timeout_s": 60},
    )
    for number in range(1, FILES + 1):
        traffic.send(FRAMES)
        service.wait_until(lambda n=number: service.interface("a").written_packets == n * FRAMES, "the frames")
    traffic.send(FRAMES // 2)
    balance(service, traffic.sent)
    supervisor = service.pids_by_page()["supervisor"]
    lab.run(["kill", "-TERM", str(supervisor)])
    assert service.wait(40) == 0, service.log
    return operations(trace, out)


def published_by(done: list[Operation]) -> dict[str, int]:
    """Names in ready/, and after how many operations each is on the disk for good."""
    renamed: list[str] = []
    found: dict[str, int] = {}
    for count, operation in enumerate(done, start=1):
        if operation.kind == "rename" and operation.target.startswith("ready/"):
            renamed.append(operation.target)
        elif operation.kind == "sync" and operation.path == "ready":
            found |= {name: count for name in renamed if name not in found}
    return found


def restore(directory: Path, state: dict[str, bytes]) -> None:
    shutil.rmtree(directory, ignore_errors=True)
    directory.mkdir()
    for path, content in state.items():
        (directory / path).parent.mkdir(parents=True, exist_ok=True)
        (directory / path).write_bytes(content)


def recover(directory: Path, compressor: str) -> ApplianceNaming:
    """As the merge worker does it at its start."""
    output = Output(directory=directory, compressor=compressor)
    naming = ApplianceNaming(directory, "main", ".pcapng" + compressor_suffix(compressor))
    prepare_directories(naming)
    pages = make_pages(["a"])
    ledger = Ledger(pages["merge"], ["a"], [pages["a"]])
    Recovery(naming, output, pages["merge"], ["a"], [pages["a"]], ledger, [(0, 0)], False).run()
    return naming


def faults_of(directory: Path, promised: dict[str, bytes], naming: ApplianceNaming) -> list[str]:
    """Whatever is not as promised after a recovery."""
    found = []
    ready = sorted((directory / "ready").iterdir())
    for name, content in promised.items():
        if not (directory / name).exists() or (directory / name).read_bytes() != content:
            found.append(f"{name} was published, and is not what it was")
    try:
        found += faults_of_files(directory, ready)
    except (OSError, ValueError, JudgeError) as error:
        found.append(f"a file cannot be read: {error}")
    if left := [path.name for path in (directory / "work").iterdir()]:
        found.append(f"left in work: {left}")
    numbers = [int(path.name.split("-")[2].split(".")[0]) for path in ready]
    if len(set(numbers)) < len(numbers) or naming.next_sequence() <= max(numbers, default=-1):
        found.append(f"a number is given twice: {numbers}")
    return found


def faults_of_files(directory: Path, ready: list[Path]) -> list[str]:
    found = []
    for path in ready:
        sidecar = json.loads((directory / "meta" / f"{path.name}.json").read_text())
        if sidecar["sha256"] != hashlib.sha256(path.read_bytes()).hexdigest():
            found.append(f"{path.name} does not agree with its sidecar")
    report = check_numbered(ready)
    if report[0].duplicates or report[0].corrupt or report.foreign or report.unreadable:
        found.append(f"frames twice or broken: {report}")
    return found


@pytest.mark.timeout(300)
@pytest.mark.parametrize("compressor", [pytest.param("none", marks=pytest.mark.slow), "lz4"])
def test_a_power_failure_between_any_two_file_operations_leaves_whole_files_or_files_that_are_salvaged(
    lab: Lab, directory: Path, compressor: str
) -> None:
    done = record(lab, directory, compressor)
    published = published_by(done)
    assert len(published) == FILES + 1
    assert all(capinfos(directory / "out" / name).packets for name in published)
    faults = list(replay(directory, done, published, compressor))
    assert not any(found for _, found in faults), "\n".join(f"{where}: {found}" for where, found in faults if found)
    assert len(faults) > 10 * len(published)
    # The same replay finds what a service that does not sync its files would leave behind.
    careless = [operation for operation in done if operation.kind != "sync" or operation.path == "ready"]
    assert any(found for _, found in replay(directory, careless, published_by(careless), compressor))


def replay(
    directory: Path, done: list[Operation], published: dict[str, int], compressor: str
) -> Iterator[tuple[str, list[str]]]:
    """For each state that a failure may leave: where it is, and what is wrong after the recovery."""
    again = directory / "again"
    contents = {name: (directory / "out" / name).read_bytes() for name in published}
    for count, words, state in after_every_operation(done):
        restore(again, state)
        promised = {name: contents[name] for name, when in published.items() if when <= count}
        naming = recover(again, compressor)
        last = done[count - 1]
        yield f"after {count} operations ({last.kind} {last.path}; {words})", faults_of(again, promised, naming)
