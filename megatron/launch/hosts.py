"""The hosts of a run and their slots: DeepSpeed's hostfile and its --include and --exclude.

    # comment
    node1 slots=8
    node2 slots=8

A slot runs one rank: it is a GPU by its index on the host, or a process on a host without GPUs.
"""

import re
from collections.abc import Mapping
from ipaddress import ip_address
from pathlib import Path

from megatron.config.schema.config import Config
from megatron.errors import UserError
from megatron.files import is_file
from megatron.text_files import read_text

HOSTFILE_VARIABLE = "DLTS_HOSTFILE"
USUAL_HOSTFILE = Path("/job/hostfile")
LOCALHOST = "localhost"
# More is a typing error: no machine has so many GPUs or cores.
MOST_RANKS_PER_NODE = 4096
MOST_PROBLEMS = 10  # lines of one hostfile that a message shows
_HOST_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_-]{0,62}(\.[A-Za-z0-9_][A-Za-z0-9_-]{0,62})*\.?")
_FILTER = re.compile(r"(?:\[(?P<address>[0-9A-Fa-f:.]+)\]|(?P<host>[^:\[\]]*))(?::(?P<slots>[0-9]+(,[0-9]+)*))?")

Slots = dict[str, tuple[int, ...]]  # the slots of each host, in the order of ranks


def hostfile_path(config: Config, environment: Mapping[str, str]) -> tuple[str, Path] | None:
    """The hostfile and the key or variable that names it: `hostfile`, DLTS_HOSTFILE, or /job/hostfile if it exists."""
    if config.launcher.hostfile:
        return "hostfile", Path(config.launcher.hostfile)
    if environment.get(HOSTFILE_VARIABLE):
        return HOSTFILE_VARIABLE, Path(environment[HOSTFILE_VARIABLE])
    return ("hostfile", USUAL_HOSTFILE) if is_file(USUAL_HOSTFILE) else None


def read_hosts(config: Config, environment: Mapping[str, str]) -> Slots | None:
    """The hosts and slots that the hostfile gives this run, or None without one. Raises UserError."""
    found = hostfile_path(config, environment)
    if found is None:
        return None
    name, path = found
    hosts = {host: tuple(range(slots)) for host, slots in read_hostfile(path, name).items()}
    hosts = limited(config, hosts, str(path))
    if len(hosts) > 1 and (loopback := next(filter(_is_loopback, hosts), None)) is not None:
        raise UserError(
            f'{path} names "{loopback}" alongside other hosts, for which it is another machine; use the machine\'s name'
        )
    return hosts


def spare_hosts(config: Config, environment: Mapping[str, str]) -> Slots:
    """The hosts of the hostfile beyond num_nodes, on which a restart may go on; none without max_restarts."""
    if config.launcher.max_restarts == 0 or config.launcher.num_nodes is None:
        return {}
    all_nodes = config.model_copy(update={"launcher": config.launcher.model_copy(update={"num_nodes": None})})
    hosts, chosen = read_hosts(all_nodes, environment) or {}, read_hosts(config, environment) or {}
    return {host: slots for host, slots in hosts.items() if host not in chosen}


def read_hostfile(path: Path, name: str = "hostfile") -> dict[str, int]:
    """Hosts and their slots, from lines such as "node1 slots=8".

    name: the key or variable that names the file, for messages. Raises UserError with a line for each wrong line.
    """
    hosts: dict[str, int] = {}
    lines_of: dict[str, int] = {}  # by name in lower case: the network does not distinguish them
    problems = []
    for number, line in enumerate(read_text(path, name).splitlines(), 1):
        text = line.partition("#")[0].strip()
        if not text:
            continue
        match = re.fullmatch(r"(\S+)\s+slots=([0-9]+)", text)
        if match is None:
            problems.append(f'{path}:{number}: "{text}" must be a host with its slots, such as "node1 slots=8"')
            continue
        host, digits = match[1], match[2].lstrip("0")
        first = lines_of.setdefault(host.lower(), number)
        if (problem := problem_with_host(host)) is not None:
            problems.append(f"{path}:{number}: {problem}")
        elif not digits or len(digits) > 9 or int(digits) > MOST_RANKS_PER_NODE:
            problems.append(f"{path}:{number}: slots ({match[2]}) must be from 1 to {MOST_RANKS_PER_NODE:,}")
        elif first != number:
            problems.append(f"{path}:{number}: {host} is in line {first} already; keep one of the lines")
        else:
            hosts[host] = int(digits)
    if problems:
        more = len(problems) - MOST_PROBLEMS
        raise UserError(*problems[:MOST_PROBLEMS], *([f"{path}: {more} more lines are wrong"] if more > 0 else []))
    if not hosts:
        raise UserError(f'{name} ({path}) names no host; write a line such as "node1 slots=8" for each')
    return hosts


