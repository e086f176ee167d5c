"""Decoding of any exporter's IPFIX messages (RFC 7011), safely: what a session may keep is bounded, a message is
either taken whole or not at all, and whatever is odd about it is told.

    octets of one message -> Session.message -> Message: records by template, and notes

Python-ipfix's own reader is not used: it hangs on a set of length 0, and fails on withdrawals, on padding behind
templates and on elements of two lengths. Its information model is (see ipfix.py).
"""

from __future__ import annotations

import re
import struct
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

from appliance.meter.ipfix import MIN_TEMPLATE_ID, OPTIONS_TEMPLATE_SET_ID, TEMPLATE_SET_ID, information_model
from appliance.meter.values import STRUCTURED, Convert, converter, plain, reader_of, shower_of

VERSION = 10
VARIABLE = 65535  # RFC 7011, 7: the length of a field that says its length itself
MESSAGE_HEADER = struct.Struct("!HHIII")  # version, length, export time, sequence, observation domain
SET_HEADER = struct.Struct("!HH")
TEMPLATE_HEADER = struct.Struct("!HH")  # ID, field count
FIELD = struct.Struct("!HH")
ENTERPRISE_BIT = 0x8000
SEQUENCES = 1 << 32
MAX_LIST_DEPTH = 8
SEMANTICS = {0: "noneOf", 1: "exactlyOneOf", 2: "oneOrMoreOf", 3: "allOf", 4: "ordered", 255: "undefined"}
TYPE_NAMES = (  # RFC 5610, 3.1: by the number of informationElementDataType
    "octetArray unsigned8 unsigned16 unsigned32 unsigned64 signed8 signed16 signed32 signed64 float32 float64 boolean "
    "macAddress string dateTimeSeconds dateTimeMilliseconds dateTimeMicroseconds dateTimeNanoseconds ipv4Address "
    "ipv6Address basicList subTemplateList subTemplateMultiList"
).split()
ELEMENT_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_.\-]{0,127}", re.ASCII)
TYPE_INFORMATION = ("privateEnterpriseNumber", "informationElementId", "informationElementName")


class MalformedMessageError(ValueError):
    """A message that RFC 7011 tells to discard; nothing of it was taken."""


@dataclass(frozen=True, slots=True)
class Limits:
    """What one session may keep. The least recently used goes first, and is counted."""

    templates: int = 2000
    fields: int = 20_000  # of all templates together
    domains: int = 1000  # whose sequence numbers are followed
    learned: int = 4096  # elements that type information named


@dataclass(slots=True)
class Counts:
    """What a session has seen."""

    messages: int = 0
    malformed_messages: int = 0
    octets: int = 0
    records: int = 0  # data records, options data included
    lost_records: int = 0  # by the gaps of the sequence numbers
    late_messages: int = 0  # whose sequence number lies behind one that was seen before
    restarts: int = 0  # of an exporter's sequence
    templates: int = 0
    withdrawals: int = 0
    refused_templates: int = 0
    evicted_templates: int = 0
    unknown_sets: int = 0  # data sets without a template
    unread_lists: int = 0  # structured data that does not hold what it says: shown as octets


@dataclass(frozen=True, slots=True)
class Field:
    """One field of a template. `length` in octets, or VARIABLE."""

    enterprise: int
    number: int
    length: int
    name: str  # `ENTERPRISE/NUMBER` when nobody has named it
    type_name: str
    code: str  # how struct reads it
    convert: Convert | None  # what makes a value of that
    show: Convert | None  # what makes JSON of a value


@lru_cache(1 << 16)
def make_field(enterprise: int, number: int, length: int, name: str, type_name: str) -> Field:
    if type_name in STRUCTURED or length == VARIABLE:
        code, convert = "", None if type_name in STRUCTURED else _any_length(type_name)
    else:
        code, convert = reader_of(type_name, length)
    show = shower_of(type_name)
    if show is None and (not code or code.endswith("s")):
        show = plain  # octets where no number has this length
    return Field(enterprise, number, length, name, type_name, code, convert, show)


def _any_length(type_name: str) -> Convert:
    def convert(octets: bytes) -> Any:
        found = converter(type_name, len(octets))
        return found(octets) if found else octets

    return convert


