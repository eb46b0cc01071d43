"""Seeds derived from text, the same on every machine."""

import hashlib


def seed_from(text: str) -> int:
    """64 bits that depend on every character of `text`."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")


def generator_seed(text: str) -> int:
    """63 bits of `seed_from`, which fit torch's signed seeds."""
    return seed_from(text) >> 1
