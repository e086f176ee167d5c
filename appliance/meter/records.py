"""Flow records as JSON lines, CSV or Parquet: an exporter whose file other programs than IPFIX collectors read.

The messages that the packer made are decoded again, so what stands in these files is what a collector would have got.
"""

from __future__ import annotations

import csv
import io
import json
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from appliance.errors import MissingInputError
from appliance.meter.decode import Records, Session, Template
from appliance.meter.export_file import FILE_MESSAGE_BYTES
from appliance.meter.exporter import Exporter, ExporterParts
from appliance.meter.files import FlowFiles
from appliance.meter.settings import parse_uri
from appliance.meter.values import TIMES, number_kind

ROWS_AT_ONCE = 65_536  # in memory, and in a row group of Parquet


class RecordFile(ABC):
    """One file of rows. `columns`: name -> abstract data type, all that a row may have, in order."""

    def __init__(self, files: FlowFiles, columns: dict[str, str]) -> None:
        self.files = files
        self.columns = columns

    @abstractmethod
    def write(self, records: Records) -> None: ...

    @abstractmethod
    def finish(self) -> None:
        """Writes what is held back; the file itself is published by its owner."""


class JsonFile(RecordFile):
    """One object a line: name -> value, as `appliance ipfix read` shows them."""

    def write(self, records: Records) -> None:
        lines = (json.dumps(records.template.shown(row)) for row in records.rows)
        self.files.write(bytearray(("\n".join(lines) + "\n").encode()))

    def finish(self) -> None:
        pass


class CsvFile(RecordFile):
    """RFC 4180, but with line feeds alone; the first line has the names, a field that a record lacks is empty."""

    def __init__(self, files: FlowFiles, columns: dict[str, str]) -> None:
        super().__init__(files, columns)
        self._put([list(columns)])

    def write(self, records: Records) -> None:
        shown = (records.template.shown(row) for row in records.rows)
        self._put([self._cell(record.get(name)) for name in self.columns] for record in shown)

    @staticmethod
    def _cell(value: Any) -> Any:
        return json.dumps(value) if isinstance(value, dict | list) else value

    def _put(self, rows: Iterable[Sequence[Any]]) -> None:
        text = io.StringIO()
        csv.writer(text, lineterminator="\n").writerows(rows)
        self.files.write(bytearray(text.getvalue().encode()))

    def finish(self) -> None:
        pass


