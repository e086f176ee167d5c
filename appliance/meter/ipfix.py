"""The one place that knows python-ipfix (PyPI `ipfix` 0.9.7): its information model and its template encoding.

Only these two parts are used. Its message buffer and its writer are not: the sequence number dies at 2^32, empty sets
are written, templates are never repeated over UDP, and records go through Python one value at a time. Elements that
its registry (up to number 433) does not have are added here by their full specification.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass

with warnings.catch_warnings():
    warnings.simplefilter("ignore", SyntaxWarning)  # invalid escapes in the package's own source, from Python 3.12 on
    import ipfix.ie
    import ipfix.template

TEMPLATE_SET_ID = 2
OPTIONS_TEMPLATE_SET_ID = 3
MIN_TEMPLATE_ID = 256

# CERT's elements (YAF); their reverse counterparts have bit 14 of the number set.
ENTERPRISE_SPECS = (
    "initialTCPFlags(6871/14)<unsigned8>[1]",
    "unionTCPFlags(6871/15)<unsigned8>[1]",
    "reverseInitialTCPFlags(6871/16398)<unsigned8>[1]",
    "reverseUnionTCPFlags(6871/16399)<unsigned8>[1]",
)

ipfix.ie.use_iana_default()
ipfix.ie.use_5103_default()
for _spec in ENTERPRISE_SPECS:
    ipfix.ie.for_spec(_spec)


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


def encode_template(template_id: int, specs: Sequence[str], scope_fields: int = 0) -> bytes:
    """A Template Record, or with scope fields an Options Template Record (RFC 7011, 3.4); no set header."""
    template = ipfix.template.for_specs(template_id, *specs)
    template.scopecount = scope_fields
    room = bytearray(8 + 8 * len(specs))
    end = template.encode_template_to(room, 0, template.native_setid())
    return bytes(room[:end])
