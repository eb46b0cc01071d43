"""The agent of one node: starts its ranks through DeepSpeed's launcher, reports on them, carries out orders.

    python node.py RUN_FOLDER (--node N | --host NAME | --variable NAME)

Every launcher comes down to one agent per machine; they differ in how they start it. The agent needs no socket: it
reads and writes small files in the run folder. It ends with its ranks, and ends them when the launcher is gone.
Standard library only.
"""

import argparse
import base64
import json
import os
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

# This file is run by its path. Its folder must not hide other modules, and the package must be found.
ROOT = str(Path(__file__).resolve().parents[3])
if __name__ == "__main__":
    sys.path[0] = ROOT

from megatron.errors import UserError  # noqa: E402
from megatron.launch.accelerators import cores, devices_of_slots, visible_gpus  # noqa: E402
from megatron.launch.node import rank  # noqa: E402
from megatron.launch.node.network import free_port, interface_towards  # noqa: E402
from megatron.launch.process_group import StopSignals, start_group, stop_group  # noqa: E402
from megatron.launch.protocol.environment import for_ranks  # noqa: E402
from megatron.launch.protocol.heartbeat import RUN_FOLDER, STACKS, read_rank_status  # noqa: E402
from megatron.launch.protocol.job import Job, read_job, read_orders  # noqa: E402
from megatron.launch.protocol.records import (  # noqa: E402
    NodeRecord,
    RankRecord,
    RankStacks,
    process_state,
    read_node,
    read_ranks,
    vanished,
    write_node,
)

POLL_SECONDS = 0.02
BEAT_SECONDS = 1.0
MEETING_SECONDS = 60.0
# Python writes its stacks from a signal handler; a process on a busy machine needs a moment for it.
STACKS_SECONDS = 1.0
GRACE_SECONDS = 5.0
# DeepSpeed's launcher looks at its ranks once a second and then leaves by itself.
LEAVING_SECONDS = 3.0


