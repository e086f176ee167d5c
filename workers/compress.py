"""The built-in compressor: standard input to an LZ4 frame on standard output. A process like any other compressor.

It is the default because it needs nothing but the `lz4` package; `compressor = ["lz4", "-q", "-c"]` does the same with
the program.
"""

from __future__ import annotations

import os
import signal
import sys

import lz4.frame

CHUNK_BYTES = 1 << 20


def main() -> int:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal's Ctrl-C is for the service; we end with our input
    buffer = bytearray(CHUNK_BYTES)
    view = memoryview(buffer)
    # The content checksum lets everybody verify a file long after.
    compressor = lz4.frame.LZ4FrameCompressor(
        block_size=lz4.frame.BLOCKSIZE_MAX1MB, block_linked=False, content_checksum=True
    )
    try:
        put(compressor.begin())
        while count := os.readv(0, [view]):
            put(compressor.compress(view[:count]))
        put(compressor.flush())
    except OSError as error:
        print(f"compress: {error.strerror}", file=sys.stderr)
        return os.EX_IOERR
    return 0


def put(data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(1, view) :]


if __name__ == "__main__":
    sys.exit(main())
