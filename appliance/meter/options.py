"""Options data that explain flow records: interface names, and what elements of enterprises mean (RFC 5610)."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from appliance.meter.ipfix import OPTIONS_TEMPLATE_SET_ID, KnownElement, encode_template, known_element
from appliance.meter.registry import REVERSE_ENTERPRISE
from appliance.meter.settings import InterfaceName

INTERFACES_ID, TYPE_INFORMATION_ID = 310, 311
INTERFACES = ("ingressInterface", "interfaceName", "interfaceDescription")
TYPE_INFORMATION = (  # RFC 5610, 3.9: all nine, for some readers pass over records with fewer
    "privateEnterpriseNumber",
    "informationElementId",
    "informationElementDataType",
    "informationElementSemantics",
    "informationElementUnits",
    "informationElementRangeBegin",
    "informationElementRangeEnd",
    "informationElementName",
    "informationElementDescription",
)
MAX_TEXT_OCTETS = 128  # of a name or a description: the record must fit into the shortest message

Encoded = tuple[int, bytes, int]
"""(set ID, one record, data records in it), as `build_messages` takes them."""

# RFC 5610, 3.6 and 3.7: numbers of semantics and units.
QUANTITY, TOTAL_COUNTER, DELTA_COUNTER, IDENTIFIER, FLAGS = range(1, 6)
UNITS = {"Milliseconds": 6, "Microseconds": 7, "Nanoseconds": 8, "Seconds": 5}
OCTETS, PACKETS = 2, 3


@dataclass(frozen=True, slots=True)
class Layout:
    """An options template, and its records: numbers in the octets of their element, text of variable length."""

    template_id: int
    specs: tuple[str, ...]
    lengths: tuple[int, ...]  # 0: text
    scope_fields: int

    @property
    def template(self) -> Encoded:
        return OPTIONS_TEMPLATE_SET_ID, encode_template(self.template_id, self.specs, self.scope_fields), 0

    def record(self, values: Sequence[int | str]) -> Encoded:
        return self.template_id, b"".join(map(field, values, self.lengths)), 1


INTERFACE_LAYOUT = Layout(INTERFACES_ID, INTERFACES, (4, 0, 0), 1)
TYPE_LAYOUT = Layout(TYPE_INFORMATION_ID, TYPE_INFORMATION, (4, 2, 1, 1, 2, 8, 8, 0, 0), 2)


def field(value: int | str, length: int) -> bytes:
    if isinstance(value, int):
        return value.to_bytes(length, "big")
    octets = value.encode()[:MAX_TEXT_OCTETS].decode("utf-8", "ignore").encode()  # no letter is cut in two
    return bytes([len(octets)]) + octets


def interface_names(interfaces: Iterable[InterfaceName]) -> list[Encoded]:
    """The options template and a record for each; nothing when there are none."""
    records = [INTERFACE_LAYOUT.record((one.number, one.name, one.description)) for one in interfaces]
    return [INTERFACE_LAYOUT.template, *records] if records else []


def type_information(elements: Iterable[tuple[int, int]]) -> list[Encoded]:
    """Of all enterprise elements among `elements`, (enterprise, number): the options template and a record for each.

    Reverse elements of IANA's are no enterprise's own: whoever knows RFC 5103 knows them.
    """
    wanted = sorted({(e, n) for e, n in elements if e not in (0, REVERSE_ENTERPRISE)})
    records = [TYPE_LAYOUT.record(description(known_element(e, n))) for e, n in wanted]
    return [TYPE_LAYOUT.template, *records] if records else []


def description(element: KnownElement) -> tuple[int | str, ...]:
    """The nine fields."""
    bits = element.type_name.removeprefix("unsigned")
    highest = (1 << int(bits)) - 1 if bits != element.type_name else 0  # 0 and 0: no range
    return (
        element.enterprise,
        element.number,
        element.type_number,
        semantics(element),
        units(element.name),
        0,
        highest,
        element.name,
        words(element.name),
    )


def semantics(element: KnownElement) -> int:
    if element.name.endswith("Flags"):
        return FLAGS
    if not element.type_name.startswith(("unsigned", "signed", "float")):
        return 0
    return DELTA_COUNTER if element.name.endswith("Count") else QUANTITY


def units(name: str) -> int:
    return next((number for ending, number in UNITS.items() if name.endswith(ending)), 0)


def words(name: str) -> str:
    """`minTcpRttMilliseconds` -> `min tcp rtt milliseconds`."""
    return " ".join(re.findall(r"[A-Z]+(?![a-z])|[A-Z]?[a-z0-9]+|[^A-Za-z0-9]+", name)).lower()
