"""From a plan to things: sockets, rings, counter pages; parts.py says what each worker is given of them.

Everything here is owned by the supervisor and inherited by the workers it forks, each of which closes what is not its
own (process.close_descriptors).
"""

from __future__ import annotations

import contextlib
import logging
import multiprocessing
import os
import secrets
import signal
import socket
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path

from appliance.capture.gate import check_rules
from appliance.capture.interfaces import host_interfaces
from appliance.capture.opener import OpenedInterface, OpenerClient, OpenRequest, interface_exists, serve
from appliance.config import Config, Output, expand_interfaces
from appliance.counters import CounterPages
from appliance.formats.encode import InterfaceDescription
from appliance.merge.compressor import compressor_suffix
from appliance.merge.naming import ApplianceNaming, Naming
from appliance.meter_settings import check_meter
from appliance.monitor.control import open_control_socket
from appliance.monitor.listener import open_listener
from appliance.monitor.topology import program_version, topology_of
from appliance.monitor.view import Snapshot, Topology, View
from appliance.plan import Plan, PlannedOutput, Source, make_plan, no_port_because
from appliance.prepare import (
    Preparation,
    check_all_cpus,
    check_files,
    check_linktypes,
    check_output,
    check_traces,
)
from appliance.process import (
    CAP_NET_RAW,
    allow_open_files,
    check_user,
    close_descriptors,
    drop_privileges,
    on_cpus,
    set_process_name,
)
from appliance.ring import memory, port as port_memory
from appliance.ring.ring import Mapping as RingMapping, Producer, initialise

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class RunOptions:
    """What a run can be told besides its configuration."""

    config_path: str = ""  # for reloading
    figures: bool = False  # a line of live figures on standard output, every few seconds
    announce: Callable[[Config], None] | None = None  # called once everything runs
    watch: Callable[[Snapshot], None] | None = None  # called about twice a second with the figures
    naming: Callable[[Output], Naming] | None = None  # None: ApplianceNaming
    count_captured_bytes: bool = False  # rotate_bytes counts packet bytes alone
    watch_file: str = ""  # no further file is opened before this one exists
    strict: bool = False  # a failed output is an exit status
    resolution_of_inputs: bool = False  # pcap: microseconds unless an input has nanoseconds


@dataclass
class Rings:
    """One source's shared memory and the eventfd that wakes its worker."""

    ring_fd: int
    digest_fd: int
    wake_fd: int
    mapping: RingMapping


