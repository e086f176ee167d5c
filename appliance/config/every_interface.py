"""`ring:*`: an [[interface]] for each interface of this host."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Protocol

from appliance.config.interface import Interface
from appliance.config.whole import Config
from appliance.errors import MissingInputError


class HostInterface(Protocol):
    """What is asked of an interface of this host; appliance/capture/interfaces.py finds them."""

    @property
    def name(self) -> str: ...

    @property
    def left_out_because(self) -> str:
        """Why `ring:*` does not take it; "" when it does."""


def expand_interfaces(config: Config, host_interfaces: Iterable[HostInterface]) -> Config:
    """The same configuration with `ring:*` (or `pcap:*`, `int:*`) replaced by the interfaces that it stands for.

    Interfaces that have an [[interface]] of their own are left to it. MissingInputError: none is left.
    """
    wildcard = next((interface for interface in config.interfaces if interface.source.is_every_interface), None)
    if wildcard is None:
        return config
    own = {interface.source.target for interface in config.interfaces if interface.source.is_live}
    hosts = list(host_interfaces)
    found = [host.name for host in hosts if not host.left_out_because and host.name not in own]
    if not found:
        reasons = "; ".join(f"{host.name}: {host.left_out_because or 'has an [[interface]] already'}" for host in hosts)
        raise MissingInputError(f"{wildcard.uri} finds no interface to record ({reasons or 'this host has none'})")
    expanded: list[Interface] = []
    for interface in config.interfaces:
        if interface is wildcard:
            scheme = wildcard.source.scheme
            expanded += [wildcard.model_copy(update={"uri": f"{scheme}:{name}", "label": ""}) for name in found]
        else:
            expanded.append(interface)
    return Config(
        memory_bytes=config.memory_bytes,
        interfaces=tuple(expanded),
        outputs=config.outputs,
        meter=config.meter,
        traceflow=config.traceflow,
        monitor=config.monitor,
        service=config.service,
    )
