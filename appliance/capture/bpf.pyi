"""Packet filters: compiled by libpcap, run by the kernel or, for files, by libpcap in user space."""

from typing_extensions import Buffer

class Filter:
    """A compiled program. `live` says that it reads VLAN tags where the kernel keeps them, beside the packet."""

    text: str
    live: bool
    @property
    def instructions(self) -> bytes:
        """The program, 8 bytes an instruction (struct sock_filter)."""
    def matches(self, packet: Buffer, original_length: int | None = None) -> bool:
        """Whether a packet of a file passes."""
    def keep_matching(self, address: int, length: int) -> tuple[int, int]:
        """Filters a batch of packet records at `address` in place; other records stay. GIL released.

        Returns (bytes kept, packets rejected). ValueError: a record is corrupt.
        """

def compile_live(interface: str, text: str, snaplen: int) -> Filter:
    """Compiles on an activated handle of the interface; packets that pass are cut to `snaplen` by the kernel.

    Raises ConfigError (bad expression), MissingInputError (no such interface), MissingPermissionError (CAP_NET_RAW).
    """

def compile_offline(linktype: int, text: str, snaplen: int = 262144) -> Filter:
    """Compiles for packets of a file with this link type. Raises ConfigError (bad expression)."""

def attach(fd: int, instructions: bytes) -> None:
    """Makes the kernel run a program on a socket. OSError when it refuses."""

def accept_all(snaplen: int) -> bytes:
    """A program that passes every packet, cut to `snaplen`."""

def reject_all() -> bytes:
    """A program that passes nothing: the way to stop a socket without losing what it holds."""
