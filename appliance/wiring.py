"""From a plan to things: sockets, rings, counter pages, and what each worker is given of them.

Everything here is owned by the supervisor and inherited by the workers it forks, each of which closes what is not its
own (process.close_descriptors).
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import logging
import multiprocessing
import os
import secrets
import signal
import socket
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import workers.capture
import workers.merge
from appliance.capture import bpf
from appliance.capture.gate import check_rules
from appliance.capture.interfaces import host_interfaces
from appliance.capture.opener import OpenedInterface, OpenerClient, OpenRequest, interface_exists, serve
from appliance.config import Config, Interface, Output, expand_interfaces
from appliance.counters import CounterPages
from appliance.errors import ConfigError, InputOutputError, MissingPermissionError
from appliance.formats.encode import InterfaceDescription
from appliance.merge.compressor import compressor_argv, compressor_suffix, program_argv
from appliance.merge.naming import ApplianceNaming, Naming
from appliance.meter.own import own_elements
from appliance.meter.settings import ExportSettings, InterfaceName, MeterSettings
from appliance.monitor.control import open_control_socket
from appliance.monitor.listener import open_listener
from appliance.monitor.ports import PortParts
from appliance.monitor.render import live_line
from appliance.monitor.topology import changes_text, topology_of
from appliance.monitor.view import Snapshot, Topology, View
from appliance.plan import Plan, PlannedOutput, Source, make_plan, with_exports
from appliance.prepare import (
    Preparation,
    check_all_cpus,
    check_files,
    check_linktypes,
    check_output,
    check_traces,
    missing_parts,
)
from appliance.process import (
    CAP_NET_RAW,
    MESSAGE_BYTES,
    RELOAD,
    WorkerContext,
    allow_open_files,
    check_user,
    close_descriptors,
    drop_privileges,
    on_cpus,
    set_process_name,
)
from appliance.reload import Changes, settings_text
from appliance.ring import memory, port as port_memory
from appliance.ring.ring import Mapping as RingMapping, Producer, initialise

if TYPE_CHECKING:
    import workers.meter
    import workers.monitor
    import workers.traceflow

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


@dataclass(frozen=True)
class Prepared:
    """A new configuration that was made ready, and only needs to be said and done: `words` by worker, `filters`
    (programs of struct sock_filter) by source."""

    plan: Plan
    topology: Topology
    words: Mapping[str, bytes]
    filters: Mapping[str, bytes]


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

    # ---- who gets what ----

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

    def parts(self, name: str, life: int) -> tuple[Callable[[WorkerContext], int], Any]:
        """The worker's main function and what it is given, in its `life`th life (from 1)."""
        role = name.partition("/")[0]
        if role == "capture":
            return workers.capture.main, self.capture_parts(self.source_of(name))
        if role == "merge":
            planned = next(planned for planned in self.plan.outputs if planned.worker == name)
            return workers.merge.main, self.merge_parts(planned, life > 1)
        if role == "meter":
            return workers.meter.main, self.meter_parts()
        if role == "traceflow":
            return workers.traceflow.main, self.traceflow_parts()
        return workers.monitor.main, self.monitor_parts()

    def cpus(self, name: str) -> tuple[int, ...]:
        """The CPUs that the configuration gives to a worker; none: any."""
        role = name.partition("/")[0]
        if role == "capture":
            return self.source_of(name).interface.cpus
        if role == "merge":
            return self.output_of(name).cpus
        if role == "traceflow":
            return self.config.traceflow.cpus
        return self.config.meter.cpus if role == "meter" else ()

    def capture_parts(self, source: Source) -> workers.capture.CaptureParts:
        rings = self.rings[source.label]
        return workers.capture.CaptureParts(
            interface=source.interface,
            label=source.label,
            generation=self.generation,
            ring_fd=rings.ring_fd,
            digest_fd=rings.digest_fd,
            wake_fd=rings.wake_fd,
            merge_wake_fd=self.merge_wakes[source.output],
            meter_wake_fd=self.meter_wake,
            opened=self.opened.get(source.label),
            socket_serial=self.serials.get(source.label, 0),
            inner=self.config.meter.tunnels == "inner",
            applications=self.config.meter.applications,
            entropy=self.config.meter.entropy,
            port_fd=self.ports.get(source.label, -1),
        )

    def merge_parts(self, planned: PlannedOutput, is_successor: bool) -> workers.merge.MergeParts:
        output = self.config.output(planned.output.name)
        sources = tuple(
            workers.merge.MergeSource(
                label=source.label,
                page=f"{planned.worker}/{source.label}",
                live=source.uri.is_live,
                ring_fd=self.rings[source.label].ring_fd,
                wake_fd=self.rings[source.label].wake_fd,
                interfaces=self.described(source, is_successor),
                traced=self.is_traced(source),
            )
            for source in planned.sources
        )
        return workers.merge.MergeParts(
            output=output,
            sources=sources,
            generation=self.generation,
            wake_fd=self.merge_wakes[output.name],
            naming=self.namings[output.name],
            compressor=compressor_argv(output.compressor),
            hook=hook_argv(output),
            is_successor=is_successor,
            count_captured_bytes=self.options.count_captured_bytes,
            watch_file=self.options.watch_file,
            strict=self.options.strict,
            resolution_of_inputs=self.options.resolution_of_inputs,
            tap_fd=self.taps.get(output.name, -1),
            tap_wake_fd=self.traceflow_wake,
        )

    def described(self, source: Source, is_successor: bool) -> tuple[InterfaceDescription, ...]:
        """What is known of a source's interfaces without its ring: a file's own records were consumed by the
        predecessor, so its successor gets what the file says at its beginning."""
        opened = self.opened.get(source.label)
        if opened is not None:
            return (live_description(source, opened.linktype),)
        if source.uri.is_live:
            return (live_description(source, LINKTYPE_ETHERNET),)
        return tuple(self.file_interfaces.get(source.label, ())) if is_successor else ()

    def meter_parts(self) -> workers.meter.MeterParts:
        sources = tuple(
            workers.meter.MeterSource(
                label=source.label,
                page=source.worker,
                live=source.uri.is_live,
                ring_fd=self.rings[source.label].digest_fd,
                wake_fd=self.rings[source.label].wake_fd,
            )
            for source in self.plan.sources
        )
        return workers.meter.MeterParts(
            sources=sources,
            generation=self.generation,
            wake_fd=self.meter_wake,
            settings=replace(meter_settings(self.config), interfaces=interface_names(self.plan)),
            max_wait_ms=max(output.max_wait_ms for output in self.config.outputs),
            export_pages=self.plan.export_pages,
        )

    def is_traced(self, source: Source) -> bool:
        wanted = self.config.traceflow.interfaces
        return source.output in self.taps and (not wanted or source.interface.label in wanted)

    def traceflow_parts(self) -> workers.traceflow.TraceflowParts:
        return workers.traceflow.TraceflowParts(
            settings=self.config.traceflow,
            directory=self.config.traces_directory,
            ring_fds=tuple(self.taps.values()),
            live=self.is_live,
            generation=self.generation,
            wake_fd=self.traceflow_wake,
        )

    def monitor_parts(self) -> workers.monitor.MonitorParts:
        return workers.monitor.MonitorParts(
            listener_fd=self.listener.fileno() if self.listener is not None else -1,
            control_fd=self.control.fileno() if self.control is not None else -1,
            rings=tuple((label, rings.ring_fd) for label, rings in self.rings.items()),
            generation=self.generation,
            ports=tuple(self.port_parts(source) for source in self.plan.sources),
        )

    def port_parts(self, source: Source) -> PortParts:
        return PortParts(
            label=source.label,
            interface=source.uri.target,
            port_fd=self.ports.get(source.label, -1),
            wake_fd=self.rings[source.label].wake_fd,
            filters=source.interface.capture_filters,
            refusal=no_port_because(source),
        )

    # ---- a new configuration ----

    def prepare_reload(self, changes: Changes) -> Prepared:
        """ApplianceError: something of it cannot be had. Nothing is taken up yet. No request may be with the opener."""
        config = changes.config
        plan = self.planned_anew(config)
        topology = topology_of(plan, config, program_version())
        filters = {interface.label: interface.filter for interface in changes.interfaces}
        words = {}
        for planned in plan.outputs:
            told = [source for source in planned.sources if source.interface.label in filters]
            texts = {source.label: source.interface.filter for source in told}
            if planned.output in changes.outputs or texts:
                hook = hook_argv(planned.output)
                words[planned.worker] = RELOAD + settings_text(planned.output, hook, texts)
        if plan.monitor and topology != self.topology:
            words["monitor"] = RELOAD + changes_text(topology)
        for worker, message in words.items():
            if len(message) > MESSAGE_BYTES:
                raise ConfigError(f"{worker}: changes of {len(message)} bytes; {MESSAGE_BYTES} can be told at most")
        if changes.meter:
            check_meter(config)
            check_flow_directories(config)
        return Prepared(plan, topology, words, self.compile_filters(filters))

    def planned_anew(self, config: Config) -> Plan:
        """What is planned, with what a reload can change of it."""
        interfaces = {interface.label: interface for interface in config.interfaces}
        sources = {source.label: with_filter(source, interfaces) for source in self.plan.sources}
        outputs = tuple(
            replace(
                planned,
                output=config.output(planned.output.name),
                sources=tuple(sources[source.label] for source in planned.sources),
            )
            for planned in self.plan.outputs
        )
        plan = replace(self.plan, sources=tuple(sources.values()), outputs=outputs)
        return with_exports(plan, config.meter.exports) if plan.meter is not None else plan

    def compile_filters(self, filters: Mapping[str, str]) -> dict[str, bytes]:
        """`filters`: by interface. Returns the programs by source."""
        programs = {}
        for source in self.plan.sources:
            if source.interface.label in filters:
                if self.opener is None:
                    raise InputOutputError(
                        f"interface {source.label}: filter: only the opener process could compile it"
                    )
                request = replace(self.open_request(source.worker), filter=filters[source.interface.label])
                programs[source.label] = self.opener.compile(request)
        return programs

    def take_up(self, config: Config, prepared: Prepared) -> None:
        """From now on every worker and socket that is made gets its parts of this one; those that are there get new
        filters, each between two packets."""
        for name in set(prepared.plan.export_pages) - set(self.plan.export_pages):
            self.pages[name].clear()
        self.config, self.plan, self.topology = config, prepared.plan, prepared.topology
        for label, program in prepared.filters.items():
            bpf.attach(self.opened[label].fd, program)

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


