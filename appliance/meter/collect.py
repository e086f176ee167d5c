"""The commands `appliance ipfix read` and `listen`: decode, show, and say at the end what there was."""

from __future__ import annotations

import contextlib
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import BinaryIO, TextIO

from appliance.errors import MissingInputError, MissingPermissionError, UsageError
from appliance.meter.collector import Listener, read_stream
from appliance.meter.decode import Message, Session
from appliance.meter.present import JsonLines, TableLines, summary
from appliance.meter.tls import ServerTls

DRAIN_S = 1.0  # at the end, for what has arrived already

Tell = Callable[[str], None]
WRITERS: dict[str, type[JsonLines | TableLines]] = {"json": JsonLines, "table": TableLines}


def make_writer(output_format: str, out: TextIO) -> JsonLines | TableLines:
    try:
        return WRITERS[output_format](out)
    except KeyError:
        raise UsageError(f"--format {output_format}: must be {' or '.join(WRITERS)}") from None


def read_file(name: str, output_format: str, out: TextIO, tell: Tell) -> None:
    """Decodes the file `name` (`-`: standard input) to `out`. MissingInputError, or FormatError when it is damaged:
    what stood before the damage has been written then."""
    writer = make_writer(output_format, out)
    session = Session()
    with opened(name) as stream:
        try:
            for message in read_stream(stream, name, session):
                for note in message.notes:
                    tell(f"{name}: {note}")
                writer.write("", message)
        finally:
            writer.finish()
            tell(f"{name}: {summary(session.counts)}")


@contextlib.contextmanager
def opened(name: str) -> Iterator[BinaryIO]:
    if name == "-":
        yield sys.stdin.buffer
        return
    try:
        stream = open(name, "rb")
    except PermissionError:
        raise MissingPermissionError(f"{name}: may not be read") from None
    except OSError as error:
        raise MissingInputError(f"{name}: {error.strerror}") from None
    with stream:
        yield stream


def listen(
    uris: Sequence[str],
    output_format: str,
    out: TextIO,
    tell: Tell,
    *,
    count: int = 0,
    certificate: Path | None = None,
    key: Path | None = None,
    ca: Path | None = None,
) -> None:
    """Collects until SIGINT or SIGTERM, or until `count` records (0: any number) have come."""
    writer = make_writer(output_format, out)
    tls = ServerTls(certificate, key or certificate, ca) if certificate is not None else None
    stopped = False
    records = 0

    def stop(*_: object) -> None:
        nonlocal stopped
        stopped = True

    def handle(exporter: str, message: Message) -> None:
        nonlocal records
        writer.write(exporter, message)
        writer.finish()  # whoever watches wants to see it now
        records += message.records

    listener = Listener(uris, handle, tell, tls=tls)
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, stop)
    tell(f"listening on {', '.join(listener.addresses)}; Ctrl-C ends it")
    try:
        listener.run(lambda: stopped or 0 < count <= records)
        if stopped:
            listener.drain(time.monotonic() + DRAIN_S)
    finally:
        listener.close()
        tell(f"{listener.totals.sessions} sessions, {summary(listener.totals.counts)}")
