"""`mtracecap`: the command line of ANT mtracecap 0.4, on this engine.

    arguments -> checked against each other -> checked against the machine -> configuration and naming -> the supervisor

Everything that can be refused is refused before anything is opened, with an exit code that has a name in errors.py.
"""

from __future__ import annotations

import contextlib
import getopt
import logging
import os
import pwd
import socket
import stat
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from appliance import config as configuration, supervisor
from appliance.capture import uri as capture_uri
from appliance.config import MAX_SNAPLEN, MIB, Config
from appliance.console import rewritten_line, size_text
from appliance.errors import (
    ApplianceError,
    CannotCreateError,
    ConfigError,
    MissingInputError,
    MissingPermissionError,
    UsageError,
)
from appliance.merge.compressor import compressor_argv
from appliance.merge.naming import STANDARD_OUTPUT, MtracecapNaming, SingleFileNaming, prepare_directories
from appliance.monitor.view import Snapshot
from appliance.wiring import RunOptions

log = logging.getLogger(__name__)

USAGE = """\
usage: mtracecap [flags] outputuri traceuri [traceuri...]
       mtracecap [flags] -B baseuri traceuri [traceuri...]
"""

HELP = f"""\
{USAGE}
Records the packets of all traceuris, in the order of their time stamps, into one file or into a series of files.

  -B, --baseuri FMT:DIR           a series of files: DIR/YYYYMMDD-HHMMSS-NNNNNNNN, in format FMT (pcapfile, pcapng,
                                  erf)
  -F, --filter BPF                discard packets that do not match the filter expression
  -G, --rotate-seconds SECONDS    a new file every SECONDS, also when no packet comes; 0: never (needs -B)
  -S, --rotate-sizemb MB          a new file before more than MB MiB of packets are in one; 0: never (needs -B)
  -s, --snaplen BYTES             keep at most BYTES of each packet, 64 to {MAX_SNAPLEN} (default {MAX_SNAPLEN})
  -w, --maxwait_ms MS             hold packets back for at most MS for the sake of their order (default 50)
  -U, --use-utc                   UTC in file names (default: local time)
  -N, --seqfile FILE              keep the number of the last file in FILE, and go on behind it
  -W, --watchfile FILE            open the next file only when FILE exists
  -z, --compress-level 0..9       compression level; alone: of gzip; 0: no compression
  -Z, --compress-type TYPE        gz, zlib, bz, lzo, xz or no; through gzip, bzip2, lzop or xz, which must be installed
      --pipeout=COMMAND           compress with this command (split at spaces, no shell), standard input to output
      --file-ext=EXT              what file names end in, e.g. .pcap.lz4 (default: nothing)
      --relinquish-privileges=USER  become USER when the inputs are open
  -v, --verbose                   say what is done; twice: say more
  -H, --libtrace-help             the kinds of uris
  -h, --help                      this text

A file is called tmp-<pid>-... until it is whole: complete, compressed and on the disk. TERM and INT end the recording
in good order: what was received is written, and the exit status is 0.

Three defaults differ from mtracecap 0.4 on purpose:
  -s  is {MAX_SNAPLEN}, not 64, which cuts packets off
  -w  is 50 ms, not 1 ms, which is less than the kernel takes to hand packets over
  -G  is aligned to the clock: -G 60 begins files at full minutes, not one minute after the start

Done right where mtracecap 0.4 has a fault:
  - a compressor's exit status counts: what it did not finish is not published, and the exit status says so
  - a --pipeout command that does not exist is refused at the start, and leaves no empty file
  - -Z works without -z
  - -W holds back the next file and not the capture, and TERM works meanwhile
  - -G does not drift; a silent interface does not slow down a busy one
  - packets without a network layer are recorded too
  - -S counts the first packet of a file too
  - no file is ever overwritten: an outputuri that exists already is refused, unless it is an empty file
  - a sequence file is never half written
"""

