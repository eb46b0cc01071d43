"""Read YAML files and `key=value` overrides into a checked Config, and report every problem at once.

Files are flat dictionaries that are merged; a key may be in one of them only. A `key=value` replaces the value of the
files, and reaches into a nested group by dots: `optimizer.params.lr=1e-4`.
"""

import os
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from megatron import registry
from megatron.config.errors import ConfigError
from megatron.config.messages import validation_problem
from megatron.config.neox.answers import ANSWERS, DEEPSPEED_KEYS, VALUES
from megatron.config.neox.translate import answer_keys, answer_values, unpack_extra_args, walk
from megatron.config.rules.run_rules import broken_rules, notes_on_defaults
from megatron.config.schema.config import Config, fields_at, group_fields, group_of_key
from megatron.config.schema.key_group import NO_VALUE, Group
from megatron.config.yaml_file import MAX_DEPTH, Entries, Location, dotted, normal_key, parse_value, read_file, show
from megatron.errors import UserError
from megatron.files import exists, expanded, is_file, is_folder

DEFAULT_FOLDER = "configs"
DEFAULT_FILE = "default.yml"
SUFFIXES = (".yml", ".yaml", ".json")
WEIGHTS_SOURCE = "weights_source"  # kind in the registry
COMMAND_LINE = Location("command line")
OVERRIDE = re.compile(r"([A-Za-z_][\w.-]*)=(.*)", re.DOTALL)


