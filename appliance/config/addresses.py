"""HOST:PORT, and where flow records can go."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal
from urllib.parse import urlsplit

_EXPORT_SCHEMES: dict[str, Literal["udp", "tcp", "tls"]] = {"udp": "udp", "tcp": "tcp", "tls": "tls"}


@dataclass(frozen=True)
class Destination:
    """Where flow records go. `path` is set for files only (None: below the state directory), host and port else."""

    scheme: Literal["udp", "tcp", "tls", "file"]
    host: str = ""
    port: int = 0
    path: Path | None = None


def parse_destination(text: str) -> Destination:
    """`udp://HOST:PORT`, `tcp://...`, `tls://...`, `file:` or `file:DIRECTORY`; ValueError says what is wrong."""
    if text.startswith("file:"):
        path = text.removeprefix("file:")
        if "\0" in path:
            raise ValueError(f"{text!r} holds a zero byte")
        return Destination("file", path=Path(path) if path else None)
    scheme, separator, address = text.partition("://")
    if scheme in ("dtls", "sctp"):
        raise ValueError(f"{scheme}:// is not supported; flow records go to udp:// tcp:// tls:// file:")
    if not separator or scheme not in _EXPORT_SCHEMES:
        raise ValueError(
            f"must be udp://HOST:PORT, tcp://HOST:PORT, tls://HOST:PORT, file: or file:DIRECTORY, is {text!r}"
        )
    host, port = parse_address(address)
    if port == 0:
        raise ValueError(f"{text!r} names no port")
    return Destination(_EXPORT_SCHEMES[scheme], host=host, port=port)


def parse_address(text: str) -> tuple[str, int]:
    """`HOST:PORT` or `[IPV6]:PORT` -> (host, port); ValueError says what is wrong."""
    try:
        parts = urlsplit(f"//{text}")
        host, port = parts.hostname, parts.port
    except ValueError as error:
        raise ValueError(f"must be HOST:PORT or [IPV6]:PORT, is {text!r} ({error})") from None
    if not host or port is None or parts.netloc != text or parts.username is not None:
        raise ValueError(f"must be HOST:PORT or [IPV6]:PORT, is {text!r}")
    return host, port
