"""What an earlier life left in `work/`: finished to the last whole record, published as recovered, and accounted for.

Runs when a merge worker starts: after a crash of the machine or the service, and after the death of a predecessor in
this very run. In the second case the shared counters still know what the predecessor had consumed, so that what is in
no file now is the exact loss, counted as `lost_unclean`.
"""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
import time
from collections.abc import Callable, Sequence

from appliance.config import Output
from appliance.counters import CounterPage
from appliance.errors import ApplianceError
from appliance.formats.unpack import DamagedStreamError, Unpacker
from appliance.merge.compressor import CompressorSink, SinkError, compressor_argv
from appliance.merge.naming import Naming
from appliance.merge.publish import Sidecar, rename_without_replacing, sync_and_hash, sync_directory, write_durably
from appliance.merge.salvage import Salvage, salvage
from appliance.merge.segment import create_exclusively

log = logging.getLogger(__name__)

COPY_BYTES = 1 << 20
EMPTY_FRAME_BYTES = 64  # every compressor's frame around nothing is smaller
LOCK_WAIT_S = 10.0  # an orphaned compressor still has its last megabyte to write


def recover(
    page: CounterPage,
    naming: Naming,
    output: Output,
    labels: Sequence[str],
    source_pages: Sequence[CounterPage],
    occupancies: Sequence[tuple[int, int]],
    is_successor: bool,
    beat: Callable[[], None],
) -> None:
    """Salvages all leftovers; with `is_successor` also settles what the predecessor had taken out of the rings.

    `occupancies`: per source (packets published ever, packets in the ring now).
    """
    recovered: dict[str, int] = {}
    for path in naming.leftovers():
        beat()
        try:
            found = recover_file(path, naming, output, page, beat)
        except (ApplianceError, OSError) as error:
            log.error("%s: cannot be recovered: %s", path, error)
            continue
        if found is not None:
            for description, packets in zip(found.interfaces, found.interface_packets, strict=True):
                recovered[description.name] = recovered.get(description.name, 0) + packets
    if is_successor:
        settle(labels, source_pages, occupancies, recovered)


def settle(
    labels: Sequence[str],
    source_pages: Sequence[CounterPage],
    occupancies: Sequence[tuple[int, int]],
    recovered: dict[str, int],
) -> None:
    """The balance of a dead merge: consumed = in closed files + recovered + dropped + lost_unclean."""
    for label, page, (published, waiting) in zip(labels, source_pages, occupancies, strict=True):
        consumed = published - waiting
        page["consumed_packets"] = consumed
        page["held_packets"] = 0
        closed = page["closed_packets"] + recovered.get(label, 0)
        page["closed_packets"] = closed
        page["written_packets"] = closed
        dropped = page["dropped_merge_packets"] + page["dropped_writer_packets"]
        lost = consumed - closed - dropped - page["lost_unclean_packets"]
        if lost > 0:
            page.add("lost_unclean_packets", lost)
            log.error("%s: %d packets were lost with the merge worker that died", label, lost)


def recover_file(
    path: str, naming: Naming, output: Output, page: CounterPage, beat: Callable[[], None]
) -> Salvage | None:
    """One leftover: published, quarantined, or left for the next start because somebody still writes it (None)."""
    if not wait_until_unlocked(path, beat):
        log.warning("%s is still being written by another process; it is left for the next start", path)
        return None
    if was_never_used(path):
        os.unlink(path)
        return None
    sequence = naming.next_sequence()
    plain = naming.staging_path(sequence)
    found = salvage(path, plain, compress=False)
    if found.outcome == "undecodable":
        quarantine(path, naming, sequence, page, found.reason)
        return None
    result = path
    if found.outcome == "salvaged":
        result = recompress(plain, naming, output)
        os.unlink(path)
    publish(result, sequence, found, naming, output, page)
    return found


def was_never_used(path: str) -> bool:
    """Opened ahead: an empty file, or the empty frame of a compressor, whole or not."""
    with open(path, "rb") as file:
        if os.stat(file.fileno()).st_size > EMPTY_FRAME_BYTES:
            return False
        unpacker = Unpacker.open(head := file.read(), lambda _count: b"")
    if unpacker is None:
        return not head
    try:
        return unpacker.read_into(memoryview(bytearray(1))) == 0
    except DamagedStreamError:
        return True


def wait_until_unlocked(path: str, beat: Callable[[], None]) -> bool:
    fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
    deadline = time.monotonic() + LOCK_WAIT_S
    try:
        while True:
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return True
            except BlockingIOError:
                beat()
                if time.monotonic() > deadline:
                    return False
                time.sleep(0.05)
    finally:
        os.close(fd)


def recompress(plain: str, naming: Naming, output: Output) -> str:
    """The salvaged bytes through the output's own compressor, so that name and content agree."""
    argv = compressor_argv(output.compressor)
    if argv is None:
        return plain
    result = naming.staging_path(naming.next_sequence())
    mode = 0o640 if output.group_readable else 0o600
    fd = create_exclusively(result, mode)
    try:
        sink = CompressorSink(result, fd, argv, output.compressor_timeout_s)
        with open(plain, "rb") as file:
            while chunk := file.read(COPY_BYTES):
                sink.write(memoryview(chunk), lambda: None)
        sink.finish(output.compressor_timeout_s)
    except SinkError:
        with contextlib.suppress(OSError):
            os.unlink(result)
        raise
    os.unlink(plain)
    return result


def publish(path: str, sequence: int, found: Salvage, naming: Naming, output: Output, page: CounterPage) -> None:
    sha256, length = sync_and_hash(path)
    start_ns = found.first_ns or time.time_ns()
    final = naming.final_path(sequence, start_ns)
    sidecar = naming.sidecar_path(sequence, start_ns)
    interfaces: dict[str, int] = {}
    for description, packets in zip(found.interfaces, found.interface_packets, strict=True):
        interfaces[description.name] = interfaces.get(description.name, 0) + packets
    if sidecar is not None:
        text = Sidecar(
            file=os.path.basename(final),
            output=output.name,
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
            interfaces=interfaces,
        )
        write_durably(sidecar, text.to_json(), 0o640 if output.group_readable else 0o600)
    rename_without_replacing(path, final)
    sync_directory(os.path.dirname(final))
    page.add("segments_recovered")
    page.add("recovered_packets", found.packets)
    log.warning("recovered %s: %d packets from a file that was not finished", final, found.packets)


def quarantine(path: str, naming: Naming, sequence: int, page: CounterPage, reason: str) -> None:
    target = naming.quarantine_path(sequence)
    page.add("segments_quarantined")
    if target is not None:
        rename_without_replacing(path, target)
        write_durably(f"{target}.json", (f'{{"reason": {quoted(reason)}}}\n').encode(), 0o640)
    log.error("quarantined %s: %s", target or path, reason)


def quoted(text: str) -> str:
    import json

    return json.dumps(text)
