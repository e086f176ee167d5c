"""What an earlier life left in `work/`: finished to the last whole record, published as recovered, and accounted for.

Runs beside the new life's own work, in the publisher's thread: a gigabyte takes its time, and no packet waits for it.

After the death of a predecessor in this very run, the rings still tell exactly what it had consumed. Until the salvage
is done, that counts as held; then what came back counts as written, and what is in no file as `lost_unclean`.

Every step can be cut off by another death: the salvaged bytes replace the leftover by one rename, under its own name,
and only what is whole under that name is published.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import logging
import os
import re
import signal
import threading
import time
from collections.abc import Sequence

from appliance.config import Output
from appliance.counters import CounterPage
from appliance.disk import opened, rename_without_replacing, sync_directory, sync_file
from appliance.errors import ApplianceError, InputOutputError
from appliance.formats.stream import InputStream
from appliance.formats.unpack import DamagedStreamError, Unpacker
from appliance.merge.compressor import CompressorSink, SinkError, compressor_argv, compressor_suffix
from appliance.merge.events import Announcer
from appliance.merge.ledger import Ledger
from appliance.merge.naming import Naming, SingleFileNaming
from appliance.merge.publish import (
    Sidecar,
    free_name,
    sync_and_hash,
    write_durably,
    write_reason,
)
from appliance.merge.salvage import Salvage, salvage
from appliance.merge.segment import create_exclusively

log = logging.getLogger(__name__)

COPY_BYTES = 1 << 20
LOCK_WAIT_S = 10.0  # an orphaned compressor still has its last megabyte to write
KILL_WAIT_S = 1.0  # until one that was killed is gone
PLAIN, PACKED = ".salvage", ".salvage.packed"  # what is made of a leftover, beside it
NOTHING_BYTES = 65536  # a larger file that cannot be decoded is kept: it may be worth a closer look


def set_written(page: CounterPage, packets: int) -> None:
    """What a source's packets are by now; the two counters that tell of the way there only grow."""
    change = packets - page["written_packets"]
    page.add("ever_written_packets" if change > 0 else "taken_back_packets", abs(change))
    page["written_packets"] = packets


