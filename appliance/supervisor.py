"""The supervisor: starts what the plan says, watches it, restarts or gives up, and ends it in the order of the data.

It never sees a packet. It owns what must outlive a worker: the packet sockets, the rings, the counter pages. It has one
thread only, because it forks. `run` is the way in; wiring.py opens what a run needs, parts.py says what each worker is
given of it, takeup.py what a new configuration changes.
"""

from __future__ import annotations

import contextlib
import logging
import multiprocessing
import multiprocessing.popen_fork
import multiprocessing.queues
import multiprocessing.synchronize
import os
import selectors
import signal
import socket
import time
from collections import deque
from dataclasses import dataclass, field
from multiprocessing.process import BaseProcess

import sdnotify

from appliance import logs, takeup
from appliance.capture.opener import OpenerGoneError, send_opened
from appliance.config import Config, load
from appliance.counters import restarts_field
from appliance.errors import EXIT_GAVE_UP, EXIT_IO, ApplianceError, CannotCreateError
from appliance.monitor.render import identity_line, live_line, state_lines, systemd_status, traceflow_line
from appliance.monitor.view import Snapshot
from appliance.parts import cpus_of, parts_of
from appliance.process import DRAIN, EXIT_CRASHED, LOG_LEVEL, RENEW, ROTATE, WorkerContext, drop_privileges, run_worker
from appliance.reload import Changes, changes_between
from appliance.wiring import RunOptions, Wiring

log = logging.getLogger(__name__)

TICK_S = 0.5
STATUS_EVERY_S = 5.0
BACKOFF_FIRST_S = 0.1
BACKOFF_MAX_S = 5.0
KILL_GRACE_S = 2.0
ONE_REQUEST_S = 0.5
STUCK_SEGMENT_INTERVALS = 3
REOPEN = b"reopen"
TERMINATING = (signal.SIGTERM, signal.SIGINT)
SIGNALS = (*TERMINATING, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)


def run(config: Config, options: RunOptions | None = None) -> int:
    """Runs the appliance until it is told to stop or its files are read; returns the exit status.

    Raises ApplianceError when it cannot start: then nothing was left behind.
    """
    handler = logs.set_up(config.service.log_level)
    signals = SignalInbox()
    wired = Wiring.make(config, options or RunOptions())
    try:
        wired.start_opener()
        wired.open_monitor()
        wired.make_memory()
        # The last thing before the workers start: the kernel's rings bridge about a second.
        wired.open_sources()
        drop_privileges(config.service.user, wired.kept_capabilities)
    except OSError as error:
        wired.undo()
        raise CannotCreateError(
            f"the service cannot start: {error}; see the limits of memory and open files (memory_bytes, ulimit -a)"
        ) from error
    except BaseException:
        wired.undo()
        raise
    return Supervisor(wired, handler, signals).run()


class SignalInbox:
    """Signals as bytes on a socket, from the first moment on: one that comes during the start is not lost, and does not
    end the process with sockets and directories half made."""

    def __init__(self) -> None:
        self.reader, writer = socket.socketpair()
        self.reader.setblocking(False)
        writer.setblocking(False)
        self._writer = writer
        signal.set_wakeup_fd(writer.fileno(), warn_on_full_buffer=False)
        for number in SIGNALS:
            signal.signal(number, lambda *_: None)  # the byte on the wake-up socket is all that is wanted

    def take(self) -> list[int]:
        """The signals since the last look, each once."""
        return sorted(set(self.reader.recv(64)))


@dataclass
class Worker:
    """One worker process, over all its lives."""

    name: str
    process: BaseProcess | None = None
    pidfd: int = -1
    channel: socket.socket | None = None
    log: logs.WorkerLog | None = None
    lives: int = 0
    ended: bool = False  # orderly, or given up: it is not started again
    is_renewed: bool = False  # it was told to end for a successor
    start_at: float = 0.0  # when the next life begins, if it has none now
    deaths: deque[float] = field(default_factory=deque)
    open_segment: tuple[int, float] = (0, 0.0)  # a merge's: when it was opened by its own word, when we first saw that

    @property
    def role(self) -> str:
        return self.name.partition("/")[0]

    @property
    def is_alive(self) -> bool:
        return self.process is not None


