"""What deepy.py does: understand the command, check the configuration, then print it, plan it or run it."""

import os
import sys
from collections.abc import Sequence
from pathlib import Path

from megatron import registry
from megatron.config.command_line import DOORS, CommandLine, parse_command_line
from megatron.config.load import load_config
from megatron.config.resolve import resolve
from megatron.config.schema.config import Config
from megatron.errors import UserError
from megatron.estimate.describe import assumed_vocabulary, dry_run, print_config
from megatron.launch.accelerators import visible_gpus
from megatron.launch.devices import planned_ranks
from megatron.launch.launchers.launcher import Launch, usual_launcher
from megatron.launch.supervisor import supervise

WRONG = 2


def main(arguments: Sequence[str], folder: Path) -> int:
    """Run the command; `folder` holds the doors. Returns the exit code."""
    try:
        command = parse_command_line(arguments)
        script = find_script(command.script, folder)
        planning = command.print_config or command.dry_run
        config = command.merged or load_config(
            command.files, command.folder, command.overrides, script.name, planning=planning
        )
        if planning:
            print(_described(command, config, script))
            return 0
        name = config.launcher.launcher or usual_launcher(config, os.environ)
        launch: Launch = registry.resolve("launcher", name)(config, script.name, os.environ)
        _check_ranks(config, script, launch.ranks)
        return supervise(launch, config, script)
    except UserError as error:
        print(error, file=sys.stderr)
        return WRONG
    except KeyboardInterrupt:
        return 1


def find_script(name: str, folder: Path) -> Path:
    """The door called `name`: as a path, or beside deepy.py. Raises UserError with the nearest door."""
    for path in (Path(name), folder / name):
        if path.suffix == ".py" and path.is_file():
            return path.resolve()
    near = registry.nearest(name, DOORS)
    hint = f' Did you mean "{near}"?' if near else ""
    raise UserError(f'there is no script "{name}".{hint} Scripts: {", ".join(DOORS)}')


def _described(command: CommandLine, config: Config, script: Path) -> str:
    ranks = planned_ranks(config, script.name, os.environ)
    plan = resolve(config, ranks, assumed_vocabulary(config), inference=_is_inference(script))
    if command.print_config:
        return print_config(config, plan).rstrip()
    notes = []
    if config.launcher.num_gpus is None:
        notes.append(f"ranks: {ranks} is what this machine would start; num_gpus=N plans for another")
    if config.launcher.hostfile is not None:
        notes.append(f"hosts: {config.launcher.hostfile}")
    gpus = config.launcher.gpu_memory or visible_gpus(os.environ, config.launcher.distributed_backend)
    return dry_run(config, plan, script.name, notes, on_cpu=not gpus)


def _check_ranks(config: Config, script: Path, ranks: int) -> None:
    """What can be wrong with this number of ranks is said before one of them starts."""
    keys = config.model
    # The tokenizer's is known to the ranks only; this one can be split in any case.
    vocabulary = keys.padded_vocab_size or keys.make_vocab_size_divisible_by * config.parallelism.model_parallel_size
    resolve(config, ranks, vocabulary, inference=_is_inference(script))


def _is_inference(script: Path) -> bool:
    return script.name in ("generate.py", "evaluate.py")
