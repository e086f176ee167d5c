"""Clocks that are set and counters that grow: the C library's answers to the running processes are changed."""

from __future__ import annotations

import mmap
import os
import signal
import struct
import time
from pathlib import Path

from support.faults import compile_preload, lab_with_wires
from support.identities import Traffic, balance, recount
from support.judges import check_numbered
from support.lab import Lab, requires_root, requires_tool
from support.service import Service

pytestmark = [requires_root, requires_tool("capinfos", "lz4")]

HOUR_NS = 3_600_000_000_000

# The wall clock is off by what stands in a file; packets keep the kernel's time.
CLOCK = """
#define _GNU_SOURCE
#include <dlfcn.h>
#include <fcntl.h>
#include <stdint.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <time.h>
static volatile int64_t *offset_ns;
int clock_gettime(clockid_t clock, struct timespec *t) {
    static int (*real)(clockid_t, struct timespec *);
    if (!real) {
        real = dlsym(RTLD_NEXT, "clock_gettime");
        int fd = open(getenv("CLOCK_OFFSET"), O_RDONLY | O_CLOEXEC);
        void *map = mmap(0, 8, PROT_READ, MAP_SHARED, fd, 0);
        offset_ns = map == MAP_FAILED ? 0 : map;
    }
    int result = real(clock, t);
    if (result == 0 && clock == CLOCK_REALTIME && offset_ns) {
        int64_t ns = t->tv_sec * 1000000000LL + t->tv_nsec + *offset_ns;
        t->tv_sec = ns / 1000000000LL;
        t->tv_nsec = ns % 1000000000LL;
    }
    return result;
}
"""

# A kernel that has counted nearly 2^32 packets each time it is asked, the first three times.
STATISTICS = """
#define _GNU_SOURCE
#include <dlfcn.h>
#include <stdint.h>
#include <sys/socket.h>
int getsockopt(int fd, int level, int name, void *value, socklen_t *length) {
    static int (*real)(int, int, int, void *, socklen_t *);
    static int asked;
    if (!real) real = dlsym(RTLD_NEXT, "getsockopt");
    int result = real(fd, level, name, value, length);
    if (result == 0 && level == 263 && name == 6 && asked < 3) {
        asked++;
        *(uint32_t *)value += 0xFFFF0000u;
    }
    return result;
}
"""


def test_a_clock_that_is_set_an_hour_on_and_an_hour_back_stops_nobody(lab: Lab, directory: Path) -> None:
    clock = directory / "clock"
    clock.write_bytes(bytes(8))
    library = compile_preload(directory, CLOCK)
    environment = {"LD_PRELOAD": str(library), "CLOCK_OFFSET": str(clock)}
    traffic = Traffic(lab, lab_with_wires(lab, "a", "b"))
    service = Service(lab, directory, [{"uri": "ring:a"}, {"uri": "ring:b"}], environment=environment)
    with clock.open("r+b") as file, mmap.mmap(file.fileno(), 8) as offset:
        traffic.send(1000)
        balance(service, traffic.sent)
        for step_ns in (HOUR_NS, 0, HOUR_NS, 0):
            struct.pack_into("=q", offset, 0, step_ns)
            begun = time.monotonic()
            traffic.send(1000)
            balance(service, traffic.sent)
            assert time.monotonic() - begun < 30
            files = service.snapshot().outputs[0].files_published
            service.wait_until(lambda n=files: service.snapshot().outputs[0].files_published > n + 1, "files close", 30)
    last = balance(service, traffic.sent)
    assert service.stop() == 0
    recount(service, last)
    report = check_numbered(service.ready())
    for number in (0, 1):
        assert report[number].sequences == set(range(traffic.each)), service.log
        assert (report[number].duplicates, report[number].corrupt) == (0, 0)
    assert last.outputs[0].clock_steps >= 3
    sidecars = service.sidecars()
    assert any(sidecar["closed_because"] == "clock_step" for sidecar in sidecars)
    assert len({sidecar["sequence"] for sidecar in sidecars}) == len(sidecars)
    assert all(sidecar["first_ns"] <= sidecar["last_ns"] for sidecar in sidecars if sidecar["packets"])
    service.assert_nothing_left()


def test_a_clock_that_is_set_on_does_not_make_an_open_file_look_hours_old(lab: Lab, directory: Path) -> None:
    """The supervisor looks before the merge can: that one is stopped for a moment."""
    clock = directory / "clock"
    clock.write_bytes(bytes(8))
    library = compile_preload(directory, CLOCK)
    environment = {"LD_PRELOAD": str(library), "CLOCK_OFFSET": str(clock)}
    traffic = Traffic(lab, lab_with_wires(lab, "a"))
    service = Service(lab, directory, [{"uri": "ring:a"}], environment=environment, service={"heartbeat_timeout_s": 60})
    traffic.send(500)
    balance(service, traffic.sent)
    merge = service.pids()["merge/main"]
    os.kill(merge, signal.SIGSTOP)
    clock.write_bytes(struct.pack("=q", HOUR_NS))
    time.sleep(1.5)
    os.kill(merge, signal.SIGCONT)
    traffic.send(500)
    balance(service, traffic.sent)
    assert service.pids()["merge/main"] == merge
    assert service.stop() == 0
    assert check_numbered(service.ready())[0].received == 1000


def test_the_kernels_32_bit_counters_add_up_beyond_their_size(lab: Lab, directory: Path) -> None:
    library = compile_preload(directory, STATISTICS)
    traffic = Traffic(lab, lab_with_wires(lab, "a"))
    service = Service(lab, directory, [{"uri": "ring:a"}], environment={"LD_PRELOAD": str(library)})
    seen = []
    for _ in range(4):
        traffic.send(500)
        service.wait_until(lambda: service.interface("a").written_packets == traffic.each, "every frame is written")
        seen.append(service.interface("a").received_packets)
    service.wait_until(
        lambda: service.interface("a").received_packets == 3 * 0xFFFF0000 + traffic.each, "64 bits of packets"
    )
    assert seen == sorted(seen)
    service.stop()
    assert check_numbered(service.ready())[0].received == traffic.each
