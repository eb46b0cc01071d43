"""What deepy.py sends to the agents: the job once at the start, orders while it runs. Standard library only."""

import json
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from megatron.launch.protocol.attempt import FIRST, Attempt
from megatron.launch.protocol.records import write_json

JOB, ORDERS = "job.json", "orders.json"


@dataclass(frozen=True)
class JobSpec:
    """Everything a node needs to start its ranks. The file is readable by its owner only: it may hold secrets."""

    hosts: tuple[str, ...]  # one name per node; empty where only the node itself knows it
    slots: tuple[tuple[int, ...], ...]  # of each node
    script: str
    arguments: tuple[str, ...]
    working_folder: str
    log_folder: str | None
    environment: dict[str, str]  # forwarded from the launcher to other machines
    backend: str | None
    master_address: str | None  # None: the host name that node 0 reports
    master_port: int | None
    max_gpu_memory_in_use: float  # the largest share of a GPU's memory that other processes may hold
    remote: bool  # nodes may be other machines than the launcher's
    attempt: Attempt = FIRST

    @property
    def world_size(self) -> int:
        """Ranks of the run."""
        return sum(map(len, self.slots))

    def first_rank(self, node: int) -> int:
        """The lowest rank of a node."""
        return sum(map(len, self.slots[:node]))


@dataclass(frozen=True)
class Orders:
    """What agents have to do. `start`, `stop` and `end` are given once and not withdrawn; the other two count up."""

    start: bool = False  # start the ranks: every node is ready
    stop: str | None = None  # end at the next step boundary: the name of the signal that requested it
    stacks: int = 0  # number of requests for the stacks of all ranks
    interrupts: int = 0  # number of times that Ctrl-C was meant for rank 0
    end: float | None = None  # end all processes now: seconds between SIGTERM and SIGKILL


class OrderBook:
    """The writing side: the orders given so far."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self.given = Orders()
        self.give()

    def give(self, **orders: Any) -> None:
        """Add orders. Raises OSError where the folder cannot be written to; they are then noted, but not sent."""
        self.given = replace(self.given, **orders)
        write_json(self._folder / ORDERS, asdict(self.given))


def write_job(folder: Path, job: JobSpec) -> None:
    """Write the job for the agents."""
    write_json(folder / JOB, asdict(job))


def read_job(folder: Path) -> JobSpec:
    """Read the job that `write_job` wrote."""
    fields = json.loads((folder / JOB).read_text(encoding="utf-8"))
    fields["slots"] = tuple(map(tuple, fields["slots"]))
    fields["attempt"] = Attempt.of(fields["attempt"])
    return JobSpec(**fields | {name: tuple(fields[name]) for name in ("hosts", "arguments")})


def read_orders(folder: Path) -> Orders:
    """The orders so far; none while the file cannot be read."""
    try:
        return Orders(**json.loads((folder / ORDERS).read_text(encoding="utf-8")))
    except (OSError, ValueError):
        return Orders()
