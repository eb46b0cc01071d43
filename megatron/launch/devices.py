"""How many ranks this machine gets and on which devices, found out without torch.

Floor 2. On a machine without a usable GPU a "device" is a process: `num_gpus` counts processes there.
"""

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Literal

from megatron.config.groups import Config
from megatron.errors import UserError

HOSTFILE_VARIABLE = "DLTS_HOSTFILE"
USUAL_HOSTFILE = Path("/job/hostfile")
# Two ranks show that parallel training works; more share the cores of a small machine badly.
USUAL_CPU_RANKS = 2


@dataclass(frozen=True)
class Placement:
    """The ranks of this machine: rank i computes on devices[i]."""

    accelerator: Literal["cuda", "cpu"]
    devices: tuple[str, ...]


def place(config: Config, script: str, environment: Mapping[str, str]) -> Placement:
    """Decide the ranks of a run on this machine. Raises UserError for devices or hosts that are not there."""
    slots = host_slots(config, environment)
    gpus = visible_gpus(config, environment)
    ranks = config.launcher.num_gpus or slots
    if not gpus:
        # -1 is no GPU: a rank that is meant for the CPU must not see those that are there.
        return Placement("cpu", _filtered(config, ["-1"] * (ranks or _usual_cpu_ranks(config, script))))
    gpus = list(_filtered(config, gpus))
    if ranks is None:
        ranks = len(gpus) if script == "train.py" else config.parallelism.model_parallel_size
    if ranks > len(gpus):
        raise UserError(f"{ranks} ranks are asked for, but {len(gpus)} GPUs are visible; lower num_gpus")
    return Placement("cuda", tuple(gpus[:ranks]))


def planned_ranks(config: Config, script: str, environment: Mapping[str, str]) -> int:
    """Ranks for --dry-run and --print-config, which may plan for machines that are not this one."""
    keys = config.launcher
    if keys.num_gpus is not None:
        return keys.num_gpus * (keys.num_nodes or 1)
    here = config.model_copy(update={"launcher": keys.model_copy(update={"hostfile": None, "num_nodes": 1})})
    return len(place(here, script, environment).devices) * (keys.num_nodes or 1)


def visible_gpus(config: Config, environment: Mapping[str, str]) -> list[str]:
    """Indices (or UUIDs) of the GPUs that ranks may use; none where torch has no CUDA or gloo is asked for."""
    if environment.get("DS_ACCELERATOR") == "cpu" or config.launcher.distributed_backend == "gloo":
        return []
    if not _torch_has_cuda():
        return []
    named = environment.get("CUDA_VISIBLE_DEVICES")
    if named is not None:
        return [name.strip() for name in named.split(",") if name.strip() not in ("", "-1")]
    found = sorted(int(path.name[6:]) for path in Path("/dev").glob("nvidia[0-9]*") if path.name[6:].isdigit())
    return [str(index) for index in range(len(found))]


def cores() -> int:
    """CPU cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def host_slots(config: Config, environment: Mapping[str, str]) -> int | None:
    """Ranks that a hostfile gives this machine, or None without one. Several hosts are refused."""
    keys = config.launcher
    if keys.num_nodes is not None and keys.num_nodes > 1:
        raise UserError(f"num_nodes ({keys.num_nodes}): launcher {keys.launcher} starts ranks on this machine only")
    usual = environment.get(HOSTFILE_VARIABLE) or (str(USUAL_HOSTFILE) if USUAL_HOSTFILE.is_file() else None)
    path = keys.hostfile or usual
    if path is None or keys.num_nodes == 1:
        return None
    hosts = read_hostfile(Path(path))
    if len(hosts) > 1:
        raise UserError(
            f"{path} names {len(hosts)} hosts, but launcher {keys.launcher} starts ranks on this machine only; "
            "num_nodes=1 leaves the others out"
        )
    return next(iter(hosts.values()))


def read_hostfile(path: Path) -> dict[str, int]:
    """Hosts and their slots, from lines such as "node1 slots=8". Raises UserError."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise UserError(f"the hostfile {path} cannot be read: {error.strerror}") from error
    hosts: dict[str, int] = {}
    for number, line in enumerate(lines, 1):
        text = line.partition("#")[0].strip()
        match = re.fullmatch(r"(\S+)\s+slots=(\d+)", text)
        if text and (match is None or match[1] in hosts or int(match[2]) == 0):
            raise UserError(f'{path}:{number}: "{text}" must be a new host with its slots, such as "node1 slots=8"')
        if match is not None:
            hosts[match[1]] = int(match[2])
    if not hosts:
        raise UserError(f"the hostfile {path} names no host")
    return hosts


def _usual_cpu_ranks(config: Config, script: str) -> int:
    """Enough ranks for the layout; for training at least two where there are two cores."""
    split = config.parallelism.model_parallel_size
    if script != "train.py":
        return split
    unit = max(1, config.parallelism.pipe_parallel_size) * split
    return -(-min(USUAL_CPU_RANKS, cores()) // unit) * unit


def _filtered(config: Config, devices: Sequence[str]) -> tuple[str, ...]:
    """Apply include or exclude, written as "localhost:0,2"."""
    keys = config.launcher
    if keys.include is None and keys.exclude is None:
        return tuple(devices)
    name, text = ("include", keys.include) if keys.include is not None else ("exclude", keys.exclude or "")
    host, _, chosen = str(text).rpartition(":")
    if host not in ("", "localhost", os.uname().nodename) or not re.fullmatch(r"\d+(,\d+)*", chosen):
        raise UserError(f'{name} ("{text}") must list devices of this machine, such as "localhost:0,2"')
    indices = dict.fromkeys(int(index) for index in chosen.split(","))
    unknown = [index for index in indices if index >= len(devices)]
    if unknown:
        raise UserError(f'{name} ("{text}") names device {unknown[0]}, but there are {len(devices)}, counted from 0')
    left = list(indices) if name == "include" else [i for i in range(len(devices)) if i not in indices]
    if not left:
        raise UserError(f'exclude ("{text}") leaves no device')
    return tuple(devices[index] for index in left)


def _torch_has_cuda() -> bool:
    """Whether the installed torch was built for CUDA, read from its files: importing it takes seconds."""
    spec = find_spec("torch")
    if spec is None or spec.origin is None:
        return False
    version = Path(spec.origin).with_name("version.py").read_text(encoding="utf-8")
    match = re.search(r"^cuda\b.*?=\s*(.+)$", version, re.MULTILINE)
    return match is not None and match[1].strip() != "None"
