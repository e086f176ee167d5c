"""The templates: which Information Elements a record has, and where in a flow table's row each of them comes from.

One template for each of other, TCP and ICMP, over IPv4 and IPv6; each for one direction, and as an RFC 5103 biflow
with the reverse elements behind. A row whose reverse direction is empty goes out by the template of one direction.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

from appliance.meter.ipfix import (
    MIN_TEMPLATE_ID,
    OPTIONS_TEMPLATE_SET_ID,
    TEMPLATE_SET_ID,
    element,
    encode_template,
    reverse_name,
)
from appliance.meter.options import Encoded, interface_names, type_information
from appliance.meter.own import OwnElement, own_elements
from appliance.meter.pack import KINDS, ROW_FIELDS, SHAPES, TEXT_FIELDS, Message
from appliance.meter.settings import ExportSettings, MeterSettings

if TYPE_CHECKING:
    from appliance.meter.pack import Plan, Step

MESSAGE_HEADER = struct.Struct("!HHIII")  # version, length, export time, sequence, observation domain
SET_HEADER = struct.Struct("!HH")
IPFIX_VERSION = 10
METERING_PROCESS_ID = 1
EXPORTING_PROCESS_ID = 1
OTHER, TCP, ICMP = range(3)
SEQUENCE_ID = 280  # of IPv4; the next one of IPv6
LISTS = 4  # basicLists of a packet sequence

STATISTICS_ID, METERING_RELIABILITY_ID, EXPORTING_RELIABILITY_ID, FLOW_KEYS_ID = range(300, 304)
PACKET_SAMPLING_ID, FLOW_SAMPLING_ID = range(304, 306)
SYSTEMATIC_COUNT_BASED = 1  # selectorAlgorithm
UNIFORM_PROBABILISTIC = 4  # flowSelectorAlgorithm


@dataclass(frozen=True, slots=True)
class Field:
    spec: str  # of the element, as python-ipfix writes it
    source: str  # a row's field; direction fields without `forward.`
    kind: str = "unsigned"
    key: bool = False  # part of the flow key
    place: int = 0  # of a constant, among the constants


# Of both directions together (appliance/meter/tcp.pxd). QoF's elements have milliseconds, the other microseconds.
ROUND_TRIPS = [
    Field("minTcpRttMilliseconds", "rtt_min_us", "thousandths"),
    Field("lastTcpRttMilliseconds", "rtt_last_us", "thousandths"),
    Field("tcpRttSampleCount", "rtt_samples"),
    Field("npmRoundTripTime", "initial_rtt_us"),
]
# Of each direction; counts in four octets where the element has eight (RFC 7011, 6.2).
TCP_ANALYSIS = [
    Field("tcpSequenceCount", "tcp.goodput_octets"),
    Field("tcpRetransmitCount[4]", "tcp.retransmitted_packets"),
    Field("npmTcpOutOfOrder", "tcp.out_of_order_packets"),
    Field("tcpSequenceLossCount[4]", "tcp.lost_segments"),
    Field("tcpDupAckCount", "tcp.duplicate_acks"),
    Field("tcpReceiverStallCount", "tcp.stalls"),
    Field("maxTcpRwin", "tcp.max_window"),
    Field("rttMinMicroseconds", "tcp.rtt_min_us"),
    Field("declaredTcpMss[2]", "tcp.mss"),
    Field("tcpWindowScale", "tcp.window_scale"),
]


# Of the flow, by what its first messages say; texts are of variable length, most of them empty.
APPLICATION = [
    Field("applicationName", "application", "text"),
    Field("sslServerName", "server_name", "text"),
    Field("tlsAlpn", "alpn", "text"),
    Field("dnsQName", "dns_name", "text"),
    Field("dnsQRType", "dns_type"),
]
TCP_APPLICATION = [
    Field("httpRequestHost", "http_host", "text"),
    Field("httpRequestMethod", "http_method", "text"),
]


def base_fields(ip_version: int, protocol_class: int, meter: MeterSettings, export: ExportSettings) -> list[Field]:
    fields = [
        Field("flowStartMilliseconds", "start_ns", "milliseconds"),
        Field("flowEndMilliseconds", "end_ns", "milliseconds"),
        Field(f"sourceIPv{ip_version}Address", "source_address", "copy", key=True),
        Field(f"destinationIPv{ip_version}Address", "destination_address", "copy", key=True),
    ]
    if export.nanoseconds:
        fields[2:2] = [
            Field("flowStartNanoseconds", "start_ns", "nanoseconds"),
            Field("flowEndNanoseconds", "end_ns", "nanoseconds"),
        ]
    if protocol_class == ICMP:
        fields += [Field(f"icmpTypeCodeIPv{ip_version}", "icmp_type_code")]
    else:
        fields += [
            Field("sourceTransportPort", "source_port", key=True),
            Field("destinationTransportPort", "destination_port", key=True),
        ]
    if protocol_class == TCP and meter.analyses_tcp and export.tcp_analysis:
        fields += ROUND_TRIPS
    if protocol_class != ICMP and meter.applications:
        fields += APPLICATION + (TCP_APPLICATION if protocol_class == TCP else [])
    return fields + [
        Field("protocolIdentifier", "protocol", key=True),
        Field("ipVersion", "ip_version", key=True),
        Field("dot1qVlanId", "vlan_outer", "vlan", key=meter.vlan_in_key),
        Field("dot1qCustomerVlanId", "vlan_inner", "vlan", key=meter.vlan_in_key),
        Field("ingressInterface", "interface", key=meter.interface_in_key),
        Field("sourceMacAddress", "source_mac", "copy"),
        Field("destinationMacAddress", "destination_mac", "copy"),
        Field("flowEndReason", "end_reason"),
        Field("biflowDirection", "biflow_direction"),
        Field("flowId", "flow_id"),
    ]


def direction_fields(protocol_class: int, meter: MeterSettings, export: ExportSettings) -> list[Field]:
    """What each direction has of its own."""
    fields = [
        Field("octetDeltaCount", "octets"),
        Field("packetDeltaCount", "packets"),
        Field("ipClassOfService", "tos"),
        Field("minimumTTL", "min_ttl"),
        Field("maximumTTL", "max_ttl"),
        Field("minimumIpTotalLength[2]", "min_length"),
        Field("maximumIpTotalLength[2]", "max_length"),
        Field("fragmentFlags", "fragment_flags"),
    ]
    if protocol_class == TCP:
        fields += [
            Field("tcpControlBits[1]", "tcp_flags"),  # two octets are read as 0 by some collectors
            Field("tcpSequenceNumber", "tcp_sequence"),
            Field("initialTCPFlags", "tcp_initial_flags"),
            Field("unionTCPFlags", "tcp_later_flags"),
        ]
        if meter.analyses_tcp and export.tcp_analysis:
            fields += TCP_ANALYSIS
        if meter.applications:
            fields += [Field("sshVersion", "ssh_version", "text")]
    if protocol_class != ICMP and meter.entropy:
        fields += [Field("payloadEntropy", "entropy")]
    return fields


def reverse_times(nanoseconds: bool) -> list[Field]:
    """A biflow's own times are those of both directions together; these are the reverse direction's."""
    fields = [
        Field("flowStartMilliseconds", "first_ns", "milliseconds"),
        Field("flowEndMilliseconds", "last_ns", "milliseconds"),
    ]
    if nanoseconds:
        fields += [
            Field("flowStartNanoseconds", "first_ns", "nanoseconds"),
            Field("flowEndNanoseconds", "last_ns", "nanoseconds"),
        ]
    return fields


def reverse_spec(spec: str) -> str:
    name, bracket, length = spec.partition("[")
    return reverse_name(name) + bracket + length


MIRRORED = {
    "source_address": "destination_address",
    "source_port": "destination_port",
    "source_mac": "destination_mac",
    "start_ns": "reverse.first_ns",
    "end_ns": "reverse.last_ns",
}
MIRRORED |= {there: here for here, there in MIRRORED.items() if not there.startswith("reverse.")}
ALONE = {"start_ns": "forward.first_ns", "end_ns": "forward.last_ns"}


def mirrored(source: str) -> str:
    """Where a record of the reverse direction takes this from."""
    for here, there in (("forward.", "reverse."), ("reverse.", "forward.")):
        if source.startswith(here):
            return there + source.removeprefix(here)
    return MIRRORED.get(source, source)


def step(field: Field, source: str) -> Step:
    if field.kind == "constant":
        return KINDS[field.kind], field.place, 0, element(field.spec).length
    if field.kind == "text":
        return KINDS[field.kind], TEXT_FIELDS[source], 0, 1
    offset, octets = ROW_FIELDS[source]
    return KINDS[field.kind], offset, octets, element(field.spec).length


@dataclass(frozen=True)
class FlowTemplate:
    """One template of flow records, and the plans that pack by it."""

    template_id: int
    row_class: int
    base: Sequence[Field]
    direction: Sequence[Field]
    reverse: Sequence[Field]  # empty: of one direction

    @property
    def specs(self) -> list[str]:
        return [f.spec for f in (*self.base, *self.direction)] + [reverse_spec(f.spec) for f in self.reverse]

    @property
    def encoded(self) -> bytes:
        return encode_template(self.template_id, self.specs)

    @property
    def key_indicator(self) -> int:
        """flowKeyIndicator: bit n for the field n of the template."""
        return sum(1 << i for i, f in enumerate(self.base) if f.key)

    def plans(self, biflow: bool) -> Iterator[Plan]:
        if self.reverse:
            steps = [step(f, f.source) for f in self.base]
            steps += [step(f, f"forward.{f.source}") for f in self.direction]
            steps += [step(f, f"reverse.{f.source}") for f in self.reverse]
            yield self.template_id, self.row_class, SHAPES["biflow"], steps
            return
        forward = [step(f, ALONE.get(f.source, f.source)) for f in self.base]
        forward += [step(f, f"forward.{f.source}") for f in self.direction]
        yield self.template_id, self.row_class, SHAPES["forward"], forward
        if not biflow:
            reverse = [step(f, mirrored(f.source)) for f in self.base]
            reverse += [step(f, f"reverse.{f.source}") for f in self.direction]
            yield self.template_id, self.row_class, SHAPES["reverse"], reverse


@dataclass(frozen=True)
class SequenceTemplate:
    """Records of a flow's first packets, beside its flow record: the flow's key and identity, and four basicLists."""

    template_id: int
    ip_version: int

    @property
    def fields(self) -> list[Field]:
        return [
            Field("flowStartMilliseconds", "start_ns", "milliseconds"),
            Field(f"sourceIPv{self.ip_version}Address", "source_address", "copy", key=True),
            Field(f"destinationIPv{self.ip_version}Address", "destination_address", "copy", key=True),
            Field("sourceTransportPort", "source_port", key=True),
            Field("destinationTransportPort", "destination_port", key=True),
            Field("protocolIdentifier", "protocol", key=True),
            Field("flowId", "flow_id"),
        ]

    @property
    def encoded(self) -> bytes:
        return encode_template(self.template_id, [f.spec for f in self.fields] + ["basicList"] * LISTS)

    @property
    def key_indicator(self) -> int:
        return sum(1 << i for i, f in enumerate(self.fields) if f.key)

    def plans(self, biflow: bool) -> Iterator[Plan]:
        steps = [step(f, f.source) for f in self.fields]
        for protocol_class in (OTHER, TCP, ICMP):
            row_class = protocol_class if self.ip_version == 4 else protocol_class + 3
            yield self.template_id, row_class, SHAPES["sequence"], steps


@dataclass(frozen=True, slots=True)
class OptionsTemplate:
    template_id: int
    specs: tuple[str, ...]
    scope_fields: int

    @property
    def encoded(self) -> bytes:
        return encode_template(self.template_id, self.specs, self.scope_fields)

    def encode(self, values: Sequence[int]) -> bytes:
        """One Data Record; all elements here are unsigned or times in milliseconds, or given as such bits."""
        lengths = [element(spec).length for spec in self.specs]
        return b"".join(
            (value & ((1 << 8 * length) - 1)).to_bytes(length, "big")
            for value, length in zip(values, lengths, strict=True)
        )


TIMES = ("observationTimeMilliseconds", "observationTimeMilliseconds")  # first and last
STATISTICS = OptionsTemplate(  # RFC 7011, 4.1
    STATISTICS_ID,
    (
        "observationDomainId",
        "meteringProcessId",
        "exportedMessageTotalCount",
        "exportedFlowRecordTotalCount",
        "exportedOctetTotalCount",
    ),
    2,
)
METERING_RELIABILITY = OptionsTemplate(  # RFC 7011, 4.2; octets of whole frames: what is ignored may have no IP length
    METERING_RELIABILITY_ID,
    ("observationDomainId", "meteringProcessId", "ignoredPacketTotalCount", "ignoredOctetTotalCount", *TIMES),
    2,
)
EXPORTING_RELIABILITY = OptionsTemplate(  # RFC 7011, 4.3
    EXPORTING_RELIABILITY_ID,
    ("exportingProcessId", "notSentFlowTotalCount", "notSentPacketTotalCount", "notSentOctetTotalCount", *TIMES),
    1,
)
FLOW_KEYS = OptionsTemplate(FLOW_KEYS_ID, ("templateId", "flowKeyIndicator"), 1)  # RFC 7011, 4.4
OPTIONS = (STATISTICS, METERING_RELIABILITY, EXPORTING_RELIABILITY, FLOW_KEYS)


def own_fields(elements: Sequence[OwnElement]) -> list[Field]:
    fields, place = [], 0
    for one in elements:
        fields.append(Field(one.spec, one.source, one.kind, place=place))
        place += len(one.constant)
    return fields


PACKET_SAMPLING = OptionsTemplate(  # RFC 5476, 6.5.2.1
    PACKET_SAMPLING_ID, ("selectorId", "selectorAlgorithm", "samplingPacketInterval", "samplingPacketSpace"), 1
)
FLOW_SAMPLING = OptionsTemplate(  # RFC 7014, 7
    FLOW_SAMPLING_ID, ("selectorId", "flowSelectorAlgorithm", "samplingProbability"), 1
)


def sampling(meter: MeterSettings) -> Iterator[tuple[OptionsTemplate, tuple[int, ...]]]:
    """Options data about what is not metered on purpose."""
    if meter.packet_sampling > 1:
        yield PACKET_SAMPLING, (PACKET_SAMPLING_ID, SYSTEMATIC_COUNT_BASED, 1, meter.packet_sampling - 1)
    if meter.flow_sampling > 1:
        probability = int.from_bytes(struct.pack("!d", 1 / meter.flow_sampling), "big")
        yield FLOW_SAMPLING, (FLOW_SAMPLING_ID, UNIFORM_PROBABILISTIC, probability)


class TemplateSet:
    """All templates of one exporter, their plans, and the messages that announce them."""

    def __init__(self, meter: MeterSettings, export: ExportSettings) -> None:
        self.observation_domain = export.domain
        self.biflow = export.biflow
        own = own_elements(meter.elements)
        self.own = own_fields(own)
        self.constants = b"".join(one.constant for one in own)
        self.flows: list[FlowTemplate | SequenceTemplate] = list(self._flow_templates(meter, export))
        if meter.packet_sequence:
            self.flows += [SequenceTemplate(SEQUENCE_ID, 4), SequenceTemplate(SEQUENCE_ID + 1, 6)]
        self.sampling = list(sampling(meter))
        self.interfaces = meter.interfaces

    def _flow_templates(self, meter: MeterSettings, export: ExportSettings) -> Iterator[FlowTemplate]:
        for row_class in range(6):
            ip_version, protocol_class = (4, row_class) if row_class < 3 else (6, row_class - 3)
            base = base_fields(ip_version, protocol_class, meter, export) + self.own
            direction = direction_fields(protocol_class, meter, export)
            template_id = MIN_TEMPLATE_ID + 2 * row_class
            yield FlowTemplate(template_id, row_class, base, direction, ())
            if export.biflow:
                reverse = [*direction, *reverse_times(export.nanoseconds)]
                yield FlowTemplate(template_id + 1, row_class, base, direction, reverse)

    @property
    def plans(self) -> list[Plan]:
        return [plan for template in self.flows for plan in template.plans(self.biflow)]

    @cached_property
    def _sets(self) -> list[tuple[int, bytes, int]]:
        """(set ID, one record, data records in it) of all that a collector needs before the first flow record."""
        templates = [(TEMPLATE_SET_ID, t.encoded, 0) for t in self.flows]
        options = [(OPTIONS_TEMPLATE_SET_ID, o.encoded, 0) for o in (*OPTIONS, *(o for o, _ in self.sampling))]
        keys = [(FLOW_KEYS_ID, FLOW_KEYS.encode((t.template_id, t.key_indicator)), 1) for t in self.flows]
        samples = [(o.template_id, o.encode(values), 1) for o, values in self.sampling]
        return templates + options + keys + samples + interface_names(self.interfaces)

    @cached_property
    def _types(self) -> list[Encoded]:
        elements = [element(spec) for one in self.flows if isinstance(one, FlowTemplate) for spec in one.specs]
        return type_information((one.enterprise, one.number) for one in elements)

    def announcement(self, message_bytes: int) -> list[Message]:
        """Templates, options templates, flow keys and interface names, in messages of at most `message_bytes`. New ones
        each time: a message is stamped when it leaves. What elements mean must come before the message with the
        templates that use them (RFC 5610, 3.9)."""
        types = build_messages(self.observation_domain, self._types, message_bytes)
        return types + build_messages(self.observation_domain, self._sets, message_bytes)

    def statistics(self, counts: Mapping[str, int], message_bytes: int) -> list[Message]:
        """Options data about metering and exporting. `counts`: messages, flow_records, bytes, ignored_packets,
        ignored_octets, not_sent_flows, not_sent_packets, not_sent_octets, first_ms, last_ms (the time that the counts
        span)."""
        domain = self.observation_domain
        times = (counts["first_ms"], counts["last_ms"])
        not_sent = (counts["not_sent_flows"], counts["not_sent_packets"], counts["not_sent_octets"])
        ignored = (counts["ignored_packets"], counts["ignored_octets"])
        sent = (counts["messages"], counts["flow_records"], counts["bytes"])
        rows = [
            (STATISTICS, (domain, METERING_PROCESS_ID, *sent)),
            (METERING_RELIABILITY, (domain, METERING_PROCESS_ID, *ignored, *times)),
            (EXPORTING_RELIABILITY, (EXPORTING_PROCESS_ID, *not_sent, *times)),
        ]
        sets = [(template.template_id, template.encode(values), 1) for template, values in rows]
        return build_messages(domain, sets, message_bytes)


def build_messages(domain: int, records: Sequence[tuple[int, bytes, int]], message_bytes: int) -> list[Message]:
    """Messages out of (set ID, encoded record, data records in it); neighbours of one set ID share a set."""
    messages: list[Message] = []
    body = bytearray()
    set_start, set_id, data_records = 0, -1, 0

    def close() -> None:
        nonlocal body, set_id, data_records
        if body:
            data = bytearray(MESSAGE_HEADER.pack(IPFIX_VERSION, MESSAGE_HEADER.size + len(body), 0, 0, domain)) + body
            messages.append(Message(data, data_records))
        body, set_id, data_records = bytearray(), -1, 0

    for record_set_id, record, data_record in records:
        if MESSAGE_HEADER.size + len(body) + SET_HEADER.size + len(record) > message_bytes:
            close()
        if record_set_id != set_id:
            set_start, set_id = len(body), record_set_id
            body += bytes(SET_HEADER.size)
        body += record
        SET_HEADER.pack_into(body, set_start, set_id, len(body) - set_start)
        data_records += data_record
    close()
    return messages
