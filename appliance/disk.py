"""Files that are to be there after a power failure, and that never take another one's place."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
from collections.abc import Iterator

from appliance.process import libc

AT_FDCWD = -100
RENAME_NOREPLACE = 1


def rename_without_replacing(source: str, target: str) -> None:
    """renameat2(RENAME_NOREPLACE). FileExistsError: the name is taken."""
    result = libc().renameat2(AT_FDCWD, os.fsencode(source), AT_FDCWD, os.fsencode(target), RENAME_NOREPLACE)
    if result == 0:
        return
    number = ctypes.get_errno()
    if number not in (errno.EINVAL, errno.ENOSYS):
        raise OSError(number, os.strerror(number), target)
    # A file system without that flag: a second name that must not exist yet, then away with the first.
    os.link(source, target, follow_symlinks=False)
    os.unlink(source)


@contextlib.contextmanager
def opened(path: str, flags: int) -> Iterator[int]:
    """A descriptor of what is there, to read and to ask; `flags` beside O_RDONLY and O_CLOEXEC. OSError as os.open."""
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | flags)
    try:
        yield fd
    finally:
        os.close(fd)


def sync_directory(path: str) -> None:
    """After this the names in it are on the disk."""
    with opened(path, os.O_DIRECTORY) as fd:
        os.fsync(fd)


def sync_file(path: str) -> int:
    """fsync; returns the file's bytes. Never tried twice: after a failed sync the pages may be gone."""
    with opened(path, os.O_NOFOLLOW) as fd:
        os.fsync(fd)
        return os.fstat(fd).st_size


def sync_file_system(directory: str) -> bool:
    """syncfs(2): all of the file system that the directory is on. False: it cannot be told that it is on the disk."""
    try:
        with opened(directory, os.O_DIRECTORY) as fd:
            return bool(libc().syncfs(fd) == 0)
    except OSError:
        return False
