"""What stands in the way of a good capture on this host, and what to do about it. Looks, and changes nothing."""

from __future__ import annotations

from collections.abc import Sequence

from appliance.capture.interfaces import HostInterface, host_interfaces
from appliance.config import Config
from appliance.doctor.check import Check
from appliance.doctor.host import (
    check_clock,
    check_interface,
    check_missing_interfaces,
    check_packages,
    check_packet_socket,
    check_rights,
    check_workers_package,
)
from appliance.doctor.service import check_service


def examine(config: Config | None) -> list[Check]:
    """All checks; those that need a configuration (expanded already) only with one."""
    interfaces = host_interfaces()
    checks = [check_rights(), check_packet_socket(), check_clock(), check_packages(), check_workers_package()]
    names = captured_names(config, interfaces)
    checks += [check for interface in interfaces if interface.name in names for check in check_interface(interface)]
    if config is not None:
        checks += check_missing_interfaces(names, interfaces)
        checks += check_service(config)
    return checks


def captured_names(config: Config | None, interfaces: Sequence[HostInterface]) -> list[str]:
    """The live interfaces of the configuration; without one, those that `ring:*` would take."""
    if config is None:
        return [interface.name for interface in interfaces if not interface.left_out_because]
    return [interface.source.target for interface in config.interfaces if interface.source.is_live]
