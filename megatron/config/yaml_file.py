"""Read one YAML or JSON file into plain values, with the line of each.

YAML 1.2, so `1e-4` is a number and `on` is text, with the merge keys (`<<`) of YAML 1.1. Dates stay text. Lists become
tuples, since a configuration never changes.
"""

import json
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from io import StringIO
from pathlib import Path
from typing import Any, NoReturn

from ruamel.yaml import YAML, MappingNode, Node, ScalarNode, SequenceNode
from ruamel.yaml.error import MarkedYAMLError, YAMLError
from ruamel.yaml.reader import ReaderError
from ruamel.yaml.tokens import AnchorToken

from megatron.errors import UserError
from megatron.text_files import decode_text

KeyPath = tuple[str | int, ...]

MAX_DEPTH = 50  # groups and lists inside each other
MAX_REPEATS = 100_000  # values that aliases repeat; a few lines of aliases can stand for billions
MAX_DIGITS = 100  # of a whole number
MAX_SHOWN = 200  # characters of a text in a message
CORE = "tag:yaml.org,2002:"
QUOTED = "[{\"'|>"  # first characters of values that are not plain text
# Parts of the library's messages, and what to say instead.
SYNTAX = {
    "found another document": 'a second document begins here ("---"); a configuration is a single one',
    r"found character '\t'": "a tab; YAML indents with spaces",
    "cannot start any token": "{reason}; put the text in quotation marks",
    "expected alphabetic or numeric character": '"*" and "&" begin a name here; put the text in quotation marks',
}


@dataclass(frozen=True)
class Location:
    """Where a key was written; `line` counts from 1."""

    source: str
    line: int | None = None

    def __str__(self) -> str:
        return self.source if self.line is None else f"{self.source}:{self.line}"


@dataclass
class Entries:
    """Flat keys with their values, the location of each of them and of their parts, problems and notes."""

    values: dict[str, Any] = field(default_factory=dict)
    locations: dict[KeyPath, Location] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def location(self, path: KeyPath) -> Location | None:
        """Where `path` was written, or the nearest part above it."""
        while path and path not in self.locations:
            path = path[:-1]
        return self.locations.get(path)

    def prefix(self, path: KeyPath) -> str:
        """The beginning of a message about `path`: "FILE:LINE: ", or nothing where the location is not known."""
        location = self.location(path)
        return f"{location}: " if location else ""


class _Unreadable(Exception):
    """The file cannot be understood; the message has the location."""


def read_file(path: Path) -> Entries:
    """Read a file of flat keys. Problems are collected, not raised; an unreadable file has no values."""
    source = str(path)
    try:
        text = decode_text(path.read_bytes(), source)
    except OSError as error:
        return Entries(problems=[f"{source}: cannot be read: {error.strerror}"])
    except UserError as error:
        return Entries(problems=list(error.problems))
    # Indented JSON may use tabs, which YAML forbids; inside a JSON string a tab is always written as \\t.
    return parse(text.replace("\t", " ") if path.suffix == ".json" else text, source)


def parse(text: str, source: str) -> Entries:
    """Flat keys from the text of a file; `source` names it in messages."""
    yaml = YAML(typ="safe", pure=True)
    reader = _Reader(yaml, source)
    try:
        with warnings.catch_warnings(action="ignore"):  # anchors may be reused
            root = yaml.compose(text)
        values = {} if root is None else reader.plain(root, ())
    except _Unreadable as error:
        return Entries(problems=[str(error)])
    except RecursionError:
        return Entries(problems=[f"{source}: {_too_deep()}"])
    except YAMLError as error:
        line, reason = _syntax_error(error, text)
        return Entries(problems=[f"{Location(source, line)}: this is not YAML: {reason}"])
    if not isinstance(values, dict):
        return Entries(problems=[f"{source}: a configuration is a set of keys with values, not {show(values)}"])
    return Entries(values, reader.locations, reader.problems)


def parse_value(text: str) -> Any:
    """The value of `key=value`, in YAML syntax but for comments: plain text is kept with its `#` and line ends.

    Raises ValueError with the reason.
    """
    indented = text.replace("\n", "\n  ")
    document = f"value: {indented}"
    entries = parse(document, "")
    if entries.problems:
        document = f"value:\n  {indented}"
        entries = parse(document, "")
    if entries.problems:
        reason = entries.problems[0]
        raise ValueError(reason.partition("YAML: ")[2] or reason.partition(": ")[2])
    value = entries.values["value"]
    lines_joined = isinstance(value, str) and "\n" in text and text.lstrip()[0] not in QUOTED
    if not lines_joined and not _drops_text(document):
        return value
    if text.lstrip()[0] in QUOTED:
        raise ValueError('what follows "#" would be a comment; leave it out, or put the whole value in quotation marks')
    return text.strip()


def _drops_text(document: str) -> bool:
    """Whether reading this valid YAML would ignore some of its text: comments and anchors."""
    end = 0
    for token in YAML(typ="safe", pure=True).scan(document):
        if "#" in document[end : token.start_mark.index] or isinstance(token, AnchorToken):
            return True
        end = token.end_mark.index
    return "#" in document[end:]


def _syntax_error(error: YAMLError, text: str) -> tuple[int | None, str]:
    """The line and the reason of the library's error."""
    if isinstance(error, ReaderError):
        line = text.count("\n", 0, error.position) + 1
        return line, f"the character U+{ord(text[error.position]):04X} is not allowed"
    if not isinstance(error, MarkedYAMLError):
        return None, " ".join(str(error).split())
    mark = error.problem_mark or error.context_mark
    reason = " ".join(str(error.problem or error.context).split())
    own = next((own for part, own in SYNTAX.items() if part in reason), "{reason}")
    return mark.line + 1 if mark else None, own.format(reason=reason)