class ParquetFile(RecordFile):
    """Typed columns: times are timestamps in UTC of the element's resolution, addresses text, octets binary."""

    def __init__(self, files: FlowFiles, columns: dict[str, str]) -> None:
        super().__init__(files, columns)
        self._arrow, parquet = load_pyarrow(str(files.place))
        self._schema = self._arrow.schema([(name, self._type(name, kind)) for name, kind in columns.items()])
        self._sink = _Sink(files)
        self._writer = parquet.ParquetWriter(self._sink, self._schema, compression="zstd")
        self._held: dict[str, list[Any]] = {name: [] for name in columns}
        self._count = 0

    def _type(self, name: str, kind: str) -> Any:
        arrow = self._arrow
        if kind in TIMES:
            units = {"dateTimeSeconds": "s", "dateTimeMilliseconds": "ms", "dateTimeMicroseconds": "us"}
            return arrow.timestamp(units.get(kind, "ns"), tz="UTC")
        if number_kind(kind) in ("unsigned", "signed"):
            return getattr(arrow, kind.replace("unsigned", "uint").replace("signed", "int"))()
        plain = {"float32": arrow.float32(), "float64": arrow.float64(), "boolean": arrow.bool_()}
        return plain.get(kind) or (arrow.binary() if kind == "octetArray" else arrow.string())

    def write(self, records: Records) -> None:
        places = {name: where[0] for name, where in records.template.columns}
        structured = {name for name, kind in self.columns.items() if kind.endswith("List")}
        for name, held in self._held.items():
            place = places.get(name)
            if place is None:
                held.extend([None] * len(records.rows))
            elif name in structured:
                held.extend(json.dumps(row[place]) for row in records.rows)
            else:
                held.extend(row[place] for row in records.rows)
        self._count += len(records.rows)
        if self._count >= ROWS_AT_ONCE:
            self._write_group()

    def _write_group(self) -> None:
        arrow = self._arrow
        per_unit = {"s": 1_000_000_000, "ms": 1_000_000, "us": 1000, "ns": 1}
        arrays = []
        for name, held in self._held.items():
            kind = self._schema.field(name).type
            if arrow.types.is_timestamp(kind):
                held = [None if ns is None else ns // per_unit[kind.unit] for ns in held]
            arrays.append(arrow.array(held, kind))
        self._writer.write_table(arrow.Table.from_arrays(arrays, schema=self._schema))
        self._held = {name: [] for name in self.columns}
        self._count = 0

    def finish(self) -> None:
        if self._count:
            self._write_group()
        self._writer.close()


class _Sink(io.RawIOBase):
    """What pyarrow writes to. Its end is not the file's: that is published later."""

    def __init__(self, files: FlowFiles) -> None:
        self._files = files
        self._position = 0

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        chunk = bytearray(data)
        self._files.write(chunk)
        self._position += len(chunk)
        return len(chunk)

    def tell(self) -> int:
        return self._position


def load_pyarrow(what: str) -> tuple[Any, Any]:
    """The modules pyarrow and pyarrow.parquet. MissingInputError tells how to get them."""
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise MissingInputError(
            f"{what}: Parquet needs the package pyarrow; pip install 'capture-appliance[parquet]' brings it"
        ) from None
    return pyarrow, pyarrow.parquet


FORMATS: dict[str, type[RecordFile]] = {"json": JsonFile, "csv": CsvFile, "parquet": ParquetFile}


class RecordExporter(Exporter):
    """Flow records into one file of rows, which appears when all is done. Options data do not belong there."""

    @property
    def default_message_bytes(self) -> int:
        return FILE_MESSAGE_BYTES

    def __init__(self, parts: ExporterParts) -> None:
        """Raises MissingInputError when the format needs a package that is not there."""
        super().__init__(parts)
        path = parse_uri(self.settings.uri).path
        if self.settings.file_format == "parquet":
            load_pyarrow(path)
        self.files = FlowFiles(Path(path), 0, self.clock, single=True)
        self.session = Session()
        self.rows: RecordFile | None = None
        self.page["up"] = 1

    def statistics(self, counts: object) -> None:
        pass

    def drain(self) -> None:
        while self.queue:
            message = self.taken()
            try:
                self._write(bytes(message.data))
            except OSError as error:
                self.page.add("send_errors")
                self.count_not_sent(message)
                self.set_up(False, f"{error.strerror or error}: {error.filename or self.files.place}")
            else:
                self.count_sent(message)

    def _write(self, data: bytes) -> None:
        rows = self.rows or self._begin()
        for records in self.session.message(data).sets:
            if not records.template.is_options:
                rows.write(records)

    def _begin(self) -> RecordFile:
        self.files.open()
        self.page.add("connects")
        templates: dict[int, Template] = {}
        for message in self.templates.announcement(self.message_bytes):
            domain = self.session.message(bytes(message.data)).domain
            templates |= dict(self.session.known_ids(domain))
        columns: dict[str, str] = {}
        for template in templates.values():
            if not template.is_options:
                columns |= {f.name: f.type_name for f in template.fields if f.name not in columns}
        self.rows = FORMATS[self.settings.file_format](self.files, columns)
        return self.rows

    def close(self, deadline_s: float) -> None:
        self.drain()
        try:
            (self.rows or self._begin()).finish()
        except OSError as error:
            self.page.add("send_errors")
            self.set_up(False, f"{error.strerror}: {error.filename}")
        self.files.close()
        self.page["up"] = 0