class Agent:
    """One node of a job."""

    def __init__(self, folder: Path, job: Job, node: int, local: Path, connected: bool) -> None:
        """folder: shared with the launcher. local: of this machine, for the ranks' records.

        connected: stdin is the connection to the launcher, open for as long as that lives.
        """
        self._folder, self._job, self._local = folder, job, local
        host = job.hosts[node] if job.hosts[node] else os.uname().nodename
        self._record = NodeRecord(node, host)
        self._written_at = 0.0
        self._parent, self._connected = os.getppid(), connected
        self._asked_to_stop = False
        self._out_of_memory_kills = out_of_memory_kills()

    def run(self, signals: StopSignals) -> None:
        """Start the ranks and stay until they have ended."""
        try:
            command, environment = self._prepare()
        except UserError as error:
            self._write(problem=str(error))
            return
        stdin = subprocess.DEVNULL if self._connected else None
        group = start_group(command, environment, if_parent_dies=signal.SIGKILL, stdin=stdin)
        grace = GRACE_SECONDS
        try:
            while group.poll() is None:
                self._look()
                orders = read_orders(self._folder)
                if orders.end is not None or signals.urgent or self._launcher_is_gone():
                    grace = GRACE_SECONDS if orders.end is None else orders.end
                    break
                if orders.stop is not None:
                    self._stop_at_step_boundary(signal.Signals[orders.stop])
                elif signals.received:
                    self._stop_at_step_boundary(signals.received[0])
                if orders.stacks > self._record.stacks_round:
                    self._gather_stacks(orders.stacks)
                time.sleep(POLL_SECONDS)
        finally:
            if (
                self._record.ranks and not self._running()
            ):  # DeepSpeed's launcher is about to see that, and a signal would cross its exit
                with suppress(subprocess.TimeoutExpired):
                    group.wait(LEAVING_SECONDS)
            if group.poll() != 0:
                stop_group(group, grace)
        self._look()
        self._write(code=group.returncode)
        if self._launcher_is_gone():  # and has not taken its folder away, which may hold secrets
            shutil.rmtree(self._folder, ignore_errors=True)

    def _launcher_is_gone(self) -> bool:
        if self._connected and select.select([0], [], [], 0)[0] and not os.read(0, 1024):
            return True
        return os.getppid() != self._parent

    def _prepare(self) -> tuple[list[str], dict[str, str]]:
        """DeepSpeed's launcher for this node, told to run `rank.py SCRIPT` on each device, and its environment."""
        job, node = self._job, self._record.node
        gpus = visible_gpus(os.environ, job.backend)
        devices = devices_of_slots(job.slots[node], gpus)
        address, port = self._meeting_point()
        # Other nodes' devices do not matter here, only their number.
        world = {f"node{other}": list(slots) for other, slots in enumerate(job.slots)} | {f"node{node}": devices}
        environment = for_ranks(os.environ, "cuda" if gpus else "cpu", cores() // len(devices))
        environment |= {RUN_FOLDER: str(self._local)}
        environment.pop(rank.LOG_FOLDER, None)
        if job.log_folder is not None:
            environment[rank.LOG_FOLDER] = job.log_folder
        if len(job.slots) > 1 and (interface := interface_towards(address)) is not None:
            environment.setdefault("GLOO_SOCKET_IFNAME", interface)
        command = [
            *(sys.executable, "-P", "-m", "deepspeed.launcher.launch", "--no_local_rank", "--log_level=critical"),
            f"--world_info={base64.urlsafe_b64encode(json.dumps(world).encode()).decode()}",
            *(f"--node_rank={node}", f"--master_addr={address}", f"--master_port={port}"),
            *(str(Path(rank.__file__).resolve()), job.script, *job.arguments),
        ]
        return command, environment

    def _meeting_point(self) -> tuple[str, int]:
        """Address and port where the ranks meet: node 0 chooses the port, as only it knows which are free there."""
        job = self._job
        if self._record.node == 0:
            self._write(port=job.master_port or free_port())
        else:
            self._write()
        deadline = time.monotonic() + MEETING_SECONDS
        while (first := read_node(self._folder, 0)) is None or not first.port:
            if time.monotonic() > deadline or read_orders(self._folder).end is not None:
                raise UserError(f"node 0 ({job.hosts[0]}) did not start within {MEETING_SECONDS:.0f} seconds")
            time.sleep(0.1)
            self._beat()
        return job.master_address or first.host, first.port

    def _look(self) -> None:
        """Put what is new about the ranks on record, and a sign of life every second."""
        ranks = read_ranks(self._local)
        gone = self._record.gone or tuple(vanished(ranks))
        if tuple(ranks) == self._record.ranks and gone == self._record.gone:
            self._beat()
            return
        logs = Path(self._job.log_folder) if self._job.log_folder else self._local
        self._write(
            ranks=tuple(ranks),
            gone=gone,
            killed_for_memory=out_of_memory_kills() > self._out_of_memory_kills,
            last_lines={str(one.rank): last_lines(logs / f"rank_{one.rank}.log") for one in gone},
        )

    def _beat(self) -> None:
        if time.monotonic() - self._written_at >= BEAT_SECONDS:
            self._write()

    def _write(self, **changes: object) -> None:
        statuses = [read_rank_status(self._local, record.rank) for record in self._running()]
        beat = self._record.beat + 1
        self._record = replace(self._record, **changes, beat=beat, statuses=tuple(filter(None, statuses)))  # type: ignore[arg-type]
        # A disk that is full or gone for a while must not end the ranks.
        with suppress(OSError):
            write_node(self._folder, self._record)
        self._written_at = time.monotonic()

    def _running(self) -> list[RankRecord]:
        gone = {record.rank for record in self._record.gone}
        return [record for record in self._record.ranks if record.code is None and record.rank not in gone]

    def _stop_at_step_boundary(self, number: signal.Signals) -> None:
        """Pass a signal on to the ranks, once; those that have no heartbeat yet do not understand it yet."""
        ready = [record for record in self._running() if read_rank_status(self._local, record.rank) is not None]
        if ready and not self._asked_to_stop:
            self._asked_to_stop = True
            self._signal(ready, number)

    def _gather_stacks(self, request: int) -> None:
        before = {record.rank: stacks_file(self._local, record.rank).stat().st_size for record in self._running()}
        self._signal(self._running(), STACKS)
        time.sleep(STACKS_SECONDS)
        stacks = []
        for record in self._running():
            with stacks_file(self._local, record.rank).open(encoding="utf-8", errors="replace") as file:
                file.seek(before[record.rank])
                stacks.append(RankStacks(record.rank, process_state(record.process), file.read()))
        self._write(stacks=tuple(stacks), stacks_round=request)

    def _signal(self, ranks: Sequence[RankRecord], number: signal.Signals) -> None:
        for record in ranks:
            with suppress(ProcessLookupError):
                os.kill(record.process, number)


def stacks_file(folder: Path, rank: int) -> Path:
    """Where a rank's stacks go, one request after the other."""
    return folder / f"stacks_{rank}.txt"


def last_lines(log: Path, count: int = 20) -> str:
    """The end of a log, empty where there is none."""
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines() if log.is_file() else []
    return "\n".join(lines[-count:])


def out_of_memory_kills() -> int:
    """How many processes of this machine or container the kernel has killed because memory was used up."""
    total = 0
    for path in (Path("/proc/vmstat"), Path("/sys/fs/cgroup/memory.events")):
        with suppress(OSError, ValueError):
            lines = [line.split() for line in path.read_text(encoding="utf-8").splitlines()]
            total += sum(int(value) for name, value in lines if name == "oom_kill")
    return total


def main(arguments: Sequence[str]) -> int:
    """Be the agent of one node. Returns 0 when it could report how the ranks ended."""
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    who = parser.add_mutually_exclusive_group(required=True)
    who.add_argument("--node", type=int)
    who.add_argument("--host")
    who.add_argument("--variable", help="that holds the number of the node")
    options = parser.parse_args(arguments)
    host = os.uname().nodename
    if not (options.folder / "job.json").is_file():
        print(f"{host}: {options.folder} is not there; all nodes must share it (log_dir says where)", file=sys.stderr)
        return 1
    job = read_job(options.folder)
    if options.host is not None:
        node = job.hosts.index(options.host)
    else:
        node = options.node if options.node is not None else int(os.environ[options.variable])
    os.chdir(job.working_folder)
    os.environ.update(job.environment)
    with tempfile.TemporaryDirectory(prefix="deepy-") as local, StopSignals() as signals:
        Agent(options.folder, job, node, Path(local), connected=options.host is not None).run(signals)
    return 0


if __name__ == "__main__":
    sys.path.remove(ROOT)
    sys.exit(main(sys.argv[1:]))