def _too_deep() -> str:
    return f"groups and lists are nested more than {MAX_DEPTH} deep"


class _Reader:
    """Turns the nodes of one file into plain values. Its methods raise _Unreadable."""

    def __init__(self, yaml: YAML, source: str) -> None:
        self.locations: dict[KeyPath, Location] = {}
        self.problems: list[str] = []
        self._yaml = yaml
        self._source = source
        self._open: list[Node] = []  # groups and lists around the current node
        self._seen: set[int] = set()
        self._repeats = 0

    def plain(self, node: Node, path: KeyPath) -> Any:
        """Dictionaries, tuples and scalars of `node`, whose key is `path`."""
        self._count(node)
        if isinstance(node, ScalarNode):
            return self._scalar(node)
        with self._inside(node):
            if isinstance(node, MappingNode):
                pairs = self._pairs(node, path)
                return {key: self._located(key_node, value, (*path, key)) for key, (key_node, value) in pairs.items()}
            return tuple(self._located(child, child, (*path, index)) for index, child in enumerate(node.value))

    def _located(self, here: Node, node: Node, path: KeyPath) -> Any:
        self.locations[path] = self._location(here)
        return self.plain(node, path)

    def _pairs(self, node: MappingNode, path: KeyPath) -> dict[str, tuple[Node, Node]]:
        """Nodes of the keys and values of a group: its own, then those of the groups that it merges (`<<`)."""
        pairs: dict[str, tuple[Node, Node]] = {}
        bases: list[Node] = []
        for key_node, value in node.value:
            if key_node.tag == f"{CORE}merge":
                if bases:
                    self._fail(key_node, 'a second "<<" in one group; write <<: [*first, *second]')
                bases = value.value if isinstance(value, SequenceNode) else [value]
                continue
            key = self._key(key_node)
            if key in pairs:
                line = pairs[key][0].start_mark.line + 1
                self.problems.append(
                    f'{self._location(key_node)}: "{dotted((*path, key))}" is there already, in line {line}'
                )
                continue
            pairs[key] = (key_node, value)
        for base in bases:
            if not isinstance(base, MappingNode):
                self._fail(base, '"<<" merges groups of keys, such as <<: *anchor')
            self._count(base)
            with self._inside(base):
                pairs = self._pairs(base, path) | pairs
        return pairs

    def _key(self, node: Node) -> str:
        if not isinstance(node, ScalarNode):
            self._fail(node, "a group or list in the place of a key; put text that begins with { or [ in quotes")
        return normal_key(str(node.value))

    def _scalar(self, node: ScalarNode) -> Any:
        kind = str(node.tag).removeprefix(CORE)
        if kind in ("str", "timestamp"):
            return self._text(node)
        if kind == "int" and len(node.value) > MAX_DIGITS:
            self._fail(node, f"a number of {len(node.value)} digits is too large")
        if kind not in ("int", "float", "bool", "null"):
            self._fail(node, f"the tag {kind} is not supported; put text that begins with ! in quotation marks")
        try:
            return self._yaml.constructor.construct_object(node)
        except ValueError:
            self._fail(node, f"{show(node.value)} is not of the type that its tag names ({kind})")

    def _text(self, node: ScalarNode) -> str:
        """The text of a scalar; JSON writes characters outside of the first plane as two escapes (surrogates)."""
        try:
            return str(node.value).encode("utf-16", "surrogatepass").decode("utf-16")
        except UnicodeDecodeError:
            self._fail(node, f"{json.dumps(node.value)} has half of a character (a lone surrogate)")

    def _count(self, node: Node) -> None:
        """Refuse aliases that repeat too many values."""
        self._repeats += id(node) in self._seen
        if self._repeats > MAX_REPEATS:
            self._fail(node, f"aliases (*) repeat more than {MAX_REPEATS:,} values")
        self._seen.add(id(node))

    @contextmanager
    def _inside(self, node: Node) -> Iterator[None]:
        """Refuse an alias to a group or list around it, and deep nesting."""
        if any(node is other for other in self._open):
            self._fail(node, "this group or list contains an alias (*) to itself")
        if len(self._open) == MAX_DEPTH:
            self._fail(node, _too_deep())
        self._open.append(node)
        try:
            yield
        finally:
            self._open.pop()

    def _location(self, node: Node) -> Location:
        return Location(self._source, node.start_mark.line + 1)

    def _fail(self, node: Node, reason: str) -> NoReturn:
        raise _Unreadable(f"{self._location(node)}: {reason}")


def yaml_text(values: Mapping[str, Any]) -> str:
    """Flat keys as YAML, in their order; a list or group of plain values in one line."""
    yaml = YAML(typ="safe", pure=True)
    yaml.default_flow_style = None
    yaml.sort_base_mapping_type_on_output = False  # type: ignore[assignment]
    yaml.width = 120
    text = StringIO()
    yaml.dump(dict(values), text)
    return text.getvalue()


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
    """A value as a message shows it, in one line: text in quotation marks, groups and lists by their size."""
    if isinstance(value, bool) or value is None:
        return {True: "true", False: "false", None: "null"}[value]
    if isinstance(value, str):
        return json.dumps(value if len(value) <= MAX_SHOWN else f"{value[:MAX_SHOWN]}...", ensure_ascii=False)
    if isinstance(value, tuple):
        return f"a list of {len(value)}"
    return "a group of keys" if isinstance(value, dict) else str(value)
