"""The way of a log record from a worker to the supervisor's handler."""

from __future__ import annotations

import logging
import multiprocessing
import os
import pickle
import signal
import struct
import threading
import time
from collections.abc import Callable, Iterator

import pytest
from support.lab import wait_until

from appliance import logs
from appliance.logs import LINES_PER_SECOND, JournalFormatter, OneLineFormatter, RateLimit, WorkerLog


class Collected(logging.Handler):
    """What arrives, as it would be written."""

    def __init__(self) -> None:
        super().__init__()
        self.setFormatter(OneLineFormatter(logs.FORMAT))
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(self.format(record))

    @property
    def text(self) -> str:
        return "\n".join(self.lines)


@pytest.fixture
def target() -> Collected:
    return Collected()


@pytest.fixture
def worker_log(target: Collected) -> Iterator[WorkerLog]:
    made = WorkerLog(target)
    yield made
    made.close()


def start(worker_log: WorkerLog, body: Callable[[], None], name: str = "capture/a") -> multiprocessing.Process:
    """A worker that logs; the supervisor's side is ready to receive."""

    def run() -> None:
        worker_log.use_in_worker()
        logging.getLogger().setLevel(logging.DEBUG)
        body()
        worker_log.flush_worker()
        os._exit(0)

    process = multiprocessing.get_context("fork").Process(target=run, name=name)
    process.start()
    worker_log.forget_writing_end()
    return process  # type: ignore[return-value]


def receive_all(worker_log: WorkerLog) -> None:
    wait_until(lambda: not worker_log.receive(), "the worker's end of the log is closed")


def record(message: str, *arguments: object) -> logging.LogRecord:
    return logging.LogRecord("test", logging.WARNING, __file__, 1, message, arguments, None)


def test_a_worker_s_record_arrives_under_its_name(worker_log: WorkerLog, target: Collected) -> None:
    process = start(worker_log, lambda: logging.getLogger("x").warning("%d of %s", 3, "a"))
    receive_all(worker_log)
    process.join()
    assert len(target.lines) == 1
    assert target.lines[0].endswith("Z WARNING capture/a: 3 of a")


def test_a_traceback_arrives_on_one_line(worker_log: WorkerLog, target: Collected) -> None:
    def fail() -> None:
        try:
            raise RuntimeError("first\nsecond")
        except RuntimeError:
            logging.getLogger().critical("a fault", exc_info=True)

    process = start(worker_log, fail)
    receive_all(worker_log)
    process.join()
    assert len(target.text.splitlines()) == 1
    assert "RuntimeError: first\\nsecond" in target.text


def test_records_of_several_threads_of_a_worker_arrive(worker_log: WorkerLog, target: Collected) -> None:
    def log_in_threads() -> None:
        threads = [threading.Thread(target=logging.getLogger().info, args=("thread %d", i)) for i in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

    process = start(worker_log, log_in_threads)
    receive_all(worker_log)
    process.join()
    assert sorted(line.rpartition(": ")[2] for line in target.lines) == [f"thread {i}" for i in range(4)]


def test_a_very_long_message_is_cut(worker_log: WorkerLog, target: Collected) -> None:
    process = start(worker_log, lambda: logging.getLogger().info("x" * 100_000))
    receive_all(worker_log)
    process.join()
    assert len(target.lines[0]) < 2000
    assert target.lines[0].endswith("x...")


def test_a_flood_is_cut_to_some_lines_a_second_and_says_so(worker_log: WorkerLog, target: Collected) -> None:
    def flood() -> None:
        until = time.monotonic() + 1.2
        while time.monotonic() < until:
            logging.getLogger().info("again")
        logging.getLogger().critical("the end")

    process = start(worker_log, flood)
    receive_all(worker_log)
    process.join()
    assert len(target.lines) <= 3 * LINES_PER_SECOND + 1
    assert "lines before this one were left out" in target.text
    assert "the end" in target.text


def test_a_worker_that_is_killed_while_it_logs_does_not_hold_up_the_others(target: Collected) -> None:
    first, second = WorkerLog(target), WorkerLog(target)

    def log_for_ever() -> None:
        while True:
            logging.getLogger().critical("y" * 1000)

    victim = start(first, log_for_ever)
    wait_until(lambda: bool(first.receive() and target.lines), "the first lines")
    assert victim.pid is not None
    os.kill(victim.pid, signal.SIGKILL)
    victim.join()
    other = start(second, lambda: logging.getLogger().info("I live"), "capture/b")
    receive_all(first)
    receive_all(second)
    other.join()
    assert any("capture/b: I live" in line for line in target.lines)
    first.close()
    second.close()


def test_half_a_record_is_not_waited_for(worker_log: WorkerLog, target: Collected) -> None:
    writer = os.dup(worker_log.worker_descriptors()[0])
    worker_log.forget_writing_end()
    message = pickle.dumps(record("whole"))
    framed = struct.pack("!i", len(message)) + message
    for piece in (framed[:3], framed[3:100], framed[100:-1]):
        os.write(writer, piece)
        started = time.monotonic()
        assert worker_log.receive()
        assert time.monotonic() - started < 1
        assert target.lines == []
    os.write(writer, framed[-1:] + framed + framed[:50])
    assert worker_log.receive()
    assert len(target.lines) == 2
    os.close(writer)
    assert not worker_log.receive()
    assert len(target.lines) == 2


def test_a_garbled_record_is_told_and_the_next_one_arrives(
    worker_log: WorkerLog, target: Collected, caplog: pytest.LogCaptureFixture
) -> None:
    writer = os.dup(worker_log.worker_descriptors()[0])
    worker_log.forget_writing_end()
    message = pickle.dumps(record("whole"))
    os.write(writer, struct.pack("!i", 5) + b"\xff\xff\xff\xff\xff" + struct.pack("!i", len(message)) + message)
    assert worker_log.receive()
    assert "unreadable" in caplog.text
    assert len(target.lines) == 1
    os.write(writer, struct.pack("!i", -1) + b"endless")
    assert worker_log.receive()
    assert "too long" in caplog.text
    os.close(writer)


def test_what_comes_from_outside_cannot_forge_a_line() -> None:
    text = OneLineFormatter("%(message)s").format(record("%s", "a\n2026 INFO forged\x1b[2J\u2028b"))
    assert text == "a\\n2026 INFO forged\\x1b[2J\\u2028b"
    assert text.isprintable()


def test_the_journal_gets_priorities() -> None:
    assert JournalFormatter("%(message)s").format(record("w")) == "<4>w"


def test_a_second_s_limit_lets_critical_records_pass_and_counts_the_rest() -> None:
    limit = RateLimit()

    def at(second: float, level: int = logging.INFO) -> logging.LogRecord:
        made = record("m")
        made.created, made.levelno = second, level
        return made

    assert [limit.filter(at(5.0)) for _ in range(LINES_PER_SECOND + 3)] == [True] * LINES_PER_SECOND + [False] * 3
    assert limit.filter(at(5.9, logging.CRITICAL))
    later = at(6.0)
    assert limit.filter(later)
    assert later.getMessage() == "m (3 lines before this one were left out)"
