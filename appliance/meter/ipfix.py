"""The one place that knows python-ipfix (PyPI `ipfix` 0.9.7): its information model and its template encoding.

Only these two parts are used. Its message buffer and its writer are not: the sequence number dies at 2^32, empty sets
are written, templates are never repeated over UDP, and records go through Python one value at a time. Elements that
its registry (up to number 433) does not have are added here by their full specification.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache

from appliance.meter import registry
from appliance.meter.registry import REVERSE_ENTERPRISE

with warnings.catch_warnings():
    warnings.simplefilter("ignore", SyntaxWarning)  # invalid escapes in the package's own source, from Python 3.12 on
    import ipfix.ie
    import ipfix.template
    import ipfix.types

TEMPLATE_SET_ID = 2
OPTIONS_TEMPLATE_SET_ID = 3
MIN_TEMPLATE_ID = 256

# Elements of enterprises, each with its reverse counterpart, which has bit 14 of the number set.
ENTERPRISE_SPECS = (
    "initialTCPFlags(6871/14)<unsigned8>[1]",  # CERT's (YAF)
    "unionTCPFlags(6871/15)<unsigned8>[1]",
    "tcpSequenceCount(35566/1024)<unsigned64>[8]",  # QoF's, from here on: octets of payload, none counted twice
    "tcpRetransmitCount(35566/1025)<unsigned64>[8]",
    "minTcpRttMilliseconds(35566/1029)<unsigned32>[4]",
    "lastTcpRttMilliseconds(35566/1030)<unsigned32>[4]",
    "declaredTcpMss(35566/1033)<unsigned32>[4]",
    "tcpSequenceLossCount(35566/1035)<unsigned64>[8]",
    "tcpDupAckCount(35566/1040)<unsigned32>[4]",
    "maxTcpRwin(35566/1044)<unsigned32>[4]",
    "tcpReceiverStallCount(35566/1045)<unsigned32>[4]",
    "tcpRttSampleCount(35566/1046)<unsigned32>[4]",
    "npmRoundTripTime(39499/69)<unsigned32>[4]",  # Flowmon's: of the handshake, in microseconds
    "npmTcpOutOfOrder(39499/72)<unsigned32>[4]",
    "rttMinMicroseconds(12325/179)<unsigned32>[4]",  # Fraunhofer FOKUS's
    "payloadEntropy(6871/35)<unsigned8>[1]",  # CERT's, from here on
    "sshVersion(6871/171)<string>",
    "dnsQRType(6871/175)<unsigned16>[2]",
    "dnsQName(6871/179)<string>",
    "sslServerName(6871/294)<string>",
    "tlsAlpn(39499/337)<string>",  # Flowmon's
)
LATER_SPECS = ("httpRequestMethod(0/459)<string>", "httpRequestHost(0/460)<string>")  # than python-ipfix knows
STRUCTURED_SPECS = ("basicList(0/291)<octetArray>[65535]",)  # RFC 6313
REVERSE_BIT = 0x4000

ipfix.ie.use_iana_default()
ipfix.ie.use_5103_default()


@dataclass(frozen=True, slots=True)
class Element:
    """An Information Element as it stands in a template. `length` in octets, of the encoding in use."""

    name: str
    enterprise: int
    number: int
    length: int


def element(spec: str) -> Element:
    """The element of a specification such as `octetDeltaCount` or `minimumIpTotalLength[2]` (reduced size)."""
    e = ipfix.ie.for_spec(spec)
    return Element(e.name, e.pen, e.num, e.length)


def reverse_name(name: str) -> str:
    """The name of an element's reverse counterpart (RFC 5103, section 6.1)."""
    return "reverse" + name[0].upper() + name[1:]


def _reverse_spec(spec: str) -> str:
    """Of an enterprise's element: a name and a number of its own."""
    name, rest = spec.split("(", 1)
    enterprise, number = rest.split(")", 1)[0].split("/")
    return f"{reverse_name(name)}({enterprise}/{int(number) | REVERSE_BIT}){rest.split(')', 1)[1]}"


for _spec in (*LATER_SPECS, *STRUCTURED_SPECS):
    ipfix.ie.for_spec(_spec)
