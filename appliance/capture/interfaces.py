"""The host's network interfaces, as the kernel tells them over rtnetlink.

Netlink answers for the network namespace that we are in; /sys answers for the one in which it was mounted, which is
another one after `unshare --net` or setns(2).
"""

from __future__ import annotations

import ctypes
import fcntl
import ipaddress
import os
import socket
import struct
from collections.abc import Iterator
from dataclasses import dataclass

import psutil

from appliance.capture.uri import is_interface_name
from appliance.errors import InputOutputError

# linux/netlink.h, linux/rtnetlink.h, linux/if_link.h, linux/if.h, linux/if_arp.h, linux/ethtool.h
_NETLINK_HEADER = struct.Struct("=IHHII")  # length, type, flags, sequence, port
_LINK_INFO = struct.Struct("=BxHiII")  # family, device type, index, flags, change
_ATTRIBUTE = struct.Struct("=HH")  # length, type
_ATTRIBUTE_TYPE_MASK = 0x3FFF  # without NLA_F_NESTED and NLA_F_NET_BYTEORDER
_NLMSG_ERROR, _NLMSG_DONE, _RTM_NEWLINK, _RTM_GETLINK = 2, 3, 16, 18
_NLM_F_REQUEST, _NLM_F_DUMP = 0x1, 0x300
_IFLA_ADDRESS, _IFLA_IFNAME, _IFLA_MTU, _IFLA_LINKINFO, _IFLA_LINK_NETNSID = 1, 3, 4, 18, 37
_IFLA_INFO_KIND, _IFLA_INFO_SLAVE_KIND = 1, 4
_IFF_UP, _IFF_LOOPBACK, _IFF_RUNNING = 0x1, 0x8, 0x40
_ARPHRD_ETHER = 1
_SIOCETHTOOL, _ETHTOOL_GDRVINFO = 0x8946, 3
_DRIVER_INFO_BYTES, _DRIVER_OFFSET, _DRIVER_BYTES = 196, 4, 32
_RECEIVE_BYTES = 1 << 18


@dataclass(frozen=True)
class HostInterface:
    """One interface. `kind`: "loopback", "ethernet", "other", or what the kernel calls a virtual one ("veth", ...)."""

    name: str
    index: int
    kind: str
    is_up: bool
    has_carrier: bool
    mac: str  # "" when it has none
    mtu: int
    speed_mbps: int  # 0 when unknown
    driver: str  # "" when unknown
    is_bridge_port: bool
    is_container_veth: bool

    @property
    def left_out_because(self) -> str:
        """Why `ring:*` does not take it; "" when it does. Both kinds carry what another interface shows as well."""
        if not is_interface_name(self.name):
            return "has a name that is not taken"
        if not self.is_up:
            return "is down"
        if self.is_bridge_port:
            return "is a port of a bridge"
        if self.is_container_veth:
            return "leads into a container"
        return ""


def host_interfaces() -> tuple[HostInterface, ...]:
    """All interfaces of this network namespace, in the order of their index; needs no privilege.

    InputOutputError: the kernel refused to answer.
    """
    speeds = {name: stats.speed for name, stats in psutil.net_if_stats().items()}
    addressed = _addressed_interfaces()
    try:
        links = sorted(_links(), key=lambda link: link.index)
    except OSError as error:
        raise InputOutputError(f"the list of interfaces: netlink says {error.strerror}") from None
    return tuple(
        HostInterface(
            name=link.name,
            index=link.index,
            kind=link.kind,
            is_up=bool(link.flags & _IFF_UP),
            has_carrier=bool(link.flags & _IFF_RUNNING),
            mac=link.mac,
            mtu=link.mtu,
            speed_mbps=max(0, speeds.get(link.name, 0)),
            driver=_driver(link.name),
            is_bridge_port=link.port_kind in ("bridge", "openvswitch"),
            # The host's end of a container's veth is a mere port: its own address, if any, is link-local. An end with
            # an address is how this host (or this container, seen from inside) reaches the world.
            is_container_veth=link.kind == "veth" and link.is_peer_elsewhere and link.name not in addressed,
        )
        for link in links
    )