class Recovery:
    """The leftovers of one output. Made by the merge's thread before it has files of its own; `run` is the publisher's
    thread's, `settle` the merge's again, once `is_done`."""

    def __init__(
        self,
        naming: Naming,
        output: Output,
        page: CounterPage,
        labels: Sequence[str],
        source_pages: Sequence[CounterPage],
        ledger: Ledger,
        occupancies: Sequence[tuple[int, int]],
        is_successor: bool,
        since_ns: int = 0,
        announcer: Announcer | None = None,
    ) -> None:
        """`occupancies`: per source (packets published ever, packets in the ring now). `since_ns`: when this run began
        (CLOCK_REALTIME). `unsettled`: per source, what the predecessor had consumed and nobody knows the end of."""
        self._naming = naming
        self._output = output
        self._page = page
        self._labels = labels
        self._pages = source_pages
        self._ledger = ledger
        self._announcer = announcer
        self._is_successor = is_successor
        self._leftovers: list[str] = []
        try:
            self._leftovers = leftovers_of(naming, is_successor, since_ns)
        except OSError as error:
            log.error("what an earlier life left cannot be looked for: %s", error)
        self._recovered: dict[str, int] = {}
        self._done = threading.Event()
        self._settled = False
        self.unsettled = [0] * len(labels)
        if is_successor:
            ledger.take_over(self._leftovers)
            self._take_over(occupancies)

    def _take_over(self, occupancies: Sequence[tuple[int, int]]) -> None:
        """consumed = in closed files + dropped + lost + unsettled; of the unsettled, some count as written already."""
        self._written_by_predecessor = []
        self._unclosed = {}
        for i, (label, page, (published, waiting)) in enumerate(
            zip(self._labels, self._pages, occupancies, strict=True)
        ):
            consumed = published - waiting
            page["consumed_packets"] = consumed
            dropped = page["dropped_merge_packets"] + page["dropped_writer_packets"]
            unclosed = max(0, consumed - dropped - page["lost_unclean_packets"] - page["closed_packets"])
            written = min(max(0, page["written_packets"] - page["closed_packets"]), unclosed)
            set_written(page, page["closed_packets"] + written)
            page["held_packets"] = self.unsettled[i] = unclosed - written
            self._unclosed[label] = unclosed
            self._written_by_predecessor.append(written)
        for name in ("open_packets", "segment_opened_ns", "queued_segments"):
            self._page[name] = 0

    @property
    def is_done(self) -> bool:
        """Every leftover is dealt with, and `settle` has not been called yet."""
        return self._done.is_set() and not self._settled

    def settle(self) -> None:
        """The balance of the dead merge: what was recovered is written, the rest is lost."""
        self._settled = True
        if not self._is_successor:
            return
        for i, (label, page) in enumerate(zip(self._labels, self._pages, strict=True)):
            recovered = self._recovered.get(label, 0)
            lost = self._unclosed[label] - recovered
            set_written(page, page["written_packets"] - self._written_by_predecessor[i] + recovered)
            page.add("lost_unclean_packets", lost)
            page["held_packets"] = page["held_packets"] - self.unsettled[i]
            self.unsettled[i] = 0
            if lost:
                log.error("%s: %d packets were lost with the merge worker that died", label, lost)
        self._page["written_packets"] = sum(page["written_packets"] for page in self._pages)

    # ---- the publisher's thread ----

    def run(self) -> None:
        try:
            for path in self._leftovers:
                try:
                    self._recover(path)
                except (ApplianceError, OSError) as error:
                    log.error("%s: cannot be recovered, and is left for the next start: %s", path, error)
        finally:
            self._done.set()

    def _recover(self, path: str) -> None:
        """One leftover: published, quarantined, removed because it holds nothing, or left for the next start."""
        discard(path + PLAIN, path + PACKED)
        if not wait_until_unlocked(path, LOCK_WAIT_S) and not end_writers(path):
            log.warning("%s is still being written by another process; it is left for the next start", path)
            return
        if os.stat(path).st_nlink > 1:
            os.unlink(path)  # published already, by link(2), where renameat2(2) is not to be had
            return
        drop_orphaned_sidecars(path, self._naming)
        found = salvage(path, path + PLAIN, compress=False, mode=self._mode)
        if found.outcome == "undecodable":
            self._set_aside_undecodable(path, found)
        elif found.packets == 0:
            # Published it would say that no packet came in its time, which nobody knows.
            discard(path, path + PLAIN)
            log.info("%s held no packet and is removed", path)
        elif not self._fits(found):
            self._set_aside_foreign(path, found)
        else:
            self._finish(path, found)
            self._publish(path, found)

    def _fits(self, found: Salvage) -> bool:
        written = self._output.format
        return found.format == (written if written in ("pcapng", "erf") else "pcap")

    def _set_aside_undecodable(self, path: str, found: Salvage) -> None:
        if os.stat(path).st_size <= NOTHING_BYTES and holds_nothing(path):
            os.unlink(path)  # a compressor's own beginning and end: it was started ahead, and never used
            return
        self._quarantine(path, found.reason)

    def _set_aside_foreign(self, path: str, found: Salvage) -> None:
        """Whoever left it wrote another format: before a change of the configuration, or for another output."""
        discard(path + PLAIN)
        if self._naming.quarantine_path(0) is None:
            log.warning("%s is a %s file, which this output does not write; it is left as it is", path, found.format)
            return
        self._quarantine(path, f"a {found.format} file, which this output does not write: it can be read as it is")

    def _quarantine(self, path: str, reason: str) -> None:
        target = self._naming.quarantine_path(self._number_of(path))
        if target is None:
            self._page.add("segments_quarantined")
        else:
            self._ledger.begin(path, {}, segments_quarantined=1)
            rename_without_replacing(path, target)
            self._ledger.end()
            write_reason(target, reason, 0, self._mode)
        log.error("%s cannot be recovered: %s", target or path, reason)

    def _finish(self, path: str, found: Salvage) -> None:
        """Makes the file at `path` whole, and packed as its published name will say."""
        argv = compressor_argv(self._output.compressor)
        wanted = compressor_suffix(self._output.compressor).removeprefix(".")
        if found.outcome == "whole" and found.compression == wanted:
            return
        if found.outcome == "whole":
            unpack(path, path + PLAIN, self._mode)
        result = path + PLAIN
        if argv is not None:
            result = path + PACKED
            pack(path + PLAIN, result, argv, self._output.compressor_timeout_s, self._mode)
        sync_file(result)
        os.replace(result, path)
        discard(path + PLAIN)

    def _publish(self, path: str, found: Salvage) -> None:
        sha256, length = sync_and_hash(path)
        start_ns = found.first_ns or time.time_ns()
        sequence, final = free_name(self._naming, self._number_of(path), start_ns)
        sidecar = self._naming.sidecar_path(sequence, start_ns)
        packets = self._attribute(found)
        told = Sidecar(
            file=os.path.basename(final),
            output=self._output.name,
            sequence=sequence,
            packets=found.packets,
            bytes=length,
            uncompressed_bytes=found.bytes,
            first_ns=found.first_ns,
            last_ns=found.last_ns,
            dropped={},
            late=found.late_packets,
            late_max_ns=0,
            sha256=sha256,
            closed_because="crash",
            recovered=True,
            interfaces=packets,
        )
        if sidecar is not None:
            write_durably(sidecar, told.to_json(), self._mode)
        counted = {"segments_recovered": 1, "recovered_packets": found.packets}
        self._ledger.begin(path, packets if self._is_successor else {}, **counted)
        rename_without_replacing(path, final)
        self._ledger.end()
        sync_directory(os.path.dirname(final))
        for label, count in packets.items():
            self._recovered[label] = self._recovered.get(label, 0) + count
        if self._announcer is not None:
            self._announcer.published(final, dataclasses.asdict(told))
        log.warning("recovered %s: %d packets from a file that was not finished", final, found.packets)

    def _number_of(self, path: str) -> int:
        """The file's own number, which puts it in front of what was written later; it was never published."""
        number = re.search(r"-(\d{8,18})(?:[.]|$)", os.path.basename(path), re.ASCII)
        return int(number[1]) if number else self._naming.next_sequence()

    def _attribute(self, found: Salvage) -> dict[str, int]:
        """Packets of each source in a recovered file. A pcap file does not say: there, the sources are credited with
        what is known to have been written of them, in their order, which is exact in the sum."""
        named: dict[str, int] = {}
        for description, count in zip(found.interfaces, found.interface_packets, strict=True):
            named[description.name] = named.get(description.name, 0) + count
        if not self._is_successor:
            return named
        credited: dict[str, int] = {}
        for label in self._labels:
            room = self._unclosed[label] - self._recovered.get(label, 0)
            credited[label] = min(room, named.pop(label, 0))
        rest = sum(named.values())
        for label in self._labels:
            room = self._unclosed[label] - self._recovered.get(label, 0) - credited[label]
            credited[label] += min(room, rest)
            rest -= min(room, rest)
        return {label: count for label, count in credited.items() if count}

    @property
    def _mode(self) -> int:
        return 0o640 if self._output.group_readable else 0o600


