"""Which nodes are fit to start a run on: agents answer, devices multiply, and all ranks talk once. Imports no torch."""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from megatron.config.schema.config import Config
from megatron.launch.failure_report import Outcome, ending_of
from megatron.launch.launchers.launcher import LaunchSpec, make_job
from megatron.launch.protocol.heartbeat import NOT_BEGUN
from megatron.launch.protocol.job import JobSpec
from megatron.launch.protocol.node_check import CANNOT_COMPUTE, CANNOT_CONNECT, CANNOT_TALK, MULTIPLYING, SCRIPT

# Longer than any wait of the check itself, the imports of a slow file system included.
CHECK_SECONDS = 300.0

Runner = Callable[[LaunchSpec, Config, JobSpec, float], Outcome]


@dataclass(frozen=True)
class CheckResult:
    """unfit: host and reason of each node that failed. problem: why the check failed where no node is to blame."""

    unfit: dict[str, str] = field(default_factory=dict)
    problem: str = ""


def check_nodes(launch: LaunchSpec, config: Config, run: Runner) -> CheckResult:
    """Run the check on all ranks of `launch`. run: starts a job, and ends it after so many seconds."""
    backend = config.launcher.distributed_backend
    job = make_job(launch, config, Path(SCRIPT), None, arguments=() if backend is None else (backend,))
    return judged(run(launch, config, job, CHECK_SECONDS), launch.hosts[0])


def judged(outcome: Outcome, first: str) -> CheckResult:
    """What a check says about the nodes. first: the host of rank 0."""
    ending = ending_of(outcome)
    if ending.code == 0:
        return CheckResult()
    silent = {host: f"does not answer{f' ({said})' if said else ''}" for host, said, _ in outcome.lost}
    refused = {node.host: node.problem for node in outcome.nodes if node.problem}
    if silent or refused:
        return CheckResult(silent | refused)
    ended = [(one, node.host) for node in outcome.nodes for one in node.ranks if one.failed]
    failures = {
        code: {host: f"rank {one.rank}: {one.text.strip()}" for one, host in reversed(ended) if one.code == code}
        for code in (CANNOT_COMPUTE, CANNOT_CONNECT)
    }
    if failures[CANNOT_COMPUTE]:
        return CheckResult(failures[CANNOT_COMPUTE])
    if unconnected := failures[CANNOT_CONNECT]:
        # Where nobody else reaches rank 0, it is rank 0 that cannot be reached; of two nodes it may be either.
        alone = len(unconnected) > 1 and len(unconnected) == len(outcome.nodes) - 1 and first not in unconnected
        return CheckResult({first: "no other node reaches it"} if alone else unconnected)
    gone = {node.host: ending.reason for node in outcome.nodes if node.gone}
    waited_in_vain = all(one.code == CANNOT_TALK for one, _ in ended)
    stuck = {
        node.host: f"rank {one.rank} hangs: {one.phase}"
        for node in outcome.nodes
        for one in reversed(node.statuses)
        if waited_in_vain and one.phase in (NOT_BEGUN, MULTIPLYING)
    }
    # What ends or holds up the ranks of all nodes is the fault of none.
    unfit = next((found for found in (gone, stuck) if 0 < len(found) < len(outcome.nodes)), {})
    return CheckResult(unfit) if unfit else CheckResult(problem=ending.reason)
