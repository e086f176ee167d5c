"""What a program did to its files, as strace saw it, and what a power failure would have left of it at any moment.

The disk is modelled as a journaling file system: changes of names reach the disk in their order, at the latest with the
next fsync of a directory; a file's bytes reach it with its own fsync, and before that in part, or not at all.
"""

from __future__ import annotations

import ast
import hashlib
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

CALLS = "openat,write,pwrite64,fsync,fdatasync,rename,renameat2,unlink,link,linkat,mkdir,rmdir,ftruncate"
STRACE = ("strace", "-f", "-y", "-s", "100000000", "-e", f"trace={CALLS}", "-e", "signal=none")
_LINE = re.compile(r"(\d+) +(.*)")
_RESULT = re.compile(r"^(\w+)\((.*)\) += (-?\d+)(?:<(.*)>)?", re.DOTALL)
_STRING = re.compile(r'"(?:[^"\\]|\\.)*"')
_FD_PATH = re.compile(r"^\d+<((?:[^>\\]|\\.)*)>")


@dataclass(frozen=True)
class Operation:
    """`kind`: create, truncate, write, cut, sync, rename, link, unlink, mkdir. Paths are relative to the root."""

    kind: str
    path: str
    target: str = ""
    data: bytes = b""
    length: int = 0


def operations(trace: Path, root: Path) -> list[Operation]:
    """The successful operations below `root` of a trace made with STRACE, in the order of their ends."""
    found = []
    for call, arguments, result, result_path in _calls(trace):
        if result >= 0:
            found += _operation(call, arguments, result, result_path, os.fspath(root))
    return found


def _calls(trace: Path) -> Iterator[tuple[str, str, int, str]]:
    begun: dict[str, str] = {}
    for line in trace.read_text(errors="surrogateescape").splitlines():
        match = _LINE.match(line)
        if not match:
            continue
        pid, text = match.groups()
        if text.endswith("<unfinished ...>"):
            begun[pid] = text.removesuffix("<unfinished ...>").rstrip()
            continue
        if resumed := re.match(r"<\.\.\. \w+ resumed>(.*)", text, re.DOTALL):
            text = begun.pop(pid, "") + resumed[1]
        if done := _RESULT.match(text):
            yield done[1], done[2], int(done[3]), done[4] or ""


def _operation(call: str, arguments: str, result: int, result_path: str, root: str) -> Iterator[Operation]:
    def below(path: str) -> str | None:
        return os.path.relpath(path, root) if path.startswith(root + "/") else None

    strings = [ast.literal_eval("b" + text).decode(errors="replace") for text in _STRING.findall(arguments)[:2]]
    of_fd = _FD_PATH.match(arguments)
    path = below(of_fd[1]) if of_fd else below(strings[0]) if strings else None
    if call == "openat":
        path = below(result_path)
        if path is not None and "O_CREAT" in arguments:
            yield Operation("create", path)
        if path is not None and "O_TRUNC" in arguments:
            yield Operation("truncate", path)
    elif path is None:
        return
    elif call in ("write", "pwrite64"):
        data = ast.literal_eval("b" + _STRING.findall(arguments)[0])
        yield Operation("write", path, data=data[:result])
    elif call in ("fsync", "fdatasync"):
        yield Operation("sync", path)
    elif call == "ftruncate":
        yield Operation("cut", path, length=int(arguments.rpartition(",")[2]))
    elif call in ("rename", "renameat2", "link", "linkat"):
        target = below(strings[1])
        assert target is not None, arguments
        yield Operation("rename" if call.startswith("rename") else "link", path, target=target)
    elif call in ("unlink", "mkdir"):
        yield Operation(call, path)


@dataclass
class Inode:
    content: bytes = b""
    synced: bytes = b""


@dataclass
class Disk:
    """Names and bytes, as programs see them, and the names that have reached the disk."""

    names: dict[str, Inode] = field(default_factory=dict)
    durable_names: dict[str, Inode] = field(default_factory=dict)
    directories: set[str] = field(default_factory=set)

    def apply(self, operation: Operation) -> None:
        kind, path = operation.kind, operation.path
        inode = self.names.get(path)
        if kind == "mkdir":
            self.directories.add(path)
        elif kind == "create":
            self.names.setdefault(path, Inode())
        elif kind == "sync" and inode is None:
            self.durable_names = dict(self.names)  # a directory: with it, all names up to now
        elif inode is None:
            return  # not made while we looked
        elif kind == "sync":
            inode.synced = inode.content
        elif kind == "truncate":
            inode.content = b""
        elif kind == "write":
            inode.content += operation.data
        elif kind == "cut":
            inode.content = inode.content[: operation.length]
        elif kind == "rename":
            self.names[operation.target] = self.names.pop(path)
        elif kind == "link":
            self.names[operation.target] = inode
        elif kind == "unlink":
            del self.names[path]

    def states(self) -> Iterator[tuple[str, dict[str, bytes]]]:
        """What may be found after a failure now: (in words, {path: bytes})."""
        yield "names and bytes as synced", {path: inode.synced for path, inode in self.durable_names.items()}
        yield "all names, bytes as synced", {path: inode.synced for path, inode in self.names.items()}
        yield "all names, half of the unsynced bytes", {path: torn(inode) for path, inode in self.names.items()}
        yield "everything", {path: inode.content for path, inode in self.names.items()}


def torn(inode: Inode) -> bytes:
    if not inode.content.startswith(inode.synced):
        return inode.synced
    return inode.content[: len(inode.synced) + (len(inode.content) - len(inode.synced)) // 2]


def after_every_operation(done: list[Operation]) -> Iterator[tuple[int, str, dict[str, bytes]]]:
    """Every state of the disk that differs from all before it: (operations done, in words, {path: bytes})."""
    disk, seen = Disk(), set()
    for count, operation in enumerate(done, start=1):
        disk.apply(operation)
        for words, state in disk.states():
            digest = hashlib.sha256()
            for path, content in sorted(state.items()):
                digest.update(f"{path}\0{len(content)}\0".encode() + content)
            if digest.digest() not in seen:
                seen.add(digest.digest())
                yield count, words, state
