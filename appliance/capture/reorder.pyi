"""The unpublished tail of a live source: held for a moment, put in the order of time, published up to a clean cut.

Compiled sources cimport the class and work on whole blocks; these methods are the same steps, a record at a time.
"""

from typing_extensions import Buffer

from appliance.ring.ring import Producer

class ReorderTail:
    """Holds at most `capacity` records that are written into one ring, or two (packets and their digests), and are not
    published yet. The rings' other records must be published."""

    def __init__(self, capacity: int = 131072) -> None: ...
    reordered: int
    """Records that stood behind a younger one and were put right, ever."""
    waiting: int
    """Records in the tail."""
    def push(
        self, records: Producer, digests: Producer | None, record: Buffer, digest: Buffer, timestamp_ns: int
    ) -> bool:
        """Writes a record, and its digest if it is not empty, behind the others. False: tail or ring is full, nothing
        was written. A full digest ring costs the digest alone."""
    def publish(self, records: Producer, digests: Producer | None, boundary_ns: int) -> tuple[int, int, int]:
        """Publishes records up to `boundary_ns`, sorted by time, then arrival: as many of the first that arrived as are
        all not younger than any that arrived later. The order of arrival is cut there, so that a successor can go on
        exactly behind what is published.

        Returns (records published, the watermark that was promised: nothing left in the tail is older, how many of
        them came after a younger one was published already).
        """
    def new_epoch(self) -> None:
        """The clock was set: what was published so far makes nobody late. The tail must be empty."""
