"""What a launcher is: a function (config, script, environment) -> Launch, one line in the registry's table.

It says which nodes a run has and with which command an agent gets to run on each; everything after that is the same
for all launchers.
"""

import os
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from megatron.config.command_line import MERGED_FLAG, merged_to_argument
from megatron.config.schema.config import Config
from megatron.errors import UserError
from megatron.launch.hostfile import read_hosts
from megatron.launch.node import agent
from megatron.launch.protocol.environment import forwarded_environment
from megatron.launch.protocol.job import Job

AGENT = str(Path(agent.__file__).resolve())


@dataclass(frozen=True)
class Launch:
    """A run about to be started.

    hosts: a name per node, empty where only the node itself knows it. slots: of each node, in the order of ranks.
    command: starts all agents, given the run folder. master: where ranks meet; None: the first node's own name.
    remote: the nodes are, or may be, other machines. settings: added to the environment of `command`.
    """

    hosts: tuple[str, ...]
    slots: tuple[tuple[int, ...], ...]
    command: Callable[[Path], list[str]]
    master: str | None
    remote: bool
    settings: Mapping[str, str]

    @property
    def ranks(self) -> int:
        """Ranks of the run."""
        return sum(map(len, self.slots))


Launcher = Callable[[Config, str, Mapping[str, str]], Launch]


def agent_command(folder: Path, *who: str) -> list[str]:
    """The command line of a node's agent; `who` says which node it is on."""
    return [sys.executable, "-P", AGENT, str(folder), *who]


def make_job(launch: Launch, config: Config, script: Path, log_folder: Path | None) -> Job:
    """What the agents get to know. Raises UserError for environment variables that are asked for and not set."""
    keys, here = config.launcher, Path.cwd()
    return Job(
        hosts=launch.hosts,
        slots=launch.slots,
        script=str(script),
        arguments=(MERGED_FLAG, merged_to_argument(config)),
        working_folder=str(here),
        log_folder=str(log_folder.resolve()) if log_folder is not None else None,
        environment=forwarded_environment(os.environ, keys.forward_environment, (here, Path.home()))
        if launch.remote
        else {},
        backend=keys.distributed_backend,
        master_address=launch.master,
        master_port=keys.master_port,
        remote=launch.remote,
    )


def make_log_folder(config: Config, script: Path) -> Path | None:
    """The folder of the ranks' logs. Reading a checkpoint writes nothing beside it unless log_dir says so."""
    name = config.log_folder if script.name == "train.py" else config.logging.log_dir
    if name is None:
        return None
    try:
        Path(name).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"log_dir ({name}) cannot be made: {error.strerror}") from error
    return Path(name)


def usual_launcher(config: Config, environment: Mapping[str, str]) -> str:
    """The launcher where the configuration names none.

    pdsh for a hostfile with several hosts, slurm from a batch script of several nodes, this machine otherwise.
    Raises UserError for a hostfile that is wrong.
    """
    if config.launcher.num_nodes == 1:
        return "local"
    hosts = read_hosts(config, environment)
    if hosts is not None:
        return "pdsh" if len(hosts) > 1 else "local"
    return "slurm" if in_batch_script(environment) else "local"


def in_batch_script(environment: Mapping[str, str]) -> bool:
    """Whether this process is the one that holds a Slurm allocation of several nodes, and not a task inside of it."""
    nodes = environment.get("SLURM_JOB_NUM_NODES") or environment.get("SLURM_NNODES") or "1"
    step = environment.get("SLURM_STEP_ID", "")
    # Slurm numbers the steps of batch scripts and shells from the top.
    inside = step.isdigit() and int(step) < 4_000_000_000
    return nodes.isdigit() and int(nodes) > 1 and not inside
