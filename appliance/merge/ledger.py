"""Which packets of each source lie in files that have left `work/`: kept so that a successor can balance the books.

A file leaves `work/` by one rename, and is counted behind it. Whoever dies between the two must not make its packets
look lost. So the publisher first writes down which file it is about to move (its inode) and what the counts will be
then; if that file is not in `work/` any longer, the rename was done, and the counts hold.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Mapping, Sequence

from appliance.counters import SETTLED_FIELDS, CounterPage


class Ledger:
    """Written by one thread, the publisher's. `source_pages`: of MERGE_SOURCE_FIELDS, one for each of `labels`."""

    def __init__(self, page: CounterPage, labels: Sequence[str], source_pages: Sequence[CounterPage]) -> None:
        self._page = page
        self._pages = dict(zip(labels, source_pages, strict=True))

    def begin(self, path: str, packets: Mapping[str, int], **counted: int) -> None:
        """The file at `path`, with so many packets of each source, is about to be moved. `counted`: what is added to
        the page's SETTLED_FIELDS with it."""
        for name in SETTLED_FIELDS:
            self._page[f"settling_{name}"] = self._page[name] + counted.get(name, 0)
        for label, page in self._pages.items():
            page["settling_packets"] = page["closed_packets"] + packets.get(label, 0)
        self._page["settling_inode"] = os.stat(path).st_ino

    def end(self) -> None:
        """It was. Doing this twice does no harm: a successor does it again."""
        for page in self._pages.values():
            page["closed_packets"] = page["settling_packets"]
        for name in SETTLED_FIELDS:
            self._page[name] = self._page[f"settling_{name}"]
        self._page["settling_inode"] = 0

    def give_up(self) -> None:
        """It was not, and stays where it is."""
        self._page["settling_inode"] = 0

    def add(self, packets: Mapping[str, int]) -> None:
        """Packets that went into a stream, which is never moved."""
        for label, count in packets.items():
            self._pages[label].add("closed_packets", count)

    def take_over(self, leftovers: Sequence[str]) -> None:
        """A predecessor died: what it was moving counts, unless the file is still among the `leftovers`."""
        inode = self._page["settling_inode"]
        if inode and inode not in map(inode_of, leftovers):
            self.end()
        else:
            self.give_up()


def inode_of(path: str) -> int:
    """0 when it does not exist."""
    with contextlib.suppress(OSError):
        return os.stat(path, follow_symlinks=False).st_ino
    return 0
