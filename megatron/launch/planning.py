"""How many ranks a run would have, and the plan for a number of ranks.

The former is for --dry-run and --print-config, which may plan for other machines.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from megatron.config.plan import Plan
from megatron.config.resolve import resolve
from megatron.config.schema.config import Config
from megatron.errors import UserError
from megatron.files import is_file
from megatron.launch.devices import local_slots
from megatron.launch.hosts import hostfile_path, read_hosts
from megatron.launch.launchers.launcher import in_batch_script
from megatron.launch.launchers.slurm import allocated_slots, in_allocation


@dataclass(frozen=True)
class PlannedRanks:
    """The world size of a plan. notes: where it comes from, for the part of a dry run that is not checked."""

    ranks: int
    notes: tuple[str, ...] = ()


def planned_ranks(config: Config, script: str, environment: Mapping[str, str]) -> PlannedRanks:
    """The ranks of the hostfile or of the Slurm allocation; without both, num_nodes times those of this machine.

    Programs and hosts need not exist here. num_gpus and num_nodes together stand in for a hostfile that is on another
    machine. Raises UserError where a run would be refused.
    """
    keys = config.launcher
    found = hostfile_path(config, environment) if keys.launcher != "slurm" else None
    if found is not None and (is_file(found[1]) or keys.num_gpus is None or keys.num_nodes is None):
        return _of_hostfile(config, environment)
    if found is not None:
        note = f"hosts: {found[0]} ({found[1]}) is not here; num_nodes and num_gpus are planned for"
        return PlannedRanks(_product(config), (note,))
    usual = keys.launcher is None and keys.num_nodes != 1 and in_batch_script(environment)
    if usual or (keys.launcher == "slurm" and in_allocation(environment)):
        slots = allocated_slots(config, script, environment)
        return PlannedRanks(sum(map(len, slots)), (f"ranks: {len(slots)} nodes of this Slurm allocation",))
    if keys.num_gpus is not None:
        return PlannedRanks(_product(config))
    alone = {"num_nodes": 1, "include": None, "exclude": None}
    here = config.model_copy(update={"launcher": keys.model_copy(update=alone)})
    ranks = len(local_slots(here, script, environment)) * (keys.num_nodes or 1)
    return PlannedRanks(ranks, (f"ranks: {ranks} is what this machine would start; num_gpus=N plans for another",))


def plan_of_ranks(config: Config, script: str, ranks: int) -> Plan:
    """The plan for a number of ranks, without the tokenizer, which only they open.

    Raises UserError for a layout that does not fit them.
    """
    keys = config.model
    # This vocabulary can be split in any case.
    divisible = keys.make_vocab_size_divisible_by * config.parallelism.model_parallel_size
    vocabulary = keys.vocab_size or keys.padded_vocab_size or divisible
    return resolve(config, ranks, vocabulary, inference=is_inference(script))


def is_inference(script: str) -> bool:
    """Whether a script computes with a model without training it."""
    return script in ("generate.py", "evaluate.py", "serve.py")


def _of_hostfile(config: Config, environment: Mapping[str, str]) -> PlannedRanks:
    try:
        hosts = read_hosts(config, environment) or {}
    except UserError as error:
        name, path = hostfile_path(config, environment) or ("", "")
        if is_file(path):
            raise
        raise UserError(f"{error}; to plan without it give both num_nodes and num_gpus, or unset {name}") from error
    names = list(hosts) if len(hosts) <= 4 else [*list(hosts)[:3], f"{len(hosts) - 3} more"]
    return PlannedRanks(sum(map(len, hosts.values())), (f"hosts: {', '.join(names)}",))


def _product(config: Config) -> int:
    return (config.launcher.num_gpus or 1) * (config.launcher.num_nodes or 1)
