"""Where a ring's memory comes from: anonymous, sealed, allocated in full before the first packet."""

from __future__ import annotations

import contextlib
import fcntl
import mmap
import os

from appliance.errors import CannotCreateError

HEADER_BYTES = 4096
MIN_CAPACITY_BYTES = 1 << 16
MADV_POPULATE_WRITE = 23  # madvise(2), since Linux 5.14


def ring_capacity(wanted_bytes: int) -> int:
    """The largest power of two that is not above `wanted_bytes`, at least 64 KiB."""
    return max(MIN_CAPACITY_BYTES, 1 << (max(1, wanted_bytes).bit_length() - 1))


def allocate(capacity: int, name: str) -> int:
    """A memfd for a ring of `capacity` bytes; its pages exist, and nobody can change its size.

    Preallocated, because a page that cannot be had later would be a SIGBUS in the middle of the capture. Cleared too:
    the kernel clears a page at its first use, and the first lap of the packets should not wait for that.
    """
    if capacity < MIN_CAPACITY_BYTES or capacity & (capacity - 1):
        raise ValueError(f"a ring's capacity is a power of two of at least 64 KiB, not {capacity}")
    fd = os.memfd_create(f"ring-{name}"[:200], os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        os.posix_fallocate(fd, 0, HEADER_BYTES + capacity)
        clear(fd, HEADER_BYTES + capacity)
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL)
    except OSError as error:
        os.close(fd)
        raise CannotCreateError(
            f"ring {name}: {capacity} bytes of shared memory cannot be had ({error.strerror}); lower memory_bytes"
        ) from error
    return fd


def clear(fd: int, length: int) -> None:
    with mmap.mmap(fd, length) as memory, contextlib.suppress(OSError):  # EINVAL: a kernel that cannot
        memory.madvise(MADV_POPULATE_WRITE)
