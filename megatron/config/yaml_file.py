"""One YAML or JSON file as plain values that know where they were written.

YAML 1.2, so `1e-4` is a number and `on` is text. Lists become tuples, since a configuration never changes.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML, MappingNode, Node, SequenceNode
from ruamel.yaml.error import MarkedYAMLError, YAMLError

KeyPath = tuple[str | int, ...]


@dataclass(frozen=True)
class Location:
    """Where a key was written; `line` counts from 1."""

    source: str
    line: int | None = None

    def __str__(self) -> str:
        return self.source if self.line is None else f"{self.source}:{self.line}"


@dataclass
class Entries:
    """Flat keys with their values, where each of them (and of their parts) stands, what was wrong, and what to say."""

    values: dict[str, Any] = field(default_factory=dict)
    locations: dict[KeyPath, Location] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def location(self, path: KeyPath) -> Location | None:
        """Where `path` was written, or the nearest part above it."""
        while path and path not in self.locations:
            path = path[:-1]
        return self.locations.get(path)


def read_file(path: Path) -> Entries:
    """Read a file of flat keys. Problems are collected, not raised; an unreadable file has no values."""
    source = str(path)
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        return Entries(problems=[f"{source}: cannot be read: {error}"])
    # Indented JSON may use tabs, which YAML forbids; inside a JSON string a tab is always written as \\t.
    return parse(text.replace("\t", " ") if path.suffix == ".json" else text, source)


def parse(text: str, source: str) -> Entries:
    """Flat keys from the text of a file; `source` names it in messages."""
    yaml = YAML(typ="safe", pure=True)
    try:
        root = yaml.compose(text)
        reader = _Reader(yaml, source)
        values = {} if root is None else reader.plain(root, ())
    except MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        location = Location(source, mark.line + 1 if mark else None)
        return Entries(problems=[f"{location}: this is not YAML: {error.problem or error.context}"])
    except (YAMLError, ValueError) as error:
        return Entries(problems=[f"{source}: this is not YAML: {error}"])
    if not isinstance(values, dict):
        return Entries(problems=[f"{source}: a configuration is a set of keys with values, not {show(values)}"])
    return Entries(values, reader.locations, reader.problems)


def parse_value(text: str) -> Any:
    """The value of `key=value`, in YAML syntax. Raises ValueError with the reason."""
    entries = parse(f"value: {text}", "")
    if entries.problems or set(entries.values) != {"value"}:
        entries = parse(f"value:\n  {text}", "")
    if entries.problems:
        raise ValueError(entries.problems[0].partition("YAML: ")[2] or entries.problems[0])
    return entries.values["value"]


class _Reader:
    """Turns the nodes of one file into plain values."""

    def __init__(self, yaml: YAML, source: str) -> None:
        self.locations: dict[KeyPath, Location] = {}
        self.problems: list[str] = []
        self._yaml = yaml
        self._source = source

    def plain(self, node: Node, path: KeyPath) -> Any:
        """Dictionaries, tuples and scalars of `node`, which stands at `path`."""
        if isinstance(node, MappingNode):
            return dict(self._items(node, path))
        if isinstance(node, SequenceNode):
            return tuple(self._item(child, (*path, index)) for index, child in enumerate(node.value))
        return self._yaml.constructor.construct_object(node)

    def _item(self, node: Node, path: KeyPath) -> Any:
        self.locations[path] = Location(self._source, node.start_mark.line + 1)
        return self.plain(node, path)

    def _items(self, node: MappingNode, path: KeyPath) -> Iterator[tuple[str, Any]]:
        for key_node, value_node in node.value:
            key = normal_key(str(self.plain(key_node, path)))
            here = Location(self._source, key_node.start_mark.line + 1)
            first = self.locations.get((*path, key))
            if first is not None:
                self.problems.append(f'{here}: "{dotted((*path, key))}" is there already, in line {first.line}')
                continue
            self.locations[(*path, key)] = here
            yield key, self.plain(value_node, (*path, key))


def normal_key(key: str) -> str:
    """A key with `_` for `-`, which mean the same."""
    return key.replace("-", "_")


def dotted(path: KeyPath) -> str:
    """`optimizer.params.betas[1]` for ("optimizer", "params", "betas", 1)."""
    text = ""
    for part in path:
        text += f"[{part}]" if isinstance(part, int) else f".{part}" if text else part
    return text


def show(value: object) -> str:
    """A value as a message shows it: text in quotation marks, long things by their kind."""
    if isinstance(value, bool) or value is None:
        return {True: "true", False: "false", None: "null"}[value]
    if isinstance(value, str):
        return f'"{value}"'
    if isinstance(value, tuple):
        return f"a list of {len(value)}"
    return "a group of keys" if isinstance(value, dict) else str(value)