@dataclass
class Wiring:
    """Everything that is opened for one run. The steps are called in their order by supervisor.run."""

    config: Config
    options: RunOptions
    plan: Plan
    topology: Topology
    pages: CounterPages
    namings: dict[str, Naming]
    preparation: Preparation
    file_interfaces: dict[str, list[InterfaceDescription]]
    opener: OpenerClient | None = None
    opened: dict[str, OpenedInterface] = field(default_factory=dict)
    serials: dict[str, int] = field(default_factory=dict)
    rings: dict[str, Rings] = field(default_factory=dict)
    ports: dict[str, int] = field(default_factory=dict)  # label -> descriptor of its port's memory
    merge_wakes: dict[str, int] = field(default_factory=dict)
    meter_wake: int = -1
    taps: dict[str, int] = field(default_factory=dict)  # output -> descriptor of its ring to the flow traces
    traceflow_wake: int = -1
    listener: socket.socket | None = None
    control: socket.socket | None = None
    generation: int = field(default_factory=lambda: secrets.randbits(63))

    # ---- the steps ----

    @classmethod
    def make(cls, config: Config, options: RunOptions) -> Wiring:
        """Checks everything that can be checked without rights, and makes the directories."""
        if config.service.user:
            check_user(config.service.user)
        config = expand_interfaces(config, host_interfaces() if needs_host(config) else ())
        plan = make_plan(config)
        check_all_cpus(config)
        load_workers(plan)
        check_meter(config)
        allow_open_files(plan.open_files)
        file_interfaces = check_files(plan)
        preparation = Preparation()
        namings: dict[str, Naming] = {}
        try:
            for planned in plan.outputs:
                output = planned.output
                naming = options.naming(output) if options.naming else appliance_naming(output)
                check_output(output, naming, preparation, config.service.user)
                namings[output.name] = naming
            if plan.traceflow is not None:
                check_traces(config.traces_directory, preparation)
            if config.service.user:
                preparation.hand_over(config.service.user)
        except BaseException:
            preparation.undo()
            raise
        topology = topology_of(plan, config, program_version())
        return cls(config, options, plan, topology, CounterPages(plan.pages), namings, preparation, file_interfaces)

    def start_opener(self) -> None:
        """The process that alone keeps CAP_NET_RAW. Only live `ring:` sources need it."""
        if not any(source.uri.scheme == "ring" for source in self.plan.sources):
            return
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        process = multiprocessing.get_context("fork").Process(
            target=run_opener, args=(theirs, self.config.service.user), name="opener", daemon=True
        )
        process.start()
        theirs.close()
        self.pages["opener"]["pid"] = process.pid or 0
        self.opener = OpenerClient(ours)

    def open_sources(self) -> None:
        """Opens every `ring:` source; then all link types are known, and must fit the output."""
        for source in self.plan.sources:
            if source.uri.scheme == "ring":
                assert self.opener is not None
                self.opened[source.label] = self.opener.open(self.open_request(source.worker))
                self.serials[source.label] = 1
                self.pages["opener"].add("opened")
                check_rules(source.interface, self.opened[source.label].linktype)
        for planned in self.plan.outputs:
            check_linktypes(planned.output, self.known_linktypes(planned))

    def open_monitor(self) -> None:
        """The sockets of the monitor: an address that is taken is an error now, and its clients wait for a restart."""
        monitor = self.config.monitor
        if monitor.address is not None:
            self.listener = open_listener(*monitor.address)
        if monitor.control_socket is not None:
            path = os.path.abspath(monitor.control_socket)
            self.preparation.make_parents(path)
            self.control = open_control_socket(Path(path))
            if self.config.service.user:
                self.preparation.hand_over(self.config.service.user)  # the directory too, for unlink at the end
                self.preparation.give(path, self.config.service.user)

    def make_memory(self) -> None:
        """Rings, eventfds."""
        for planned in self.plan.outputs:
            self.merge_wakes[planned.output.name] = eventfd()
        if self.plan.meter is not None:
            self.meter_wake = eventfd()
        if self.plan.traceflow is not None:
            self.traceflow_wake = eventfd()
        for planned in self.plan.outputs:
            if planned.tap_ring_bytes:
                name = f"traceflow-{planned.output.name}"
                self.taps[planned.output.name] = self.new_ring(planned.tap_ring_bytes, name)
        for source in self.plan.sources:
            with on_cpus(source.interface.cpus):
                ring_fd = self.new_ring(source.ring_bytes, source.label)
                digest_fd = self.new_ring(source.digest_ring_bytes, source.label) if source.digest_ring_bytes else -1
            self.rings[source.label] = Rings(ring_fd, digest_fd, eventfd(), RingMapping(ring_fd, self.generation))
            if self.config.monitor.control_socket is not None and not no_port_because(source):
                capacity = memory.ring_capacity(source.interface.capture_buffer_bytes)
                self.ports[source.label] = port_memory.allocate(capacity, self.generation, source.label)

    def new_ring(self, capacity: int, name: str) -> int:
        fd = memory.allocate(capacity, name)
        initialise(fd, capacity, self.generation)
        return fd

    def announce(self) -> None:
        if self.options.announce is not None:
            self.options.announce(self.config)

    def undo(self) -> None:
        """The start failed: nothing stays behind."""
        self.close_sockets()
        self.preparation.undo()

    def close(self) -> None:
        self.close_sockets()
        self.preparation.release()

    def close_sockets(self) -> None:
        self.close_opener()
        self.close_monitor()
        for opened in self.opened.values():
            os.close(opened.fd)
        self.opened.clear()

    def close_opener(self) -> None:
        if self.opener is not None:
            self.opener.channel.close()
            self.opener = None

    def close_monitor(self) -> None:
        if self.listener is not None:
            self.listener.close()
        if self.control is not None:
            with contextlib.suppress(OSError):
                os.unlink(self.control.getsockname())
            self.control.close()

    # ---- what is asked of it ----

    @property
    def kept_capabilities(self) -> tuple[int, ...]:
        """None, but for libpcap's own sources: it opens its sockets itself, in the worker, which then drops this."""
        return (CAP_NET_RAW,) if any(source.uri.scheme in ("pcap", "int") for source in self.plan.sources) else ()

    @property
    def is_live(self) -> bool:
        return bool(self.plan.live_sources)

    @property
    def view(self) -> View:
        return View(self.pages, self.topology, ring_usage=self.ring_usage)

    def ring_usage(self) -> dict[str, int]:
        return {label: rings.mapping.used_bytes for label, rings in self.rings.items()}

    def source_of(self, worker: str) -> Source:
        return next(source for source in self.plan.sources if source.worker == worker)

    def output_of(self, worker: str) -> Output:
        return next(planned.output for planned in self.plan.outputs if planned.worker == worker)

    # ---- sockets ----

    def open_request(self, worker: str) -> OpenRequest:
        source = self.source_of(worker)
        interface = source.interface
        output = self.config.output(source.output)
        return OpenRequest(
            interface=source.uri.target,
            filter=interface.filter,
            snaplen=interface.snaplen,
            promiscuous=interface.promiscuous,
            kernel_ring_bytes=interface.kernel_ring_bytes,
            block_timeout_ms=interface.block_timeout_ms,
            linktype=output.linktype,
            fanout_group=source.fanout_group,
        )

    def has_current_socket(self, worker: str) -> bool:
        """Whether the interface that the worker's socket is bound to still exists."""
        return interface_exists(self.opened[self.source_of(worker).label].ifindex)

    def replace_socket(self, worker: str, opened: OpenedInterface) -> None:
        """An interface came back: our duplicate of its old socket goes, the new one stays for the next life."""
        label = self.source_of(worker).label
        os.close(self.opened[label].fd)
        self.opened[label] = opened
        self.serials[label] += 1
        self.pages["opener"].add("opened")

    def end_rings(self, worker: str) -> None:
        """A producer is gone for good: its rings end here."""
        source = self.source_of(worker)
        rings = self.rings[source.label]
        for fd, consumer in ((rings.ring_fd, self.merge_wakes[source.output]), (rings.digest_fd, self.meter_wake)):
            if fd >= 0:
                try:
                    Producer(fd, self.generation, consumer).end()
                except OSError as error:  # no room to map it: the consumer waits for drain_timeout_s, and then ends
                    log.error("%s: its ring cannot be ended: %s", source.label, error)

    def known_linktypes(self, planned: PlannedOutput) -> list[tuple[str, int]]:
        found = []
        for source in planned.sources:
            if source.label in self.opened:
                found.append((source.label, self.opened[source.label].linktype))
            for description in self.file_interfaces.get(source.label, ()):
                found.append((source.label, description.linktype))
        return found


def run_opener(channel: socket.socket, user: str) -> None:
    signal.set_wakeup_fd(-1)
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)  # it ends when the supervisor's end of the channel closes
    close_descriptors({0, 1, 2, channel.fileno()})
    set_process_name("opener")
    drop_privileges(user, (CAP_NET_RAW,))
    with contextlib.suppress(OSError):
        serve(channel)


def load_workers(plan: Plan) -> None:
    """The code of the workers that not every run has: a third of a start's time. Before the user is changed, because
    another one may not be able to read our files."""
    if plan.meter is not None:
        import_module("workers.meter")
    if plan.traceflow is not None:
        import_module("workers.traceflow")
    if plan.monitor:
        import_module("workers.monitor")


def needs_host(config: Config) -> bool:
    return any(interface.source.is_every_interface for interface in config.interfaces)


def eventfd() -> int:
    return os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)


def appliance_naming(output: Output) -> Naming:
    ending = f".{output.format}" if output.format in ("pcapng", "erf") else ".pcap"
    return ApplianceNaming(output.directory, output.name, ending + compressor_suffix(output.compressor))


# ---- words about the figures ----
