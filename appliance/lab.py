"""A run that needs no rights: user and network namespaces of its own, and traffic that it makes itself on loopback.

For `appliance run --lab`: anybody can see the whole appliance at work, on any machine that allows unprivileged user
namespaces. Nothing of the machine's own network is seen or touched.
"""

from __future__ import annotations

import ctypes
import fcntl
import multiprocessing
import os
import signal
import socket
import struct
import time
from multiprocessing.process import BaseProcess

from appliance.errors import MissingPermissionError
from appliance.process import die_with_parent, libc, set_process_name

CLONE_NEWUSER = 0x10000000
CLONE_NEWNET = 0x40000000
SIOCGIFFLAGS = 0x8913
SIOCSIFFLAGS = 0x8914
IFF_UP = 1
DATAGRAM_SIZES = (64, 256, 1200)
EXCHANGES_PER_S = 50


def enter() -> None:
    """Moves this process into new user and network namespaces, where it may capture, and brings loopback up.

    To be called before any thread exists. MissingPermissionError: this machine does not allow it.
    """
    uid, gid = os.getuid(), os.getgid()
    if libc().unshare(CLONE_NEWUSER | CLONE_NEWNET) != 0:
        reason = os.strerror(ctypes.get_errno())
        raise MissingPermissionError(
            f"a lab run needs unprivileged user namespaces, which this machine refuses ({reason}); "
            "run with sudo instead, or allow them: sudo sysctl kernel.unprivileged_userns_clone=1 "
            "(on Ubuntu: kernel.apparmor_restrict_unprivileged_userns=0)"
        )
    try:
        write("/proc/self/setgroups", "deny")
        write("/proc/self/uid_map", f"0 {uid} 1")
        write("/proc/self/gid_map", f"0 {gid} 1")
        bring_up("lo")
    except OSError as error:
        raise MissingPermissionError(
            f"a lab run needs a user namespace with rights of its own, which this machine refuses ({error}); "
            "run with sudo instead"
        ) from error


def write(path: str, text: str) -> None:
    with open(path, "w") as file:
        file.write(text)


def bring_up(interface: str) -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        request = struct.pack("16sH22x", interface.encode(), 0)
        flags = struct.unpack_from("H", fcntl.ioctl(sock, SIOCGIFFLAGS, request), 16)[0]
        fcntl.ioctl(sock, SIOCSIFFLAGS, struct.pack("16sH22x", interface.encode(), flags | IFF_UP))


def start_traffic() -> BaseProcess:
    """A process that makes steady, modest traffic on loopback until its parent ends: UDP in three sizes, short TCP
    connections."""
    parent = os.getpid()
    process = multiprocessing.get_context("fork").Process(target=make_traffic, args=(parent,), daemon=True)
    process.start()
    return process


def make_traffic(parent: int) -> None:
    for ignored in (signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(ignored, signal.SIG_IGN)  # a terminal's, for the service; it ends us with SIGTERM
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    die_with_parent(parent)
    set_process_name("lab-traffic")
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as receiver, socket.create_server(("127.0.0.1", 0)) as server:
        receiver.bind(("127.0.0.1", 0))
        number = 0
        while True:
            send_datagram(receiver, DATAGRAM_SIZES[number % len(DATAGRAM_SIZES)])
            exchange(server, number)
            number += 1
            time.sleep(1 / EXCHANGES_PER_S)


def send_datagram(receiver: socket.socket, size: int) -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sender:
        sender.sendto(bytes(size), receiver.getsockname())
        receiver.recv(65536)


def exchange(server: socket.socket, number: int) -> None:
    """One connection: a request, a longer answer, an orderly end."""
    with socket.create_connection(server.getsockname()) as client:
        connection, _ = server.accept()
        with connection:
            client.sendall(b"request %d\n" % number)
            connection.recv(4096)
            connection.sendall(bytes(3000))
            client.recv(4096)
