"""Logging of all processes into the supervisor's handler, through multiprocessing_logging.

Each worker has a handler and a queue of its own: one shared queue would be locked for ever by a worker that is killed
while it logs. The supervisor receives with its own selector instead of the library's thread, because it forks, and a
fork beside a running thread can leave the child with locks that nobody opens.
"""

from __future__ import annotations

import logging
import multiprocessing
import os
import pickle
import struct
import sys
import time
from collections.abc import Iterator
from typing import Any

import multiprocessing_logging

log = logging.getLogger(__name__)

MESSAGE_MAX_CHARACTERS = 1500
MESSAGE_MAX_BYTES = 1 << 20  # of a pickled record, a traceback included
READ_BYTES = 65536
LINES_PER_SECOND = 10
FLUSH_S = 2.0
FORMAT = "%(asctime)s %(levelname)s %(processName)s: %(message)s"
JOURNAL_LEVELS = {logging.DEBUG: 7, logging.INFO: 6, logging.WARNING: 4, logging.ERROR: 3, logging.CRITICAL: 2}


class OneLineFormatter(logging.Formatter):
    """One line a record, whatever is in it: what comes from a wire or a file must not forge log lines."""

    converter = staticmethod(time.gmtime)
    default_msec_format = "%s.%03dZ"
    default_time_format = "%Y-%m-%dT%H:%M:%S"

    def format(self, record: logging.LogRecord) -> str:
        text = super().format(record)
        if not text.isprintable():
            text = "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)
        return text


class JournalFormatter(OneLineFormatter):
    """For systemd: the priority in front (sd-daemon(3)), no time, because the journal has its own."""

    def format(self, record: logging.LogRecord) -> str:
        return f"<{JOURNAL_LEVELS.get(record.levelno, 6)}>{super().format(record)}"


class RateLimit(logging.Filter):
    """At most LINES_PER_SECOND records a second; the next second says how many were left out."""

    def __init__(self) -> None:
        super().__init__()
        self._second = 0
        self._lines = 0
        self._left_out = 0

    def filter(self, record: logging.LogRecord) -> bool:
        second = int(record.created)
        if second != self._second:
            self._second, self._lines = second, 0
            if self._left_out:
                record.msg = f"{record.getMessage()} ({self._left_out} lines before this one were left out)"
                record.args = None
                self._left_out = 0
        self._lines += 1
        if self._lines > LINES_PER_SECOND and record.levelno < logging.CRITICAL:
            self._left_out += 1
            return False
        return True


def set_up(level: str) -> logging.Handler:
    """The supervisor's handler: standard error, in the journal's format when that is what stands behind it."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(
        JournalFormatter("%(processName)s: %(message)s") if "JOURNAL_STREAM" in os.environ else OneLineFormatter(FORMAT)
    )
    root = logging.getLogger()
    for old in list(root.handlers):
        root.removeHandler(old)
    root.addHandler(handler)
    root.setLevel(level.upper())
    multiprocessing.current_process().name = "supervisor"
    return handler


class WorkerLog(multiprocessing_logging.MultiProcessingHandler):  # type: ignore[misc]
    """One worker's way to the supervisor's handler. Made before the fork; both sides use it after."""

    def __init__(self, target: logging.Handler) -> None:
        # Not the library's __init__: that would start its receiving thread.
        logging.Handler.__init__(self)
        self.sub_handler = target
        self.setLevel(target.level)
        self.formatter = target.formatter  # setFormatter of the library would set it on the shared target too
        self.queue: Any = multiprocessing.get_context("fork").Queue(-1)
        self._received = bytearray()
        self._is_closed = False

    # ---- in the worker ----

    def worker_descriptors(self) -> tuple[int, ...]:
        return (int(self.queue._writer.fileno()),)

    def use_in_worker(self) -> None:
        """In the child: all logging of this process goes through here, at a bounded rate."""
        self.queue._reader.close()
        root = logging.getLogger()
        for old in list(root.handlers):
            root.removeHandler(old)
        self.addFilter(RateLimit())
        root.addHandler(self)

    def emit(self, record: logging.LogRecord) -> None:
        message = record.getMessage()
        if len(message) > MESSAGE_MAX_CHARACTERS:
            message = message[:MESSAGE_MAX_CHARACTERS] + "..."
        record.msg, record.args = message, None
        super().emit(record)

    def flush_worker(self) -> None:
        """Before the child exits: everything is in the pipe, or nobody takes it any more."""
        self.queue.close()
        if self.queue._thread is not None:
            self.queue._thread.join(FLUSH_S)

    # ---- in the supervisor ----

    def forget_writing_end(self) -> None:
        """After the fork: the worker's death is then the end of the pipe."""
        self.queue._writer.close()
        os.set_blocking(self.fileno(), False)

    def fileno(self) -> int:
        """What to select on."""
        return int(self.queue._reader.fileno())

    def receive(self) -> bool:
        """Hands on what has arrived, without waiting, not even for the second half of what a worker was writing when it
        was killed or stopped. False: the worker's end is closed and everything was read."""
        is_open = True
        try:
            while piece := os.read(self.fileno(), READ_BYTES):
                self._received += piece
            is_open = False
        except BlockingIOError:
            pass
        for message in self._whole_messages():
            try:
                record = pickle.loads(message)
            except Exception as error:  # what a dying worker garbled must not end the supervisor
                log.warning("a worker's log record was unreadable: %s", error)
                continue
            self.sub_handler.handle(record)
        return is_open

    def _whole_messages(self) -> Iterator[bytes]:
        """In the framing of multiprocessing.connection: a signed 32-bit length (-1: it is longer), the bytes."""
        while len(self._received) >= 4:
            (length,) = struct.unpack_from("!i", self._received)
            if not 0 <= length <= MESSAGE_MAX_BYTES:
                log.warning("a worker's log record was too long: what follows it is left out")
                self._received.clear()
                return
            if len(self._received) < 4 + length:
                return
            yield bytes(self._received[4 : 4 + length])
            del self._received[: 4 + length]

    def close(self) -> None:
        """The end. The target stays open for the others."""
        if not self._is_closed:
            self._is_closed = True
            self.queue._reader.close()
            self.queue._writer.close()
            logging.Handler.close(self)
