"""Renew requirements/*.txt: install what pyproject.toml asks for into empty environments, write down what came.

    python tools/lock.py

build.txt comes first in an installation: DeepSpeed is built from source and wants torch and setuptools present.
"""

import os
import subprocess
import sys
import tempfile
import tomllib
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
REQUIREMENTS = ROOT / "requirements"
BUILD = ["setuptools>=77", "wheel", "ninja", "torch==2.13.0"]


def main() -> None:
    """Write build.txt, run.txt (to run Deepy), dev.txt (to work on it), and flash.txt (flash-attn, for GPUs)."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    develop = [need for need in extras["dev"] if not need.startswith("deepy[")]
    with tempfile.TemporaryDirectory() as folder:
        venv.create(folder, with_pip=True)
        python = Path(folder) / "bin" / "python"
        install(python, BUILD)
        write("build.txt", freeze(python, only={"setuptools", "wheel", "ninja", "torch"}))
        install(python, project["dependencies"])
        write("run.txt", freeze(python))
        wanted = next(need for need in extras["dev"] if need.startswith("deepy["))
        named = wanted.removeprefix("deepy[").removesuffix("]").split(",")
        install(python, [*(need for name in named for need in extras[name]), *develop])
        write("dev.txt", development := freeze(python))
        # Without what it depends on: on a GPU torch brings its own triton.
        install(python, ["--no-deps", *extras["flash"]])
        write("flash.txt", [pin for pin in freeze(python) if pin not in development])


def install(python: Path, needs: list[str]) -> None:
    """Install `needs` into the environment of `python`; flash-attn without its kernels, which take nvcc and an hour."""
    environment = os.environ | {"FLASH_ATTENTION_SKIP_CUDA_BUILD": "TRUE"}
    command = [python, "-m", "pip", "install", "--quiet", "--no-build-isolation", *needs]
    subprocess.run(command, check=True, env=environment)


def freeze(python: Path, only: set[str] | None = None) -> list[str]:
    """What is installed, as `name==version`; a local part such as `+cpu` belongs to one machine and is left out."""
    command = [str(python), "-m", "pip", "freeze", "--all", "--exclude", "pip"]
    lines = subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()
    pins = [line.split(" @ ")[0].split("+")[0] for line in lines]
    return [pin for pin in pins if only is None or pin.split("==")[0] in only]


def write(name: str, pins: list[str]) -> None:
    """Write one file of pins."""
    header = (
        f"# Made by `make lock` with Python {sys.version_info.major}.{sys.version_info.minor} from pyproject.toml\n"
    )
    (REQUIREMENTS / name).write_text(header + "\n".join(pins) + "\n")


if __name__ == "__main__":
    main()
