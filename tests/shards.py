"""Shards of the test suite: shares of its tests, so that each run takes a part of the time."""

import re
from argparse import ArgumentTypeError
from collections.abc import Sequence
from typing import TypeVar

Item = TypeVar("Item")
Shard = tuple[int, int]  # the number of this one, from 1 on, and how many there are


def parse_shard(text: str) -> Shard:
    """Read "K/N". Raises ArgumentTypeError, which ends pytest with a line about the option."""
    numbers = re.fullmatch(r"([1-9][0-9]*)/([1-9][0-9]*)", text)
    if not numbers or int(numbers[1]) > int(numbers[2]):
        raise ArgumentTypeError(f"{text!r} must be K/N with K from 1 to N, such as 2/3")
    return int(numbers[1]), int(numbers[2])


def items_of(shard: Shard, items: Sequence[Item]) -> list[Item]:
    """Every N-th item from the K-th on. Neighbours, the cases of one test, take alike: they are spread over shards."""
    number, count = shard
    return list(items[number - 1 :: count])
