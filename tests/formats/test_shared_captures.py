"""Real captures, read as Wireshark's tools read them; damaged ones end cleanly. Skipped where the captures are not."""

from __future__ import annotations

import csv
import ctypes
import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest

from appliance.errors import FormatError
from appliance.formats.decoder import Decoder
from appliance.formats.reader import BATCH_BYTES, CaptureReader

DATA = Path(os.environ.get("APPLIANCE_SHARED_DATA", Path(__file__).parents[3] / "shared" / "data"))
NO_DATA = f"the shared captures are not in {DATA}"
NOT_READ = {"snoop"}
# What Wireshark counts otherwise: it takes an ERF record's frame check sequence for data, which we leave out, and the
# card's metadata without their headers, which we keep.
OTHER_BYTES = {"100_packets.erf": -4 * 100, "provenance.erf": 24 * 100}

# Where the tool's reading is not the file's meaning; the reason stands beside each. Packets and bytes are compared.
OTHER_TIMES = {
    "pcapng-example.pcapng": "times beyond the year 2262 in microseconds; records end there",
    "pcapng-example.pcapng.zst": "the same",
    "malformed/fuzz-2021-10-13.pcap": "the fraction of a second is above 1 s, which the tool prints as such",
    "malformed/timestamp_invalid_nano.pcap": "the same, printed as a negative number",
}
# The tool gives up on the times of a file with Simple Packet Blocks; by the specification the others count.
NO_TIMES = {
    "pcapng-be-test201.pcapng": (1340954905298858000, 1340954905301858000),
    "pcapng-le-test016.pcapng": (1340954905298858000, 1340954905300858000),
    "pcapng-le-test102.pcapng": (1340954905298858000, 1340954905301858000),
    "pcapng-le-test202.pcapng": (1340954905298858000, 1340954905301858000),
}
# What the tool refuses without a count: packets that are whole by the specification.
REFUSED_BY_THE_TOOL = {
    "malformed/fuzz.pcap": 1,  # the tool guesses another header size and gets one more
    "malformed/linktype-reserved-field-not-zero.pcap": 0,
    "malformed/pcap-invalid-version-1.pcap": 0,
    "malformed/shb-option-too-long.pcapng": 0,
    "malformed/tls_DER-incomplete-header.pcap": 6,
}


def truth() -> list[dict[str, str]]:
    table = DATA / "truth" / "capinfos.tsv"
    if not table.exists():
        return []
    with table.open(newline="") as rows:
        return list(csv.DictReader(rows, delimiter="\t", quoting=csv.QUOTE_NONE))


ROWS = truth()


def nanoseconds(seconds: str) -> int | None:
    if seconds == "n/a":
        return None
    whole, _, fraction = seconds.partition(".")
    return int(whole) * 10**9 + int(fraction.ljust(9, "0"))


def read(path: Path) -> tuple[Decoder, str]:
    """The counts of a capture, and the error that it ends with."""
    batch = bytearray(BATCH_BYTES)
    address = ctypes.addressof(ctypes.c_char.from_buffer(batch))
    with CaptureReader(path) as reader:
        try:
            while not reader.fill(address, BATCH_BYTES).end:
                pass
        except FormatError as error:
            assert error.packets == reader.counts.packets
            return reader.counts, str(error)
        return reader.counts, ""


@pytest.mark.skipif(not ROWS, reason=NO_DATA)
@pytest.mark.parametrize("row", ROWS, ids=lambda row: row["file"])
def test_packets_bytes_and_times_are_those_of_the_truth(row: dict[str, str]) -> None:
    name = row["file"]
    path = DATA / "captures" / name
    if row["format"] in NOT_READ:
        with pytest.raises(FormatError, match=row["format"]):
            read(path)
        return
    counts, error = read(path)
    if name in REFUSED_BY_THE_TOOL:
        assert error
        assert counts.packets == REFUSED_BY_THE_TOOL[name]
        return
    assert counts.packets == int(row["packets"])
    assert counts.bytes == int(row["data_bytes"]) + OTHER_BYTES.get(name, 0)
    assert bool(error) == bool(row["reader_message"])
    if name in NO_TIMES:
        assert (counts.first_ns, counts.last_ns) == NO_TIMES[name]
        assert counts.untimed_packets > 0
    elif name not in OTHER_TIMES:
        assert (counts.first_ns, counts.last_ns) == (nanoseconds(row["first_ts"]), nanoseconds(row["last_ts"]))
        if row["strict_time_order"] != "Unknown":
            assert str(counts.in_order) == row["strict_time_order"]


@pytest.mark.skipif(not ROWS, reason=NO_DATA)
def test_no_damaged_capture_takes_much_memory_or_ends_otherwise_than_cleanly() -> None:
    program = (
        "import re, sys\n"
        "from appliance.errors import FormatError\n"
        "from appliance.formats.reader import read_records\n"
        "for path in sys.argv[1:]:\n"
        "    try:\n"
        "        for batch in read_records(path): pass\n"
        "    except FormatError as error:\n"
        "        assert path in str(error), error\n"
        "print(re.search(r'VmHWM:\\s*(\\d+)', open('/proc/self/status').read())[1])\n"
    )
    files = sorted((DATA / "captures" / "malformed").iterdir())
    result = subprocess.run(
        [sys.executable, "-c", program, *map(str, files)],
        check=False,
        capture_output=True,
        text=True,
        timeout=60,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_AS, (400 << 20, 400 << 20)),
    )
    assert result.stderr == ""
    assert result.returncode == 0
    assert int(result.stdout) < 64 << 10
