"""Processes forked from a server that has imported torch and DeepSpeed: each starts in a tenth of a second.

Ranks of tests (`tests/ranks/run.py`) and scripts of the repository (`run_script`) are such processes.
"""

import atexit
import multiprocessing
import os
import runpy
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from multiprocessing.context import ForkServerContext
from pathlib import Path

BACKEND = os.environ.get("RANKS_BACKEND", "gloo")  # of the ranks of tests; nccl: each is a GPU


def fork_server() -> ForkServerContext:
    """The context of multiprocessing that forks from the server."""
    # the server inherits these; DeepSpeed reads the first at its import
    os.environ.setdefault("DS_ACCELERATOR", "cpu" if BACKEND == "gloo" else "cuda")
    if BACKEND != "gloo":
        # imports ask whether there is a GPU: torch then asks NVML, as a process cannot use CUDA if the one that it was
        # forked from has initialised it
        os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.preloaded"])
    return context


def run_script(
    script: Path, words: Sequence[str], folder: Path, environment: Mapping[str, str], timeout: float
) -> subprocess.CompletedProcess[str]:
    """Run a script in `folder` as `python script words...` does, but for the imports that the server did before.

    Standard input is empty. Raises subprocess.TimeoutExpired after killing a script that takes more than `timeout` s.
    """
    with tempfile.TemporaryDirectory() as name:
        outputs = Path(name, "stdout"), Path(name, "stderr")
        process = fork_server().Process(target=as_script, args=(script, words, folder, dict(environment), outputs))
        process.start()
        process.join(timeout)
        if process.exitcode is None:
            process.kill()
            process.join()
            raise subprocess.TimeoutExpired([str(script), *words], timeout, *(path.read_bytes() for path in outputs))
        written = [path.read_text() for path in outputs]
    return subprocess.CompletedProcess([str(script), *words], process.exitcode, *written)


def as_script(
    script: Path, words: Sequence[str], folder: Path, environment: dict[str, str], outputs: tuple[Path, Path]
) -> None:
    """Become the script's process: its descriptors, folder, environment, arguments and path of modules."""
    for descriptor, path in enumerate((Path(os.devnull), *outputs)):
        opened = os.open(path, os.O_RDWR | os.O_CREAT)
        os.dup2(opened, descriptor)
        os.close(opened)
    sys.stdin, sys.stdout, sys.stderr = open(0), open(1, "w"), open(2, "w", buffering=1)  # noqa: SIM115
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    root = Path(__file__).parents[1]
    added = [entry for entry in environment.get("PYTHONPATH", "").split(os.pathsep) if entry]
    kept = [entry for entry in sys.path if Path(entry or ".").resolve() != root and entry not in added]
    sys.path[:] = [str(script.parent), *added, *kept]
    sys.argv[:] = [str(script), *words]
    try:
        runpy.run_path(str(script), run_name="__main__")
    finally:
        atexit._run_exitfuncs()  # which processes of multiprocessing do not
