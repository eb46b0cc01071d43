"""Launcher "pdsh": one ssh to each host of the hostfile.

Settings of ssh (port, key, user) belong into ~/.ssh/config or, as for pdsh everywhere, into PDSH_SSH_ARGS_APPEND.
"""

import shlex
import shutil
from collections.abc import Mapping
from pathlib import Path

from megatron.config.schema.config import Config
from megatron.errors import UserError
from megatron.launch.devices import local_slots
from megatron.launch.hostfile import LOCALHOST, hostfile_path, read_hosts
from megatron.launch.launchers.launcher import Launch, agent_command

# Hosts that are contacted at the same time: all, as none ends before the others.
FAN_OUT = 1024
SETTINGS = {"PDSH_RCMD_TYPE": "ssh"}


def pdsh(config: Config, script: str, environment: Mapping[str, str]) -> Launch:
    """Registry entry. Without a hostfile the run is on this machine, as with DeepSpeed. Raises UserError."""
    hosts = read_hosts(config, environment)
    if hosts is None:
        if (config.launcher.num_nodes or 1) > 1:
            raise UserError(
                f"num_nodes ({config.launcher.num_nodes}): launcher pdsh needs the names of the nodes; give a hostfile "
                '(-H FILE) with lines such as "node1 slots=8"'
            )
        hosts = {LOCALHOST: local_slots(config, script, environment)}
    elif len(hosts) > 1 and LOCALHOST in hosts:
        path = hostfile_path(config, environment)
        raise UserError(f'{path} names "localhost" beside others, which they cannot reach; use the machine\'s name')
    if shutil.which("pdsh") is None:
        raise UserError("launcher pdsh: there is no program pdsh here; install it (apt install pdsh openssh-client)")
    extra = shlex.split(config.launcher.launcher_args or "")
    names = ",".join(hosts)

    def command(folder: Path) -> list[str]:
        # The agent takes the shell's place: it ends its ranks when its parent, the connection, is gone. pdsh puts the
        # host's name for %h.
        remote = f"exec {shlex.join(agent_command(folder, '--host'))} %h"
        return ["pdsh", "-N", "-S", "-f", str(FAN_OUT), *extra, "-w", names, remote]

    master = config.launcher.master_addr or next(iter(hosts))
    return Launch(tuple(hosts), tuple(hosts.values()), command, master, remote=True, settings=SETTINGS)
