"""How many ranks this machine gets and on which devices, found out without torch.

On a machine without a usable GPU a "device" is a process: `num_gpus` counts processes there.
"""

import os
from collections.abc import Mapping

from megatron.config.schema.config import Config
from megatron.errors import UserError
from megatron.launch.accelerators import cores, visible_gpus
from megatron.launch.hostfile import LOCALHOST, hostfile_path, limited, read_hostfile

# Two ranks show that parallel training works; more share the cores of a small machine badly.
USUAL_CPU_RANKS = 2


def local_slots(config: Config, script: str, environment: Mapping[str, str]) -> tuple[int, ...]:
    """The slots of a run on this machine. Raises UserError for devices or hosts that are not there."""
    keys = config.launcher
    of_hostfile = _slots_of_hostfile(config, environment)
    asked = keys.num_gpus or of_hostfile
    gpus = visible_gpus(environment, keys.distributed_backend)
    slots = tuple(range(len(gpus) or asked or _usual_cpu_ranks(config, script)))
    if keys.include is not None or keys.exclude is not None:
        slots = _filtered(config, slots)
    if not gpus:
        return slots
    ranks = asked or (len(slots) if script == "train.py" else config.parallelism.model_parallel_size)
    if ranks > len(slots):
        raise UserError(f"{ranks} ranks are asked for, but {len(slots)} GPUs are visible; lower num_gpus")
    return slots[:ranks]


def planned_ranks(config: Config, script: str, environment: Mapping[str, str]) -> int:
    """Ranks for --dry-run and --print-config, which may plan for machines that are not this one."""
    keys = config.launcher
    if keys.num_gpus is not None:
        return keys.num_gpus * (keys.num_nodes or 1)
    alone = {"hostfile": None, "num_nodes": 1, "include": None, "exclude": None}
    here = config.model_copy(update={"launcher": keys.model_copy(update=alone)})
    return len(local_slots(here, script, environment)) * (keys.num_nodes or 1)


def _slots_of_hostfile(config: Config, environment: Mapping[str, str]) -> int | None:
    """Ranks that a hostfile gives this machine, or None without one. Several hosts are refused."""
    keys = config.launcher
    if keys.num_nodes is not None and keys.num_nodes > 1:
        raise UserError(
            f"num_nodes ({keys.num_nodes}): launcher local starts ranks on this machine only; "
            "launcher pdsh with a hostfile, openmpi or slurm start them on several"
        )
    path = hostfile_path(config, environment)
    if path is None or keys.num_nodes == 1:
        return None
    hosts = read_hostfile(path)
    if len(hosts) > 1:
        raise UserError(
            f"{path} names {len(hosts)} hosts, but launcher local starts ranks on this machine only; "
            "launcher pdsh starts them on all, num_nodes=1 leaves the others out"
        )
    return next(iter(hosts.values()))


def _usual_cpu_ranks(config: Config, script: str) -> int:
    """Enough ranks for the layout; for training at least two where there are two cores."""
    split = config.parallelism.model_parallel_size
    if script != "train.py":
        return split
    unit = max(1, config.parallelism.pipe_parallel_size) * split
    return -(-min(USUAL_CPU_RANKS, cores()) // unit) * unit


def _filtered(config: Config, slots: tuple[int, ...]) -> tuple[int, ...]:
    """Apply include or exclude, which may call this machine "localhost" or by its name."""
    keys = config.launcher
    written = keys.include if keys.include is not None else keys.exclude or ""
    name = os.uname().nodename
    hosts = {name if written.partition(":")[0] == name else LOCALHOST: slots}
    alone = config.model_copy(update={"launcher": keys.model_copy(update={"num_nodes": None, "num_gpus": None})})
    return next(iter(limited(alone, hosts, "this machine").values()))
