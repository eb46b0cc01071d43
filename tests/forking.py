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
import time
from collections.abc import Mapping, Sequence
from multiprocessing.context import ForkServerContext
from pathlib import Path

from megatron.launch.node.network import free_port

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
    script: Path, words: Sequence[str], folder: Path, environment: Mapping[str, str], timeout: float, ranks: int = 1
) -> subprocess.CompletedProcess[str]:
    """Run a script in `folder` as `python script words...` does, but for the imports that the server did before.

    ranks: processes, which find each other as those that torchrun starts do. What is returned is of the first one that
    failed, or of rank 0. Standard input is empty. Raises subprocess.TimeoutExpired after killing a script that takes
    more than `timeout` s.
    """
    with tempfile.TemporaryDirectory() as name:
        outputs = [(Path(name, f"{rank}.out"), Path(name, f"{rank}.err")) for rank in range(ranks)]
        processes = [
            fork_server().Process(target=as_script, args=(script, words, folder, {**environment, **added}, written))
            for added, written in zip(_environments(ranks), outputs, strict=True)
        ]
        for process in processes:
            process.start()
        deadline = time.monotonic() + timeout
        for process in processes:
            process.join(max(0, deadline - time.monotonic()))
        running = [rank for rank, process in enumerate(processes) if process.exitcode is None]
        for rank in running:
            processes[rank].kill()
            processes[rank].join()
        if running:
            written = [path.read_bytes() for path in outputs[running[0]]]
            raise subprocess.TimeoutExpired([str(script), *words], timeout, *written)
        told = next((rank for rank, process in enumerate(processes) if process.exitcode), 0)
        texts = [path.read_text() for path in outputs[told]]
    return subprocess.CompletedProcess([str(script), *words], processes[told].exitcode, *texts)


def _environments(ranks: int) -> list[dict[str, str]]:
    """What each of several ranks finds the others by; nothing for one alone."""
    if ranks == 1:
        return [{}]
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": str(ranks)}
    return [shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(ranks)]


def as_script(
    script: Path, words: Sequence[str], folder: Path, environment: dict[str, str], outputs: tuple[Path, Path]
) -> None:
    """Become the script's process: its descriptors, folder, environment, arguments and path of modules."""
    for descriptor, path in enumerate((Path(os.devnull), *outputs)):
        opened = os.open(path, os.O_RDWR | os.O_CREAT)
        os.dup2(opened, descriptor)
        os.close(opened)
    sys.stdin, sys.stdout, sys.stderr = open(0), open(1, "w"), open(2, "w", buffering=1)  # noqa: SIM115
    multiprocessing.set_start_method(None, force=True)  # as of a script, which forks its loaders
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
