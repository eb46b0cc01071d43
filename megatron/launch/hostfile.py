"""The hosts of a run and their slots: DeepSpeed's hostfile and its --include and --exclude.

    # comment
    node1 slots=8
    node2 slots=8

A slot is the place of one rank: a GPU by its index on the host, or a process where there is none.
"""

import re
from collections.abc import Mapping
from pathlib import Path

from megatron.config.schema.config import Config
from megatron.errors import UserError

HOSTFILE_VARIABLE = "DLTS_HOSTFILE"
USUAL_HOSTFILE = Path("/job/hostfile")
LOCALHOST = "localhost"

Slots = dict[str, tuple[int, ...]]  # of each host, in the order of ranks


def hostfile_path(config: Config, environment: Mapping[str, str]) -> Path | None:
    """The hostfile that the configuration, DLTS_HOSTFILE or custom (/job/hostfile) gives; None: there is none."""
    usual = environment.get(HOSTFILE_VARIABLE) or (str(USUAL_HOSTFILE) if USUAL_HOSTFILE.is_file() else None)
    path = config.launcher.hostfile or usual
    return None if path is None else Path(path)


def read_hosts(config: Config, environment: Mapping[str, str]) -> Slots | None:
    """The hosts that the hostfile gives this run, or None without one. Raises UserError."""
    path = hostfile_path(config, environment)
    if path is None:
        return None
    return limited(config, {host: tuple(range(slots)) for host, slots in read_hostfile(path).items()}, str(path))


def read_hostfile(path: Path) -> dict[str, int]:
    """Hosts and their slots, from lines such as "node1 slots=8". Raises UserError."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise UserError(f"the hostfile {path} cannot be read: {error.strerror}") from error
    hosts: dict[str, int] = {}
    problems = []
    for number, line in enumerate(lines, 1):
        text = line.partition("#")[0].strip()
        match = re.fullmatch(r"(\S+)\s+slots=(\d+)", text)
        if text and (match is None or match[1] in hosts or int(match[2]) == 0):
            problems.append(f'{path}:{number}: "{text}" must be a new host with its slots, such as "node1 slots=8"')
        elif match is not None:
            hosts[match[1]] = int(match[2])
    if problems:
        raise UserError(*problems)
    if not hosts:
        raise UserError(f"the hostfile {path} names no host")
    return hosts


def limited(config: Config, hosts: Slots, source: str) -> Slots:
    """What include, exclude, num_nodes and num_gpus leave of `hosts`. source: what names them. Raises UserError."""
    keys = config.launcher
    if keys.include is not None:
        hosts = _included(hosts, keys.include, source)
    if keys.exclude is not None:
        hosts = _excluded(hosts, keys.exclude, source)
    nodes = keys.num_nodes or len(hosts)
    if nodes > len(hosts):
        raise UserError(f"num_nodes ({nodes}) is more than the {len(hosts)} hosts of {source}; lower num_nodes")
    few = [host for host, slots in hosts.items() if keys.num_gpus is not None and len(slots) < keys.num_gpus]
    if few:
        raise UserError(f"num_gpus ({keys.num_gpus}) is more than the {len(hosts[few[0]])} slots of {few[0]}")
    return {host: hosts[host][: keys.num_gpus] for host in list(hosts)[:nodes]}


def parse_filter(name: str, text: str) -> dict[str, tuple[int, ...] | None]:
    """Hosts and slots from "node1@node2:0,2"; None stands for all slots of a host. Raises UserError."""
    chosen: dict[str, tuple[int, ...] | None] = {}
    for part in text.split("@"):
        host, colon, slots = part.strip().partition(":")
        # A list without a host is one of this machine.
        if not colon and re.fullmatch(r"\d+(,\d+)*", host):
            host, colon, slots = LOCALHOST, ":", host
        if not host and colon:
            host = LOCALHOST
        if not host or host in chosen or (colon and not re.fullmatch(r"\d+(,\d+)*", slots)):
            raise UserError(f'{name} ("{text}") must be hosts with or without slots, such as "node1@node2:0,2"')
        chosen[host] = tuple(dict.fromkeys(int(slot) for slot in slots.split(","))) if colon else None
    return chosen


def _included(hosts: Slots, text: str, source: str) -> Slots:
    chosen = _checked("include", text, hosts, source)
    return {host: slots if slots is not None else hosts[host] for host, slots in chosen.items()}


def _excluded(hosts: Slots, text: str, source: str) -> Slots:
    chosen = _checked("exclude", text, hosts, source)
    left = {
        host: tuple(slot for slot in slots if slot not in (chosen[host] or slots)) if host in chosen else slots
        for host, slots in hosts.items()
    }
    left = {host: slots for host, slots in left.items() if slots}
    if not left:
        raise UserError(f'exclude ("{text}") leaves no device')
    return left


def _checked(name: str, text: str, hosts: Slots, source: str) -> dict[str, tuple[int, ...] | None]:
    chosen = parse_filter(name, text)
    for host, slots in chosen.items():
        if host not in hosts:
            raise UserError(f'{name} ("{text}") names {host}, but {source} has {", ".join(hosts)}')
        unknown = [slot for slot in slots or () if slot not in hosts[host]]
        if unknown:
            there = len(hosts[host])
            raise UserError(f'{name} ("{text}") names device {unknown[0]}, but there are {there}, counted from 0')
    return chosen
