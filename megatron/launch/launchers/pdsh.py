"""Launcher "pdsh": one ssh to each host of the hostfile.

Settings of ssh (port, key, user) belong into ~/.ssh/config or PDSH_SSH_ARGS_APPEND.
"""

import shlex
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

from megatron.config.schema.config import Config
from megatron.errors import UserError
from megatron.launch.devices import local_slots
from megatron.launch.hosts import LOCALHOST, read_hosts, spare_hosts
from megatron.launch.launchers.launcher import LaunchSpec, agent_command, split_arguments

# Hosts contacted at the same time; it must be all of them, as no connection ends before the run does.
FAN_OUT = 1024
SETTINGS = {"PDSH_RCMD_TYPE": "ssh"}


def pdsh(config: Config, script: str, environment: Mapping[str, str]) -> LaunchSpec:
    """Registry entry. Without a hostfile the run uses this machine, as with DeepSpeed. Raises UserError."""
    hosts = read_hosts(config, environment)
    if hosts is None:
        if (config.launcher.num_nodes or 1) > 1:
            raise UserError(
                f"num_nodes ({config.launcher.num_nodes}): launcher pdsh needs the names of the nodes; give a hostfile "
                '(-H FILE) with lines such as "node1 slots=8"'
            )
        hosts = {LOCALHOST: local_slots(config, script, environment)}
    if shutil.which("pdsh") is None:
        raise UserError("launcher pdsh: there is no program pdsh here; install it (apt install pdsh openssh-client)")
    extra = split_arguments(config)

    def start(folder: Path, names: Sequence[str]) -> list[str]:
        # `exec`: the agent must be a direct child of the connection, because it ends its ranks when its parent is gone.
        # pdsh replaces %h by the host's name.
        remote = f"exec {shlex.join(agent_command(folder, '--host'))} %h"
        return ["pdsh", "-N", "-S", "-f", str(FAN_OUT), *extra, "-w", ",".join(names), remote]

    master = config.launcher.master_addr or next(iter(hosts))
    spares = spare_hosts(config, environment)
    return LaunchSpec(tuple(hosts), tuple(hosts.values()), start, master, True, SETTINGS, spares)
