"""Start and stop triggers and keep rules, decided per packet in compiled code.

What the criteria mean here:

FCSERR  the frame's last 4 bytes are not its CRC-32. Only where the card hands the check sequence up (`rx-fcs`).
PLDERR  a wrong IPv4, TCP or UDP checksum, or a wrong checksum of our test payload (payload.pyi). Never where the
        checksum was left to the sender's card, where the packet was cut, and in fragments.
TPLD    the frame ends with a trailer of ours.
FILTER  a BPF program says so, run over the packet as a file would hold it (VLAN tag in its place).
"""

from typing_extensions import Buffer

class PortTap:
    """The worker's end of a port: what the monitor asked for is carried out on the packets that are shown.

    A port that was capturing when its worker died goes on capturing with the next one. ValueError, OSError: as for
    appliance.ring.port.PortMemory.
    """

    def __init__(self, fd: int, generation: int) -> None: ...
    def attach(self, socket_serial: int, linktype: int) -> None:
        """Says whose packets come now. With the same serial as a predecessor, blocks that it showed are left out."""
    def show(
        self,
        data: Buffer,
        timestamp_ns: int,
        original_length: int | None = None,
        *,
        checksum_not_ready: bool = False,
        outgoing: bool = False,
    ) -> None:
        """Offers one packet: looks for a command, then decides. For other sources than a kernel's ring, and tests."""
    def rest(self, now_ns: int) -> None:
        """Says that every packet that had arrived was shown: a stop that was asked for takes effect."""

class Gate:
    """Which packets of a live source are recorded: those from one that meets the start criterion to one that meets the
    stop criterion, both included, as far as they are of the kind that is kept.

    Numbers as in the enums of appliance.capturer (stop FULL is none here). Programs are BPF instructions, empty where
    the criterion is not FILTER. `stream` is that of keep TPLD; `fcs` says that frames end with their check sequence.
    `repeats`: after a stop the start criterion opens it again. With start ON it is open from the
    beginning, and a stop is for good. ValueError: out of range, or a program that is none.
    """

    def __init__(
        self,
        linktype: int,
        start: int,
        start_program: bytes,
        stop: int,
        stop_program: bytes,
        keep: int,
        keep_program: bytes,
        stream: int = 0,
        fcs: bool = False,
        repeats: bool = True,
    ) -> None: ...
    def lets_pass(self, data: Buffer) -> bool:
        """The verdict on the next packet, as a walk through a block asks for it; for tests."""
    state: int
    """0 closed, 1 open, 2 closed for good."""
