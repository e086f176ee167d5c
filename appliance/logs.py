"""Logging of all processes into the supervisor's handler, through multiprocessing_logging.

Each worker has a handler and a queue of its own: one shared queue would be locked for ever by a worker that is killed
while it logs. The supervisor receives with its own selector instead of the library's thread, because it forks, and a
fork beside a running thread can leave the child with locks that nobody opens.
"""

from __future__ import annotations

import logging
import multiprocessing
import os
import sys
import time

import multiprocessing_logging

MESSAGE_MAX_CHARACTERS = 1500  # a pickled record then fits into one atomic write to the queue's pipe (PIPE_BUF)
LINES_PER_SECOND = 10
FLUSH_S = 2.0
FORMAT = "%(asctime)s %(levelname)s %(processName)s: %(message)s"
JOURNAL_LEVELS = {logging.DEBUG: 7, logging.INFO: 6, logging.WARNING: 4, logging.ERROR: 3, logging.CRITICAL: 2}


class OneLineFormatter(logging.Formatter):
    """One line a record, whatever is in it: what comes from a wire or a file must not forge log lines."""

    converter = time.gmtime
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
        self._is_closed = True
        logging.Handler.__init__(self)
        self.sub_handler = target
        self.setLevel(target.level)
        self.setFormatter(target.formatter)
        self.queue = multiprocessing.get_context("fork").Queue(-1)
        self._is_closed = False

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

    def setFormatter(self, formatter: logging.Formatter | None) -> None:
        # The library would set it on the shared target too.
        logging.Handler.setFormatter(self, formatter)

    def forget_writing_end(self) -> None:
        """In the parent, after the fork: a dead worker's half-written record then ends in EOF, not in waiting."""
        self.queue._writer.close()

    def fileno(self) -> int:
        """What to select on, in the supervisor."""
        return int(self.queue._reader.fileno())

    def worker_descriptors(self) -> tuple[int, ...]:
        return (int(self.queue._writer.fileno()),)

    def receive(self) -> bool:
        """Hands on what has arrived, without waiting. False: the worker's end is closed and everything was read."""
        try:
            while self.queue._reader.poll(0):
                self.sub_handler.handle(self.queue._reader.recv())
        except (EOFError, OSError):
            return False
        except Exception as error:  # a record that a dying worker garbled must not end the supervisor
            logging.getLogger(__name__).warning("a worker's log record was unreadable: %s", error)
        return True

    def flush_worker(self) -> None:
        """In the child, before it exits: everything is in the pipe, or nobody takes it any more."""
        self.queue.close()
        if self.queue._thread is not None:
            self.queue._thread.join(FLUSH_S)

    def close(self) -> None:
        """In the supervisor: the end. The target stays open for the others."""
        if not self._is_closed:
            self._is_closed = True
            self.queue._reader.close()
            logging.Handler.close(self)
