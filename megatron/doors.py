"""What the scripts in the repository's root (the doors) share: preparing the process, and running a configuration.

Importing this file needs the standard library only, because `enter` also runs where nothing is installed yet.
Exit codes: 0 done, 1 the run failed, 2 the command, the configuration or the input is wrong, 130 interrupted.
"""

import os
import sys
from contextlib import suppress
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

NEEDED = ("torch", "deepspeed", "pydantic")
OLDEST_PYTHON = (3, 11)
MOVED = "DEEPY_MOVED_TO_VENV"  # set in the process that has been replaced, so that it is not replaced again


def enter(script: str) -> None:
    """Prepare this process to run `script`, the `__file__` of a door. Call it before any other import.

    If packages are missing, the process is replaced by `.venv/bin/python` next to the script; if that does not exist
    it exits with code 2 and a hint. The script's folder is removed from `sys.path`: our `evaluate.py` would otherwise
    shadow the package `evaluate`.
    """
    folder = Path(script).resolve().parent
    if not _has_environment():
        _become_environment(folder, script)
    sys.path[:] = [entry for entry in sys.path if not _is_folder(entry, folder)]


def _is_folder(entry: str, folder: Path) -> bool:
    """Whether an entry of `sys.path` is this folder. Where the working folder is gone, relative ones are none."""
    try:
        return Path(entry or ".").resolve() == folder
    except OSError:
        return False


def run(script: str, target: str) -> int:
    """Load the configuration that the command line names, call `target` with it, and return the exit code.

    script: the door's `__file__`. target: "module:function", imported only after the configuration has passed.
    Anything but a UserError, a RunError or Ctrl-C keeps its traceback, OSError included: it may be a defect.
    """
    from megatron.errors import RunError, exit_code

    return exit_code(lambda: _run(script, target), failures=(RunError,))


def _run(script: str, target: str) -> int | None:
    from megatron.config.command_line import configuration_of, parse_command_line
    from megatron.terminal import live

    name = Path(script).name
    command = parse_command_line(sys.argv[1:], script=name)
    if command.print_config or command.dry_run:
        from megatron.launch.main import main as describe

        return describe([name, *sys.argv[1:]], Path(script).resolve().parent)
    config = configuration_of(command, [name, *sys.argv[1:]], name)
    module, function = target.split(":")
    with live(config.logging.console == "panel"):
        getattr(import_module(module), function)(config)
    return None


def _has_environment() -> bool:
    return sys.version_info >= OLDEST_PYTHON and all(find_spec(name) is not None for name in NEEDED)


def _become_environment(folder: Path, script: str) -> None:
    python = folder / ".venv" / "bin" / "python"
    if python.exists() and MOVED not in os.environ:
        print(f"This Python lacks packages that Deepy needs; continuing with {python}", file=sys.stderr, flush=True)
        with suppress(OSError):  # not executable, or built for another machine
            os.execve(python, [str(python), script, *sys.argv[1:]], {**os.environ, MOVED: "1"})
    print(
        f"This Python ({sys.executable}) lacks packages that Deepy needs ({', '.join(NEEDED)}; Python 3.11 or newer).\n"
        f"`make demo` or `make test` in {folder} installs them; or activate the environment that has them.",
        file=sys.stderr,
    )
    raise SystemExit(2)
