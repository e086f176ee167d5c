"""python-ipfix 0.9.7 as a library, repaired: import this module, then use the package as its documentation shows.

    import appliance.meter.library          # once, before anything is read or written
    import ipfix.message, ipfix.reader, ipfix.writer

The repairs are made in the package itself, so that its own names stay the ones to use:

- dateTimeMicroseconds and dateTimeNanoseconds count from 1900 (RFC 7011, 6.1.9), microseconds with their low 11 bits
  zero; datetimes may be aware (naive ones are UTC, and what is read is naive UTC, as documented);
- integers of any reduced length are read and written, elements may come in several lengths, IEs of reduced length can
  be unparsed, `use_integer_ipv4` works, and an unknown element of a message is not kept for ever;
- the registry goes on to number 529 and has structured data types, as octets;
- templates may begin with a field of variable length; options templates are withdrawn in 4 octets; withdrawals,
  padding and sets of impossible length are read for what they are;
- every domain has a sequence of its own, modulo 2^32, also domain 0; a message has no empty set and keeps to its MTU;
- a writer needs no `set_domain`, writes nothing when there is nothing, and `DatagramWriter` repeats templates over UDP;
  a reader has the documented `records_as_dict` and `records_as_tuple`.
"""

from __future__ import annotations

import socket
import struct
import time
import warnings
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from typing import Any

with warnings.catch_warnings():
    warnings.simplefilter("ignore", SyntaxWarning)  # as in ipfix.py
    import ipfix.ie
    import ipfix.message
    import ipfix.reader
    import ipfix.template
    import ipfix.types
    import ipfix.writer

from appliance.meter import registry
from appliance.meter.ipfix import OPTIONS_TEMPLATE_SET_ID, TEMPLATE_SET_ID, information_model
from appliance.meter.values import NTP_ERA_S, NTP_OFFSET_S, ntp_to_ns

EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
SEQUENCES = 1 << 32
SET_HEADER = struct.Struct("!HH")
MESSAGE_HEADER_BYTES = 16
MICROSECOND_BITS = ~0x7FF  # RFC 7011, 6.1.9: the low 11 bits of dateTimeMicroseconds mean nothing

IpfixDecodeError = ipfix.template.IpfixDecodeError
IpfixEncodeError = ipfix.template.IpfixEncodeError
EndOfMessage = ipfix.message.EndOfMessage


# Times ---------------------------------------------------------------------------------------------------------------


def microseconds_of(moment: datetime) -> int:
    """Since 1970, exactly. A naive datetime is UTC."""
    aware = moment if moment.tzinfo is not None else moment.replace(tzinfo=UTC)
    return (aware - EPOCH) // timedelta(microseconds=1)


def moment_of(microseconds: int) -> datetime:
    """Naive, in UTC, as the package's documentation has it."""
    return (EPOCH + timedelta(microseconds=microseconds)).replace(tzinfo=None)


