"""What an interface's card and driver are set to do (ethtool features), as the kernel tells without any privilege."""

from __future__ import annotations

import array
import fcntl
import socket
import struct

# linux/sockios.h, linux/ethtool.h
_SIOCETHTOOL = 0x8946
_GSTRINGS, _GSSET_INFO, _GFEATURES = 0x1B, 0x37, 0x3A
_ETH_SS_FEATURES = 4
_STRING_BYTES = 32
_MAX_FEATURES = 1024


def active_features(interface: str) -> frozenset[str]:
    """The features that are on, by ethtool's names ("rx-fcs", "rx-gro", ...). OSError: no such interface."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        count = _count(sock, interface)
        names = _names(sock, interface, count)
        words = _active_words(sock, interface, (count + 31) // 32)
    return frozenset(name for i, name in enumerate(names) if words[i // 32] >> i % 32 & 1)


def hands_up_fcs(interface: str) -> bool:
    """Whether received frames end with their check sequence (`ethtool -K IF rx-fcs on`)."""
    try:
        return "rx-fcs" in active_features(interface)
    except OSError:
        return False


def _count(sock: socket.socket, interface: str) -> int:
    """struct ethtool_sset_info: how many features this kernel knows."""
    answer = _ask(sock, interface, struct.pack("=IIQI", _GSSET_INFO, 0, 1 << _ETH_SS_FEATURES, 0))
    _, _, mask, count = struct.unpack("=IIQI", answer)
    return min(count, _MAX_FEATURES) if mask else 0


def _names(sock: socket.socket, interface: str, count: int) -> list[str]:
    """struct ethtool_gstrings."""
    head = struct.pack("=III", _GSTRINGS, _ETH_SS_FEATURES, count)
    answer = _ask(sock, interface, head + bytes(_STRING_BYTES * count))
    texts = (answer[12 + _STRING_BYTES * i : 12 + _STRING_BYTES * (i + 1)] for i in range(count))
    return [text.partition(b"\0")[0].decode("ascii", "replace") for text in texts]


def _active_words(sock: socket.socket, interface: str, words: int) -> list[int]:
    """struct ethtool_gfeatures: 32 features a block of (available, requested, active, never changed)."""
    answer = _ask(sock, interface, struct.pack("=II", _GFEATURES, words) + bytes(16 * words))
    return [struct.unpack_from("=4I", answer, 8 + 16 * i)[2] for i in range(words)]


def _ask(sock: socket.socket, interface: str, request: bytes) -> bytes:
    """SIOCETHTOOL (netdevice(7)): the kernel answers in the request's own memory."""
    memory = array.array("B", request)
    address, _ = memory.buffer_info()
    fcntl.ioctl(sock, _SIOCETHTOOL, struct.pack("16sP16x", interface.encode()[:15], address))
    return memory.tobytes()
