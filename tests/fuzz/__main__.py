"""Fuzzes for a while: `./bootstrap fuzz [--seconds N] [--target NAME] [--seed N]`.

It runs on a build of its own, with the checks of Cython, AddressSanitizer and UndefinedBehaviorSanitizer. Inputs that
take a branch which none had taken are kept and changed further. Each target runs in a process of its own; an input that
crashes it, fails an assertion or takes too long is saved in build/fuzz, and the exit status is 1.
"""

from __future__ import annotations

import argparse
import ctypes
import os
import random
import signal
import sys
import time
import traceback
from pathlib import Path

from fuzz.engine import mutate
from fuzz.seeds import seeds
from fuzz.targets import TARGETS, silence

INPUT_S = 20  # for one input
CORPUS_MAX = 5000
SAY_EVERY_S = 30.0


def fuzz(name: str, seconds: float, seed: int, current: Path) -> None:
    """In a child process: runs until the time is over, or it dies."""
    target, chance = TARGETS[name], random.Random(f"{name} {seed}")
    corpus = seeds(name)
    new_steps = coverage()
    begun = said = time.monotonic()
    runs = kept = 0
    for data in [*corpus]:
        run(target, data, current)
    new_steps()
    while time.monotonic() - begun < seconds:
        data = mutate(chance, corpus)
        run(target, data, current)
        runs += 1
        if new_steps() and len(corpus) < CORPUS_MAX:
            corpus.append(data)
            kept += 1
        if time.monotonic() - said > SAY_EVERY_S:
            said = time.monotonic()
            print(f"fuzz: {name}: {runs:,} inputs, {kept} with new branches", flush=True)
    print(f"fuzz: {name}: {runs:,} inputs in {time.monotonic() - begun:.0f} s, {kept} with new branches: no fault")


def run(target, data: bytes, current: Path) -> None:  # type: ignore[no-untyped-def]
    current.write_bytes(data)  # in memory: whoever dies leaves it behind
    signal.alarm(INPUT_S)
    target(data)
    signal.alarm(0)


def coverage():  # type: ignore[no-untyped-def]
    try:
        return ctypes.CDLL(None).fuzz_new_steps
    except AttributeError:
        return lambda: 0  # this build does not count branches


def fuzz_in_child(name: str, seconds: float, seed: int, results: Path) -> bool:
    """False: a fault was found, and its input saved."""
    current = Path(f"/dev/shm/fuzz-{os.getpid()}-{name}")
    child = os.fork()
    if child == 0:
        status = 1
        try:
            with silence():
                fuzz(name, seconds, seed, current)
            status = 0
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            os._exit(status)
    _, status = os.waitpid(child, 0)
    try:
        if status == 0:
            return True
        results.mkdir(parents=True, exist_ok=True)
        saved = results / f"{name}-{seed}.bin"
        saved.write_bytes(current.read_bytes())
        how = f"signal {os.WTERMSIG(status)}" if os.WIFSIGNALED(status) else f"status {os.WEXITSTATUS(status)}"
        print(f"fuzz: {name}: FAULT ({how}); its input is in {saved}", flush=True)
        return False
    finally:
        current.unlink(missing_ok=True)


def main() -> int:
    parser = argparse.ArgumentParser(prog="./bootstrap fuzz", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--seconds", type=float, default=600, help="for each target (default: %(default)s)")
    parser.add_argument("--target", action="append", choices=sorted(TARGETS), help="only this one; may be repeated")
    parser.add_argument("--seed", type=int, help="default: another one each time")
    parser.add_argument("--results", type=Path, default=Path("build/fuzz"), help="where inputs with faults are saved")
    arguments = parser.parse_args()
    seed = arguments.seed if arguments.seed is not None else random.SystemRandom().randrange(1 << 32)
    print(f"fuzz: seed {seed}", flush=True)
    faultless = [
        fuzz_in_child(name, arguments.seconds, seed, arguments.results) for name in arguments.target or TARGETS
    ]
    return 0 if all(faultless) else 1


if __name__ == "__main__":
    sys.exit(main())
