"""The benchmark's arithmetic, and how it runs programs."""

from __future__ import annotations

import math
import os
import subprocess
import sys
import time

import pytest

from bench.measure import MeasureError, line, memory_bytes, peak_resident_bytes, percentile, run


def test_the_line_through_two_sizes_tells_set_up_from_marginal_cost() -> None:
    found = line(100, [1.2, 1.0, 9.9], 300, [2.0, 1.4, 1.7])
    assert found.marginal_s == pytest.approx(0.0025)  # medians: 1.2 and 1.7
    assert found.setup_s == pytest.approx(0.95)
    assert found.per_second == pytest.approx(400)


def test_a_longer_run_that_took_less_time_has_no_rate() -> None:
    assert math.isnan(line(1, [2.0], 2, [1.0]).per_second)


@pytest.mark.parametrize(("fraction", "expected"), [(0.5, 2), (0.75, 3), (0.99, 4), (1.0, 4), (0.0, 1)])
def test_a_percentile_is_a_value_that_occurred(fraction: float, expected: float) -> None:
    assert percentile([4, 1, 3, 2], fraction) == expected


def test_a_run_counts_the_cpu_of_the_program_and_its_children() -> None:
    burn = "import time; end = time.process_time() + 0.2\nwhile time.process_time() < end: pass"
    child = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {burn!r}])"
    done = run([sys.executable, "-c", f"{child}; print('done')"])
    assert done.output == "done\n"
    assert done.cpu_s >= 0.2
    assert done.wall_s > 0


def test_memory_is_what_a_process_holds_and_its_peak_what_it_held() -> None:
    hold = "block = bytearray(64 << 20); del block; print(flush=True); input()"
    process = subprocess.Popen([sys.executable, "-c", hold], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    try:
        assert process.stdout is not None
        process.stdout.readline()
        assert 0 < memory_bytes([process.pid]) < 64 << 20 < peak_resident_bytes(process.pid) < 200 << 20
    finally:
        process.communicate(b"\n")
    assert memory_bytes([process.pid]) == peak_resident_bytes(process.pid) == 0


def test_a_program_that_fails_is_named_with_what_it_said() -> None:
    with pytest.raises(MeasureError, match=r"exit status 3: no luck"):
        run([sys.executable, "-c", "import sys; print('no luck'); sys.exit(3)"])


def test_an_interrupted_run_leaves_no_process(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []

    def interrupt(pid: int, options: int) -> tuple[int, int, object]:
        seen.append(pid)
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "wait4", interrupt)
    begun = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        run([sys.executable, "-c", "import time; time.sleep(100)"])
    assert time.monotonic() - begun < 20
    with pytest.raises(ProcessLookupError):
        os.kill(seen[0], 0)