LINKTYPE_ETHERNET = 1


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


def with_filter(source: Source, interfaces: Mapping[str, Interface]) -> Source:
    label = source.interface.label
    return replace(source, interface=source.interface.model_copy(update={"filter": interfaces[label].filter}))


def no_port_because(source: Source) -> str:
    """Why a source has no port capture; empty when it has."""
    if source.uri.scheme != "ring":
        return f"{source.label}: port capture needs a ring: source, {source.uri} is none"
    if source.interface.fanout > 1:
        return f"{source.label}: port capture needs all packets in one worker, and fanout is {source.interface.fanout}"
    if not source.interface.capture_buffer_bytes:
        return f"{source.label}: port capture is switched off (capture_buffer_bytes = 0)"
    return ""


def needs_host(config: Config) -> bool:
    return any(interface.source.is_every_interface for interface in config.interfaces)


def eventfd() -> int:
    return os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)


def appliance_naming(output: Output) -> Naming:
    ending = f".{output.format}" if output.format in ("pcapng", "erf") else ".pcap"
    return ApplianceNaming(output.directory, output.name, ending + compressor_suffix(output.compressor))


def hook_argv(output: Output) -> tuple[str, ...]:
    return program_argv(output.hook, "hook") if output.hook else ()


def live_description(source: Source, linktype: int) -> InterfaceDescription:
    import psutil

    speed = psutil.net_if_stats().get(source.uri.target)
    return InterfaceDescription(
        linktype=linktype,
        name=source.label,
        description=str(source.uri),
        speed_bps=speed.speed * 1_000_000 if speed is not None else 0,
        filter=source.interface.filter,
    )