URI_HELP = """\
Inputs (traceuri):
  ring:IF        an interface, through the kernel's shared ring (fastest)
  pcap:IF pcapint:IF int:IF
                 an interface, through libpcap
  pcapfile:PATH  a pcap, pcapng or ERF file, also compressed (gz, lz4, zst, xz, bz2); - is standard input
  pcapng:PATH erf:PATH rawerf:PATH
                 the same: what a file is, its content tells
  legacyeth:PATH legacypos:PATH legacyatm:PATH tsh:PATH fr+:PATH
                 old traces, whose content does not tell what they are
  NAME -         a file, or else an interface, of that name; standard input
Not here, and what to use instead, is said when they are named: dag: dpdk: ndag: rt: duck: bpf: pfring: and others.
Outputs (outputuri; DIR for -B):
  pcapfile:PATH  pcap, with nanoseconds where an input has them; - is standard output
  pcapng:PATH    pcapng, with every interface's name and its losses
  erf:PATH       ERF: Ethernet, IP and HDLC; no more than 65517 bytes of a packet
"""

SHORT_OPTIONS = "HhF:B:G:N:S:s:Uvz:Z:W:w:"
LONG_OPTIONS = {  # the short form, "" when there is none; a trailing "=" takes a value
    "baseuri=": "B",
    "filter=": "F",
    "rotate-seconds=": "G",
    "rotate-sizemb=": "S",
    "libtrace-help": "H",
    "help": "h",
    "verbose": "v",
    "snaplen=": "s",
    "use-utc": "U",
    "watchfile=": "W",
    "maxwait_ms=": "w",
    "compress-level=": "z",
    "compress-type=": "Z",
    "seqfile=": "N",
    "file-ext=": "",
    "relinquish-privileges=": "",
    "pipeout=": "",
}

# A type on the command line begins with one of these, so `gzip` and `bz2` are understood too.
COMPRESSORS: dict[str, tuple[str, ...]] = {
    "gz": ("gzip", "-c"),
    "zlib": ("gzip", "-c"),  # what libtrace calls zlib is a gzip file
    "bz": ("bzip2", "-c"),
    "lzo": ("lzop", "-c"),
    "xz": ("xz", "-c"),
    "no": (),
}
MAX_ROTATE_SECONDS = 7 * 86400
MAX_ROTATE_MIB = 1 << 40
MAX_WAIT_MS = 60_000
MAX_EXTENSION_CHARACTERS = 64
OUTPUT_NAME = "main"


@dataclass
class Arguments:
    """The command line, each value within its own range. `output`: of the first form, `base`: of -B."""

    inputs: tuple[capture_uri.Uri, ...] = ()
    output: capture_uri.Uri | None = None
    base: capture_uri.Uri | None = None
    filter: str = ""
    rotate_seconds: int = 0
    rotate_mib: int = 0
    snaplen: int = MAX_SNAPLEN
    max_wait_ms: int = 50
    use_utc: bool = False
    watch_file: str = ""
    compress_level: int | None = None
    compress_type: str | None = None
    pipeout: tuple[str, ...] = ()
    sequence_file: str | None = None
    extension: str = ""
    user: str = ""
    verbosity: int = 0
    help: str = field(default="", repr=False)  # the text that was asked for, instead of work

    @property
    def compressor(self) -> tuple[str, ...]:
        """The argv to compress with; empty: none."""
        if self.pipeout:
            return self.pipeout
        if self.compress_level == 0 or (self.compress_level is None and self.compress_type is None):
            return ()
        argv = COMPRESSORS[self.compress_type or "gz"]
        return (*argv, f"-{self.compress_level}") if argv and self.compress_level is not None else argv


@dataclass(frozen=True)
class Job:
    """What the engine is asked to do."""

    config: Config
    naming: MtracecapNaming | SingleFileNaming
    watch_file: str


