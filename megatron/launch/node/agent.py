"""The agent of one node: starts its ranks through DeepSpeed's launcher, reports their state, carries out orders.

    python agent.py RUN_FOLDER (--node N | --host NAME | --variable NAME | --host-variable NAME)

Launchers differ only in how they start one agent per machine. The agent needs no socket: it reads and writes small
files in the run folder. It exits with its ranks, and terminates them when deepy.py is gone. Quick to start: no torch.
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
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

# This file is run by its path, with -P: its folder is not searched for modules, and the package must be importable.
ROOT = str(Path(__file__).resolve().parents[3])
if __name__ == "__main__":
    sys.path.insert(0, ROOT)

from megatron.errors import RunError, UserError, exit_code  # noqa: E402
from megatron.launch.accelerators import cores, devices_of_slots, visible_gpus  # noqa: E402
from megatron.launch.gpu_checks import check_gpus  # noqa: E402
from megatron.launch.node import rank  # noqa: E402
from megatron.launch.node.network import free_port, interface_towards  # noqa: E402
from megatron.launch.process_group import StopSignals, start_group, stop_group  # noqa: E402
from megatron.launch.protocol.environment import rank_environment  # noqa: E402
from megatron.launch.protocol.heartbeat import (  # noqa: E402
    NOT_BEGUN,
    RUN_FOLDER,
    SCRIPTS_WITH_HEARTBEATS,
    STACKS,
    RankStatus,
    read_rank_status,
)
from megatron.launch.protocol.job import JOB, ORDERS, JobSpec, read_job, read_orders  # noqa: E402
from megatron.launch.protocol.records import (  # noqa: E402
    NodeRecord,
    RankRecord,
    RankStacks,
    look_at_ranks,
    process_state,
    read_node,
    write_node,
)

POLL_SECONDS = 0.02
BEAT_SECONDS = 1.0
# A rank writes its stacks within milliseconds, unless the machine is busy.
STACKS_SECONDS, STACKS_POLL_SECONDS = 5.0, 0.1
GRACE_SECONDS = 5.0
# DeepSpeed's launcher polls its ranks once a second and then exits by itself.
EXIT_SECONDS = 3.0


class _EndedEarlyError(Exception):
    """The run ended before its ranks were started."""


class Agent:
    """Runs the ranks of one node."""

    def __init__(self, folder: Path, job: JobSpec, node: int, local: Path, connected: bool) -> None:
        """Prepare node number `node` of `job`; starts nothing.

        folder: shared with deepy.py. local: on this machine, for the ranks' records and heartbeats.
        connected: stdin is the connection to deepy.py, which closes when that ends.
        """
        self._folder, self._job, self._local = folder, job, local
        host = job.hosts[node] if job.hosts[node] else os.uname().nodename
        self._record = NodeRecord(node, host, os.uname().nodename)
        self._written_at = 0.0
        self._started_at = float("inf")  # when the ranks were, on the monotonic clock
        self._seen: dict[int, tuple[RankStatus, float]] = {}  # the last beat of each rank that was read, and when
        self._ends_ranks = False  # those that vanish from now on did not do so by themselves
        self._parent, self._connected = os.getppid(), connected
        self._asked_to_stop = False
        self._interrupts = 0
        self._out_of_memory_kills = out_of_memory_kills()

    def run(self, signals: StopSignals) -> None:
        """Start the ranks and return after they have ended."""
        try:
            command, environment = self._prepare(signals)
        except UserError as error:
            self._write(problem=str(error))
            return
        except _EndedEarlyError:
            self._write(code=0)
            return
        stdin = subprocess.DEVNULL if self._connected else None
        group = start_group(command, environment, if_parent_dies=signal.SIGKILL, stdin=stdin)
        self._started_at = time.monotonic()
        grace = GRACE_SECONDS
        try:
            while group.poll() is None:
                self._update_record()
                orders = read_orders(self._folder)
                if orders.end is not None or signals.urgent or self._launcher_is_gone():
                    grace = GRACE_SECONDS if orders.end is None else orders.end
                    self._ends_ranks = True
                    break
                if orders.stop is not None:
                    self._stop_at_step_boundary(signal.Signals[orders.stop])
                elif signals.received:
                    self._stop_at_step_boundary(signals.received[0])
                if orders.interrupts > self._interrupts:
                    self._interrupts = orders.interrupts
                    self._signal([record for record in self._running() if record.rank == 0], signal.SIGINT)
                if orders.stacks > self._record.stacks_round:
                    self._gather_stacks(orders.stacks)
                time.sleep(POLL_SECONDS)
        finally:
            if self._record.ranks and not self._running():
                # DeepSpeed's launcher is about to exit by itself; a signal now would change its exit code.
                deadline = time.monotonic() + EXIT_SECONDS
                while group.poll() is None and time.monotonic() < deadline:
                    self._beat()
                    time.sleep(POLL_SECONDS)
            if group.poll() != 0:
                stop_group(group, grace, self._beat)
        self._update_record()
        self._write(code=group.returncode)
        if self._launcher_is_gone():  # without having removed its folder, which may hold secrets
            shutil.rmtree(self._folder, ignore_errors=True)

    def _launcher_is_gone(self) -> bool:
        if self._connected and select.select([0], [], [], 0)[0] and not os.read(0, 1024):
            return True
        if os.getppid() != self._parent:
            return True
        with suppress(OSError):  # of a file system that is unavailable for a while
            # deepy.py empties its folder when it ends, and where it has given this node up. Both files are gone then: a
            # job that nobody reads again systemd removes from /tmp after ten days, and orders are replaced.
            return not any((self._folder / name).exists() for name in (JOB, ORDERS))
        return False

    def _prepare(self, signals: StopSignals) -> tuple[list[str], dict[str, str]]:
        """The command of DeepSpeed's launcher, which runs `rank.py SCRIPT` on each device, and its environment."""
        job, node = self._job, self._record.node
        gpus = visible_gpus(os.environ, job.backend)
        devices = devices_of_slots(job.slots[node], gpus)
        for warning in check_gpus(os.environ, job.backend, devices if gpus else (), job.max_gpu_memory_in_use):
            print(f"warning: {self._record.host}: {warning}", file=sys.stderr, flush=True)
        address, port = self._rendezvous(signals)
        # Of other nodes only the number of devices matters here.
        world = {f"node{other}": list(slots) for other, slots in enumerate(job.slots)} | {f"node{node}": devices}
        environment = rank_environment(os.environ, "cuda" if gpus else "cpu", cores() // len(devices))
        environment |= {RUN_FOLDER: str(self._local)}
        environment.pop(rank.LOG_FOLDER, None)
        if job.log_folder is not None:
            environment[rank.LOG_FOLDER] = job.log_folder
        environment |= job.attempt.environment()
        if len(job.slots) > 1 and (interface := interface_towards(address)) is not None:
            environment.setdefault("GLOO_SOCKET_IFNAME", interface)
        command = [
            *(sys.executable, "-P", "-m", "deepspeed.launcher.launch", "--no_local_rank", "--log_level=critical"),
            f"--world_info={base64.urlsafe_b64encode(json.dumps(world).encode()).decode()}",
            *(f"--node_rank={node}", f"--master_addr={address}", f"--master_port={port}"),
            *(str(Path(rank.__file__).resolve()), job.script, *job.arguments),
        ]
        return command, environment

    def _rendezvous(self, signals: StopSignals) -> tuple[str, int]:
        """Address and port of rank 0, once every node is ready; node 0 chooses the port, which is free there.

        A node is ready when it has written a record without a problem. Raises _EndedEarlyError.
        """
        job = self._job
        if self._record.node == 0:
            self._write(port=job.master_port or free_port())
        else:
            self._write()
        while True:
            orders, first = read_orders(self._folder), read_node(self._folder, 0)
            if orders.end is not None or signals.urgent or self._launcher_is_gone():
                raise _EndedEarlyError
            if orders.start and first is not None and first.port:
                return job.master_address or first.host, first.port
            time.sleep(POLL_SECONDS)
            self._beat()

    def _update_record(self) -> None:
        """Write changes of the ranks into the node's record, and a beat every second."""
        ranks, vanished = look_at_ranks(self._local)
        gone = self._record.gone or (() if self._ends_ranks else tuple(vanished))
        if tuple(ranks) == self._record.ranks and gone == self._record.gone:
            self._beat()
            return
        logs = Path(self._job.log_folder) if self._job.log_folder else self._local
        self._write(
            ranks=tuple(ranks),
            gone=gone,
            killed_for_memory=out_of_memory_kills() > self._out_of_memory_kills,
            last_lines={str(one.rank): last_lines(logs / self._job.attempt.log_name(one.rank)) for one in gone},
        )

    def _beat(self) -> None:
        if time.monotonic() - self._written_at >= BEAT_SECONDS:
            self._write()

    def _write(self, **changes: object) -> None:
        self._record = replace(self._record, **changes, beat=self._record.beat + 1)  # type: ignore[arg-type]
        statuses = list(self._read_statuses())
        ended = {record.rank for record in self._record.ranks} - {record.rank for record in self._running()}
        self._record = replace(
            self._record,
            statuses=tuple(one for one in statuses if one.rank not in ended),
            steps={str(one.rank): one.step for one in statuses},
        )
        # A file system that is full or unavailable for a while must not end the ranks.
        with suppress(OSError):
            write_node(self._folder, self._record)
        self._written_at = time.monotonic()

    def _read_statuses(self) -> Iterator[RankStatus]:
        """The last beats of all ranks, and where every rank has some, what precedes them: it may hang there too."""
        first = self._job.first_rank(self._record.node)
        awaited = Path(self._job.script).name in SCRIPTS_WITH_HEARTBEATS and self._started_at < time.monotonic()
        for rank_number in range(first, first + len(self._job.slots[self._record.node])):
            now = time.monotonic()
            if (status := read_rank_status(self._local, rank_number)) is not None:
                self._seen[rank_number] = status, now
                yield status
            elif rank_number in self._seen:  # it cannot be read now
                last, then = self._seen[rank_number]
                yield replace(last, age=last.age + now - then)
            elif awaited:
                yield RankStatus(rank_number, 0, NOT_BEGUN, now - self._started_at, None)

    def _running(self) -> list[RankRecord]:
        gone = {record.rank for record in self._record.gone}
        return [record for record in self._record.ranks if record.code is None and record.rank not in gone]

    def _stop_at_step_boundary(self, number: signal.Signals) -> None:
        """Forward a stop signal to the ranks, once; ranks without a heartbeat do not handle it yet."""
        ready = [record for record in self._running() if read_rank_status(self._local, record.rank) is not None]
        if ready and not self._asked_to_stop:
            self._asked_to_stop = True
            self._signal(ready, number)

    def _gather_stacks(self, request: int) -> None:
        running = self._running()
        before = {record.rank: len(self._stacks_so_far(record.rank)) for record in running}
        self._signal(running, STACKS)
        deadline = time.monotonic() + STACKS_SECONDS
        stacks: tuple[RankStacks, ...] = ()
        are_complete = False
        while not are_complete and time.monotonic() < deadline:
            time.sleep(STACKS_POLL_SECONDS)
            self._beat()
            seen = tuple(self._stacks_of(record, before[record.rank]) for record in running)
            # Each has written all of its own, or is stopped and cannot.
            are_complete = seen == stacks and all(one.text or one.state == "T" for one in seen)
            stacks = seen
        self._write(stacks=stacks, stacks_round=request)

    def _stacks_of(self, record: RankRecord, begin: int) -> RankStacks:
        """What a rank has written from byte `begin` of its file on."""
        text = self._stacks_so_far(record.rank)[begin:].decode(errors="replace")
        return RankStacks(record.rank, process_state(record.process), text)

    def _stacks_so_far(self, rank_number: int) -> bytes:
        try:
            return stacks_file(self._local, rank_number).read_bytes()
        except OSError:  # as after a cleaner of /tmp
            return b""

    def _signal(self, ranks: Sequence[RankRecord], number: signal.Signals) -> None:
        for record in ranks:
            with suppress(ProcessLookupError):
                os.kill(record.process, number)


def stacks_file(folder: Path, rank: int) -> Path:
    """The file to which a rank appends its stacks at each request."""
    return folder / f"stacks_{rank}.txt"


def last_lines(log: Path, count: int = 20) -> str:
    """The last lines of a log, empty if there is none."""
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines() if log.is_file() else []
    return "\n".join(lines[-count:])


def out_of_memory_kills() -> int:
    """How many processes of this machine or container the kernel has killed because memory was exhausted."""
    total = 0
    for path in (Path("/proc/vmstat"), Path("/sys/fs/cgroup/memory.events")):
        with suppress(OSError, ValueError):
            lines = [line.split() for line in path.read_text(encoding="utf-8").splitlines()]
            total += sum(int(value) for name, value in lines if name == "oom_kill")
    return total


def main(arguments: Sequence[str]) -> int:
    """Be the agent of one node. Returns 0 if it could report how the ranks ended."""
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    node = parser.add_mutually_exclusive_group(required=True)
    node.add_argument("--node", type=int)
    node.add_argument("--host")
    node.add_argument("--variable", help="environment variable with the number of the node")
    node.add_argument("--host-variable", help="environment variable with the name of the host")
    options = parser.parse_args(arguments)
    return exit_code(lambda: _run_node(options))


def _run_node(options: argparse.Namespace) -> None:
    host = os.uname().nodename
    try:
        job = read_job(options.folder)
    except OSError as error:
        raise RunError(
            f"{host}: {options.folder / JOB} cannot be read ({error.strerror}); all nodes must share this folder "
            "(log_dir says where it is)"
        ) from error
    node = _node_number(options, job)
    try:
        os.chdir(job.working_folder)
    except OSError as error:
        raise RunError(
            f"{host}: the working folder {job.working_folder} cannot be entered ({error.strerror}); all nodes must "
            "have it"
        ) from error
    os.environ.update(job.environment)
    with tempfile.TemporaryDirectory(prefix="deepy-") as local, StopSignals() as signals:
        Agent(options.folder, job, node, Path(local), connected=options.host is not None).run(signals)


def _node_number(options: argparse.Namespace, job: JobSpec) -> int:
    """The number of this node in the job. Raises RunError where the launcher did not pass a valid one."""
    if options.node is not None:
        return int(options.node)
    host = os.environ.get(options.host_variable, "not set") if options.host_variable else options.host
    if host is not None:
        if host not in job.hosts:
            name = f"{options.host_variable} is {host}" if options.host_variable else host
            raise RunError(f"the launcher started an agent on {name}, which is not a host of this run")
        return job.hosts.index(host)
    number = os.environ.get(options.variable, "")
    if not number.isdecimal() or int(number) >= len(job.slots):
        raise RunError(
            f"{os.uname().nodename}: {options.variable} is {number or 'not set'}, but must be the number of this node, "
            f"below {len(job.slots)}; another program than the launcher's own started the agent"
        )
    return int(number)


if __name__ == "__main__":
    sys.path.remove(ROOT)
    sys.exit(main(sys.argv[1:]))
