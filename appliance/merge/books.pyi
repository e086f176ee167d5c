"""The one place where the packets of an output are counted, from the rings into a file or a drop.

A batch is what is in the merge's buffer. It is noted when it is there (`note_batch`), before anything is tried with it;
then exactly one of `count_written` and `count_dropped` takes it off.
"""

from collections.abc import Sequence

from appliance.counters import CounterPage
from appliance.merge.order import Merge

class Books:
    """`page` has MERGE_FIELDS, each of `source_pages` has MERGE_SOURCE_FIELDS. Counts go on from what they hold."""

    def __init__(self, merge: Merge, page: CounterPage, source_pages: Sequence[CounterPage]) -> None: ...
    def set_unsettled(self, packets: Sequence[int]) -> None:
        """Per source: packets of a predecessor that are still being looked for, and count as held."""
    def note_consumed(self) -> None:
        """What was taken out of the rings and is no packet, or was dropped there; and how far time has come."""
    def note_batch(self) -> None: ...
    def count_written(self) -> None: ...
    def count_dropped(self) -> int:
        """Returns how many packets that were."""
    def take_back(self, index: int, packets: int) -> None:
        """Packets of a source that were counted as written, and whose file is gone: dropped by the writer."""
    def take(self) -> tuple[list[int], int, int, int, int, int] | None:
        """What was written since the last call, for the open segment: packets per source, bytes that the pump wrote,
        first and last time, late packets, the worst lateness in ns. None: nothing."""
