"""The console script `appliance`. Metering files begins at once; everything else goes to the command line (cli.py).

The packages of the command line take longer to import than a million packets take to meter: `flows` has a reader of its
own (flows_command.py).
"""

from __future__ import annotations

import gc
import os
import sys
from collections.abc import Callable

from appliance.errors import ApplianceError

DEBUG_VARIABLE = "APPLIANCE_DEBUG"
EXIT_FAULT = os.EX_SOFTWARE  # 70: a fault of the program itself
EXIT_INTERRUPTED = 130


def main() -> None:
    """The console script."""
    arguments = sys.argv[1:]
    if arguments[:1] != ["flows"]:
        from appliance.cli import run_command

        sys.exit(run_command(arguments))
    gc.disable()  # until all is imported: that is here to stay, and a look for garbage in it takes a tenth of the start
    from appliance.flows_command import run

    status = exit_status(lambda: run(arguments[1:]))
    gc.freeze()  # nor at the end
    sys.exit(status)


def exit_status(command: Callable[[], int]) -> int:
    """Runs a command; whatever goes wrong is one message."""
    try:
        status = command()
        sys.stdout.flush()
        return status
    except ApplianceError as error:
        print(f"appliance: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        return EXIT_INTERRUPTED
    except BrokenPipeError:
        return reader_left()
    except Exception as error:
        if os.environ.get(DEBUG_VARIABLE):
            raise
        print(
            f"appliance: a fault of the program itself: {type(error).__name__}: {error}; "
            f"{DEBUG_VARIABLE}=1 shows where",
            file=sys.stderr,
        )
        return EXIT_FAULT


def reader_left() -> int:
    """The reader of our output (head, less) has seen enough. Python must not try to flush it once more at its end."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 0
