"""Mutation of seeds from a seeded generator: the same seed gives the same inputs on every machine."""

from __future__ import annotations

import random

INTERESTING = (0, 1, 4, 16, 0x7F, 0x80, 0xFF, 0x100, 0x7FFF, 0x8000, 0xFFFF, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF)
CHANGES_MAX = 8
INPUT_BYTES_MAX = 400_000


def mutate(chance: random.Random, seeds: list[bytes]) -> bytes:
    """One of the seeds with a few changes, or with a part of another one in it."""
    data = bytearray(chance.choice(seeds))
    for _ in range(chance.randint(1, CHANGES_MAX)):
        change = chance.choice(CHANGES)
        change(chance, data, seeds)
    return bytes(data[:INPUT_BYTES_MAX])


def place(chance: random.Random, data: bytearray) -> int:
    """Most damage is done where the headers are."""
    limit = len(data) if chance.random() < 0.5 else min(len(data), 128)
    return chance.randrange(limit) if limit else 0


def flip(chance: random.Random, data: bytearray, seeds: list[bytes]) -> None:
    if data:
        data[place(chance, data)] ^= 1 << chance.randrange(8)


def set_byte(chance: random.Random, data: bytearray, seeds: list[bytes]) -> None:
    if data:
        data[place(chance, data)] = chance.randrange(256)


def set_number(chance: random.Random, data: bytearray, seeds: list[bytes]) -> None:
    size = chance.choice((2, 4, 8))
    at = place(chance, data)
    value = (chance.choice(INTERESTING) + chance.choice((-1, 0, 0, 0, 1))) % (1 << 8 * size)
    data[at : at + size] = value.to_bytes(size, chance.choice(("little", "big")))


def cut(chance: random.Random, data: bytearray, seeds: list[bytes]) -> None:
    del data[place(chance, data) :]


def remove(chance: random.Random, data: bytearray, seeds: list[bytes]) -> None:
    at = place(chance, data)
    del data[at : at + chance.choice((1, 2, 4, 8, 64))]


def insert(chance: random.Random, data: bytearray, seeds: list[bytes]) -> None:
    at = place(chance, data)
    data[at:at] = chance.randbytes(chance.choice((1, 2, 4, 8, 64)))


def repeat(chance: random.Random, data: bytearray, seeds: list[bytes]) -> None:
    at = place(chance, data)
    piece = data[at : at + chance.choice((4, 8, 32, 256))]
    data[at:at] = piece * chance.choice((1, 2, 16))


def splice(chance: random.Random, data: bytearray, seeds: list[bytes]) -> None:
    other = chance.choice(seeds)
    if other:
        start = chance.randrange(len(other))
        data[place(chance, data) :] = other[start : start + 4096]


CHANGES = (flip, set_byte, set_number, set_number, cut, remove, insert, repeat, splice)
