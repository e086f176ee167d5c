"""A collector of IPFIX for tests: `python ipfix_sink.py udp|tcp PORT FILE` appends what it receives to FILE.

Each piece stands behind its connection's number and its length, so that `read_messages` can tell connections apart. It
knows of RFC 7011 what is needed to count: messages, sets, templates, packetDeltaCount and its reverse.
"""

from __future__ import annotations

import socket
import struct
import sys
import threading
from dataclasses import dataclass, field
from pathlib import Path

PIECE = struct.Struct("!II")
PACKET_DELTA_COUNT = 2
REVERSE_ENTERPRISE = 29305  # RFC 5103
VARIABLE = 65535


@dataclass
class Received:
    """What a collector got. `packets`: of all flow records, both directions."""

    messages: int = 0
    packets: int = 0
    templates_sent: int = 0
    undescribed_sets: int = 0  # data sets whose template had not come before on their connection
    first_sequences: list[int] = field(default_factory=list)
    sequence_gaps: int = 0

    @property
    def connections(self) -> int:
        return len(self.first_sequences)


class Stream:
    """One connection: its templates and its sequence."""

    def __init__(self, total: Received) -> None:
        self.total = total
        self.rest = b""
        self.templates: dict[int, list[tuple[int, int, int]]] = {}
        self.expected: int | None = None

    def feed(self, data: bytes) -> None:
        self.rest += data
        while len(self.rest) >= 16:
            length = int.from_bytes(self.rest[2:4], "big")
            if len(self.rest) < length:
                return
            self.message(self.rest[:length])
            self.rest = self.rest[length:]

    def message(self, message: bytes) -> None:
        version, _, _, sequence, _ = struct.unpack_from("!HHIII", message)
        assert version == 10
        self.total.messages += 1
        if self.expected is None:
            self.total.first_sequences.append(sequence)
        elif sequence != self.expected:
            self.total.sequence_gaps += 1
        records, position = 0, 16
        while position + 4 <= len(message):
            set_id, length = struct.unpack_from("!HH", message, position)
            body = message[position + 4 : position + length]
            if set_id in (2, 3):
                self.learn(body, 4 if set_id == 2 else 6)
            elif set_id in self.templates:
                records += self.data(body, self.templates[set_id])
            else:
                self.total.undescribed_sets += 1
            position += length
        self.expected = (sequence + records) & 0xFFFFFFFF

    def learn(self, body: bytes, header_bytes: int) -> None:
        position = 0
        while position + header_bytes <= len(body):
            template, count = struct.unpack_from("!HH", body, position)
            position += header_bytes
            fields = []
            for _ in range(count):
                element, length = struct.unpack_from("!HH", body, position)
                position += 4
                enterprise = 0
                if element & 0x8000:
                    enterprise = int.from_bytes(body[position : position + 4], "big")
                    position += 4
                fields.append((element & 0x7FFF, enterprise, length))
            self.templates[template] = fields
            self.total.templates_sent += 1

    def data(self, body: bytes, fields: list[tuple[int, int, int]]) -> int:
        smallest = sum(1 if length == VARIABLE else length for _, _, length in fields)
        records, position = 0, 0
        while position + smallest <= len(body):
            for element, enterprise, length in fields:
                if length == VARIABLE:
                    length = body[position]
                    position += 1
                    if length == 255:
                        length = int.from_bytes(body[position : position + 2], "big")
                        position += 2
                if element == PACKET_DELTA_COUNT and enterprise in (0, REVERSE_ENTERPRISE):
                    self.total.packets += int.from_bytes(body[position : position + length], "big")
                position += length
            records += 1
        return records


def read_messages(path: Path) -> Received:
    """What the sink has written so far; a piece that is only half there is left out."""
    content = path.read_bytes() if path.exists() else b""
    total = Received()
    streams: dict[int, Stream] = {}
    position = 0
    while position + PIECE.size <= len(content):
        number, length = PIECE.unpack_from(content, position)
        position += PIECE.size
        if position + length > len(content):
            break
        streams.setdefault(number, Stream(total)).feed(content[position : position + length])
        position += length
    return total


def main() -> None:
    kind, port, path = sys.argv[1], int(sys.argv[2]), sys.argv[3]
    lock = threading.Lock()
    start = (Path(path).stat().st_mtime_ns & 0x3FFFFFFF) if Path(path).exists() else 0
    with open(path, "ab", buffering=0) as file:

        def note(number: int, data: bytes) -> None:
            with lock:
                file.write(PIECE.pack(number, len(data)) + data)

        if kind == "udp":
            with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 8 << 20)
                sock.bind(("127.0.0.1", port))
                while True:
                    note(start, sock.recv(65535))
        with socket.create_server(("127.0.0.1", port)) as listener:
            number = start
            while True:
                connection, _ = listener.accept()
                threading.Thread(target=drain, args=(connection, number, note), daemon=True).start()
                number += 1


def drain(connection: socket.socket, number: int, note: object) -> None:
    with connection:
        while data := connection.recv(65536):
            note(number, data)  # type: ignore[operator]


if __name__ == "__main__":
    main()
