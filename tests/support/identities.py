"""The accounting identities: what every counter of a service must add up to, exactly, while traffic rests.

`balance` is for tests that inject a fault: it waits for the rest, and then everything must agree, from what the sender
counted and the network interface saw, over each process's own counters, to the published files recounted by capinfos.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from appliance.monitor.view import Snapshot
from support.judges import NumberedReport, check_numbered, packet_count
from support.lab import Lab, Sender
from support.service import Service


def balance(service: Service, sent: Mapping[str, int], *, timeout_s: float = 20.0) -> Snapshot:
    """Waits until every packet of `sent` (per label) has come to rest and every identity holds; the picture of then."""
    return service.wait_at_rest(sent, timeout_s)


class Traffic:
    """Numbered frames on the same wires, phase by phase: the numbers go on, and what was sent is known at any time."""

    def __init__(self, lab: Lab, wires: Mapping[str, str]) -> None:
        """`wires`: per label, the interface at the sender's end. The n-th has the frames' number n."""
        self._lab = lab
        self.wires = dict(wires)
        self.each = 0

    @property
    def sent(self) -> dict[str, int]:
        return dict.fromkeys(self.wires, self.each)

    def send(self, frames: int = 2000, rate: float = 20_000, **options: Any) -> None:
        """So many more frames on each wire, `rate` a second in all."""
        self._lab.send(list(self.wires.values()), frames=frames, rate=rate, first_sequence=self.each, **options)
        self.each += frames

    def start(self, rate: float = 10_000, **options: Any) -> Sender:
        """Frames without an end, until `stop` is told of the sender."""
        return self._lab.start_sender(list(self.wires.values()), rate=rate, first_sequence=self.each, **options)

    def stop(self, sender: Sender) -> None:
        """Every wire gets up to the same number of frames."""
        counts = sender.stop().sent
        most = max(counts.values())
        for number, wire in enumerate(self.wires.values()):
            if rest := most - counts[wire]:
                first = self.each + counts[wire]
                self._lab.send([wire], frames=rest, rate=20_000, first_id=number, first_sequence=first)
        self.each += most


def quarantined_packets(directory: Path) -> int:
    """What the reasons beside the files in quarantine say; without a reason (the disk was full), what capinfos says."""
    total = 0
    for path in (directory / "quarantine").iterdir():
        reason = path.with_name(f"{path.name}.json")
        if path.suffix == ".json":
            total += json.loads(path.read_text())["packets"]
        elif not reason.exists():
            total += packet_count([path])
    return total


def recount(service: Service, last: Snapshot, *, recovered_before: int = 0) -> None:
    """After the end: the published files, counted by capinfos, hold what the counters of the `last` rest say.

    `recovered_before`: packets in files that an earlier run had left.
    """
    for output in last.outputs:
        directory = Path(output.directory)
        written = sum(view.written_packets for view in last.interfaces if view.output == output.name)
        in_files = packet_count(sorted((directory / "ready").iterdir()))
        aside = quarantined_packets(directory)
        assert in_files + aside == written + recovered_before, (in_files, aside, written, service.log)
        assert aside == output.quarantined_packets, (aside, output, service.log)
    service.check_sidecars()


def judge(service: Service, traffic: Traffic, last: Snapshot) -> NumberedReport:
    """The published files hold every frame that is neither lost nor in quarantine, once, whole and in order."""
    report = check_numbered(service.ready())
    labels = list(traffic.wires)
    missing = 0
    for view in last.interfaces:
        found = report[labels.index(view.label)]
        assert (found.duplicates, found.corrupt, found.disordered) == (0, 0, 0), (view, service.log)
        assert not found.unexpected(traffic.each), view
        missing += traffic.each - found.received
    lost = sum(view.lost_packets for view in last.interfaces)
    assert missing == lost + sum(output.quarantined_packets for output in last.outputs), (missing, lost, service.log)
    assert (report.foreign, report.unreadable) == (0, 0)
    assert report.inversions == sum(output.late_packets for output in last.outputs)
    return report


def conclude(service: Service, traffic: Traffic, *, others: Collection[int] = ()) -> Snapshot:
    """The end of a test that injected a fault: identities, an orderly stop, the files recounted and judged. `others`:
    processes of the test's own."""
    for label in traffic.wires:
        seen = service.lab.statistics(label)["rx_packets"]
        assert seen == traffic.each, f"{label}: {seen} of {traffic.each} frames came through the wire"
    last = balance(service, traffic.sent)
    assert service.stop() == 0, service.log
    assert "Traceback" not in service.log, service.log
    recount(service, last)
    judge(service, traffic, last)
    assert not list((service.directory / "work").iterdir())
    assert set(service.leftover_processes()) <= set(others)
    return last
