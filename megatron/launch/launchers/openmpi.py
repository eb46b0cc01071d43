"""Launcher "openmpi": `mpirun` starts one agent on each host."""

import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

from megatron.config.schema.config import Config
from megatron.errors import UserError
from megatron.launch.devices import local_slots
from megatron.launch.hosts import LOCALHOST, read_hosts, spare_hosts
from megatron.launch.launchers.launcher import LaunchSpec, agent_command, split_arguments

NODE_VARIABLE = "OMPI_COMM_WORLD_RANK"


def openmpi(config: Config, script: str, environment: Mapping[str, str]) -> LaunchSpec:
    """Registry entry: the hosts of the hostfile, or this machine without one. Raises UserError."""
    hosts = read_hosts(config, environment) or {LOCALHOST: local_slots(config, script, environment)}
    if (address := next((host for host in hosts if ":" in host), None)) is not None:
        raise UserError(f'launcher openmpi: mpirun reads "{address}" as a host with slots; use the host\'s name')
    if shutil.which("mpirun") is None:
        raise UserError("launcher openmpi: there is no program mpirun here; install it (apt install openmpi-bin)")
    # By default mpirun would bind the agent, and with it all ranks of its node, to one core.
    options = ["--map-by", "ppr:1:node", "--bind-to", "none"]
    options += ["--allow-run-as-root"] if os.geteuid() == 0 else []
    options += split_arguments(config)

    def start(folder: Path, names: Sequence[str]) -> list[str]:
        agent = agent_command(folder, "--variable", NODE_VARIABLE)
        return ["mpirun", "-n", str(len(names)), "--host", ",".join(names), *options, *agent]

    spares = spare_hosts(config, environment)
    alone = len(hosts) == 1 and not spares
    master = config.launcher.master_addr or ("127.0.0.1" if alone else next(iter(hosts)))
    return LaunchSpec(tuple(hosts), tuple(hosts.values()), start, master, not alone, {}, spares)
