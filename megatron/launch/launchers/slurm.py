"""Launcher "slurm": `srun` inside an allocation; no ssh between nodes, no hostfile."""

import re
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path

from megatron.config.schema.config import Config
from megatron.errors import UserError
from megatron.launch.devices import local_slots
from megatron.launch.launchers.launcher import LaunchSpec, agent_command, nodes_of_allocation, split_arguments

NODE_VARIABLE = "SLURM_PROCID"
HOST_VARIABLE = "SLURMD_NODENAME"


def slurm(config: Config, script: str, environment: Mapping[str, str]) -> LaunchSpec:
    """Registry entry: one task, the agent, on each node of the allocation. Raises UserError outside of one."""
    keys = config.launcher
    if not in_allocation(environment):
        raise UserError("launcher slurm works inside an allocation: start deepy.py from a script for sbatch, or salloc")
    if shutil.which("srun") is None:
        raise UserError("launcher slurm: there is no program srun here")
    slots = allocated_slots(config, script, environment)
    # Restarts choose among the nodes, so their names must be known.
    names = _allocated_names(environment) if keys.max_restarts else [""] * len(slots)
    spares = dict.fromkeys(names[len(slots) :], slots[0])

    def start(folder: Path, hosts: Sequence[str]) -> list[str]:
        # One task runs all ranks of its node, so it gets all cores and GPUs of the job there.
        tasks = [
            f"--nodes={len(hosts)}",
            f"--ntasks={len(hosts)}",
            "--ntasks-per-node=1",
            "--cpu-bind=none",
            "--kill-on-bad-exit=0",
        ]
        comment = [f"--comment={keys.comment}"] if keys.comment else []
        extra = [*_cores(environment), *comment, *split_arguments(config)]
        if not keys.max_restarts:
            return ["srun", *tasks, *extra, *agent_command(folder, "--variable", NODE_VARIABLE)]
        # The step, and with --no-kill of sbatch the allocation, outlives a node that fails.
        chosen = [f"--nodelist={','.join(hosts)}", "--no-kill"]
        return ["srun", *tasks, *chosen, *extra, *agent_command(folder, "--host-variable", HOST_VARIABLE)]

    return LaunchSpec(tuple(names[: len(slots)]), slots, start, keys.master_addr, True, {}, spares)


def in_allocation(environment: Mapping[str, str]) -> bool:
    """Whether this process runs inside a Slurm allocation."""
    return "SLURM_JOB_ID" in environment


def allocated_slots(config: Config, script: str, environment: Mapping[str, str]) -> tuple[tuple[int, ...], ...]:
    """The slots of each node of this allocation. Raises UserError for keys that ask for more than it has."""
    keys = config.launcher
    if keys.include is not None or keys.exclude is not None:
        raise UserError("include and exclude choose hosts of a hostfile; with launcher slurm use sbatch --nodelist")
    held = nodes_of_allocation(environment)
    nodes = keys.num_nodes or held
    if nodes > held:
        raise UserError(f"num_nodes ({nodes}) is more than the {held} of this allocation")
    return (tuple(range(_slots_per_node(config, script, environment))),) * nodes


def _slots_per_node(config: Config, script: str, environment: Mapping[str, str]) -> int:
    """num_gpus; unset, what Slurm allocated per node; without that, the devices of this node."""
    if config.launcher.num_gpus is not None:
        return config.launcher.num_gpus
    for name in ("SLURM_GPUS_ON_NODE", "SLURM_GPUS_PER_NODE", "SLURM_NTASKS_PER_NODE"):
        # "8", "h200:8" or "h200:8(x2)"
        match = re.fullmatch(r"(?:[^:]*:)?(\d+)(?:\(x\d+\))?", environment.get(name, ""))
        if match is not None and int(match[1]) > 0:
            return int(match[1])
    here = config.model_copy(update={"launcher": config.launcher.model_copy(update={"num_nodes": 1})})
    return len(local_slots(here, script, environment))


def _allocated_names(environment: Mapping[str, str]) -> list[str]:
    """The names of all nodes of this allocation. Raises UserError where Slurm does not tell."""
    written = environment.get("SLURM_JOB_NODELIST", "")
    try:
        done = subprocess.run(["scontrol", "show", "hostnames", written], capture_output=True, text=True, check=False)
    except OSError as error:
        raise UserError(
            f"max_restarts needs the names of the nodes, but scontrol cannot be started: {error.strerror}"
        ) from error
    names = done.stdout.split()
    if done.returncode or len(names) != nodes_of_allocation(environment):
        raise UserError(
            f'max_restarts needs the names of the nodes, but `scontrol show hostnames "{written}"` says: '
            f"{(done.stderr or done.stdout).strip() or 'nothing'}"
        )
    return names


def _cores(environment: Mapping[str, str]) -> list[str]:
    """All cores of the node, explicitly: since Slurm 22.05 srun does not inherit --cpus-per-task of sbatch."""
    cores = environment.get("SLURM_CPUS_ON_NODE")
    return [f"--cpus-per-task={cores}"] if cores else []
