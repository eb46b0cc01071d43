"""From YAML files and `key=value` to a checked Config, with every problem named at once.

Files are flat dictionaries that are put together; a key may stand in one of them only. A `key=value` replaces
what the files say, and reaches into a nested group by dots: `optimizer.params.lr=1e-4`.
"""

import os
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from megatron import registry
from megatron.config.messages import validation_problem
from megatron.config.neox.answers import ANSWERS, VALUES
from megatron.config.neox.translate import answer_keys, answer_values
from megatron.config.rules.run_rules import broken_rules, notes_on_defaults
from megatron.config.schema.config import Config, group_fields, group_of_key
from megatron.config.schema.key_group import Group
from megatron.config.yaml_file import Entries, Location, normal_key, parse_value, read_file
from megatron.errors import UserError

DEFAULT_FOLDER = "configs"
DEFAULT_FILE = "default.yml"
SUFFIXES = (".yml", ".yaml", ".json")
COMMAND_LINE = Location("command line")
OVERRIDE = re.compile(r"([A-Za-z_][\w.-]*)=(.*)", re.DOTALL)


class ConfigError(UserError):
    """The configuration is wrong; `problems` has one message for each thing to mend."""

    def __init__(self, source: str, problems: Sequence[str]) -> None:
        count = "1 problem" if len(problems) == 1 else f"{len(problems)} problems"
        super().__init__(f"{count} in {source}:", *(f"  {problem}" for problem in problems))
        self.problems = tuple(problems)


def say(line: str) -> None:
    """Tell the user, once for all ranks, what became of a key."""
    if os.environ.get("RANK", "0") == "0":
        print(line, file=sys.stderr, flush=True)


def load_config(
    files: Sequence[str],
    folder: str | None = None,
    overrides: Sequence[str] = (),
    script: str | None = None,
    *,
    planning: bool = False,
    tell: Callable[[str], None] = say,
) -> Config:
    """Read, merge and check a configuration.

    files: with or without extension; a directory stands for its default.yml; none: configs/default.yml.
    folder: prefix of the files. overrides: "key=value" in YAML syntax. script: the name of the door that will run
    ("train.py"), whose needs are then checked as well; planning: all but data and checkpoint.
    tell: gets a line for each key of GPT-NeoX that was translated or left out.
    Raises ConfigError with all problems.
    """
    paths, missing = find_files(files, folder)
    if missing:
        raise ConfigError("the command line", missing)
    parts = [read_file(path) for path in paths]
    merged = merge(parts)
    if any(part.problems and not part.values for part in parts):
        raise ConfigError("the files", merged.problems)  # what else is wrong cannot be known
    for override in overrides:
        _override(merged, override)
    source = " + ".join([str(path) for path in paths] + (["the command line"] if overrides else []))
    config = build(merged, source, script, planning)
    for note in merged.notes:
        tell(note)
    return config


def config_from_flat(flat: Mapping[str, Any], source: str = "configuration", script: str | None = None) -> Config:
    """A checked Config from flat keys, as `Config.to_flat` gives them. Raises ConfigError."""
    return build(Entries(values={normal_key(key): _frozen(value) for key, value in flat.items()}), source, script)


def find_files(files: Sequence[str], folder: str | None = None) -> tuple[list[Path], list[str]]:
    """The paths that `files` mean, and a message for each that is not there or may mean two things."""
    if not files:
        files = ["."] if folder is not None else [DEFAULT_FOLDER]
    paths, missing = [], []
    for name in files:
        path = Path(folder or "") / name
        beside = [other for other in _with_suffixes(path) if other.is_file()]
        if path.is_dir() and beside and not name.endswith("/"):
            missing.append(f"{path} is a folder and {beside[0]} a file; write {name}/ or {name}{beside[0].suffix}")
            continue
        path = path / DEFAULT_FILE if path.is_dir() else path
        found = next((candidate for candidate in (path, *_with_suffixes(path)) if candidate.is_file()), None)
        if found is None:
            missing.append(_no_such_file(path))
        else:
            paths.append(found)
    return paths, missing


def _with_suffixes(path: Path) -> list[Path]:
    """What a name without its extension may mean."""
    return [path.with_name(path.name + suffix) for suffix in SUFFIXES] if path.name else []


def merge(parts: Sequence[Entries]) -> Entries:
    """One set of keys from several files; a key that stands in two of them is a problem."""
    merged = Entries()
    for part in parts:
        merged.problems += part.problems
        merged.notes += part.notes
        for key, value in part.values.items():
            if key in merged.values:
                here, there = part.locations[(key,)], merged.locations[(key,)]
                merged.problems.append(f'{here}: "{key}" is in {there} already; keep it in one file')
                continue
            merged.values[key] = value
            merged.locations |= {path: where for path, where in part.locations.items() if path[0] == key}
    return merged