def say(line: str) -> None:
    """Print a line about a key to stderr, on rank 0 only."""
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

    files: with or without extension; a folder stands for its default.yml; none: as `find_files` says.
    folder: prefix of the files. overrides: "key=value" in YAML syntax. script: that will run ("train.py"),
    whose required keys are then checked; planning: except data and checkpoint. tell: gets a line for each GPT-NeoX key
    that was translated or left out.
    Raises ConfigError with all problems.
    """
    paths, missing = find_files(files, folder, overrides)
    if missing:
        raise ConfigError("the command line", missing)
    parts = [read_file(path) for path in paths]
    merged = merge(parts)
    if any(part.problems and not part.values for part in parts):
        raise ConfigError("the files", merged.problems)  # the other problems cannot be known
    for override in overrides:
        override_key(merged, override)
    _add_keys_of_weights(merged)
    source = " + ".join([str(path) for path in paths] + (["the command line"] if overrides else []))
    config = build(merged, source, script, planning)
    for note in merged.notes:
        tell(note)
    return config


def config_from_flat(flat: Mapping[str, Any], source: str = "configuration", script: str | None = None) -> Config:
    """A checked Config from flat keys, as `Config.to_flat` gives them. Raises ConfigError."""
    return build(Entries(values={normal_key(key): _frozen(value) for key, value in flat.items()}), source, script)


def find_files(
    files: Sequence[str], folder: str | None = None, overrides: Sequence[str] = ()
) -> tuple[list[Path], list[str]]:
    """The paths that `files` mean, and a message for each that is missing or ambiguous.

    No files: the default.yml of `folder` or of configs, but nothing where `load=hf:MODEL` stands among the overrides.
    Such weights bring the settings of their model, which those of another one would contradict.
    """
    if not files and folder is None and any(_describes_its_model(word.removeprefix("load=")) for word in overrides):
        return [], []
    files = files or (["."] if folder is not None else [DEFAULT_FOLDER])
    paths: list[Path] = []
    problems: list[str] = []
    for name in files:
        try:
            paths.append(_find_file(name, folder))
        except UserError as error:
            problems += error.problems
    return paths, problems


def _find_file(name: str, folder: str | None) -> Path:
    path = Path(expanded(folder or "", "-d")) / expanded(name, "the configuration")
    with_suffix = [other for other in _with_suffixes(path) if is_file(other)]
    if is_folder(path) and with_suffix and not name.endswith("/"):
        raise UserError(
            f"{path} is a folder and {with_suffix[0]} a file; write {name}/ or {name}{with_suffix[0].suffix}"
        )
    path = path / DEFAULT_FILE if is_folder(path) else path
    if exists(path):  # pipes too
        return path
    found = [other for other in _with_suffixes(path) if is_file(other)]
    if not found:
        raise UserError(_no_such_file(path))
    return found[0]


def _with_suffixes(path: Path) -> list[Path]:
    """The files that a name without extension may mean."""
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
    """Check merged keys and build the Config. Raises ConfigError with all problems; `source` names the files."""
    unpack_extra_args(entries, DEEPSPEED_KEYS)
    answer_keys(entries, ANSWERS)
    _unset_none(entries)
    try:
        plugins = entries.values.get("plugins", ())
        registry.load_plugins([name for name in plugins if isinstance(name, str)] if isinstance(plugins, tuple) else [])
    except UserError as error:
        entries.problems.append(entries.prefix(("plugins",)) + str(error))
    known_names = {name for names in registry.TABLE.values() for name in names}  # names of plugins are honoured
    answer_values(entries, {key: answer for key, answer in VALUES.items() if key[1] not in known_names})
    problems = list(entries.problems)
    known = group_of_key()
    unknown = [key for key in entries.values if key not in known and key != "plugins"]
    problems += [entries.prefix((key,)) + _unknown_key(key, [*known, "plugins"]) for key in unknown]
    config, wrong = _build_groups(entries, problems)
    problems += broken_rules(config, wrong, script, planning)
    if problems:
        raise ConfigError(source, problems)
    entries.notes += notes_on_defaults(config)
    return config


def _build_groups(entries: Entries, problems: list[str]) -> tuple[Config, set[str]]:
    """The Config, and the keys with invalid values, whose problems are appended."""
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
        # A required key is missing: rules that read it are skipped, the others are checked.
        return kind.model_construct(**usable), wrong


def _unset_none(entries: Entries) -> None:
    """Unset optional keys whose value is the text "None", which other programs write for null."""
    for path, value in list(walk(entries.values)):
        field = fields_at(path[:-1]).get(str(path[-1]))
        if not isinstance(value, str) or value.lower() not in NO_VALUE or field is None or field.default is not None:
            continue
        here: Any = entries.values
        for part in path[:-1]:
            here = here[part]
        here[path[-1]] = None
        entries.notes.append(f"{entries.prefix(path)}{dotted(path)} ({show(value)}) is taken as unset (null)")


def _add_keys_of_weights(entries: Entries) -> None:
    """Where `load` names weights that describe their model (`hf:gpt2`): the keys of the model that are not set."""
    load = str(entries.values.get("load"))
    if not _describes_its_model(load):
        return
    kind, _, model = load.partition(":")
    try:
        keys = registry.resolve(WEIGHTS_SOURCE, kind)(expanded(model, "load"))
    except UserError as error:
        entries.problems += [entries.prefix(("load",)) + problem for problem in error.problems]
        return
    entries.values |= {key: _frozen(value) for key, value in keys.items() if key not in entries.values}


def _describes_its_model(load: str) -> bool:
    """Whether `load` names weights that come with the settings of their model, such as hf:gpt2."""
    kind, _, model = load.partition(":")
    return kind in registry.names(WEIGHTS_SOURCE) and bool(model)


def override_key(entries: Entries, text: str) -> None:
    """Replace the value in the files by that of "key=value"."""
    match = OVERRIDE.fullmatch(text)
    if match is None:
        entries.problems.append(f"{COMMAND_LINE}: {show(text)} is not of the form key=value")
        return
    path = tuple(normal_key(match[1]).split("."))
    if len(path) > MAX_DEPTH:
        entries.problems.append(f"{COMMAND_LINE}: unknown key {show(match[1])}")
        return
    try:
        value = parse_value(match[2])
    except ValueError as error:
        entries.problems.append(f"{COMMAND_LINE}: the value in {show(text)} is not YAML: {error}")
        return
    here = entries.values
    for depth, part in enumerate(path[:-1], 1):
        group = {} if here.get(part) is None else here[part]
        if not isinstance(group, dict):
            where = entries.prefix(path[:depth])
            entries.problems.append(f"{where}{dotted(path[:depth])} ({show(group)}) is not a group with {path[depth]}")
            return
        here[part] = dict(group)
        here = here[part]
    here[path[-1]] = value
    for old in [old for old in entries.locations if old[: len(path)] == path]:
        del entries.locations[old]
    entries.locations[path] = COMMAND_LINE


def _frozen(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {normal_key(str(key)): _frozen(part) for key, part in value.items()}
    return tuple(_frozen(part) for part in value) if isinstance(value, list | tuple) else value


def _unknown_key(key: str, known: Sequence[str]) -> str:
    near = registry.nearest(key, known)
    return f'unknown key "{key}"' + (f'. Did you mean "{near}"?' if near else "")


def _no_such_file(path: Path) -> str:
    if not is_folder(path.parent):
        return f"there is no folder {path.parent} (for {path.name})"
    present: list[str] = []
    with suppress(OSError):  # a folder that may not be listed
        present = [other.name for other in path.parent.iterdir() if other.suffix in SUFFIXES]
    near = registry.nearest(path.name, [*present, *(Path(name).stem for name in present)])
    return f"there is no file {path}" + (f". Did you mean {path.with_name(near)}?" if near else "")