def interface_names(plan: Plan) -> tuple[InterfaceName, ...]:
    """The meter numbers its sources in this order."""
    return tuple(InterfaceName(i, source.label, str(source.uri)) for i, source in enumerate(plan.sources))


def meter_settings(config: Config) -> MeterSettings:
    meter = config.meter
    own_elements(meter.elements)  # here, where a mistake is told to the user; the worker would die of it
    return MeterSettings(
        elements=meter.elements,
        idle_timeout_s=meter.idle_timeout_s,
        active_timeout_s=meter.active_timeout_s,
        max_flows=meter.max_flows,
        vlan_in_key=meter.vlan_in_key,
        interface_in_key=meter.interface_in_key,
        tcp_analysis=meter.tcp_analysis,
        packet_sampling=meter.packet_sampling,
        flow_sampling=meter.flow_sampling,
        packet_sequence=meter.packet_sequence,
        zero_length=meter.zero_length,
        tunnels=meter.tunnels,
        applications=meter.applications,
        entropy=meter.entropy,
        name_bytes=meter.name_bytes,
        max_fragmented=meter.max_fragmented,
        fragment_timeout_s=meter.fragment_timeout_s,
        export=tuple(
            ExportSettings(
                uri=export.uri,
                domain=export.domain,
                biflow=export.biflow,
                nanoseconds=export.nanoseconds,
                tcp_analysis=export.tcp_analysis,
                message_bytes=export.mtu_bytes,
                template_refresh_s=export.template_refresh_s,
                template_refresh_messages=export.template_refresh_messages,
                rotate_seconds=export.rotate_seconds,
                tls_ca=export.tls_ca,
                tls_certificate=export.tls_certificate,
                tls_key=export.tls_key,
                tls_name=export.tls_name,
                directory=config.flows_directory.parent,
            )
            for export in meter.exports
        ),
    )


