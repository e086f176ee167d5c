"""A capture file as digest records (ring/digest.h), for who wants nothing else of its packets."""

import os

from appliance.capture.application import Inspector

class DigestFile:
    """One capture file of any kind that CaptureReader reads; it raises what that raises.

    `path` may also be a URI, which must tell the format of what its content does not (`tsh:PATH`).

    No packet is copied: the parser looks at them in the reader's buffer. `source`: the interface that every digest
    gets, as the merge would write it. `inner`: tunnels are described by their innermost IP header. `inspector`: what
    looks at the payloads, if anything does.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        source: int = 0,
        *,
        inner: bool = False,
        inspector: Inspector | None = None,
    ) -> None: ...

    ended: bool
    """The file is over, and all its digests were given."""
    read_packets: int
    """Read from the file so far; the last of them may not be digested yet."""
    ignored: list[int]
    """Packets that gave no digest, by their reasons, and their octets: the order of `counters.IGNORED_FIELDS`."""

    def fill(self, address: int, room: int) -> int:
        """Digests for at most `room` octets of memory at `address` (aligned to 4); returns the octets written.

        It fills the room, but for the file's end. A damaged file gives the digests of its whole packets first; the call
        after them raises FormatError.
        """
    def close(self) -> None: ...
