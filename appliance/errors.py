"""The appliance's errors and exit codes: an error names its object and says what to do."""

from __future__ import annotations

import os

EXIT_USAGE = os.EX_USAGE  # 64: the command line is wrong
EXIT_NO_INPUT = os.EX_NOINPUT  # 66: an interface or file does not exist
EXIT_GAVE_UP = os.EX_UNAVAILABLE  # 69: a worker failed again and again
EXIT_CANNOT_CREATE = os.EX_CANTCREAT  # 73: a directory or output cannot be made or written
EXIT_IO = os.EX_IOERR  # 74: reading or writing failed
EXIT_PERMISSION = os.EX_NOPERM  # 77: a capability or permission is missing
EXIT_CONFIG = os.EX_CONFIG  # 78: the configuration is wrong


class ApplianceError(Exception):
    """Anything the user can act on. The message names the object; `exit_code` is the process's exit status."""

    exit_code = 1


class UsageError(ApplianceError):
    """The command line is wrong."""

    exit_code = EXIT_USAGE


class MissingInputError(ApplianceError):
    """An interface, file or program that was named does not exist."""

    exit_code = EXIT_NO_INPUT


class GaveUpError(ApplianceError):
    """A worker failed too often in too short a time."""

    exit_code = EXIT_GAVE_UP


class CannotCreateError(ApplianceError):
    """An output directory or file cannot be made or written."""

    exit_code = EXIT_CANNOT_CREATE


class InputOutputError(ApplianceError):
    """Reading or writing failed after a good start."""

    exit_code = EXIT_IO


class MissingPermissionError(ApplianceError):
    """A capability or file permission is missing; the message names it and the command that grants it."""

    exit_code = EXIT_PERMISSION


class ConfigError(ApplianceError):
    """The configuration is wrong; the message lists every fault with its key."""

    exit_code = EXIT_CONFIG


class FormatError(InputOutputError):
    """A capture file is damaged or of a kind that is not read here. `packets` were whole before the damage."""

    def __init__(self, message: str, packets: int = 0) -> None:
        super().__init__(message)
        self.packets = packets