def check_meter(config: Config) -> None:
    """ApplianceError: the meter would end with it at its start: elements of the user's own, certificates."""
    settings = meter_settings(config)
    for export in settings.export if config.meter.enabled else ():
        if export.uri.startswith("tls://"):
            from appliance.meter.tls import client_context

            client_context(export)


def check_flow_directories(config: Config) -> None:
    """MissingPermissionError: flow files cannot be made by the user that this process is by now."""
    for export in config.meter.exports:
        if export.destination.scheme == "file":
            directory = os.path.abspath(export.destination.path or config.flows_directory.parent)
            there = os.path.dirname(missing[0]) if (missing := missing_parts(directory)) else directory
            if not os.access(there, os.W_OK | os.X_OK):
                raise MissingPermissionError(f"{there}: may not be written by user {os.geteuid()}, for {export.uri}")


def program_version() -> str:
    try:
        return version("capture-appliance")
    except PackageNotFoundError:  # run from a source tree
        return "0"


# ---- words about the figures ----


def state_lines(snapshot: Snapshot) -> Sequence[str]:
    """For USR2: everything, a line an object."""
    lines = [live_line(snapshot), *snapshot.problems]
    for group in (snapshot.interfaces, snapshot.outputs, snapshot.exports, snapshot.workers):
        lines += [json.dumps(dataclasses.asdict(entry)) for entry in group]
    return lines