class Template:
    """A (possibly options) template, with what decodes by it."""

    __slots__ = ("_conversions", "_struct", "columns", "fields", "min_length", "scope_fields", "shows", "template_id")

    def __init__(self, template_id: int, fields: Sequence[Field], scope_fields: int = 0) -> None:
        self.template_id = template_id
        self.fields = tuple(fields)
        self.scope_fields = scope_fields
        self.min_length = sum(1 if f.length == VARIABLE else f.length for f in fields)
        is_fixed = all(f.code for f in fields)
        self._struct = struct.Struct("!" + "".join(f.code for f in fields)) if is_fixed else None
        self._conversions = [(i, f.convert) for i, f in enumerate(fields) if f.convert is not None]
        self.shows = [(i, f.show) for i, f in enumerate(fields) if f.show is not None]
        places: dict[str, list[int]] = {}
        for i, f in enumerate(fields):
            places.setdefault(f.name, []).append(i)
        self.columns: list[tuple[str, tuple[int, ...]]] = [(name, tuple(where)) for name, where in places.items()]

    @property
    def is_options(self) -> bool:
        return self.scope_fields > 0

    def same_as(self, other: Template) -> bool:
        return self.fields == other.fields and self.scope_fields == other.scope_fields

    def shown(self, values: Sequence[Any]) -> dict[str, Any]:
        """A record for people and JSON: name -> value; the values of fields of one name are a list."""
        row = list(values)
        for i, show in self.shows:
            row[i] = show(row[i])
        return {
            name: row[where[0]] if len(where) == 1 else [row[place] for place in where] for name, where in self.columns
        }

    def fixed_records(self, body: bytes) -> list[tuple[Any, ...]] | None:
        """All records of a set's body, or None when there are fields of variable length."""
        if self._struct is None:
            return None
        size = self._struct.size
        rows = self._struct.iter_unpack(memoryview(body)[: len(body) // size * size])
        if not self._conversions:
            return list(rows)
        records = []
        for row in rows:
            values = list(row)
            for i, convert in self._conversions:
                values[i] = convert(values[i])
            records.append(tuple(values))
        return records


@dataclass(slots=True)
class Records:
    """The data records of one set; each a tuple in the order of the template's fields."""

    template: Template
    rows: list[tuple[Any, ...]]


@dataclass(slots=True)
class Message:
    octets: int
    export_time_s: int
    sequence: int
    domain: int
    sets: list[Records] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)  # what is odd about it, each a sentence

    @property
    def records(self) -> int:
        return sum(len(records.rows) for records in self.sets)


@dataclass(slots=True)
class _Sequence:
    """Of one observation domain. `expected`: None when records that could not be counted came last."""

    expected: int | None
    behind: int | None = None  # expected behind the last late message


class Session:
    """One transport session: its templates (RFC 7011, 8: by observation domain), sequence numbers and counts."""

    def __init__(self, *, datagrams: bool = False, limits: Limits | None = None) -> None:
        """`datagrams`: over UDP, where templates are not withdrawn (RFC 7011, 8.4) and messages overtake others."""
        self.datagrams = datagrams
        self.limits = limits or Limits()
        self.counts = Counts()
        self._templates: OrderedDict[tuple[int, int], Template] = OrderedDict()
        self._fields = 0
        self._sequences: OrderedDict[int, _Sequence] = OrderedDict()
        self._learned: dict[tuple[int, int], tuple[str, str]] = {}

    def message(self, data: bytes) -> Message:
        """Decodes one whole message. MalformedMessageError: discarded, as if it had not come."""
        try:
            message, reading = self._read(data)
        except MalformedMessageError:
            self.counts.malformed_messages += 1
            raise
        self._commit(reading)
        self._follow_sequence(message, reading)
        self.counts.messages += 1
        self.counts.octets += message.octets
        self.counts.records += message.records
        return message

    def template(self, domain: int, template_id: int) -> Template | None:
        template = self._templates.get((domain, template_id))
        if template is not None:
            self._templates.move_to_end((domain, template_id))
        return template

    @property
    def template_count(self) -> int:
        return len(self._templates)

    @property
    def field_count(self) -> int:
        return self._fields

    def _read(self, data: bytes) -> tuple[Message, _Reading]:
        _, export_time_s, sequence, domain = message_header(data)
        message = Message(len(data), export_time_s, sequence, domain)
        reading = _Reading(self, message)
        for set_id, body in sets_of(data):
            if set_id in (TEMPLATE_SET_ID, OPTIONS_TEMPLATE_SET_ID):
                reading.templates(set_id, body)
            elif set_id >= MIN_TEMPLATE_ID:
                reading.data(set_id, body)
            else:
                message.notes.append(f"set {set_id}: this number is reserved; {len(body)} octets passed over")
        return message, reading

    def field_of(self, enterprise: int, number: int, length: int) -> Field:
        name = f"{enterprise}/{number}"
        key = (enterprise, number)
        found = information_model().get(key) or self._learned.get(key) or (name, "octetArray")
        return make_field(enterprise, number, length, *found)

    def _commit(self, reading: _Reading) -> None:
        domain = reading.message.domain
        for template_id, template in reading.staged.items():
            self._remove((domain, template_id))
            if template is not None:
                self._templates[domain, template_id] = template
                self._fields += len(template.fields)
        while len(self._templates) > self.limits.templates or self._fields > self.limits.fields:
            self._remove(next(iter(self._templates)))
            self.counts.evicted_templates += 1
        for key, known in reading.learned.items():
            if len(self._learned) < self.limits.learned or key in self._learned:
                self._learned[key] = known
        for name, count in reading.counted.items():
            setattr(self.counts, name, getattr(self.counts, name) + count)

    def _remove(self, key: tuple[int, int]) -> None:
        template = self._templates.pop(key, None)
        if template is not None:
            self._fields -= len(template.fields)

    def known_ids(self, domain: int) -> Iterator[tuple[int, Template]]:
        return ((key[1], template) for key, template in self._templates.items() if key[0] == domain)

    def _follow_sequence(self, message: Message, reading: _Reading) -> None:
        """Sequence numbers count the data records before a message (RFC 7011, 3.1), by observation domain."""
        known = self._sequences.get(message.domain)
        after: int | None = (message.sequence + message.records) % SEQUENCES
        if reading.counted.get("unknown_sets"):
            after = None
        if known is None or known.expected is None:
            self._sequences[message.domain] = _Sequence(after)
        else:
            self._compare(message, known, after)
        self._sequences.move_to_end(message.domain)
        while len(self._sequences) > self.limits.domains:
            self._sequences.popitem(last=False)

    def _compare(self, message: Message, known: _Sequence, after: int | None) -> None:
        assert known.expected is not None
        ahead = (message.sequence - known.expected) % SEQUENCES
        where = f"domain {message.domain}, sequence {message.sequence}"
        if ahead < SEQUENCES // 2:
            if ahead:
                self.counts.lost_records += ahead
                message.notes.append(f"{where}: {ahead} records before it did not come")
            known.expected, known.behind = after, None
        elif message.sequence in (0, known.behind):
            # From nothing, or two in a row that go on from each other behind the rest: the exporter began anew.
            self.counts.restarts += 1
            message.notes.append(f"{where}: begins anew, {known.expected} was due")
            known.expected, known.behind = after, None
        else:
            self.counts.late_messages += 1
            self.counts.lost_records -= min(self.counts.lost_records, message.records)
            message.notes.append(f"{where}: comes late, {known.expected} was due")
            known.behind = after


class _Reading:
    """One message on its way: nothing reaches the session before all of it has been read."""

    def __init__(self, session: Session, message: Message) -> None:
        self.session = session
        self.message = message
        self.staged: dict[int, Template | None] = {}  # None: withdrawn
        self.learned: dict[tuple[int, int], tuple[str, str]] = {}
        self.counted: dict[str, int] = {}

    def count(self, name: str) -> None:
        self.counted[name] = self.counted.get(name, 0) + 1

    def template(self, template_id: int) -> Template | None:
        if template_id in self.staged:
            return self.staged[template_id]
        return self.session.template(self.message.domain, template_id)

    # Templates

    def templates(self, set_id: int, body: bytes) -> None:
        offset = 0
        while offset + TEMPLATE_HEADER.size <= len(body):
            template_id, count = TEMPLATE_HEADER.unpack_from(body, offset)
            if template_id < MIN_TEMPLATE_ID and template_id != set_id:
                if any(body[offset:]):
                    raise MalformedMessageError(f"a template has the ID {template_id}, which is reserved")
                return  # padding
            offset += TEMPLATE_HEADER.size
            if count == 0:
                self._withdraw(set_id, template_id)
                continue
            if template_id < MIN_TEMPLATE_ID:
                raise MalformedMessageError(f"a template has the ID {template_id}, which is reserved")
            offset = self._template(set_id, template_id, count, body, offset)

    def _template(self, set_id: int, template_id: int, count: int, body: bytes, offset: int) -> int:
        """Reads the fields of a template record; the offset behind it."""
        scope_fields = 0
        if set_id == OPTIONS_TEMPLATE_SET_ID:
            scope_fields = int.from_bytes(body[offset : offset + 2], "big")
            offset += 2
            if not 0 < scope_fields <= count:
                raise MalformedMessageError(f"options template {template_id}: {scope_fields} scope fields of {count}")
        fields = []
        for _ in range(count):
            offset, found = self._field(body, offset, f"template {template_id}")
            fields.append(found)
        self.count("templates")
        if len(fields) > self.session.limits.fields or not all(f.length for f in fields):
            # Fields of no octets could make a short record endlessly long.
            self.count("refused_templates")
            self.message.notes.append(f"template {template_id}: refused, it has empty fields or too many")
            self.staged[template_id] = None
            return offset
        template = Template(template_id, fields, scope_fields)
        known = self.template(template_id)
        if known is not None and not known.same_as(template):
            self.message.notes.append(f"template {template_id}: has new fields")
        self.staged[template_id] = template
        return offset

    def _field(self, body: bytes, offset: int, where: str) -> tuple[int, Field]:
        """A field specifier (RFC 7011, 3.2), and the offset behind it."""
        if offset + FIELD.size > len(body):
            raise MalformedMessageError(f"{where}: cut off by the end of its set")
        number, length = FIELD.unpack_from(body, offset)
        offset += FIELD.size
        enterprise = 0
        if number & ENTERPRISE_BIT:
            if offset + 4 > len(body):
                raise MalformedMessageError(f"{where}: cut off by the end of its set")
            enterprise = int.from_bytes(body[offset : offset + 4], "big")
            offset += 4
        return offset, self.session.field_of(enterprise, number & ~ENTERPRISE_BIT, length)

    def _withdraw(self, set_id: int, template_id: int) -> None:
        if self.session.datagrams:
            self.message.notes.append(f"template {template_id}: a withdrawal over UDP is ignored (RFC 7011, 8.4)")
            return
        self.count("withdrawals")
        if template_id >= MIN_TEMPLATE_ID:
            if self.template(template_id) is None:
                self.message.notes.append(f"template {template_id}: withdrawn, but nobody knew it")
            self.staged[template_id] = None
            return
        is_options = set_id == OPTIONS_TEMPLATE_SET_ID
        known = dict(self.session.known_ids(self.message.domain)) | self.staged
        for known_id, template in known.items():
            if template is not None and template.is_options == is_options:
                self.staged[known_id] = None

    # Data

    def data(self, template_id: int, body: bytes) -> None:
        template = self.template(template_id)
        if template is None:
            self.count("unknown_sets")
            self.message.notes.append(
                f"domain {self.message.domain}: no template {template_id} for {len(body)} octets of data"
            )
            return
        rows = template.fixed_records(body)
        if rows is None:
            rows = list(self._variable_records(template, body, 0))
        self.message.sets.append(Records(template, rows))
        if template.is_options:
            self._learn(template, rows)

    def _variable_records(self, template: Template, body: bytes, depth: int) -> Iterator[tuple[Any, ...]]:
        offset = 0
        while offset + template.min_length <= len(body):
            values = []
            for f in template.fields:
                offset, octets = field_octets(f.length, body, offset)
                if f.type_name in STRUCTURED:
                    values.append(self._structured(f.type_name, octets, depth + 1))
                elif f.convert is not None:
                    values.append(f.convert(octets))
                elif f.code and not f.code.endswith("s"):
                    values.append(struct.unpack("!" + f.code, octets)[0])
                else:
                    values.append(octets)
            yield tuple(values)

    # Structured data (RFC 6313)

    def _structured(self, type_name: str, octets: bytes, depth: int) -> Any:
        """A value that JSON holds; octets when they do not hold what they say."""
        readers = {
            "basicList": self._basic_list,
            "subTemplateList": self._sub_template_list,
            "subTemplateMultiList": self._sub_template_multi_list,
        }
        try:
            if depth > MAX_LIST_DEPTH:
                raise MalformedMessageError("lists in lists in lists")
            if not octets:
                return None  # nothing at all, not even a semantic: some exporters leave unused lists empty
            return {"semantic": SEMANTICS.get(octets[0], octets[0])} | readers[type_name](octets[1:], depth)
        except MalformedMessageError as error:
            self.count("unread_lists")
            self.message.notes.append(f"a {type_name} is shown as octets: {error}")
            return octets.hex()

    def _basic_list(self, octets: bytes, depth: int) -> dict[str, Any]:
        offset, f = self._field(octets, 0, "a basicList")
        if f.length == 0:
            raise MalformedMessageError("its elements have no octets")
        items = []
        while offset < len(octets):
            offset, value = field_octets(f.length, octets, offset)
            items.append(self._item(f, value, depth))
        return {"element": f.name, "values": items}

    def _item(self, f: Field, octets: bytes, depth: int) -> Any:
        if f.type_name in STRUCTURED:
            return self._structured(f.type_name, octets, depth + 1)
        convert = converter(f.type_name, len(octets))
        value = convert(octets) if convert else octets
        show = shower_of(f.type_name) or plain
        return show(value)

    def _sub_template_list(self, octets: bytes, depth: int) -> dict[str, Any]:
        if len(octets) < 2:
            raise MalformedMessageError("it names no template")
        return self._sub_records(int.from_bytes(octets[:2], "big"), octets[2:], depth)

    def _sub_records(self, template_id: int, octets: bytes, depth: int) -> dict[str, Any]:
        template = self.template(template_id)
        if template is None:
            return {"template": template_id, "octets": octets.hex()}
        rows = template.fixed_records(octets)
        if rows is None:
            rows = list(self._variable_records(template, octets, depth))
        return {"template": template_id, "records": [template.shown(row) for row in rows]}

    def _sub_template_multi_list(self, octets: bytes, depth: int) -> dict[str, Any]:
        groups = []
        while octets:
            template_id, length = SET_HEADER.unpack_from(octets) if len(octets) >= SET_HEADER.size else (0, 0)
            if not SET_HEADER.size <= length <= len(octets):
                raise MalformedMessageError("one of its groups does not end within it")
            groups.append(self._sub_records(template_id, octets[SET_HEADER.size : length], depth))
            octets = octets[length:]
        return {"groups": groups}

    # Type information (RFC 5610)

    def _learn(self, template: Template, rows: Iterable[tuple[Any, ...]]) -> None:
        places = {name: where[0] for name, where in template.columns}
        if not all(name in places for name in TYPE_INFORMATION):
            return
        for row in rows:
            enterprise, number, name = (row[places[wanted]] for wanted in TYPE_INFORMATION)
            type_number = row[places["informationElementDataType"]] if "informationElementDataType" in places else 0
            if not isinstance(enterprise, int) or not isinstance(number, int) or not isinstance(name, str):
                continue
            key = (enterprise, number & ~ENTERPRISE_BIT)
            if enterprise and key not in information_model() and ELEMENT_NAME.fullmatch(name):
                known_type = isinstance(type_number, int) and type_number < len(TYPE_NAMES)
                self.learned[key] = (name, TYPE_NAMES[type_number] if known_type else "octetArray")


def message_header(data: bytes) -> tuple[int, int, int, int]:
    """(length, export time, sequence, observation domain) of a whole message. MalformedMessageError."""
    if len(data) < MESSAGE_HEADER.size:
        raise MalformedMessageError(f"{len(data)} octets are no message")
    version, length, export_time_s, sequence, domain = MESSAGE_HEADER.unpack_from(data)
    if version != VERSION:
        what = {9: " (NetFlow v9)", 5: " (NetFlow v5)"}.get(version, "")
        raise MalformedMessageError(f"version {version}{what}, not {VERSION} (IPFIX)")
    if length != len(data):
        raise MalformedMessageError(f"a message of {length} octets in {len(data)}")
    return length, export_time_s, sequence, domain


def sets_of(data: bytes) -> list[tuple[int, bytes]]:
    """(ID, body) of the sets of a message. MalformedMessageError: they do not fill it."""
    sets = []
    offset = MESSAGE_HEADER.size
    while offset < len(data):
        if offset + SET_HEADER.size > len(data):
            raise MalformedMessageError(f"{len(data) - offset} octets behind the last set")
        set_id, length = SET_HEADER.unpack_from(data, offset)
        if not SET_HEADER.size <= length <= len(data) - offset:
            raise MalformedMessageError(f"set {set_id} of {length} octets, where {len(data) - offset} are left")
        sets.append((set_id, data[offset + SET_HEADER.size : offset + length]))
        offset += length
    return sets


def field_octets(length: int, body: bytes, offset: int) -> tuple[int, bytes]:
    """(offset behind the field, its octets). MalformedMessageError: it reaches past the end."""
    if length == VARIABLE:
        if offset >= len(body):
            raise MalformedMessageError("a field is cut off")
        length = body[offset]
        offset += 1
        if length == 255:
            if offset + 2 > len(body):
                raise MalformedMessageError("a field is cut off")
            length = int.from_bytes(body[offset : offset + 2], "big")
            offset += 2
    end = offset + length
    if end > len(body):
        raise MalformedMessageError("a field is cut off")
    return end, body[offset:end]
