"""A capture file into a packet ring and a digest ring."""

from appliance.capture.application import Inspector
from appliance.config import Interface
from appliance.counters import CounterPage
from appliance.ring.ring import Producer

class FileCapture:
    """Reads the file of `interface` (pcapfile: or pcapng:) into `records` and, if given, `digests`.

    A full ring is waited for, nothing is dropped. A successor on the same rings goes on behind what was published.
    Raises what FileSource raises; FormatError comes behind the last whole packet of a damaged file.
    """

    def __init__(
        self,
        interface: Interface,
        records: Producer,
        digests: Producer | None,
        page: CounterPage,
        *,
        inner: bool = False,
        inspector: Inspector | None = None,
    ) -> None: ...
    ended: bool
    """Everything is published."""
    must_wait: bool
    """There is no room, or the recorded time has not come: a sleep is in order."""
    waits_for_room: bool
    """What the last `step` waited for was room in a ring."""
    def step(self) -> int:
        """One batch further. Returns 0, or for how many ms there may be nothing to do."""
    def close(self) -> None: ...