def build(entries: Entries, source: str, script: str | None = None, planning: bool = False) -> Config:
    """Check merged keys and build the Config. Raises ConfigError with all problems, `source` naming the files."""
    answer_keys(entries, ANSWERS)
    try:
        plugins = entries.values.get("plugins", ())
        registry.load_plugins([name for name in plugins if isinstance(name, str)] if isinstance(plugins, tuple) else [])
    except UserError as error:
        entries.problems.append(_at(entries, "plugins") + str(error))
    known_names = {name for names in registry.TABLE.values() for name in names}  # what a plugin brings is honoured
    answer_values(entries, {key: answer for key, answer in VALUES.items() if key[1] not in known_names})
    problems = list(entries.problems)
    known = group_of_key()
    unknown = [key for key in entries.values if key not in known and key != "plugins"]
    problems += [_at(entries, key) + _unknown_key(key, [*known, "plugins"]) for key in unknown]
    config, wrong = _build_groups(entries, problems)
    problems += broken_rules(config, wrong, script, planning)
    if problems:
        raise ConfigError(source, problems)
    entries.notes += notes_on_defaults(config)
    return config


def _build_groups(entries: Entries, problems: list[str]) -> tuple[Config, set[str]]:
    """The Config, and the keys whose values could not be used (their problems are appended)."""
    known, wrong = group_of_key(), set()
    groups: dict[str, Any] = {}
    for name, kind in group_fields().items():
        values = {key: value for key, value in entries.values.items() if known.get(key) == name}
        groups[name], bad = _build_group(kind, values, entries, problems)
        wrong |= bad
    written = {"plugins": entries.values["plugins"]} if "plugins" in entries.values else {}
    try:
        return Config(**groups, **written), wrong
    except ValidationError as error:
        problems += [validation_problem(detail, entries) for detail in error.errors()]
        return Config(**groups), wrong | {"plugins"}


def _build_group(
    kind: type[Group], values: dict[str, Any], entries: Entries, problems: list[str]
) -> tuple[Group, set[str]]:
    try:
        return kind.model_validate(values), set()
    except ValidationError as error:
        details = error.errors()
    problems += list(dict.fromkeys(validation_problem(detail, entries) for detail in details))
    wrong = {str(detail["loc"][0]) for detail in details}
    usable = {key: value for key, value in values.items() if key not in wrong}
    try:
        return kind.model_validate(usable), wrong
    except ValidationError:
        # A required key is missing: rules that read it are left out, the others still see the rest.
        return kind.model_construct(**usable), wrong


def _override(entries: Entries, text: str) -> None:
    """Put the value of "key=value" in place of what the files say."""
    match = OVERRIDE.fullmatch(text)
    if match is None:
        entries.problems.append(f'{COMMAND_LINE}: "{text}" is not of the form key=value')
        return
    path = tuple(normal_key(match[1]).split("."))
    try:
        value = parse_value(match[2])
    except ValueError as error:
        entries.problems.append(f'{COMMAND_LINE}: the value in "{text}" is not YAML: {error}')
        return
    here = entries.values
    for part in path[:-1]:
        here[part] = dict(here[part]) if isinstance(here.get(part), dict) else {}
        here = here[part]
    here[path[-1]] = value
    for old in [old for old in entries.locations if old[: len(path)] == path]:
        del entries.locations[old]
    entries.locations[path] = COMMAND_LINE


def _frozen(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {normal_key(str(key)): _frozen(part) for key, part in value.items()}
    return tuple(_frozen(part) for part in value) if isinstance(value, list | tuple) else value


def _at(entries: Entries, key: str) -> str:
    location = entries.location((key,))
    return f"{location}: " if location else ""


def _unknown_key(key: str, known: Sequence[str]) -> str:
    near = registry.nearest(key, known)
    return f'unknown key "{key}"' + (f'. Did you mean "{near}"?' if near else "")


def _no_such_file(path: Path) -> str:
    if not path.parent.is_dir():
        return f"there is no folder {path.parent} (for {path.name})"
    present = [other.name for other in path.parent.iterdir() if other.suffix in SUFFIXES]
    near = registry.nearest(path.name, [*present, *(Path(name).stem for name in present)])
    return f"there is no file {path}" + (f". Did you mean {path.with_name(near)}?" if near else "")
