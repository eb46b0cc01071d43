"""Shards of the test suite."""

from argparse import ArgumentTypeError

import pytest

from tests.shards import items_of, parse_shard


def test_each_test_is_in_one_shard_and_the_shards_are_of_one_size():
    tests = list(range(100))
    shards = [items_of(parse_shard(f"{number}/7"), tests) for number in range(1, 8)]
    assert sorted(test for shard in shards for test in shard) == tests
    assert {len(shard) for shard in shards} == {14, 15}
    assert items_of((1, 1), tests) == tests


@pytest.mark.parametrize("shard", ["0/3", "4/3", "3", "1/0", "a/b", "1/3/5", "-1/3", ""])
def test_what_is_not_a_shard_is_refused(shard):
    with pytest.raises(ArgumentTypeError, match="K from 1 to N"):
        parse_shard(shard)
