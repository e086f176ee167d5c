"""Continuous numbered traffic on four interfaces, random faults, and the books balanced to the packet every minute.

A round is a minute: traffic, and in it some faults, drawn from a seed; then the traffic pauses, everything must come to
rest, and every identity must hold exactly, down to the published files, which are read, counted and taken away. Memory,
descriptors, processes and staging files are compared with the first rounds at the end. Exit status: 0 when everything
held, 1 when not, with the seed that shows it again.
"""

from __future__ import annotations

import argparse
import os
import random
import sys
import time
from pathlib import Path

from support.faults import small_disk
from support.lab import Lab
from support.service import service_directory

from soak.run import Soak


def main() -> int:
    parser = argparse.ArgumentParser(prog="./bootstrap soak", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--minutes", type=float, default=30, help="how long (default: %(default)s)")
    parser.add_argument("--seed", type=int, help="of the faults; default: another one each time")
    parser.add_argument("--rate", type=int, default=8000, help="frames a second in all (default: %(default)s)")
    parser.add_argument("--round-seconds", type=int, default=60, help="between two balances (default: %(default)s)")
    parser.add_argument("--faults-per-round", type=int, default=6, help="(default: %(default)s)")
    arguments = parser.parse_args()
    if os.geteuid() != 0:
        print("soak: needs root: it makes network namespaces, veth pairs and a small disk", file=sys.stderr)
        return 77
    seed = arguments.seed if arguments.seed is not None else random.SystemRandom().randrange(1 << 32)
    print(f"soak: {arguments.minutes:g} minutes, seed {seed}", flush=True)
    with Lab() as lab, service_directory() as directory, small_disk(directory / "disk", 256 << 20) as disk:
        soak = Soak(lab, directory, disk, random.Random(seed), arguments.rate)
        try:
            deadline = time.monotonic() + arguments.minutes * 60
            while time.monotonic() < deadline:
                soak.round(min(arguments.round_seconds, deadline - time.monotonic()), arguments.faults_per_round)
            soak.finish()
        except AssertionError as error:
            kept = Path(f"/tmp/soak-{seed}.log")
            kept.write_text(soak.service.log)
            print(f"soak: FAILED with seed {seed}: {error}\nsoak: the service's log is in {kept}", flush=True)
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
