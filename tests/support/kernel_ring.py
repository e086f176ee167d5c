"""A live interface's ring as the kernel fills it (TPACKET_V3, Documentation/networking/packet_mmap.rst), in a file in
memory: a capture by itself, without a sender."""

from __future__ import annotations

import os
from typing import Any

import numpy as np

BLOCK_BYTES = 1 << 20
FIRST_PACKET = 48  # behind the block's header
DATA_OFFSET = 82  # tp_mac: behind the packet's header and the address; the IP header is aligned
TP_STATUS_USER = 1
ARPHRD_ETHER = 1
INTERVAL_NS = 1000  # between two packets

BLOCK = np.dtype(
    {
        "names": ["version", "block_status", "num_pkts", "offset_to_first_pkt", "blk_len", "seq_num"],
        "formats": ["<u4", "<u4", "<u4", "<u4", "<u4", "<u8"],
        "offsets": [0, 8, 12, 16, 20, 24],
        "itemsize": BLOCK_BYTES,
    }
)

Array = np.ndarray[Any, Any]


def packet_type(size: int) -> np.dtype[Any]:
    """tpacket3_hdr, sockaddr_ll and the frame, as far as a capture reads them."""
    return np.dtype(
        {
            "names": [
                *("next", "sec", "nsec", "snaplen", "len", "status", "mac", "vlan_tci", "vlan_tpid"),
                *("ifindex", "hatype", "pkttype", "frame"),
            ],
            "formats": [*["<u4"] * 6, "<u2", "<u4", "<u2", "<i4", "<u2", "u1", f"V{size}"],
            "offsets": [0, 4, 8, 12, 16, 20, 24, 32, 36, 52, 56, 58, DATA_OFFSET],
            "itemsize": (DATA_OFFSET + size + 15) // 16 * 16,
        }
    )


class KernelRing:
    """`fd` takes the place of the packet socket. All `packets` are the same frame, a microsecond apart; `headers` are
    theirs, a row for each block, to be changed."""

    def __init__(self, frame: bytes, blocks: int, ifindex: int) -> None:
        self.fd = os.memfd_create("kernel ring")
        os.ftruncate(self.fd, blocks * BLOCK_BYTES)
        self._blocks: Array = np.memmap(os.fdopen(os.dup(self.fd), "r+b"), BLOCK, shape=(blocks,))
        packet = packet_type(len(frame))
        each = (BLOCK_BYTES - FIRST_PACKET) // packet.itemsize
        octets = self._blocks.view(np.uint8).reshape(blocks, BLOCK_BYTES)
        self.headers = octets[:, FIRST_PACKET : FIRST_PACKET + each * packet.itemsize].view(packet)
        self.headers["next"] = packet.itemsize
        self.headers["snaplen"] = self.headers["len"] = len(frame)
        self.headers["mac"] = DATA_OFFSET
        self.headers["ifindex"] = ifindex
        self.headers["hatype"] = ARPHRD_ETHER
        self.headers["frame"] = np.frombuffer(frame, f"V{len(frame)}")
        self._blocks["offset_to_first_pkt"] = FIRST_PACKET
        self._blocks["blk_len"] = BLOCK_BYTES
        self.packets = self.headers.size

    def hand_over(self, now_ns: int) -> None:
        """All blocks are full again, with packets from `now_ns` on."""
        stamps = now_ns + INTERVAL_NS * np.arange(self.packets, dtype=np.uint64).reshape(self.headers.shape)
        self.headers["sec"] = stamps // 1_000_000_000
        self.headers["nsec"] = stamps % 1_000_000_000
        self._blocks["num_pkts"] = self.headers.shape[1]
        self._blocks["seq_num"] += np.uint64(len(self._blocks))
        self.hand_over_again()

    def hand_over_again(self) -> None:
        """All blocks, as they are."""
        self._blocks["block_status"] = TP_STATUS_USER

    def close(self) -> None:
        os.close(self.fd)
