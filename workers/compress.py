"""The built-in compressor: standard input to an LZ4 frame on standard output. A process like any other compressor.

It is the default because it needs nothing but the `lz4` package; `compressor = ["lz4", "-q", "-c"]` does the same with
the program. Each file has a process of its own, so what matters is how fast it starts: as a script, whose argument is
the directory that has `lz4`, it does without `site` (python -S), which takes longer than all the rest. It has a session
of its own, so that a terminal's Ctrl-C, which is for the service, does not reach it.
"""

from __future__ import annotations

import os
import sys

sys.path.extend(sys.argv[1:])

import lz4.frame

CHUNK_BYTES = 1 << 20


def main() -> int:
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
