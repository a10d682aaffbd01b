# SPDX-License-Identifier: Apache-2.0
"""Damaged files of frozen networks: the runtime must refuse each, or run what it says, and never crash.

    python -m gates.damaged_files [--count 10000] [--first 0]

File number n is the same everywhere: the file of a small network with seeded damage, in most with a right checksum, so
that what the checksum would hide is read. `make sanitize` runs it under AddressSanitizer, `make test` without.
"""

from __future__ import annotations

import argparse
import random
import resource
import struct
import zlib

import numpy as np

from mvit_kernels import runtime

MEMORY = 1 << 30  # bytes that a file may ask for: no program with maps of gigabytes
INTERESTING = (0, 1, 2, 3, 7, 8, 63, 64, 65, 128, 255, 2**16, 2**24, 2**24 + 1, 2**31, 2**32 - 1, 2**40, 2**63 - 1, -1)
HEADER = 128
LARGEST = 1 << 22  # floats of a result that is computed


def with_checksum(content: bytearray) -> bytes:
    if len(content) >= HEADER:
        struct.pack_into("<Q", content, 16, len(content))
        struct.pack_into("<I", content, 12, zlib.crc32(memoryview(content)[16:]))
    return bytes(content)


def damaged(whole: bytes, number: int) -> bytes:
    """File `number`."""
    r = random.Random(number)
    content = bytearray(whole)
    at, words = struct.unpack_from("<QQ", whole, 40)
    for _ in range(r.choice((1, 1, 1, 2, 4))):
        way = r.random()
        if way < 0.5:  # a word of the program
            place = at + 8 * r.randrange(words)
            (word,) = struct.unpack_from("<q", whole, place)
            others = (word + 1, word - 1, 2 * word, word ^ 1 << r.randrange(63))
            word = r.choice((*others, r.randrange(-2, 70), 64 * r.randrange(4000), r.choice(INTERESTING)))
            _pack_into(content, "<q", place, max(-(2**63), min(2**63 - 1, word)))
        elif way < 0.75:  # a field of the header
            place = r.randrange(8, HEADER, 4)
            _pack_into(content, "<I", place, r.choice(INTERESTING) % 2**32)
        elif way < 0.85:  # a byte anywhere
            if content:
                content[r.randrange(len(content))] ^= 1 << r.randrange(8)
        elif way < 0.9:  # cut off
            del content[r.randrange(len(content) + 1) :]
        elif way < 0.95:  # a stretch taken out, or doubled
            begin = r.randrange(len(content) + 1)
            end = min(len(content), begin + r.choice((1, 8, 64, 1000)))
            content[begin:end] = r.choice((b"", bytes(content[begin:end]) * 2))
        else:  # noise
            begin = r.randrange(len(content) + 1)
            content[begin : begin + 64] = r.randbytes(min(64, len(content) - begin))
    return with_checksum(content) if r.random() < 0.9 else bytes(content)


def _pack_into(content: bytearray, kind: str, at: int, value: int) -> None:
    if at + struct.calcsize(kind) <= len(content):
        struct.pack_into(kind, content, at, value)


def try_file(content: bytes) -> str:
    """What became of a file: refused, refused when called, or run."""
    try:
        network = runtime.Network(content, threads=1)
    except (RuntimeError, ValueError):  # the latter where its metadata are no JSON
        return "refused"
    with network:
        channels = network.input_shape[0]
        try:
            for batch, height, width, dtype in ((1, 16, 24, np.float32), (2, 17, 9, np.uint8)):
                if np.prod(network.result_shape(batch, height, width), dtype=float) > LARGEST:
                    return "refused when called"
                network(np.ones((batch, height, width, channels), dtype), "NHWC")
        except (RuntimeError, MemoryError):
            return "refused when called"
    return "run"


def whole_files() -> list[bytes]:
    """Of a small network with every kind of step, in each dtype. They import torch, hence not at the top."""
    import torch

    from mvit_kernels.freezing import saved
    from mvit_kernels.freezing.program import build
    from support.networks import chain

    facts = {"labels": ["cat", "dog"], "preprocessing": {"mean": [0.5, 0.4, 0.3], "std": [0.2, 0.2, 0.1]}}
    files = []
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        stored = build(chain()[0].to(dtype), dtype).stored()
        files.append(saved.file_of(stored, stored.out_channels, False, dict(facts), 3))
    return files


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=10000)
    parser.add_argument("--first", type=int, default=0)
    arguments = parser.parse_args()
    files = whole_files()
    for content in files:
        assert try_file(content) == "run"
    used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
    if used < 1 << 44:  # AddressSanitizer reserves more, and limits its allocations itself
        resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, used + MEMORY))
    results: dict[str, int] = {}
    for number in range(arguments.first, arguments.first + arguments.count):
        print(f"\r{number}", end="", flush=True)  # the last line of a process that dies
        became = try_file(damaged(files[number % len(files)], number))
        results[became] = results.get(became, 0) + 1
    print(f"\r{arguments.count} damaged files: " + ", ".join(f"{n} {what}" for what, n in sorted(results.items())))


if __name__ == "__main__":
    main()
