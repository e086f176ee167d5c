"""An output's packets into one more ring, in the output's order, for who may miss some: a full ring never waits."""

from appliance.counters import CounterPage

class Tap:
    """Fills the ring `fd` with what a Merge emits (`Merge.use_tap`). A record's interface field holds its link type.

    What finds no room is counted in `tap_dropped_packets` of `page` (MERGE_FIELDS), the rest in `tapped_packets`; both
    go on where a predecessor's counts in the ring ended. ValueError, OSError: see ring.Producer.
    """

    def __init__(self, fd: int, generation: int, consumer_eventfd: int, page: CounterPage) -> None: ...
    def end(self) -> None:
        """Nothing will follow."""
