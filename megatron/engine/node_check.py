"""Check the device of this rank and its way to the other ranks, before a run starts again: `node_check.py [BACKEND]`.

The device multiplies two matrices, whose exact product is known; then all ranks sum a vector by the backend of the run.
The exit code says what failed (launch/protocol/node_check.py), and a line on stderr why.
"""

import os
import sys
from collections.abc import Sequence
from datetime import timedelta

import torch
import torch.distributed as dist

from megatron.engine.distributed import start
from megatron.errors import first_line
from megatron.launch.protocol.heartbeat import Heartbeat
from megatron.launch.protocol.node_check import (
    CANNOT_COMPUTE,
    CANNOT_CONNECT,
    CANNOT_TALK,
    CONNECT_SECONDS,
    MULTIPLYING,
    TALK_SECONDS,
    TALKING,
)

SIZE = 512


def main(arguments: Sequence[str]) -> int:
    """Check what there is to check; returns the exit code."""
    backend = arguments[0] if arguments else None
    heartbeat = Heartbeat.of_this_process()
    heartbeat.beat(MULTIPLYING, 0)
    failure = CANNOT_COMPUTE
    try:
        _multiply(_device(backend))
        heartbeat.beat(TALKING, 0)
        failure = CANNOT_CONNECT
        _store = _reach_first_rank()
        failure = CANNOT_TALK
        _talk(backend)
    except Exception as error:  # whatever a broken device or network raises
        print(first_line(error), file=sys.stderr, flush=True)
        return failure
    return 0


def _device(backend: str | None) -> torch.device:
    if backend == "gloo" or not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", int(os.environ["LOCAL_RANK"]))


def _multiply(device: torch.device) -> None:
    """Multiply small whole numbers: fp32 and TF32 hold factors, products and sums exactly, in any order."""
    generator = torch.Generator().manual_seed(0)
    one, other = (torch.randint(-8, 9, (SIZE, SIZE), generator=generator) for _ in range(2))
    product = one.to(device, torch.float32) @ other.to(device, torch.float32)
    wrong = int((product.cpu().long() != one @ other).sum())
    if wrong:
        raise ArithmeticError(f"{wrong:,} of {SIZE * SIZE:,} elements of a matrix product are wrong on {device}")


def _reach_first_rank() -> dist.Store:
    """Connect to rank 0 alone, which waits for nobody yet. `start` then uses the same port."""
    return dist.TCPStore(
        os.environ["MASTER_ADDR"],
        int(os.environ["MASTER_PORT"]),
        is_master=os.environ["RANK"] == "0",
        timeout=timedelta(seconds=CONNECT_SECONDS),
        wait_for_workers=False,
        multi_tenant=True,
    )


def _talk(backend: str | None) -> None:
    device = start(backend=backend, timeout_minutes=TALK_SECONDS / 60).device
    ranks = dist.get_world_size()
    ones = torch.ones(SIZE, device=device)
    dist.all_reduce(ones)
    if not bool((ones == ranks).all()):
        raise ArithmeticError(f"the sum of a vector over {ranks} ranks is wrong")
    dist.destroy_process_group()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