def problem_with_host(name: str) -> str | None:
    """Why `name` cannot be given to ssh, pdsh or mpirun as a host, with the way out; None: it can.

    It must be a host name, an IPv4 or an IPv6 address: a word with "-" in front would be an option, and pdsh's forms
    (user@host, node[1-4]) do not name one host as the node knows it.
    """
    if (_HOST_NAME.fullmatch(name) and len(name) <= 253) or _is_address(name):
        return None
    if "@" in name:
        hint = "put the user into ~/.ssh/config and write the host alone"
    elif "[" in name:
        hint = "write one line for each host"
    elif re.fullmatch(r"[^:]+:[0-9]+", name):
        hint = "put the port of ssh into ~/.ssh/config and write the host alone"
    else:
        hint = 'it may have letters, digits, "-", "_" and ".", and not begin with "-"'
    return f'"{name}" is not a host name or address; {hint}'


def limited(config: Config, hosts: Slots, source: str) -> Slots:
    """Apply include, exclude, num_nodes and num_gpus to `hosts`. source: what names them. Raises UserError."""
    keys = config.launcher
    if keys.include is not None:
        hosts = _included(hosts, keys.include, source)
    if keys.exclude is not None:
        hosts = _excluded(hosts, keys.exclude, source)
    nodes = keys.num_nodes or len(hosts)
    if nodes > len(hosts):
        raise UserError(f"num_nodes ({nodes}) is more than the {len(hosts)} hosts of {source}; lower num_nodes")
    chosen = {host: hosts[host] for host in list(hosts)[:nodes]}
    few = [host for host, slots in chosen.items() if keys.num_gpus is not None and len(slots) < keys.num_gpus]
    if few:
        raise UserError(
            f"num_gpus ({keys.num_gpus}) is more than the {len(chosen[few[0]])} slots of {few[0]}; lower num_gpus"
        )
    return {host: slots[: keys.num_gpus] for host, slots in chosen.items()}


def parse_filter(name: str, text: str) -> dict[str, tuple[int, ...] | None]:
    """Hosts and slots from "node1@node2:0,2"; None stands for all slots of a host. Raises UserError.

    An IPv6 address with slots is in brackets: "[fe80::1]:0,2".
    """
    chosen: dict[str, tuple[int, ...] | None] = {}
    for part in (part.strip() for part in text.split("@")):
        host: str | None
        if re.fullmatch(r"[0-9]+(,[0-9]+)*", part):  # slots alone are those of this machine
            host, slots = LOCALHOST, part
        elif _is_address(part):
            host, slots = part, None
        elif (match := _FILTER.fullmatch(part)) is not None:
            slots = match["slots"]
            host = match["address"] or match["host"] or (LOCALHOST if slots else None)
        else:
            host = None
        if not host or host in chosen:
            raise UserError(f'{name} ("{text}") must be hosts with or without slots, such as "node1@node2:0,2"')
        chosen[host] = _slots(name, text, slots) if slots else None
    return chosen


def _slots(name: str, text: str, slots: str) -> tuple[int, ...]:
    absurd = next((slot for slot in slots.split(",") if len(slot.lstrip("0")) > 9), None)
    if absurd is not None:
        raise UserError(f'{name} ("{text}") names device {absurd}, more than any machine has')
    return tuple(dict.fromkeys(map(int, slots.split(","))))


def _is_address(name: str) -> bool:
    """Whether it is an IP address, without the zone that IPv6 may have: the zone could hold anything."""
    try:
        return "%" not in name and ip_address(name) is not None
    except ValueError:
        return False


def _is_loopback(host: str) -> bool:
    return host.lower().rstrip(".") == LOCALHOST or (_is_address(host) and ip_address(host).is_loopback)


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
