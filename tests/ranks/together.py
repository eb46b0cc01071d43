"""The cases of a parametrized test in one start of ranks: to start them takes as long as many a case.

A case that fails ends the ranks; the cases after it are then run in a new start, so that each test tells of its own.
"""

import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from tests.ranks.run import own_device, run_ranks

Parameters = Mapping[str, Any]  # of a test
_OUTCOMES: dict[str, AssertionError | None] = {}  # by the id of a test


def run_together(
    request: pytest.FixtureRequest,
    body: Callable[..., object],
    arguments: Callable[[Parameters], tuple[object, ...]],
    world: Callable[[Parameters], int] = lambda _: 2,
    timeout: float = 60,
) -> None:
    """Run `body(*arguments(parameters))` on `world(parameters)` ranks for the test that `request` is of.

    The first test of a function runs all of its chosen cases that take as many ranks, one after the other.
    timeout: seconds for each case; see `run_ranks`.
    """
    __tracebackhide__ = True
    own = request.node
    if own.nodeid not in _OUTCOMES:
        ranks = world(own.callspec.params)
        cases = [own, *(item for item in request.session.items if item is not own and _is_like(item, own))]
        cases = [case for case in cases if case.nodeid not in _OUTCOMES and world(case.callspec.params) == ranks]
        chosen = [arguments(case.callspec.params) for case in cases]
        limit = min(600, timeout * len(cases))  # pytest allows a test 900 s
        _OUTCOMES.update(run_cases([case.nodeid for case in cases], ranks, body, chosen, limit))
    if (error := _OUTCOMES[own.nodeid]) is not None:
        raise error


def _is_like(item: Any, own: Any) -> bool:
    return isinstance(item, pytest.Function) and item.function is own.function


def run_cases(
    names: Sequence[str], world: int, body: Callable[..., object], arguments: Sequence[Any], timeout: float
) -> dict[str, AssertionError | None]:
    """Run each case on the same ranks until one fails: the outcomes by name, without those of the cases after it."""
    with tempfile.TemporaryDirectory() as folder:
        torch.save(arguments, Path(folder, "arguments.pt"))  # tensors given to a process take a descriptor each
        try:
            run_ranks(world, _run_each, folder, body, timeout=timeout)
        except AssertionError as error:
            passed = min(_number(Path(folder, str(rank))) for rank in range(world))
            return dict.fromkeys(names[:passed]) | {names[passed]: error}
    return dict.fromkeys(names)


def _number(file: Path) -> int:
    return int(file.read_text()) if file.exists() else 0


def _run_each(folder: str, body: Callable[..., object]) -> None:
    """On a rank; each writes how many cases it has behind it."""
    arguments = torch.load(Path(folder, "arguments.pt"), map_location=own_device(), weights_only=False)
    for number, case in enumerate(arguments, 1):
        torch.manual_seed(1234)  # as after a start
        body(*case)
        Path(folder, str(dist.get_rank())).write_text(str(number))
        dist.barrier()  # so that no rank fails in a case while another is in the one before