def main(argv: Sequence[str] | None = None) -> int:
    """The console script; returns the exit status."""
    try:
        arguments = parse_arguments(sys.argv[1:] if argv is None else argv)
        if arguments.help:
            print(arguments.help, end="")
            return 0
        job = make_job(arguments)
        check_machine(arguments, job)
        return run(job)
    except ApplianceError as error:
        print(f"mtracecap: {error}", file=sys.stderr)
        if isinstance(error, UsageError):
            print("mtracecap --help lists all flags", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        return 130


# The command line ----------------------------------------------------------------------------------------------------


def parse_arguments(argv: Sequence[str]) -> Arguments:
    """UsageError says which flag is wrong, and how. Flags may be clustered (`-Uv`), abbreviated (`--pipe=...`), and
    stand behind positional arguments."""
    try:
        options, positionals = getopt.gnu_getopt(list(argv), SHORT_OPTIONS, list(LONG_OPTIONS))
    except getopt.GetoptError as error:
        raise UsageError(f"{error.msg}") from None
    arguments = Arguments()
    for given, value in options:
        flag = given.lstrip("-")
        if not given.startswith("--"):
            _SETTERS[flag](arguments, given, value)
            continue
        short = LONG_OPTIONS.get(flag, LONG_OPTIONS.get(f"{flag}=", ""))
        _SETTERS[short or flag](arguments, given, value)
    if not arguments.help:
        _take_positionals(arguments, positionals)
        _check_together(arguments)
    return arguments


def _take_positionals(arguments: Arguments, positionals: list[str]) -> None:
    if arguments.base is None:
        if not positionals:
            raise UsageError(f"no output is named\n{USAGE}")
        arguments.output = _output_uri(positionals.pop(0))
    if not positionals:
        raise UsageError(f"no input is named\n{USAGE}")
    arguments.inputs = tuple(capture_uri.guess(text) for text in positionals)


def _check_together(arguments: Arguments) -> None:
    if arguments.pipeout and (arguments.compress_level or arguments.compress_type not in (None, "no")):
        raise UsageError("--pipeout and -z or -Z: a file is compressed once; choose one of them")
    if arguments.base is None:
        for flag, value in (("-G", arguments.rotate_seconds), ("-S", arguments.rotate_mib)):
            if value:
                raise UsageError(f"{flag} makes a series of files, which needs -B FMT:DIR")
    live = [uri for uri in arguments.inputs if uri.is_live]
    files = [uri for uri in arguments.inputs if not uri.is_live]
    if live and files:
        raise UsageError(f"{live[0]} and {files[0]} cannot be merged: a file's clock is not the host's")
    if sum(uri.target == STANDARD_OUTPUT for uri in files) > 1:
        raise UsageError("standard input (-) can be read once only")


def _output_uri(text: str) -> capture_uri.Uri:
    try:
        return capture_uri.parse_output(text)
    except UsageError as error:
        raise UsageError(f"output {text!r}: {error}") from None


def _base(arguments: Arguments, given: str, value: str) -> None:
    arguments.base = _output_uri(value)
    if arguments.base.target == STANDARD_OUTPUT:
        raise UsageError(f"{given} {value}: needs a directory")


def _compress_type(arguments: Arguments, given: str, value: str) -> None:
    known = next((name for name in COMPRESSORS if value.startswith(name)), None)
    if known is None:
        raise UsageError(f"{given} {value!r}: is none of {' '.join(COMPRESSORS)}")
    arguments.compress_type = known


def _pipeout(arguments: Arguments, given: str, value: str) -> None:
    arguments.pipeout = tuple(value.split())
    if not arguments.pipeout:
        raise UsageError(f"{given}: names no command")


def _extension(arguments: Arguments, given: str, value: str) -> None:
    if "/" in value or not value.isprintable() or len(value) > MAX_EXTENSION_CHARACTERS:
        raise UsageError(
            f"{given} {value!r}: must be at most {MAX_EXTENSION_CHARACTERS} printable characters without /"
        )
    arguments.extension = value


def _user(arguments: Arguments, given: str, value: str) -> None:
    if not value:
        raise UsageError(f"{given}: names no user")
    arguments.user = value


def _watch_file(arguments: Arguments, given: str, value: str) -> None:
    # The workers' directory need not be ours.
    arguments.watch_file = os.path.abspath(_path(given, value))


def _sequence_file(arguments: Arguments, given: str, value: str) -> None:
    arguments.sequence_file = os.path.abspath(_path(given, value))


def _filter(arguments: Arguments, given: str, value: str) -> None:
    arguments.filter = value


def _use_utc(arguments: Arguments, given: str, value: str) -> None:
    arguments.use_utc = True


def _verbose(arguments: Arguments, given: str, value: str) -> None:
    arguments.verbosity += 1


def _help(arguments: Arguments, given: str, value: str) -> None:
    arguments.help = HELP


def _libtrace_help(arguments: Arguments, given: str, value: str) -> None:
    arguments.help = URI_HELP


def _number(name: str, low: int, high: int) -> Callable[[Arguments, str, str], None]:
    def set_number(arguments: Arguments, given: str, value: str) -> None:
        if not (value.isascii() and value.isdecimal() and low <= int(value) <= high):
            raise UsageError(f"{given} {value!r}: must be a whole number from {low} to {high}")
        setattr(arguments, name, int(value))

    return set_number


def _path(given: str, value: str) -> str:
    if not value or "\0" in value:
        raise UsageError(f"{given} {value!r}: must be a path")
    return value


_SETTERS: dict[str, Callable[[Arguments, str, str], None]] = {
    "B": _base,
    "F": _filter,
    "G": _number("rotate_seconds", 0, MAX_ROTATE_SECONDS),
    "H": _libtrace_help,
    "N": _sequence_file,
    "S": _number("rotate_mib", 0, MAX_ROTATE_MIB),
    "U": _use_utc,
    "W": _watch_file,
    "Z": _compress_type,
    "h": _help,
    "s": _number("snaplen", 64, MAX_SNAPLEN),
    "v": _verbose,
    "w": _number("max_wait_ms", 0, MAX_WAIT_MS),
    "z": _number("compress_level", 0, 9),
    "file-ext": _extension,
    "pipeout": _pipeout,
    "relinquish-privileges": _user,
}


# The job -------------------------------------------------------------------------------------------------------------


def make_job(arguments: Arguments) -> Job:
    """Configuration and naming; looks at nothing but the arguments, except for what kind of thing the output is."""
    naming: MtracecapNaming | SingleFileNaming
    if arguments.base is not None:
        directory, sink = arguments.base.target, arguments.base
        naming = MtracecapNaming(directory, arguments.extension, arguments.use_utc, arguments.sequence_file)
    else:
        assert arguments.output is not None
        naming, sink = SingleFileNaming(arguments.output.target), arguments.output
        directory = naming.directories[0] if naming.directories else os.curdir
    output = {
        "name": OUTPUT_NAME,
        "directory": directory,
        "format": {"pcapfile": "pcap", "pcapng": "pcapng", "erf": "erf"}[sink.scheme],
        "max_wait_ms": max(1, arguments.max_wait_ms),
        "rotate_seconds": arguments.rotate_seconds,
        "rotate_bytes": arguments.rotate_mib * MIB,
        "compressor": list(arguments.compressor) or "none",
        "group_readable": False,
        "min_free_bytes": 0,  # nothing is ever deleted to make room
    }
    interfaces: list[dict[str, Any]] = [
        {"uri": str(uri), "filter": arguments.filter, "snaplen": arguments.snaplen} for uri in arguments.inputs
    ]
    tables: dict[str, Any] = {
        "interface": interfaces,
        "output": [output],
        "meter": {"enabled": False},
        "monitor": {"listen": "", "control_socket": ""},
        "service": {"user": arguments.user, "log_level": ("warning", "info", "debug")[min(2, arguments.verbosity)]},
    }
    try:
        config = configuration.parse(tables, "the command line")
    except ConfigError as error:
        raise UsageError(str(error)) from None
    return Job(config, naming, arguments.watch_file)


# The machine ---------------------------------------------------------------------------------------------------------


def check_machine(arguments: Arguments, job: Job) -> None:
    """Whatever the arguments name is there and may be used. ApplianceError names what is not."""
    for uri in arguments.inputs:
        _check_input(uri)
    compressor_argv(arguments.compressor or "none")
    with _as_user(arguments.user):
        prepare_directories(job.naming)
        if isinstance(job.naming, MtracecapNaming):
            job.naming.check_numbers()
        else:
            _check_single_output(job.naming)


def _check_input(uri: capture_uri.Uri) -> None:
    if uri.is_every_interface or uri.target == STANDARD_OUTPUT:
        return
    if uri.is_live:
        try:
            socket.if_nametoindex(uri.target)
        except OSError:
            raise MissingInputError(f"{uri}: there is no interface of this name") from None
        return
    try:
        mode = os.stat(uri.target).st_mode
    except OSError as error:
        raise MissingInputError(f"{uri}: {error.strerror}") from None
    if stat.S_ISDIR(mode):
        raise MissingInputError(f"{uri}: is a directory, not a file")
    if not os.access(uri.target, os.R_OK, effective_ids=True):
        raise MissingPermissionError(f"{uri}: may not be read by user {os.geteuid()}; check its owner and mode")


def _check_single_output(naming: SingleFileNaming) -> None:
    if naming.stream == STANDARD_OUTPUT:
        if os.isatty(sys.stdout.fileno()):
            raise UsageError("standard output is a terminal, which cannot show packets; redirect it")
        return
    if naming.stream is not None:
        if not os.access(naming.stream, os.W_OK, effective_ids=True):
            raise CannotCreateError(f"{naming.stream}: may not be written by user {os.geteuid()}")
        return
    if os.path.lexists(naming.path):
        raise CannotCreateError(
            f"{naming.path}: exists already and is not overwritten; remove it, or take another name"
        )
    for path in naming.unfinished():
        log.warning("%s is what an earlier run left unfinished", path)


@contextlib.contextmanager
def _as_user(name: str) -> Iterator[None]:
    """The effective user, groups included, while the block lasts: for looking at what will be allowed later."""
    if not name:
        yield
        return
    try:
        entry = pwd.getpwnam(name)
    except KeyError:
        raise UsageError(f"--relinquish-privileges: there is no user {name!r}") from None
    if entry.pw_uid == os.geteuid():
        yield
        return
    if os.geteuid() != 0:
        raise MissingPermissionError(f"--relinquish-privileges={name}: only root can become another user")
    groups, group = os.getgroups(), os.getegid()
    os.setgroups(os.getgrouplist(name, entry.pw_gid))
    os.setegid(entry.pw_gid)
    os.seteuid(entry.pw_uid)
    try:
        yield
    finally:
        os.seteuid(0)
        os.setegid(group)
        os.setgroups(groups)


def run(job: Job) -> int:
    """Hands the job to the engine; returns its exit status."""
    with rewritten_line() as show:
        options = RunOptions(
            watch=(lambda snapshot: show(progress_text(snapshot))) if show is not None else None,
            naming=lambda _output: job.naming,
            count_captured_bytes=True,  # -S counts packets' bytes, as 0.4 does
            watch_file=job.watch_file,
            strict=True,
            resolution_of_inputs=job.config.outputs[0].format == "pcap",
        )
        return supervisor.run(job.config, options)


def progress_text(snapshot: Snapshot) -> str:
    """What a terminal shows while the job runs."""
    packets = sum(row.written_packets for row in snapshot.interfaces)
    lost = sum(row.lost_packets for row in snapshot.interfaces)
    size = sum(row.written_bytes for row in snapshot.outputs)
    return f"{packets:,} packets, {size_text(size)} written" + (f", {lost:,} lost" if lost else "")


if __name__ == "__main__":
    sys.exit(main())
