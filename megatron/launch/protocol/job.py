"""What the launcher tells the agents of the nodes: the job once, orders as it goes on.

Standard library only.
"""

import json
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from megatron.launch.protocol.records import write_json

JOB, ORDERS = "job.json", "orders.json"


@dataclass(frozen=True)
class Job:
    """All that a node needs to start its ranks. The file is readable by its owner only: it may hold secrets."""

    hosts: tuple[str, ...]  # one name per node; where nobody knows them yet, any
    slots: tuple[tuple[int, ...], ...]  # of each node
    script: str
    arguments: tuple[str, ...]
    working_folder: str
    log_folder: str | None
    environment: dict[str, str]  # what other machines get of the launcher's
    backend: str | None
    master_address: str | None  # None: the host name that node 0 finds itself to have
    master_port: int | None
    remote: bool  # nodes may be other machines than the launcher's

    @property
    def world_size(self) -> int:
        """Ranks of the run."""
        return sum(map(len, self.slots))

    def first_rank(self, node: int) -> int:
        """The lowest rank of a node."""
        return sum(map(len, self.slots[:node]))


@dataclass(frozen=True)
class Orders:
    """What agents shall do, from the launcher. Each may be added once and is never taken back, but for `stacks`."""

    stop: str | None = None  # end at the next step boundary; the name of the signal that asked for it
    stacks: int = 0  # counts requests for the stacks of all ranks
    end: float | None = None  # end all processes now: seconds between SIGTERM and SIGKILL


class OrderBook:
    """The launcher's side: the orders given so far, written for the agents to read."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self.given = Orders()
        self.give()

    def give(self, **orders: Any) -> None:
        """Add orders."""
        self.given = replace(self.given, **orders)
        write_json(self._folder / ORDERS, asdict(self.given))


def write_job(folder: Path, job: Job) -> None:
    """Leave the job for the agents."""
    write_json(folder / JOB, asdict(job))


def read_job(folder: Path) -> Job:
    """The job that the launcher left."""
    told = json.loads((folder / JOB).read_text(encoding="utf-8"))
    told["slots"] = tuple(map(tuple, told["slots"]))
    return Job(**told | {name: tuple(told[name]) for name in ("hosts", "arguments")})


def read_orders(folder: Path) -> Orders:
    """The orders so far; none where the folder cannot be read just now."""
    try:
        return Orders(**json.loads((folder / ORDERS).read_text(encoding="utf-8")))
    except (OSError, ValueError):
        return Orders()
