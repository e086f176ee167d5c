"""Decoded IPFIX for people and programs: JSON lines, which hold everything, or a table of what flows have in common."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any, TextIO

from appliance.meter.decode import Counts, Message, Records
from appliance.meter.values import NS_PER_S, time_text

HEADINGS = ("start", "duration", "proto", "source", "destination", "packets", "octets", "back", "b.octets", "end")
ROW = "{:<24} {:>8} {:>7} {:<22} {:<22} {:>7} {:>11} {:>5} {:>9}  {}"
PROTOCOLS = {1: "ICMP", 2: "IGMP", 6: "TCP", 17: "UDP", 47: "GRE", 50: "ESP", 51: "AH", 58: "ICMPv6", 132: "SCTP"}
END_REASONS = {1: "idle", 2: "active", 3: "end", 4: "forced", 5: "resources"}  # IANA: flowEndReason
STARTS = ("flowStartNanoseconds", "flowStartMicroseconds", "flowStartMilliseconds", "flowStartSeconds")
ENDS = ("flowEndNanoseconds", "flowEndMicroseconds", "flowEndMilliseconds", "flowEndSeconds")
PACKETS = ("packetDeltaCount", "packetTotalCount")
NAMES = ("applicationName", "sslServerName", "dnsQName", "httpRequestHost", "sshVersion")  # behind the end, if any
OCTETS = ("octetDeltaCount", "octetTotalCount")


class JsonLines:
    """One object a line and record: {"domain", "template", "exported", "flow": {...}}; options data has "options" and
    the names of its "scope" instead of "flow"; over the network each names its "exporter"."""

    def __init__(self, out: TextIO) -> None:
        self._out = out

    def write(self, exporter: str, message: Message) -> None:
        head: dict[str, Any] = {"exporter": exporter} if exporter else {}
        head |= {"domain": message.domain, "exported": time_text(message.export_time_s * NS_PER_S, 0)}
        for records in message.sets:
            template = records.template
            head["template"] = template.template_id
            scope = [f.name for f in template.fields[: template.scope_fields]]
            for row in records.rows:
                shown = template.shown(row)
                body = {"scope": scope, "options": shown} if template.is_options else {"flow": shown}
                self._out.write(json.dumps(head | body) + "\n")

    def finish(self) -> None:
        self._out.flush()


class TableLines:
    """One line a flow, of fixed columns; options data are lines that begin with the template's number."""

    def __init__(self, out: TextIO) -> None:
        self._out = out
        self._has_heading = False

    def write(self, exporter: str, message: Message) -> None:
        for records in message.sets:
            line = self._options_line if records.template.is_options else self._flow_line
            if not records.template.is_options and records.rows and not self._has_heading:
                self._has_heading = True
                self._out.write(ROW.format(*HEADINGS) + "\n")
            places = {name: where[0] for name, where in records.template.columns}
            for row in records.rows:
                self._out.write(printable(line(records, places, row)) + "\n")

    def finish(self) -> None:
        self._out.flush()

    def _options_line(self, records: Records, places: Mapping[str, int], row: Sequence[Any]) -> str:
        shown = records.template.shown(row)
        return f"options {records.template.template_id}: " + " ".join(
            f"{name}={value}" for name, value in shown.items()
        )

    def _flow_line(self, records: Records, places: Mapping[str, int], row: Sequence[Any]) -> str:
        def of(*names: str) -> Any:
            return next((row[places[name]] for name in names if name in places), None)

        start, end = of(*STARTS), of(*ENDS)
        is_timed = isinstance(start, int) and isinstance(end, int)
        protocol = of("protocolIdentifier")
        return ROW.format(
            time_text(start, 3) if isinstance(start, int) else "-",
            f"{(end - start) / NS_PER_S:.3f}" if is_timed else "-",
            PROTOCOLS.get(protocol, str(protocol)) if protocol is not None else "-",
            endpoint(of("sourceIPv4Address", "sourceIPv6Address"), of("sourceTransportPort")),
            endpoint(of("destinationIPv4Address", "destinationIPv6Address"), of("destinationTransportPort")),
            *(cell(of(*names)) for names in (PACKETS, OCTETS, reverse(PACKETS), reverse(OCTETS))),
            " ".join([END_REASONS.get(of("flowEndReason"), "-"), *(text for text in map(of, NAMES) if text)]),
        ).rstrip()


def reverse(names: Sequence[str]) -> list[str]:
    return ["reverse" + name[0].upper() + name[1:] for name in names]


def cell(value: Any) -> str:
    return "-" if value is None else str(value)


def endpoint(address: Any, port: Any) -> str:
    if address is None:
        return "-"
    if not port:
        return str(address)
    return f"[{address}]:{port}" if ":" in str(address) else f"{address}:{port}"


def printable(text: str) -> str:
    """What came from a network does not steer the terminal."""
    return text if text.isprintable() else "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


def summary(counts: Counts) -> str:
    """What was decoded, and what was not, in one line."""
    parts = [f"{counts.messages} messages, {counts.octets} octets, {counts.records} records"]
    faults = {
        "malformed messages": counts.malformed_messages,
        "records that did not come": counts.lost_records,
        "late messages": counts.late_messages,
        "sets without a template": counts.unknown_sets,
        "templates refused": counts.refused_templates,
        "templates forgotten": counts.evicted_templates,
        "lists not read": counts.unread_lists,
    }
    parts += [f"{count} {what}" for what, count in faults.items() if count]
    return ", ".join(parts)