def encode_ntp(moment: datetime) -> int:
    seconds, microsecond = divmod(microseconds_of(moment), 1_000_000)
    # Rounded up, so that what is read again is the same microsecond.
    fraction = -(-(microsecond << 32) // 1_000_000)
    return (seconds + NTP_OFFSET_S) % NTP_ERA_S << 32 | fraction


def encode_ntp_microseconds(moment: datetime) -> int:
    return (encode_ntp(moment) + 0x400) & MICROSECOND_BITS


def decode_ntp(timestamp: int) -> datetime:
    return moment_of((ntp_to_ns(timestamp) + 500) // 1000)


def _repair_times() -> None:
    encoders: dict[str, tuple[Callable[[datetime], int], Callable[[int], datetime]]] = {
        "dateTimeSeconds": (lambda dt: microseconds_of(dt) // 1_000_000, lambda n: moment_of(n * 1_000_000)),
        "dateTimeMilliseconds": (lambda dt: microseconds_of(dt) // 1000, lambda n: moment_of(n * 1000)),
        "dateTimeMicroseconds": (encode_ntp_microseconds, decode_ntp),
        "dateTimeNanoseconds": (encode_ntp, decode_ntp),
    }
    for name, (encode, decode) in encoders.items():
        kind = ipfix.types.for_name(name)
        kind.valenc, kind.valdec = encode, decode
    ipfix.types._encode_sec, ipfix.types._decode_sec = encoders["dateTimeSeconds"]


# Types and elements --------------------------------------------------------------------------------------------------


class ReducedInteger(ipfix.types.StructType):  # type: ignore[misc]
    """An integer in as many octets as struct has no letter for."""

    def __init__(self, kind: Any, length: int) -> None:
        signed = kind.name.startswith("signed")
        super().__init__(
            kind.name,
            kind.num,
            f"{length}s",
            lambda value: value.to_bytes(length, "big", signed=signed),
            lambda octets: int.from_bytes(octets, "big", signed=signed),
            kind.valstr,
            kind.valparse,
            kind.roottype,
        )


def struct_for_length(kind: Any, length: int) -> Any:
    """StructType.for_length: the type in another length."""
    if not length or length == kind.length:
        return kind
    rest = (kind.valenc, kind.valdec, kind.valstr, kind.valparse, kind.roottype)
    root = kind.roottype
    if isinstance(root, ipfix.types.OctetArrayType):
        letter = f"{length}s" if length != ipfix.types.VARLEN else None
    else:
        letter = ipfix.types._stel_rle.get((root.stel, length)) if length != root.length else root.stel
    if letter is not None:
        return ipfix.types.StructType(kind.name, kind.num, letter, *rest)
    if length == ipfix.types.VARLEN and isinstance(root, ipfix.types.OctetArrayType):
        return root
    if 0 < length < root.length and root.name.startswith(("unsigned", "signed")):
        return ReducedInteger(root, length)
    raise ipfix.types.IpfixTypeError(f"No RLE for <{kind.name}>[{length}]")


def octets_for_length(kind: Any, length: int) -> Any:
    """OctetArrayType.for_length."""
    if not length or length == kind.length:
        return kind
    rest = (kind.valenc, kind.valdec, kind.valstr, kind.valparse, kind.roottype)
    return ipfix.types.StructType(kind.name, kind.num, f"{length}s", *rest)


def use_integer_ipv4() -> None:
    kind = ipfix.types.for_name("ipv4Address")
    kind.__init__("ipv4Address", 18, "L")


def element_of_template(enterprise: int, number: int, length: int) -> Any:
    """ie.for_template_entry, which must not keep what any message may name. A field without octets is refused: with
    such fields a record could have none, and a set no end."""
    if length == 0:
        raise IpfixDecodeError(f"element {enterprise}/{number} has no octets")
    known = ipfix.ie._ieForNum.get((enterprise, number))
    if known is not None:
        return known.for_length(length)
    octets = ipfix.types.for_name("octetArray")
    return ipfix.ie.InformationElement(None, enterprise, number, octets, length)


_use_iana_of_2014 = ipfix.ie.use_iana_default


def use_iana_default() -> None:
    _use_iana_of_2014()
    for spec in registry.IANA_SPECS:
        ipfix.ie.for_spec(spec)


def _repair_elements() -> None:
    information_model()  # brings the structured data types
    ipfix.types.StructType.for_length = struct_for_length
    ipfix.types.OctetArrayType.for_length = octets_for_length
    ipfix.types.use_integer_ipv4 = use_integer_ipv4
    ipfix.ie.for_template_entry = element_of_template
    ipfix.ie.use_iana_default = use_iana_default


# Templates -----------------------------------------------------------------------------------------------------------


def variable_fields(template: Any) -> range:
    """The fields from the first of variable length on, also when that is the very first."""
    first = template.varlenslice
    return range(template.count() if first is None else first, template.count())


def decode_record(template: Any, buffer: memoryview, offset: int, packplan: Any = None) -> tuple[list[Any], int]:
    """Template.decode_from. IpfixDecodeError: the record reaches past the end of `buffer`."""
    plan = packplan or template.packplan
    try:
        fixed = plan.st.unpack_from(buffer, offset)
        values = [decode(value) for decode, value in zip(plan.valdec, fixed, strict=False)]
        offset += plan.st.size
        for i in variable_fields(template):
            element = template.ies[i]
            length = element.length
            if length == ipfix.types.VARLEN:
                length, offset = ipfix.types.decode_varlen(buffer, offset)
            if offset + length > len(buffer):
                raise IpfixDecodeError("a field reaches past the end")
            if i in plan.indices:
                values.append(element.type.decode_single_value_from(buffer, offset, length))
            offset += length
    except struct.error:
        raise IpfixDecodeError("a record reaches past the end") from None
    return values, offset


def encode_record(template: Any, buffer: memoryview, offset: int, values: Any, packplan: Any = None) -> int:
    """Template.encode_to. EndOfMessage: there is no room in `buffer`."""
    plan = packplan or template.packplan
    fixed = [encode(value) for encode, value in zip(plan.valenc, values, strict=False)]
    if offset + plan.st.size > len(buffer):
        raise EndOfMessage
    plan.st.pack_into(buffer, offset, *fixed)
    offset += plan.st.size
    for i in variable_fields(template):
        element = template.ies[i]
        encoded = octets_of(element.type, values[i])
        head = 0 if element.length != ipfix.types.VARLEN else 1 if len(encoded) < 255 else 3
        if offset + head + len(encoded) > len(buffer):
            raise EndOfMessage
        if head:
            offset = ipfix.types.encode_varlen(buffer, offset, len(encoded))
        buffer[offset : offset + len(encoded)] = encoded
        offset += len(encoded)
    return offset


def octets_of(kind: Any, value: Any) -> bytes:
    encoded = kind.valenc(value)
    return bytes(encoded) if isinstance(kind, ipfix.types.OctetArrayType) else bytes(kind.st.pack(encoded))


def withdrawal_length(set_id: int) -> int:
    """A withdrawal has an ID and a field count of 0, of options templates too (RFC 7011, 8.1)."""
    return 4


def encode_withdrawal_to(buffer: memoryview, offset: int, set_id: int, template_id: int) -> int:
    SET_HEADER.pack_into(buffer, offset, template_id, 0)
    return offset + 4


def _repair_templates() -> None:
    ipfix.template.Template.decode_from = decode_record
    ipfix.template.Template.encode_to = encode_record
    ipfix.template.withdrawal_length = withdrawal_length
    ipfix.template.encode_withdrawal_to = encode_withdrawal_to


# Messages ------------------------------------------------------------------------------------------------------------


def scan_sets(message: Any) -> None:
    """MessageBuffer._scan_setlist."""
    message.cursetoff, message.cursetid, message.curtmpl = 0, None, None
    message.setlist.clear()
    offset = MESSAGE_HEADER_BYTES
    while offset < message.length:
        if offset + SET_HEADER.size > message.length:
            raise IpfixDecodeError("octets behind the last set")
        set_id, length = SET_HEADER.unpack_from(message.mbuf, offset)
        if length < SET_HEADER.size or offset + length > message.length:
            raise IpfixDecodeError(f"set {set_id} of {length} octets")  # of length 0: there would be no end
        message.setlist.append((offset, set_id, length))
        offset += length


def read_templates(message: Any, set_id: int, body: memoryview, accept: Callable[[Any], bool]) -> None:
    offset = 0
    while offset + SET_HEADER.size <= len(body):
        template_id, count = SET_HEADER.unpack_from(body, offset)
        if template_id == 0:
            return  # padding
        if count == 0:
            withdraw(message, set_id, template_id)
            offset += SET_HEADER.size
            continue
        try:
            template, offset = ipfix.template.decode_template_from(body, offset, set_id)
        except (struct.error, ValueError) as error:
            raise IpfixDecodeError(f"template {template_id}: {error}") from None
        if template.minlength == 0:
            raise IpfixDecodeError(f"template {template_id}: its records have no octets")
        key = (message.odid, template.tid)
        message.templates[key] = template
        message.accepted_tids.discard(key)
        if accept(template):
            message.accepted_tids.add(key)
        if message.template_record_hook:
            message.template_record_hook(message, template)


def withdraw(message: Any, set_id: int, template_id: int) -> None:
    """One template, or all of its kind when the ID is the set's."""
    for key, template in list(message.templates.items()):
        same_domain = key[0] == message.odid
        if same_domain and (key[1] == template_id or (template_id == set_id and template.native_setid() == set_id)):
            del message.templates[key]
            message.accepted_tids.discard(key)


def read_records(
    message: Any,
    decode_fn: Callable[..., Any] = ipfix.template.Template.decode_namedict_from,
    tmplaccept_fn: Callable[[Any], bool] = ipfix.message.accept_all_templates,
    recinf: Any = None,
) -> Iterator[Any]:
    """MessageBuffer.record_iterator."""
    for offset, set_id, length in message.setlist:
        whole = message.mbuf[offset : offset + length]
        body = whole[SET_HEADER.size :]
        if set_id in (TEMPLATE_SET_ID, OPTIONS_TEMPLATE_SET_ID):
            read_templates(message, set_id, body, tmplaccept_fn)
            continue
        template = message.templates.get((message.odid, set_id))
        if template is None:
            if message.unknown_data_set_hook:
                message.unknown_data_set_hook(message, whole)
        elif (message.odid, set_id) not in message.accepted_tids:
            if message.ignored_data_set_hook:
                message.ignored_data_set_hook(message, template, whole)
        else:
            place = 0
            while place + template.minlength <= len(body):
                record, place = decode_fn(template, body, place, recinf=recinf)
                yield record
                message._increment_sequence()


def count_record(message: Any) -> None:
    """MessageBuffer._increment_sequence."""
    key = (message.odid, message.streamid)
    message.sequences[key] = (message.sequences.get(key, 0) + 1) % SEQUENCES


def begin_export(message: Any, odid: int | None = None) -> None:
    """MessageBuffer.begin_export."""
    message.setlist.clear()
    if odid is not None:
        message.odid = odid
    message.sequence = message.sequences.setdefault((message.odid, message.streamid), 0) % SEQUENCES
    message.length = message.cursetoff = MESSAGE_HEADER_BYTES
    message.mbuf[:MESSAGE_HEADER_BYTES] = bytes(MESSAGE_HEADER_BYTES)
    if message.mtu <= message.length:
        raise IpfixEncodeError(f"MTU too small: {message.mtu}")
    message.cursetid = None


def close_set(message: Any) -> None:
    """MessageBuffer._export_close_set: a set with nothing in it is taken back."""
    if message.cursetid and message.length == message.cursetoff + SET_HEADER.size:
        message.length = message.cursetoff
    elif message.cursetid:
        SET_HEADER.pack_into(message.mbuf, message.cursetoff, message.cursetid, message.length - message.cursetoff)
    message.cursetid = None


def needs_flush(message: Any) -> bool:
    """MessageBuffer.export_needs_flush."""
    empty = message.cursetid and message.length == message.cursetoff + SET_HEADER.size
    return bool(message.length - (SET_HEADER.size if empty else 0) > MESSAGE_HEADER_BYTES)


def to_bytes(message: Any) -> bytes:
    """MessageBuffer.to_bytes."""
    message._export_close_set()
    if message.auto_export_time:
        message.export_epoch = int(time.time())
    header = (10, message.length, message.export_epoch, message.sequence, message.odid)
    struct.pack_into("!HHLLL", message.mbuf, 0, *header)
    return bytes(message.mbuf[: message.length])


def set_export_time(message: Any, dt: datetime | None = None) -> None:
    """MessageBuffer.set_export_time."""
    message.export_epoch = int(time.time()) if dt is None else microseconds_of(dt) // 1_000_000
    message.auto_export_time = False


def export_template(message: Any, template_id: int) -> None:
    """MessageBuffer.export_template, which leaves the message as it was when there is no room."""
    template = message.templates[message.odid, template_id]
    set_id = template.native_setid()
    header_bytes = 6 if set_id == OPTIONS_TEMPLATE_SET_ID else 4
    _make_room(message, set_id, header_bytes + template.enclength)
    message.length = template.encode_template_to(message.mbuf, message.length, set_id)


def export_withdrawal(message: Any, set_id: int, template_id: int) -> None:
    _make_room(message, set_id, 4)
    message.length = encode_withdrawal_to(message.mbuf, message.length, set_id, template_id)


def _make_room(message: Any, set_id: int, octets: int) -> None:
    needed = octets + (0 if message.cursetid == set_id else SET_HEADER.size)
    if message.length + needed > message.mtu:
        raise EndOfMessage
    message.export_ensure_set(set_id)


def delete_template(message: Any, tid: int, export: bool = True) -> None:
    """MessageBuffer.delete_template."""
    template = message.templates[message.odid, tid]
    if export:
        export_withdrawal(message, template.native_setid(), tid)
    del message.templates[message.odid, tid]


def _repair_messages() -> None:
    buffer = ipfix.message.MessageBuffer
    buffer._scan_setlist, buffer.record_iterator, buffer._increment_sequence = scan_sets, read_records, count_record
    buffer.begin_export, buffer._export_close_set, buffer.export_needs_flush = begin_export, close_set, needs_flush
    buffer.to_bytes, buffer.set_export_time, buffer.delete_template = to_bytes, set_export_time, delete_template
    buffer.export_template, buffer._export_template_withdrawal = export_template, export_withdrawal
    buffer.export_template_withdrawal = export_withdrawal


# Writers -------------------------------------------------------------------------------------------------------------


class Writer(ipfix.writer.MessageStreamWriter):  # type: ignore[misc]
    """MessageStreamWriter: begins in domain 0, and writes only messages that hold something."""

    def __init__(self, stream: Any, mtu: int = 65535) -> None:
        super().__init__(stream, mtu)
        self.curtid: int | None = None
        self.msg.begin_export(0)

    def set_domain(self, odid: int) -> None:
        self._write()
        self.msg.begin_export(odid)

    def add_template(self, tmpl: Any) -> None:
        self._retry_after_flush(self.msg.add_template, tmpl)

    def export_namedict(self, rec: Any) -> None:
        self._export(self.msg.export_namedict, rec)

    def export_tuple(self, rec: Any) -> None:
        self._export(self.msg.export_tuple, rec)

    def _export(self, export: Callable[[Any], None], record: Any) -> None:
        self._retry_after_flush(self.msg.export_ensure_set, self.curtid)
        try:
            export(record)
        except EndOfMessage:
            self.flush()
            self.msg.export_ensure_set(self.curtid)
            export(record)

    def delete_template(self, tid: int) -> None:
        """Tells the reader that a template is gone: its ID may have another meaning then (RFC 7011, 8.1)."""
        self._retry_after_flush(self.msg.delete_template, tid)

    def flush(self) -> None:
        self._write()
        self.msg.begin_export()

    def _write(self) -> None:
        if self.msg.export_needs_flush():
            self.msg.write_message(self.stream)
            self.msgcount += 1


class DatagramWriter(Writer):
    """A writer over UDP: one message in each datagram, and all templates again after a time and after some messages
    (RFC 7011, 8.4). `connected`: a connected datagram socket. Templates cannot be withdrawn here."""

    def __init__(
        self, connected: socket.socket, mtu: int = 512, refresh_s: float = 600.0, refresh_messages: int = 1000
    ) -> None:
        super().__init__(_Datagrams(connected), mtu)
        self._refresh_s = refresh_s
        self._refresh_messages = refresh_messages
        self._refreshed_at_s = time.monotonic()
        self._messages = 0

    def delete_template(self, tid: int) -> None:
        raise IpfixEncodeError("over UDP templates are not withdrawn (RFC 7011, 8.4)")

    def _write(self) -> None:
        before = self.msgcount
        super()._write()
        self._messages += self.msgcount - before
        is_due = time.monotonic() - self._refreshed_at_s >= self._refresh_s or self._messages >= self._refresh_messages
        if is_due:
            self.refresh()

    def refresh(self) -> None:
        """Sends all templates of the domain, in messages of their own."""
        self._refreshed_at_s = time.monotonic()
        self._messages = 0
        self.msg.begin_export()
        for template_id in list(self.msg.active_template_ids()):
            try:
                self.msg.export_template(template_id)
            except EndOfMessage:
                self.msg.write_message(self.stream)
                self.msg.begin_export()
                self.msg.export_template(template_id)
        if self.msg.export_needs_flush():
            self.msg.write_message(self.stream)
        self.msg.begin_export()


class _Datagrams:
    def __init__(self, connected: socket.socket) -> None:
        self._socket = connected

    def write(self, message: bytes) -> int:
        return self._socket.send(message)


def _repair_writers() -> None:
    ipfix.writer.MessageStreamWriter = Writer
    ipfix.writer.to_stream = Writer


def _repair_readers() -> None:
    """The documentation's names of what 0.9.7 calls namedict_iterator and tuple_iterator."""
    reader = ipfix.reader.MessageStreamReader
    reader.records_as_dict, reader.records_as_tuple = reader.namedict_iterator, reader.tuple_iterator


_repair_times()
_repair_elements()
_repair_templates()
_repair_messages()
_repair_writers()
_repair_readers()