class Supervisor:
    """The loop: wait, take signals and words, reap, watch, tell."""

    def __init__(self, wired: Wiring, handler: logging.Handler, signals: SignalInbox) -> None:
        self.signals = signals
        self.wired = wired
        self.config = wired.config
        self.handler = handler
        self.page = wired.pages["supervisor"]
        # The consumers first: a producer must find somebody to wake.
        order = {"traceflow": 0, "merge": 1, "meter": 2, "monitor": 3, "capture": 4}
        names = sorted(wired.plan.workers, key=lambda name: order[name.partition("/")[0]])
        self.workers = {name: Worker(name) for name in names}
        self.selector = selectors.DefaultSelector()
        self.reopening: deque[str] = deque()  # workers whose request the opener has, in order
        self.stopping_since: float | None = None
        self.status = 0
        self.hurried = False
        self.ready = False
        self.next_status = 0.0
        self.last_snapshot: Snapshot | None = None
        self.notifier = make_notifier()
        self.watchdog_s = int(os.environ.get("WATCHDOG_USEC", "0")) / 2_000_000
        self.next_watchdog = 0.0

    # ---- the loop ----

    def run(self) -> int:
        self.page["pid"] = os.getpid()
        self.page["started_ns"] = time.monotonic_ns()
        self.page["last_reload_ok"] = 1
        self.selector.register(self.signals.reader, selectors.EVENT_READ, self.hear_signals)
        if self.wired.opener is not None:
            self.selector.register(self.wired.opener.channel, selectors.EVENT_READ, self.hear_opener)
        try:
            for worker in self.workers.values():
                self.start(worker)
            self.wired.announce()
            while not self.is_over():
                self.turn()
        finally:
            self.end()
        return self.status

    def turn(self) -> None:
        for key, _ in self.selector.select(TICK_S):
            key.data()
        now = time.monotonic()
        self.page["heartbeat_ns"] = time.monotonic_ns()
        self.start_due(now)
        self.watch(now)
        self.tell(now)
        if self.stopping_since is None:
            if self.nothing_left_to_do():
                self.stop("all inputs are read")
        else:
            self.drain(now)

    def is_over(self) -> bool:
        return self.stopping_since is not None and all(worker.ended for worker in self.workers.values())

    def nothing_left_to_do(self) -> bool:
        """Every source has ended, and so have those who live from them."""
        return all(worker.ended for worker in self.workers.values() if worker.role != "monitor")

    # ---- signals ----

    def hear_signals(self) -> None:
        for number in self.signals.take():
            if number in TERMINATING:
                # Within a moment it is one request: `timeout` and some terminals send it to us and to our group.
                if self.stopping_since is not None and time.monotonic() - self.stopping_since > ONE_REQUEST_S:
                    log.warning("told to stop twice: ending at once, what is not written is lost")
                    self.hurried = True
                self.stop(f"signal {signal.Signals(number).name}")
            elif number == signal.SIGHUP:
                self.reload()
            elif number == signal.SIGUSR1:
                self.rotate()
            elif number == signal.SIGUSR2:
                self.log_state()

    def rotate(self) -> None:
        """Every merge begins a new file now."""
        for worker in self.workers.values():
            if worker.role == "merge":
                self.say(worker, ROTATE)

    def reload(self) -> None:
        """Takes up what can change while it runs; an error keeps the old configuration as a whole."""
        path = self.wired.options.config_path
        if not path or self.stopping_since is not None:
            log.warning("reload: %s", "the service is about to end" if path else "this run has no configuration file")
            return
        self.page.add("reloads")
        try:
            changes = changes_between(self.config, load(path))
            while self.reopening:
                self.hear_opener()  # its answers come in the order of the requests
            prepared = takeup.prepare_reload(self.wired, changes)
        except ApplianceError as error:
            if isinstance(error, OpenerGoneError):
                self.lose_opener(error)  # an answer that comes late would be taken for that to another request
            self.page.add("reload_failures")
            self.page["last_reload_ok"] = 0
            log.error("reload: the old configuration stays in force: %s", error)
            return
        self.page["last_reload_ok"] = 1
        for key in changes.refused:
            log.warning("reload: %s changes only with a restart", key)
        self.take_up(changes, prepared)
        log.info("reload: %s", "done" if changes else "nothing that can change while it runs has changed")

    def take_up(self, changes: Changes, prepared: takeup.Prepared) -> None:
        self.config = changes.config
        takeup.take_up(self.wired, changes.config, prepared)
        level = self.config.service.log_level.upper()
        logging.getLogger().setLevel(level)
        told = list(prepared.words.items())
        told += [(name, LOG_LEVEL + level.encode()) for name in self.workers]
        for name, message in told:
            if self.workers[name].is_alive and not self.say(self.workers[name], message):
                log.error("reload: %s does not listen; it has the new settings when it starts again", name)
        if changes.meter:
            self.renew(self.workers["meter"])

    def renew(self, worker: Worker) -> None:
        """A planned end, and the next life at once: what takes other settings at its start only. A worker that has no
        life now needs no word."""
        if worker.is_alive and self.say(worker, RENEW):
            log.info("%s: it is started again for its new settings", worker.name)
            worker.is_renewed = True
            self.page.add("planned_restarts")

    def log_state(self) -> None:
        snapshot = self.wired.view.snapshot()
        for line in state_lines(snapshot):
            log.info("%s", line)
        for worker in self.workers.values():
            state = "ended" if worker.ended else f"pid {worker.process.pid}" if worker.process else "waiting to restart"
            log.info("worker %s: %s, life %d", worker.name, state, worker.lives)

    # ---- lives and deaths ----

    def start(self, worker: Worker) -> None:
        """The next life. That the machine refuses one (memory, open files) is as if it had died at once."""
        worker.lives += 1
        try:
            self.spawn(worker)
        except OSError as error:
            self.failed(worker, f"cannot be started ({error.strerror})")

    def spawn(self, worker: Worker) -> None:
        with contextlib.ExitStack() as undo:
            parent, child = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            undo.callback(parent.close)
            undo.callback(child.close)
            worker_log = logs.WorkerLog(self.handler)
            undo.callback(worker_log.close)
            process = self.fork(worker, child, worker_log)
            undo.callback(process.kill)
            assert process.pid is not None
            pidfd = os.pidfd_open(process.pid)
            undo.pop_all()
        child.close()
        worker_log.forget_writing_end()
        worker.process, worker.channel, worker.log, worker.pidfd = process, parent, worker_log, pidfd
        worker.open_segment = (0, 0.0)
        if self.stopping_since is not None and worker.role == "capture":
            self.say(worker, DRAIN)  # what its predecessor left in the kernel's ring
        self.selector.register(pidfd, selectors.EVENT_READ, lambda: self.reap(worker))
        self.selector.register(parent, selectors.EVENT_READ, lambda: self.hear(worker))
        self.selector.register(worker_log, selectors.EVENT_READ, lambda: self.hear_log(worker))

    def fork(self, worker: Worker, channel: socket.socket, worker_log: logs.WorkerLog) -> BaseProcess:
        main, parts = parts_of(self.wired, worker.name, worker.lives)
        context = WorkerContext(
            name=worker.name,
            pages=self.wired.pages,
            page=self.wired.pages[worker.name],
            channel=channel,
            topology=self.wired.topology,
            config=self.config,
            parts=parts,
            keep_descriptors=parts.descriptors if parts is not None else (),
            cpus=cpus_of(self.wired, worker.name),
            capabilities=self.wired.kept_capabilities,
        )
        context.set_state("starting")
        context.beat()
        process = multiprocessing.get_context("fork").Process(
            target=run_worker, args=(main, context, worker_log), name=worker.name
        )
        process.start()
        return process

    def start_due(self, now: float) -> None:
        for worker in self.workers.values():
            if not worker.is_alive and not worker.ended and now >= worker.start_at:
                log.warning("%s: starting again", worker.name)
                self.page.add("restarts")
                self.page.add(restarts_field(worker.name))
                self.start(worker)

    def reap(self, worker: Worker) -> None:
        """A worker's process is over: orderly, with an error that a restart cannot mend, or by a crash."""
        process = worker.process
        if process is None:
            return
        process.join()
        status = process.exitcode
        self.forget(worker)
        is_renewed, worker.is_renewed = worker.is_renewed, False
        if status == 0 and is_renewed:
            self.start(worker)
        elif status == 0:
            worker.ended = True
        elif status is not None and status > 0 and status != EXIT_CRASHED:
            worker.ended = True
            self.status = self.status or status
            if worker.role == "traceflow":
                log.error("%s cannot go on; the recording does without it", worker.name)
            elif not (worker.role == "capture" and status == EXIT_IO) and self.stopping_since is None:
                self.stop(f"{worker.name} cannot go on")
        else:
            self.crashed(worker, status)

    def crashed(self, worker: Worker, status: int | None) -> None:
        if self.stopping_since is not None and worker.role == "monitor":
            worker.ended = True
            return
        self.failed(worker, f"was ended by signal {-status}" if status is not None and status < 0 else "crashed")

    def failed(self, worker: Worker, how: str) -> None:
        """A life is over before its time: the next one after a pause, or none when there were too many."""
        now = time.monotonic()
        worker.deaths.append(now)
        service = self.config.service
        while worker.deaths and now - worker.deaths[0] > service.restart_window_s:
            worker.deaths.popleft()
        if len(worker.deaths) > service.restart_limit:
            log.critical(
                "%s %s, %d times within %d s: giving up", worker.name, how, len(worker.deaths), service.restart_window_s
            )
            self.abandon(worker)
            self.status = EXIT_GAVE_UP
            if worker.role != "traceflow":  # the recording does without it, and counts what it misses
                self.stop(f"{worker.name} fails again and again")
            return
        delay = backoff_s(len(worker.deaths))
        worker.start_at = now + delay
        log.error("%s %s; it starts again %s", worker.name, how, f"in {delay:g} s" if delay else "at once")

    def abandon(self, worker: Worker) -> None:
        """It is not started again. A producer's rings get their end from us, so that nobody waits for it."""
        worker.ended = True
        if worker.role == "capture":
            self.wired.end_rings(worker.name)

    def forget(self, worker: Worker) -> None:
        """Closes what belonged to a life that is over; its last words are read first."""
        assert worker.channel is not None and worker.log is not None
        self.selector.unregister(worker.pidfd)
        os.close(worker.pidfd)
        self.hear(worker)
        with contextlib.suppress(KeyError, ValueError):
            self.selector.unregister(worker.channel)
        worker.channel.close()
        worker.log.receive()
        with contextlib.suppress(KeyError, ValueError):
            self.selector.unregister(worker.log)
        worker.log.close()
        worker.process, worker.channel, worker.log, worker.pidfd = None, None, None, -1

    def watch(self, now: float) -> None:
        """A worker without signs of life is ended; the rest is as after any death."""
        timeout_ns = self.config.service.heartbeat_timeout_s * 1_000_000_000
        for worker in self.workers.values():
            if worker.process is None:
                continue
            age_ns = time.monotonic_ns() - self.wired.pages[worker.name]["heartbeat_ns"]
            if age_ns > timeout_ns:
                log.error("%s shows no sign of life for %.1f s; it is ended", worker.name, age_ns / 1e9)
                worker.process.kill()
            elif worker.role == "merge" and self.is_stuck(worker, now):
                log.error("%s has not closed its file for much too long; it is ended", worker.name)
                worker.process.kill()

    def is_stuck(self, worker: Worker, now: float) -> bool:
        """Alive by its heartbeat, dead by its output: the open file is older than any rotation allows. By the monotonic
        clock: the other one may be set."""
        output = self.wired.output_of(worker.name)
        opened_ns = self.wired.pages[worker.name]["segment_opened_ns"]
        if opened_ns != worker.open_segment[0]:
            worker.open_segment = (opened_ns, now)
        if not output.rotate_seconds or not opened_ns or self.wired.options.watch_file or not self.wired.is_live:
            return False
        limit_s = STUCK_SEGMENT_INTERVALS * output.rotate_seconds + output.compressor_timeout_s
        return now - worker.open_segment[1] > limit_s

    # ---- words ----

    def say(self, worker: Worker, message: bytes) -> bool:
        """False: it is not there, or its queue is full."""
        if worker.channel is not None:
            with contextlib.suppress(OSError):
                worker.channel.send(message, socket.MSG_DONTWAIT)
                return True
        return False

    def hear(self, worker: Worker) -> None:
        while worker.channel is not None:  # one look at the selector may tell of a death first, and then of words
            try:
                message = worker.channel.recv(4096, socket.MSG_DONTWAIT)
            except OSError:
                return
            if not message:
                with contextlib.suppress(KeyError, ValueError):
                    self.selector.unregister(worker.channel)
                return
            if message == REOPEN:
                self.reopen(worker)
            elif message == ROTATE:
                self.rotate()

    def reopen(self, worker: Worker) -> None:
        """Asks the opener for a new socket, once: a second one would bring the same packets a second time."""
        if self.wired.opener is None or worker.name in self.reopening or self.wired.has_current_socket(worker.name):
            return
        try:
            self.wired.opener.ask(self.wired.open_request(worker.name))
        except OSError:
            return  # it is gone, which is told once, in hear_opener
        self.reopening.append(worker.name)

    def hear_log(self, worker: Worker) -> None:
        if worker.log is not None and not worker.log.receive():
            self.selector.unregister(worker.log)

    def hear_opener(self) -> None:
        """The answer to the oldest request: a new packet socket, or why there is none (yet)."""
        opener = self.wired.opener
        assert opener is not None
        try:
            opened = opener.answer()
        except OpenerGoneError as error:
            self.lose_opener(error)
            return
        except ApplianceError as error:
            log.warning("%s: %s", self.reopening.popleft(), error)
            return
        name = self.reopening.popleft()
        self.wired.replace_socket(name, opened)
        worker = self.workers[name]
        if worker.channel is not None:
            with contextlib.suppress(OSError):  # it dies: its next life gets the socket at its start
                send_opened(worker.channel, opened, socket.MSG_DONTWAIT)

    def lose_opener(self, error: OpenerGoneError) -> None:
        assert self.wired.opener is not None
        self.selector.unregister(self.wired.opener.channel)
        self.wired.close_opener()
        self.reopening.clear()
        log.error("%s: interfaces that come back cannot be opened again without a restart", error)

    # ---- telling ----

    def tell(self, now: float) -> None:
        if not self.ready and all(self.has_started(worker) for worker in self.workers.values()):
            self.ready = True
            self.notifier.notify("READY=1")
        if self.watchdog_s and now >= self.next_watchdog and self.all_beat():
            self.next_watchdog = now + self.watchdog_s
            self.notifier.notify("WATCHDOG=1")
        if self.wired.options.watch is not None and self.ready:
            self.wired.options.watch(self.wired.view.snapshot())
        if now >= self.next_status:
            self.next_status = now + STATUS_EVERY_S
            snapshot = self.wired.view.snapshot()
            self.notifier.notify(f"STATUS={systemd_status(snapshot, self.last_snapshot)}")
            if self.wired.options.figures and self.ready:
                print(live_line(snapshot, self.last_snapshot), flush=True)
            self.last_snapshot = snapshot

    def has_started(self, worker: Worker) -> bool:
        return worker.ended or self.wired.pages[worker.name]["state"] > 0

    def all_beat(self) -> bool:
        """The supervisor's own sign of life to systemd stands for all stages."""
        limit_ns = self.config.service.heartbeat_timeout_s * 1_000_000_000
        now_ns = time.monotonic_ns()
        return all(
            now_ns - self.wired.pages[worker.name]["heartbeat_ns"] < limit_ns
            for worker in self.workers.values()
            if worker.is_alive
        )

    # ---- the end ----

    def stop(self, reason: str) -> None:
        if self.stopping_since is not None:
            return
        log.info("stopping: %s", reason)
        self.stopping_since = time.monotonic()
        self.notifier.notify("STOPPING=1")
        for worker in self.workers.values():
            if worker.role == "capture":
                self.say(worker, DRAIN)
            if not worker.is_alive:
                worker.start_at = 0.0  # for what it left behind; there is no time for pauses now

    def drain(self, now: float) -> None:
        """First the sources end, and with their rings the merges and the meter; the monitor watches until the last."""
        assert self.stopping_since is not None
        if self.nothing_left_to_do():
            for worker in self.workers.values():
                self.say(worker, DRAIN)
        overdue = now - self.stopping_since - self.config.service.drain_timeout_s
        if overdue > 0:
            for worker in self.workers.values():
                self.say(worker, DRAIN)
        if self.hurried or overdue > KILL_GRACE_S:
            for worker in self.workers.values():
                if worker.process is not None:
                    log.error("%s did not end in time and is killed", worker.name)
                    worker.process.kill()
                    self.status = self.status or EXIT_GAVE_UP
                worker.ended = True

    def end(self) -> None:
        self.await_workers()
        snapshot: Snapshot = self.wired.view.snapshot()
        for row in snapshot.interfaces:
            log.info("%s", identity_line(row))
        if snapshot.traceflow is not None:
            log.info("%s", traceflow_line(snapshot.traceflow))
        if self.wired.options.figures:
            print(live_line(snapshot), flush=True)
        signal.set_wakeup_fd(-1)
        self.wired.close()

    def await_workers(self) -> None:
        """There are some only after a fault of ours. They drain when their channel closes, as if we had been killed."""
        left = [worker for worker in self.workers.values() if worker.process is not None]
        for worker in left:
            if worker.channel is not None:
                worker.channel.close()
        deadline = time.monotonic() + self.config.service.drain_timeout_s
        for worker in left:
            assert worker.process is not None
            worker.process.join(max(0.0, deadline - time.monotonic()))
            worker.process.kill()
            worker.process.join()
            self.forget(worker)


def make_notifier() -> sdnotify.SystemdNotifier:
    """A manager that stands still fills its socket's queue: what finds no room is left out, and nobody waits for it."""
    notifier = sdnotify.SystemdNotifier()
    if notifier.socket is not None:
        notifier.socket.setblocking(False)
    return notifier


def backoff_s(deaths: int) -> float:
    """The pause before the next life, after so many deaths in the window. None after the first: meanwhile the kernel's
    ring of a capture worker fills, and it holds half a second only."""
    return min(BACKOFF_FIRST_S * 2.0 ** (deaths - 2), BACKOFF_MAX_S) if deaths > 1 else 0.0