for _spec in ENTERPRISE_SPECS:
    ipfix.ie.for_spec(_spec)
    ipfix.ie.for_spec(_reverse_spec(_spec))


def encode_template(template_id: int, specs: Sequence[str], scope_fields: int = 0) -> bytes:
    """A Template Record, or with scope fields an Options Template Record (RFC 7011, 3.4); no set header."""
    template = ipfix.template.for_specs(template_id, *specs)
    template.scopecount = scope_fields
    room = bytearray(8 + 8 * len(specs))
    end = template.encode_template_to(room, 0, template.native_setid())
    return bytes(room[:end])


@cache
def information_model() -> Mapping[tuple[int, int], tuple[str, str]]:
    """(enterprise, number) -> (name, abstract data type) of every element that has a name here.

    python-ipfix has no structured data types (RFC 6313); they are known to it as octet arrays under their own names.
    """
    for number, name in enumerate(("basicList", "subTemplateList", "subTemplateMultiList"), start=20):
        ipfix.types._TypeForName.setdefault(name, ipfix.types.OctetArrayType(name, number))
    for spec in (*registry.IANA_SPECS, *registry.CERT_SPECS, *registry.CERT_REVERSIBLE_SPECS):
        ipfix.ie.for_spec(spec)
    # Not by dump_infomodel, which sorts: that would take as long as a small file.
    model = {key: (e.name, e.type.name) for key, e in ipfix.ie._ieForNum.items()}
    for spec in registry.IANA_SPECS:  # also what was made known under a simpler type
        name, enterprise, number, type_name, _ = ipfix.ie.parse_spec(spec)
        model[enterprise, number] = (name, type_name)
    for (enterprise, number), (name, type_name) in list(model.items()):
        if enterprise == 0:
            model.setdefault((registry.REVERSE_ENTERPRISE, number), (reverse_name(name), type_name))
    for spec in registry.CERT_REVERSIBLE_SPECS:
        e = ipfix.ie.for_spec(spec)
        model[e.pen, e.num | registry.CERT_REVERSE_BIT] = (reverse_name(e.name), e.type.name)
    return model


@dataclass(frozen=True, slots=True)
class KnownElement:
    """What the information model says of an element. `type_number`: as RFC 5610, 3.1 numbers the data types."""

    enterprise: int
    number: int
    name: str
    type_name: str
    type_number: int


def known_element(enterprise: int, number: int) -> KnownElement:
    """Of an element that templates here may use. KeyError: nobody has named it."""
    e = ipfix.ie._ieForNum[enterprise, number]
    return KnownElement(enterprise, number, e.name, e.type.name, e.type.num)


OWN_SPEC = re.compile(r"([A-Za-z]\w{0,63})\((\d{1,10})/(\d{1,5})\)<(\w+)>(?:\[(\d{1,5})\])?", re.ASCII)


def define_element(spec: str) -> tuple[Element, str]:
    """A new element of an enterprise by its whole specification, and its data type. ValueError says what is wrong."""
    matched = OWN_SPEC.fullmatch(spec)
    if matched is None:
        raise ValueError("the element must be written as in siteNumber(99999/1)<unsigned16>")
    name, enterprise, number, type_name = matched[1], int(matched[2]), int(matched[3]), matched[4]
    if not 0 < enterprise < 1 << 32 or enterprise == REVERSE_ENTERPRISE or not 0 < number < 1 << 15:
        raise ValueError(f"{enterprise}/{number}: an enterprise has its own number, and its elements have 1 to 32767")
    known = information_model().get((enterprise, number))
    if known is not None and known != (name, type_name):
        raise ValueError(f"{enterprise}/{number} is {known[0]}<{known[1]}> already")
    if known is None and any(name == other for other, _ in information_model().values()):
        raise ValueError(f"another element is called {name} already")
    found = ipfix.ie.for_spec(f"{name}({enterprise}/{number})<{type_name}>")  # its errors are ValueErrors
    information_model.cache_clear()
    length = int(matched[5]) if matched[5] else found.length
    found.for_length(length)
    return Element(name, enterprise, number, length), type_name