@dataclass(frozen=True)
class _Link:
    name: str
    index: int
    kind: str
    port_kind: str
    flags: int
    mac: str
    mtu: int
    is_peer_elsewhere: bool


def _links() -> Iterator[_Link]:
    request = _LINK_INFO.pack(socket.AF_UNSPEC, 0, 0, 0, 0)
    header = _NETLINK_HEADER.pack(_NETLINK_HEADER.size + len(request), _RTM_GETLINK, _NLM_F_REQUEST | _NLM_F_DUMP, 1, 0)
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, socket.NETLINK_ROUTE) as netlink:
        netlink.send(header + request)
        while True:
            for kind, body in _messages(netlink.recv(_RECEIVE_BYTES)):
                if kind == _NLMSG_DONE:
                    return
                if kind == _NLMSG_ERROR:
                    number = -struct.unpack_from("=i", body)[0]
                    raise OSError(number, os.strerror(number))
                if kind == _RTM_NEWLINK:
                    yield _link(body)


def _messages(datagram: bytes) -> Iterator[tuple[int, bytes]]:
    offset = 0
    while offset + _NETLINK_HEADER.size <= len(datagram):
        length, kind, *_ = _NETLINK_HEADER.unpack_from(datagram, offset)
        if length < _NETLINK_HEADER.size:
            return
        yield kind, datagram[offset + _NETLINK_HEADER.size : offset + length]
        offset += (length + 3) & ~3


def _attributes(body: bytes) -> dict[int, bytes]:
    found = {}
    offset = 0
    while offset + _ATTRIBUTE.size <= len(body):
        length, kind = _ATTRIBUTE.unpack_from(body, offset)
        if length < _ATTRIBUTE.size:
            break
        found[kind & _ATTRIBUTE_TYPE_MASK] = body[offset + _ATTRIBUTE.size : offset + length]
        offset += (length + 3) & ~3
    return found


def _link(body: bytes) -> _Link:
    _, device_type, index, flags, _ = _LINK_INFO.unpack_from(body)
    attributes = _attributes(body[_LINK_INFO.size :])
    info = _attributes(attributes.get(_IFLA_LINKINFO, b""))
    kind = _text(info.get(_IFLA_INFO_KIND, b""))
    if not kind:
        kind = "loopback" if flags & _IFF_LOOPBACK else "ethernet" if device_type == _ARPHRD_ETHER else "other"
    mac = attributes.get(_IFLA_ADDRESS, b"")
    return _Link(
        name=_text(attributes[_IFLA_IFNAME]),
        index=index,
        kind=kind,
        port_kind=_text(info.get(_IFLA_INFO_SLAVE_KIND, b"")),
        flags=flags,
        mac=mac.hex(":") if any(mac) else "",
        mtu=struct.unpack("=I", attributes[_IFLA_MTU])[0],
        is_peer_elsewhere=_IFLA_LINK_NETNSID in attributes,
    )


def _text(value: bytes) -> str:
    return os.fsdecode(value.rstrip(b"\0"))


def _driver(name: str) -> str:
    """The driver's name, by ethtool's ioctl (which, unlike /sys, is of our network namespace)."""
    info = bytearray(_DRIVER_INFO_BYTES)
    struct.pack_into("=I", info, 0, _ETHTOOL_GDRVINFO)
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as control:
        address = _address_of(info)
        request = struct.pack("@16sP16x", os.fsencode(name), address)
        try:
            fcntl.ioctl(control, _SIOCETHTOOL, request)
        except OSError:
            return ""
    return _text(bytes(info[_DRIVER_OFFSET : _DRIVER_OFFSET + _DRIVER_BYTES]).partition(b"\0")[0])


def _address_of(buffer: bytearray) -> int:
    return ctypes.addressof(ctypes.c_char.from_buffer(buffer))


def _addressed_interfaces() -> set[str]:
    """Names of the interfaces that have an address of more than link scope."""
    found = set()
    for name, addresses in psutil.net_if_addrs().items():
        for entry in addresses:
            if entry.family in (socket.AF_INET, socket.AF_INET6):
                address = ipaddress.ip_address(entry.address.partition("%")[0])
                if not address.is_link_local:
                    found.add(name)
    return found
