"""The command deepy.py: parse the command line, check the configuration, then print, plan or run it."""

import os
import re
from collections.abc import Sequence
from pathlib import Path

from megatron import registry
from megatron.config.command_line import DOORS, CommandLine, configuration_of, parse_command_line
from megatron.config.resolve import resolve
from megatron.config.schema.config import Config
from megatron.errors import UserError, exit_code
from megatron.estimate.describe import assumed_vocabulary, dry_run, print_config
from megatron.files import is_file
from megatron.launch.accelerators import visible_gpus
from megatron.launch.hosts import problem_with_host
from megatron.launch.launchers.launcher import LaunchSpec, usual_launcher
from megatron.launch.planning import is_inference, plan_of_ranks, planned_ranks
from megatron.launch.restarting import supervise


def main(arguments: Sequence[str], folder: Path) -> int:
    """Run the command; `folder` holds the doors. Returns the exit code."""
    return exit_code(lambda: _main(arguments, folder))


def _main(arguments: Sequence[str], folder: Path) -> int:
    _check_working_folder()
    command = parse_command_line(arguments)
    script = find_script(command.script, folder)
    planning = command.print_config or command.dry_run
    config = configuration_of(command, ["deepy.py", *arguments], script.name, planning=planning)
    _check_master_address(config)
    if planning:
        print(_described(command, config, script))
        return 0
    name = config.launcher.launcher or usual_launcher(config, os.environ)
    launch: LaunchSpec = registry.resolve("launcher", name)(config, script.name, os.environ)
    plan_of_ranks(config, script.name, launch.ranks)  # before any rank starts
    return supervise(launch, config, script)


def find_script(name: str, folder: Path) -> Path:
    """The door called `name`: a path, or a file next to deepy.py. Raises UserError with the nearest door."""
    for path in (Path(name), folder / name):
        if path.suffix == ".py" and is_file(path):
            return path.resolve()
    near = registry.nearest(name, DOORS)
    hint = f' Did you mean "{near}"?' if near else ""
    raise UserError(f'there is no script "{name}".{hint} Scripts: {", ".join(DOORS)}')


def _check_working_folder() -> None:
    try:
        Path.cwd()
    except OSError as error:
        raise UserError(f"the working folder cannot be entered any more ({error.strerror}); cd into another") from error


def _check_master_address(config: Config) -> None:
    address = config.launcher.master_addr
    if address is None or (problem := problem_with_host(address)) is None:
        return
    if re.fullmatch(r"[^:]+:[0-9]+", address):
        raise UserError(f'master_addr ("{address}") must not hold a port; write the port as master_port')
    raise UserError(f"master_addr: {problem}")


def _described(command: CommandLine, config: Config, script: Path) -> str:
    planned = planned_ranks(config, script.name, os.environ)
    plan = resolve(config, planned.ranks, assumed_vocabulary(config), inference=is_inference(script.name))
    if command.print_config:
        return print_config(config, plan).rstrip()
    gpus = config.launcher.gpu_memory or visible_gpus(os.environ, config.launcher.distributed_backend)
    return dry_run(config, plan, script.name, planned.notes, on_cpu=not gpus)
