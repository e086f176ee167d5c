"""The socket that the monitor serves HTTP on. Apart from the server, so that who only opens it need not load that."""

from __future__ import annotations

import errno
import os
import socket

from appliance.errors import CannotCreateError, MissingPermissionError

BACKLOG = 512


def open_listener(host: str, port: int) -> socket.socket:
    """A listening TCP socket. CannotCreateError, MissingPermissionError: why not, with the address."""
    where = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
    listener: socket.socket | None = None
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listener = socket.socket(family, kind | socket.SOCK_CLOEXEC, protocol)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        listener.listen(BACKLOG)
        listener.setblocking(False)
        return listener
    except OSError as error:
        if listener is not None:
            listener.close()
        if error.errno in (errno.EACCES, errno.EPERM):
            raise MissingPermissionError(
                f"monitor.listen {where}: user {os.geteuid()} may not listen there; choose a port above 1023"
            ) from None
        hint = "another service has it; stop that one, or set monitor.listen to a free port"
        if error.errno != errno.EADDRINUSE:
            hint = "set monitor.listen to an address of this host"
        raise CannotCreateError(f"monitor.listen {where}: {error.strerror}; {hint}") from None
