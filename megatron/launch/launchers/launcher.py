"""What a launcher is: a function (config, script, environment) -> LaunchSpec, one line in the registry's table.

It chooses the nodes of a run and the command that starts an agent on each; everything after that is the same for all
launchers.
"""

import os
import re
import shlex
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from megatron.config.command_line import MERGED_FLAG, merged_to_argument
from megatron.config.schema.config import Config
from megatron.errors import UserError
from megatron.launch.hosts import read_hosts
from megatron.launch.node import agent
from megatron.launch.protocol.attempt import FIRST, Attempt
from megatron.launch.protocol.environment import forwarded_environment
from megatron.launch.protocol.job import JobSpec

AGENT = str(Path(agent.__file__).resolve())


@dataclass(frozen=True)
class LaunchSpec:
    """What a launcher decides about a run: its nodes, their slots, and how the agents are started.

    hosts: a name per node, empty where only the node itself knows it. slots: of each node, in the order of ranks.
    start: the command that starts all agents, from the run folder and the hosts. master: the address of rank 0; None:
    the first node's own name. remote: the nodes are, or may be, other machines. settings: added to the environment of
    the command. spares: further nodes, on which a restart may go on.
    """

    hosts: tuple[str, ...]
    slots: tuple[tuple[int, ...], ...]
    start: Callable[[Path, Sequence[str]], list[str]]
    master: str | None
    remote: bool
    settings: Mapping[str, str]
    spares: Mapping[str, tuple[int, ...]] = field(default_factory=dict)

    def command(self, folder: Path) -> list[str]:
        """The command that starts an agent on each host, for a run folder."""
        return self.start(folder, self.hosts)

    def on(self, hosts: Sequence[str]) -> "LaunchSpec":
        """The same run on other nodes: some of `hosts` and `spares`, in the order of ranks."""
        nodes = self.nodes
        master = self.master if hosts[0] == self.hosts[0] else None
        spares = {host: slots for host, slots in nodes.items() if host not in hosts}
        return replace(
            self, hosts=tuple(hosts), slots=tuple(nodes[host] for host in hosts), master=master, spares=spares
        )

    @property
    def nodes(self) -> dict[str, tuple[int, ...]]:
        """The slots of each node, spares last."""
        return dict(zip(self.hosts, self.slots, strict=True)) | dict(self.spares)

    @property
    def ranks(self) -> int:
        """World size."""
        return sum(map(len, self.slots))


Launcher = Callable[[Config, str, Mapping[str, str]], LaunchSpec]


def agent_command(folder: Path, *node: str) -> list[str]:
    """The command line of a node's agent; `node` holds the option that identifies its node."""
    return [sys.executable, "-P", AGENT, str(folder), *node]


def split_arguments(config: Config) -> list[str]:
    """The words of launcher_args. Raises UserError where a quote is not closed."""
    written = config.launcher.launcher_args or ""
    try:
        return shlex.split(written)
    except ValueError as error:
        raise UserError(f"launcher_args ({written}) cannot be split into words: {error}") from error


def make_job(
    launch: LaunchSpec,
    config: Config,
    script: Path,
    log_folder: Path | None,
    attempt: Attempt = FIRST,
    arguments: tuple[str, ...] | None = None,
) -> JobSpec:
    """What the agents have to know. arguments: of the script; None: the whole configuration.

    Raises UserError for forwarded environment variables that are not set.
    """
    keys, here = config.launcher, Path.cwd()
    return JobSpec(
        hosts=launch.hosts,
        slots=launch.slots,
        script=str(script),
        arguments=(MERGED_FLAG, merged_to_argument(config)) if arguments is None else arguments,
        working_folder=str(here),
        log_folder=str(log_folder.resolve()) if log_folder is not None else None,
        environment=forwarded_environment(os.environ, keys.forward_environment, (here, *_home()))
        if launch.remote
        else {},
        backend=keys.distributed_backend,
        master_address=launch.master,
        master_port=keys.master_port,
        max_gpu_memory_in_use=keys.max_gpu_memory_in_use,
        remote=launch.remote,
        attempt=attempt,
    )


def _home() -> list[Path]:
    """The user's home folder; none in a container whose user has no entry in /etc/passwd and no HOME."""
    try:
        return [Path.home()]
    except RuntimeError:
        return []


def make_log_folder(config: Config, script: Path) -> Path | None:
    """Make the folder of the ranks' logs, or return None where there is none.

    The other doors write no logs into the checkpoint folder; they do so in log_dir only.
    Raises UserError where the folder cannot be made or written to.
    """
    name = config.log_folder if script.name == "train.py" else config.logging.log_dir
    if name is None:
        return None
    try:
        Path(name).mkdir(parents=True, exist_ok=True)
    except (OSError, ValueError) as error:  # ValueError: a zero byte in the name
        reason = error.strerror if isinstance(error, OSError) else str(error)
        raise UserError(f"log_dir ({name}) cannot be made: {reason}") from error
    try:
        tempfile.TemporaryFile(dir=name).close()
    except OSError as error:
        raise UserError(f"log_dir ({name}) cannot be written to: {error.strerror}") from error
    return Path(name)


def usual_launcher(config: Config, environment: Mapping[str, str]) -> str:
    """The launcher if the configuration names none.

    pdsh for a hostfile with several hosts, slurm in the batch script of several nodes, otherwise local.
    Raises UserError for a hostfile that is wrong.
    """
    if config.launcher.num_nodes == 1:
        return "local"
    hosts = read_hosts(config, environment)
    if hosts is not None:
        return "pdsh" if len(hosts) > 1 else "local"
    return "slurm" if in_batch_script(environment) else "local"


def in_batch_script(environment: Mapping[str, str]) -> bool:
    """Whether this process is the batch script (or the shell of salloc) of several nodes, and not a task of a step."""
    step = environment.get("SLURM_STEP_ID", "")
    # Slurm gives batch scripts and interactive shells the highest step numbers.
    inside = re.fullmatch(r"[0-9]+", step) is not None and int(step) < 4_000_000_000
    return nodes_of_allocation(environment) > 1 and not inside


def nodes_of_allocation(environment: Mapping[str, str]) -> int:
    """The number of nodes of this Slurm allocation, 1 outside of one."""
    nodes = environment.get("SLURM_JOB_NUM_NODES") or environment.get("SLURM_NNODES") or "1"
    return int(nodes) if re.fullmatch(r"[0-9]{1,6}", nodes) else 1