def leftovers_of(naming: Naming, is_successor: bool, since_ns: int) -> list[str]:
    """Staging files without an owner. A single file's do not concern a new run, but a new merge in the same run."""
    if isinstance(naming, SingleFileNaming):
        paths = naming.unfinished() if is_successor else []
        return [path for path in paths if os.stat(path).st_mtime_ns >= since_ns]
    found = naming.leftovers()
    for path in found:
        if path.endswith((PLAIN, PACKED)) and path.partition(PLAIN)[0] not in found:
            discard(path)
    return [path for path in found if not path.endswith((PLAIN, PACKED))]


def discard(*paths: str) -> None:
    for path in paths:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(path)


def wait_until_unlocked(path: str, timeout_s: float) -> bool:
    """Whether nobody writes the file any longer."""
    deadline = time.monotonic() + timeout_s
    with opened(path, os.O_NOFOLLOW) as fd:
        while True:
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return True
            except BlockingIOError:
                if time.monotonic() > deadline:
                    return False
                time.sleep(0.05)


def end_writers(path: str) -> bool:
    """Kills compressors that outlived their merge and hang (stopped, say): the file is their standard output. Whether
    nobody writes it any longer; those of another user cannot be found."""
    wanted = os.stat(path)
    for name in filter(str.isdecimal, os.listdir("/proc")):
        with contextlib.suppress(OSError):
            pidfd = os.pidfd_open(int(name))  # before the look: another process may get the number later
            try:
                found = os.stat(f"/proc/{name}/fd/1")
                if (found.st_dev, found.st_ino) == (wanted.st_dev, wanted.st_ino):
                    signal.pidfd_send_signal(pidfd, signal.SIGKILL)
                    log.warning("%s: its compressor outlived the merge worker, and hung: it was killed", path)
            finally:
                os.close(pidfd)
    return wait_until_unlocked(path, KILL_WAIT_S)


def holds_nothing(path: str) -> bool:
    """Whether not a single byte comes out of the file, be it whole or cut."""
    buffer = memoryview(bytearray(1))
    with open(path, "rb") as file:
        if not (head := file.read(64)):
            return True
        unpacker = Unpacker.open(head, file.read)
        try:
            return unpacker is not None and unpacker.read_into(buffer) == 0
        except DamagedStreamError:
            return True


def drop_orphaned_sidecars(path: str, naming: Naming) -> None:
    """A sidecar is written before its file is renamed: the file with its number is still here, so it speaks of none."""
    example = naming.sidecar_path(0, 0)
    parts = re.fullmatch(r"(.+)-(\d{8,18})([.].+)", os.path.basename(path), re.ASCII)
    if example is None or parts is None:
        return
    output, number, ending = map(re.escape, parts.groups())
    orphan = re.compile(rf"{output}-\d{{8}}T\d{{6}}Z-{number}{ending}[.]json", re.ASCII)
    directory = os.path.dirname(example)
    for name in os.listdir(directory):
        if orphan.fullmatch(name):
            discard(os.path.join(directory, name))


def unpack(path: str, target: str, mode: int) -> None:
    piece = memoryview(bytearray(COPY_BYTES))
    with contextlib.closing(InputStream(path)) as stream, open(create_exclusively(target, mode), "wb") as file:
        while count := stream.read_into(piece):
            file.write(piece[:count])


def pack(path: str, target: str, argv: Sequence[str], timeout_s: float, mode: int) -> None:
    """The plain file through the output's own compressor."""
    sink = CompressorSink(target, create_exclusively(target, mode), argv, timeout_s)
    try:
        with open(path, "rb") as file:
            while chunk := file.read(COPY_BYTES):
                sink.write(memoryview(chunk), lambda: None)
        sink.finish(timeout_s)
    except SinkError as error:
        sink.abandon()
        discard(target)
        raise InputOutputError(f"what {path} holds cannot be compressed: {error}") from error
