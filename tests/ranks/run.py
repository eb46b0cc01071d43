"""Run a function on several ranks of this machine, and say clearly which rank failed and how.

Ranks talk over gloo on the CPU. With RANKS_BACKEND=nccl in the environment each is a GPU, and a test of more ranks than
there are GPUs is skipped, so that `RANKS_BACKEND=nccl pytest tests/ranks` is of use with a single GPU. What one process
computes as a reference (`one_rank`) comes from the CPU all the same. Products of fp32 matrices are in fp32 there too,
not in TF32, so the bounds hold for both: a GPU sums in another order, as layouts do, and its exp differs in a bit.

A rank that fails ends the others; a rank that hangs is asked for its stack and then killed.
"""

import faulthandler
import os
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch.utils._pytree import tree_map_only

from megatron.engine.distributed import be_deterministic
from megatron.parallel.grid import ParallelGrid
from tests.forking import BACKEND, fork_server

STACK_SECONDS = 10.0  # in which a rank that hangs begins to write its stack
GRACE_SECONDS = 1.0  # for the other ranks to fail as well, once one has


def run_ranks(world: int, body: Callable[..., object], *arguments: object, timeout: float = 60) -> None:
    """Run `body(*arguments)` on `world` ranks, in an initialised process group.

    body: a function at the top of a module, which every rank imports: no place for slow imports. The tensors among its
    arguments arrive on the rank's device; those that it makes itself it has to put there (`own_device`).
    timeout: seconds until ranks that still run count as hung.
    Raises AssertionError with the traceback of every rank that failed and the stack of every rank that hung.
    """
    __tracebackhide__ = True  # for pytest: the rank's traceback is what counts
    if not can_run(world):
        pytest.skip(f"{world} ranks over {BACKEND} need as many GPUs, and there are {torch.cuda.device_count()}")
    context = fork_server()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        ranks: list[BaseProcess] = [
            context.Process(target=_rank, args=(body, arguments, rank, world, folder), daemon=True)
            for rank in range(world)
        ]
        for process in ranks:
            process.start()
        try:
            _wait(ranks, timeout, folder)
        finally:
            running = [rank for rank, process in enumerate(ranks) if process.is_alive()]
            for process in ranks:
                process.kill()
                process.join()
        reports = [_report(rank, process, rank in running, folder) for rank, process in enumerate(ranks)]
    if any(reports):
        raise AssertionError("\n\n".join(["", *filter(None, reports)]))


def can_run(world: int) -> bool:
    """Whether this machine has what `world` ranks need: over nccl, a GPU for each."""
    return BACKEND != "nccl" or world <= torch.cuda.device_count()


def own_device() -> torch.device:
    """The device of this rank: over nccl, its GPU."""
    return torch.device("cuda", torch.cuda.current_device()) if BACKEND == "nccl" else torch.device("cpu")


def deterministic_on_gpu() -> None:
    """Let each operation of this rank give the same bits each time, for tests that compare bits; a CPU does anyway."""
    if BACKEND == "nccl":
        be_deterministic()


def make_grid(pipe: int = 1, tensor: int = 1, context: int = 1, sequence_parallel: bool = False) -> ParallelGrid:
    """The ranks of a test on their devices, arranged as by `ParallelGrid.create`."""
    return ParallelGrid.create(pipe, tensor, context, sequence_parallel, device=own_device().type)


@contextmanager
def one_rank(device: str = "cpu") -> Iterator[ParallelGrid]:
    """A grid of this process alone, for tests that need no second rank."""
    backend = "nccl" if device == "cuda" else "gloo"
    dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    try:
        yield ParallelGrid.create(device=device)
    finally:
        dist.destroy_process_group()


def _rank(body: Callable[..., object], arguments: tuple[object, ...], rank: int, world: int, folder: Path) -> None:
    """What a rank's process does: exit code 0, or 1 with the traceback in its file."""
    with (folder / f"stack_{rank}").open("w") as stack:
        faulthandler.register(signal.SIGUSR1, file=stack, all_threads=False)
        os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world), MASTER_ADDR="127.0.0.1")
        torch.set_num_threads(1)
        torch.manual_seed(1234)
        try:
            if BACKEND == "nccl":
                torch.cuda.set_device(rank)
            bound = own_device() if BACKEND == "nccl" else None  # as in a run (engine/distributed.py)
            store = f"file://{folder}/store"
            dist.init_process_group(BACKEND, init_method=store, rank=rank, world_size=world, device_id=bound)
            body(*tree_map_only(torch.Tensor, lambda tensor: tensor.to(own_device()), arguments))
            dist.barrier()
            dist.destroy_process_group()
        except BaseException:
            (folder / f"traceback_{rank}").write_text(traceback.format_exc())
            sys.stdout.flush()
            os._exit(1)  # leave at once: a broken process group can hang at its destruction


def _wait(ranks: list[BaseProcess], timeout: float, folder: Path) -> None:
    """Return when all ranks ended, or one failed, or the time is over; ranks that still run write their stacks."""
    deadline, running = time.monotonic() + timeout, list(ranks)
    failed = False
    while running and (left := deadline - time.monotonic()) > 0:
        wait([process.sentinel for process in running], left)
        if not failed and any(process.exitcode for process in ranks):
            failed, deadline = True, min(deadline, time.monotonic() + GRACE_SECONDS)
        running = [process for process in running if process.is_alive()]
    for process in running:
        assert process.pid is not None
        os.kill(process.pid, signal.SIGUSR1)
    stacks = [folder / f"stack_{ranks.index(process)}" for process in running]
    deadline = time.monotonic() + STACK_SECONDS
    while time.monotonic() < deadline and not all(path.exists() and path.stat().st_size for path in stacks):
        time.sleep(0.05)
    if running:
        time.sleep(0.2)  # while they write the rest


def _report(rank: int, process: BaseProcess, was_running: bool, folder: Path) -> str | None:
    """What to report of a rank that ended: its traceback, its stack when it hung, its signal; None if all went well."""
    file, stack = folder / f"traceback_{rank}", folder / f"stack_{rank}"
    if file.exists():
        return f"rank {rank} failed:\n{file.read_text()}"
    if was_running:
        return f"rank {rank} was still running:\n{stack.read_text() if stack.exists() else ''}"
    return f"rank {rank} ended with exit code {process.exitcode}" if process.exitcode else None
