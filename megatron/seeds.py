"""Seeds derived from text, the same on every machine."""

import hashlib


def seed_from(text: str) -> int:
    """64 bits that depend on every character of `text`."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")


def generator_seed(text: str) -> int:
    """63 bits of `seed_from`, which fit torch's signed seeds."""
    return seed_from(text) >> 1


def cell_seed(text: str, number: int) -> int:
    """The seed of part `number` of what `text` names: 32 bits, because torch's generator on a CPU uses no more.

    Different numbers below 2^32 have different seeds.
    """
    return (seed_from(text) + number) * 0x9E3779B1 % 2**32
