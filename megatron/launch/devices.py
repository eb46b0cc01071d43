"""How many ranks this machine runs and on which devices, determined without torch.

On a machine without a usable GPU a "device" is a process: `num_gpus` counts processes there.
"""

import os
from collections.abc import Mapping

from megatron.config.schema.config import Config
from megatron.errors import UserError
from megatron.launch.accelerators import cores, visible_gpus
from megatron.launch.hosts import LOCALHOST, MOST_RANKS_PER_NODE, hostfile_path, limited, read_hostfile

# Two ranks show that parallel training works; more would compete for the cores of a small machine.
USUAL_CPU_RANKS = 2


def local_slots(config: Config, script: str, environment: Mapping[str, str]) -> tuple[int, ...]:
    """The slots of a run on this machine. Raises UserError for devices or hosts that do not exist."""
    keys = config.launcher
    of_hostfile = _slots_of_hostfile(config, environment)
    asked = keys.num_gpus or of_hostfile
    gpus = visible_gpus(environment, keys.distributed_backend)
    count = len(gpus) or asked or _usual_cpu_ranks(config, script)
    if count > MOST_RANKS_PER_NODE:
        cause = f"num_gpus ({count})" if asked else f"the layout needs {count} ranks, which"
        raise UserError(f"{cause} is more than the {MOST_RANKS_PER_NODE:,} ranks that a machine can run")
    slots = tuple(range(count))
    if keys.include is not None or keys.exclude is not None:
        slots = _filtered(config, slots)
    if not gpus:
        return slots
    ranks = asked or (len(slots) if script == "train.py" else config.parallelism.model_parallel_size)
    if ranks > len(slots):
        raise UserError(f"{ranks} ranks are asked for, but {len(slots)} GPUs are visible; lower num_gpus")
    return slots[:ranks]


def _slots_of_hostfile(config: Config, environment: Mapping[str, str]) -> int | None:
    """The number of slots that a hostfile of one host gives, or None without one. Raises UserError for several."""
    keys = config.launcher
    if keys.num_nodes is not None and keys.num_nodes > 1:
        raise UserError(
            f"num_nodes ({keys.num_nodes}): launcher local starts ranks on this machine only; "
            "launcher pdsh with a hostfile, openmpi or slurm start them on several"
        )
    found = hostfile_path(config, environment)
    if found is None or keys.num_nodes == 1:
        return None
    name, path = found
    hosts = read_hostfile(path, name)
    if len(hosts) > 1:
        raise UserError(
            f"{path} names {len(hosts)} hosts, but launcher local starts ranks on this machine only; "
            "launcher pdsh starts them on all hosts, num_nodes=1 runs on this machine alone"
        )
    return next(iter(hosts.values()))


def _usual_cpu_ranks(config: Config, script: str) -> int:
    """As many ranks as the layout needs; for training at least two where there are two cores."""
    split = config.parallelism.model_parallel_size
    if script != "train.py":
        return split
    unit = max(1, config.parallelism.pipe_parallel_size) * split
    return -(-min(USUAL_CPU_RANKS, cores()) // unit) * unit


def _filtered(config: Config, slots: tuple[int, ...]) -> tuple[int, ...]:
    """Apply include or exclude, which may name this machine "localhost" or by its host name."""
    keys = config.launcher
    written = keys.include if keys.include is not None else keys.exclude or ""
    name = os.uname().nodename
    hosts = {name if written.partition(":")[0] == name else LOCALHOST: slots}
    alone = config.model_copy(update={"launcher": keys.model_copy(update={"num_nodes": None, "num_gpus": None})})
    return next(iter(limited(alone, hosts, "this machine").values()))
