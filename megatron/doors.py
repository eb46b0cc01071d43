"""What the scripts in the repository's root share: how a process gets ready, and how failures become exit codes.

Importing this file needs the standard library only, because `enter` also runs where nothing is installed yet.
Exit codes: 0 done, 1 the run failed, 2 the command, the configuration or the input is wrong.
"""

import os
import sys
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

NEEDED = ("torch", "deepspeed", "pydantic")
OLDEST_PYTHON = (3, 11)
MOVED = "DEEPY_MOVED_TO_VENV"  # set for the process that took over, which must not look for another


def enter(script: str) -> None:
    """Make this process fit to run `script`, which is the `__file__` of a door. Call it before any other import.

    Without the environment the process becomes `.venv/bin/python` beside the script where that exists, and exits
    with code 2 and a hint where it does not. The script's own folder leaves `sys.path`: our `evaluate.py` would
    otherwise hide the package `evaluate` from everything that imports it.
    """
    folder = Path(script).resolve().parent
    if not _has_environment():
        _become_environment(folder, script)
    sys.path[:] = [entry for entry in sys.path if Path(entry or ".").resolve() != folder]


def run(script: str, target: str) -> int:
    """Load the configuration that the command line names, call `target` with it, return the exit code.

    script: the door's `__file__`. target: "module:function", imported only after the configuration has passed.
    What is neither a UserError nor a RunError keeps its traceback (and Python's exit code 1).
    """
    from megatron.config.command_line import parse_command_line
    from megatron.config.load import load_config
    from megatron.errors import RunError, UserError

    try:
        name = Path(script).name
        command = parse_command_line(sys.argv[1:], script=name)
        if command.print_config or command.dry_run:
            from megatron.launch.main import main as describe

            return describe([name, *sys.argv[1:]], Path(script).resolve().parent)
        config = command.merged or load_config(command.files, command.folder, command.overrides, name)
        module, function = target.split(":")
        getattr(import_module(module), function)(config)
    except UserError as error:
        print(error, file=sys.stderr, flush=True)
        return 2
    except RunError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        return 1
    except KeyboardInterrupt:
        return 1
    return 0


def _has_environment() -> bool:
    return sys.version_info >= OLDEST_PYTHON and all(find_spec(name) is not None for name in NEEDED)


def _become_environment(folder: Path, script: str) -> None:
    python = folder / ".venv" / "bin" / "python"
    if python.exists() and MOVED not in os.environ:
        print(f"This Python lacks what Deepy needs; going on with {python}", file=sys.stderr, flush=True)
        os.execve(python, [str(python), script, *sys.argv[1:]], {**os.environ, MOVED: "1"})
    print(
        f"This Python ({sys.executable}) lacks what Deepy needs ({', '.join(NEEDED)}; Python 3.11 or newer).\n"
        f"`make demo` or `make test` in {folder} sets it up; or activate the environment that has it.",
        file=sys.stderr,
    )
    raise SystemExit(2)
