"""IPFIX in files (RFC 5655)."""

from __future__ import annotations

import time
from pathlib import Path

from appliance.errors import ConfigError
from appliance.meter.exporter import Counts, Exporter, ExporterParts
from appliance.meter.files import FlowFiles
from appliance.meter.pack import Message
from appliance.meter.settings import parse_uri

FILE_MESSAGE_BYTES = 65535  # nobody waits for a message of a file, and each has its price


class FileExporter(Exporter):
    """RFC 5655 files: each begins with its templates, and is a session of its own."""

    @property
    def default_message_bytes(self) -> int:
        return FILE_MESSAGE_BYTES

    def __init__(self, parts: ExporterParts) -> None:
        super().__init__(parts)
        settings, clock = parts.settings, parts.clock
        path = parse_uri(settings.uri).path
        if settings.single_file:
            self.files = FlowFiles(Path(path), 0, clock, single=True)
        elif path or settings.directory:
            self.files = FlowFiles(Path(path) if path else settings.directory or Path(), settings.rotate_seconds, clock)
        else:
            raise ConfigError(f"{settings.uri} names no directory, and none is configured; use file:DIRECTORY")
        self.page["up"] = 1

    def service(self, now_s: float, counts: Counts) -> None:
        super().service(now_s, counts)
        if self.files.due():
            self.files.publish()

    def next_deadline_s(self) -> float:
        deadline = super().next_deadline_s()
        rotation_s = self.files.seconds_to_rotation()
        if rotation_s is None:
            return deadline
        rotation_at_s = time.monotonic() + rotation_s
        return min(deadline, rotation_at_s) if deadline else rotation_at_s

    def statistics(self, counts: Counts) -> None:
        """Only beside records: a file of nothing but statistics every minute would help nobody."""
        if self.files.is_open:
            super().statistics(counts)

    def drain(self) -> None:
        while self.queue:
            if self.files.due():
                self.files.publish()
            message = self.taken()
            try:
                if not self.files.is_open:
                    self.begin_file()
                self.write(message)
            except OSError as error:
                self.page.add("send_errors")
                self.count_not_sent(message)
                self.set_up(False, f"{error.strerror or error}: {error.filename or self.files.place}")
            else:
                self.set_up(True)

    def begin_file(self) -> None:
        self.files.open()
        self.page.add("connects")
        self.sequence = self.first_sequence
        try:
            for message in self.templates.announcement(self.message_bytes):
                self.write(message)
        except OSError:
            self.files.discard()  # without its templates a file cannot be read
            raise

    def write(self, message: Message) -> None:
        self.stamp(message)
        self.files.write(message.data)
        self.count_sent(message)

    def close(self, deadline_s: float) -> None:
        self.drain()
        if self.files.single and not self.files.is_open:
            try:
                self.begin_file()  # a file that was asked for exists, even without a flow
            except OSError as error:
                self.page.add("send_errors")
                self.set_up(False, f"{error.strerror}: {error.filename}")
        self.files.close()
        self.page["up"] = 0
