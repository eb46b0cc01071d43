"""Launcher "local": all ranks on this machine."""

import os
from collections.abc import Mapping

from megatron.config.schema.config import Config
from megatron.launch.devices import local_slots
from megatron.launch.launchers.launcher import LaunchSpec, agent_command


def local(config: Config, script: str, environment: Mapping[str, str]) -> LaunchSpec:
    """Registry entry: one agent, a child of deepy.py. Raises UserError for devices that do not exist."""
    return LaunchSpec(
        hosts=(os.uname().nodename,),
        slots=(local_slots(config, script, environment),),
        start=lambda folder, _: agent_command(folder, "--node", "0"),
        master=config.launcher.master_addr or "127.0.0.1",
        remote=False,
        settings={},
    )
