"""One thread per process for all tests, no deadlines of Hypothesis, and the option --shard."""

import os

import hypothesis
import pytest

from tests.shards import items_of, parse_shard

# Before torch is imported. Several processes share the cores: with more threads small matrices take ten times as long.
os.environ.setdefault("OMP_NUM_THREADS", "1")

# A process may stand still for a second on a shared machine: that says nothing of the code.
hypothesis.settings.register_profile("shared", deadline=None, suppress_health_check=[hypothesis.HealthCheck.too_slow])
hypothesis.settings.load_profile("shared")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--shard", type=parse_shard, metavar="K/N", help="run every N-th selected test, from the K-th on")


@pytest.hookimpl(trylast=True)  # after -m and -k
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if shard := config.getoption("shard"):
        chosen = items_of(tuple(shard), items)
        kept = set(chosen)
        config.hook.pytest_deselected(items=[item for item in items if item not in kept])
        items[:] = chosen
