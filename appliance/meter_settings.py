"""The meter's tables of the configuration, as the meter itself wants them, and what can be told of them beforehand."""

from __future__ import annotations

import os

from appliance.config import Config
from appliance.errors import MissingPermissionError
from appliance.meter.own import own_elements
from appliance.meter.settings import ExportSettings, MeterSettings
from appliance.prepare import missing_parts


def meter_settings(config: Config) -> MeterSettings:
    meter = config.meter
    own_elements(meter.elements)  # here, where a mistake is told to the user; the worker would die of it
    return MeterSettings(
        elements=meter.elements,
        idle_timeout_s=meter.idle_timeout_s,
        active_timeout_s=meter.active_timeout_s,
        max_flows=meter.max_flows,
        vlan_in_key=meter.vlan_in_key,
        interface_in_key=meter.interface_in_key,
        tcp_analysis=meter.tcp_analysis,
        packet_sampling=meter.packet_sampling,
        flow_sampling=meter.flow_sampling,
        packet_sequence=meter.packet_sequence,
        zero_length=meter.zero_length,
        tunnels=meter.tunnels,
        applications=meter.applications,
        entropy=meter.entropy,
        name_bytes=meter.name_bytes,
        max_fragmented=meter.max_fragmented,
        fragment_timeout_s=meter.fragment_timeout_s,
        export=tuple(
            ExportSettings(
                uri=export.uri,
                domain=export.domain,
                biflow=export.biflow,
                nanoseconds=export.nanoseconds,
                tcp_analysis=export.tcp_analysis,
                message_bytes=export.mtu_bytes,
                template_refresh_s=export.template_refresh_s,
                template_refresh_messages=export.template_refresh_messages,
                rotate_seconds=export.rotate_seconds,
                tls_ca=export.tls_ca,
                tls_certificate=export.tls_certificate,
                tls_key=export.tls_key,
                tls_name=export.tls_name,
                directory=config.flows_directory.parent,
            )
            for export in meter.exports
        ),
    )


def check_meter(config: Config) -> None:
    """ApplianceError: the meter would end with it at its start: elements of the user's own, certificates."""
    settings = meter_settings(config)
    for export in settings.export if config.meter.enabled else ():
        if export.uri.startswith("tls://"):
            from appliance.meter.tls import client_context

            client_context(export)


def check_flow_directories(config: Config) -> None:
    """MissingPermissionError: flow files cannot be made by the user that this process is by now."""
    for export in config.meter.exports:
        if export.destination.scheme == "file":
            directory = os.path.abspath(export.destination.path or config.flows_directory.parent)
            there = os.path.dirname(missing[0]) if (missing := missing_parts(directory)) else directory
            if not os.access(there, os.W_OK | os.X_OK):
                raise MissingPermissionError(f"{there}: may not be written by user {os.geteuid()}, for {export.uri}")
