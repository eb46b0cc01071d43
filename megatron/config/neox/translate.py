"""What becomes of a GPT-NeoX key that is not one of ours: translated or left out with a line, or refused.

The answers are data (`answers.py`); this file applies them to the keys of a configuration, before they are
checked. A key that is a field of Config is honoured and never comes here; some of its values may, though, and a nested
key goes by its dotted name ("fp16.type").
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from megatron.config.yaml_file import Entries, KeyPath, dotted, show

Kind = Literal["honoured", "translated", "refused"]
# From the value and all keys of the configuration to dotted keys of ours; None: there is nothing to translate.
Change = Callable[[Any, Mapping[str, Any]], Mapping[str, Any] | None]


@dataclass(frozen=True)
class Answer:
    """What a GPT-NeoX key, or one value of it, means here."""

    kind: Kind
    line: str = ""  # honoured: what differs, if anything does; else why, and what to use instead
    harmless: tuple[object, ...] = ()  # refused: values under which nothing would be different here
    change: Change | None = None  # translated: our keys for it; None: it is left out, as it changes nothing


def answer_keys(entries: Entries, answers: Mapping[str, Answer]) -> None:
    """Replace or take out what has an answer; what was done goes to `entries.notes`, refusals to `entries.problems`."""
    for path, value in list(_walk(entries.values, ())):
        answer = answers.get(dotted(path))
        if answer is None or answer.kind == "honoured" or not _is_there(entries.values, path):
            continue
        said = f"{_place(entries, path)}{dotted(path)} ({show(value)})"
        if answer.kind == "translated":
            _translate(entries, path, value, answer, said)
            continue
        _take_out(entries.values, path)
        if _is_harmless(value, answer):
            entries.notes.append(f"{said} is left out: it changes nothing here")
        else:
            entries.problems.append(f"{said} is not supported: {answer.line}")


def answer_values(entries: Entries, answers: Mapping[tuple[str, object], Answer]) -> None:
    """The same for single values of keys that are honoured otherwise, such as norm: scalenorm."""
    for path, value in list(_walk(entries.values, ())):
        answer = answers.get((dotted(path), _lower(value))) if isinstance(value, str | int | float) else None
        if answer is None:
            continue
        said = f"{_place(entries, path)}{dotted(path)} ({show(value)})"
        if answer.kind == "translated":
            _translate(entries, path, value, answer, said)
        else:
            _take_out(entries.values, path)
            entries.problems.append(f"{said} is not supported: {answer.line}")


def _translate(entries: Entries, path: KeyPath, value: Any, answer: Answer, said: str) -> None:
    new = {} if answer.change is None else answer.change(value, entries.values)
    if new is None:
        return
    _take_out(entries.values, path)
    for name, replacement in new.items():
        _put(entries, tuple(name.split(".")), replacement, path, said)
    written = ", ".join(f"{name}: {show(replacement)}" for name, replacement in new.items())
    entries.notes.append(f"{said} {f'is taken as {written}' if new else 'is left out'}: {answer.line}")


def _put(entries: Entries, target: KeyPath, value: Any, origin: KeyPath, said: str) -> None:
    """Write `value` at `target`, which then stands where `origin` was written; another value there is a problem."""
    here: Any = entries.values
    for part in target[:-1]:
        here = here.setdefault(part, {})
        if not isinstance(here, dict):
            return  # the group is no group, which is said when it is checked
    if here.get(target[-1], value) != value:
        entries.problems.append(
            f"{said} and {dotted(target)} ({show(here[target[-1]])}) contradict each other; keep {dotted(target)}"
        )
        return
    here[target[-1]] = value
    place = entries.location(origin)
    if place is not None:
        entries.locations.setdefault(target, place)


def _walk(values: Mapping[str, Any], above: KeyPath) -> Iterator[tuple[KeyPath, Any]]:
    """Every key with its value, groups before what is in them."""
    for key, value in values.items():
        yield (*above, key), value
        if isinstance(value, dict):
            yield from _walk(value, (*above, key))


def _is_there(values: Mapping[str, Any], path: KeyPath) -> bool:
    here: Any = values
    for part in path:
        if not isinstance(here, dict) or part not in here:
            return False  # an answer to what is above or beside it took it out
        here = here[part]
    return True


def _take_out(values: dict[str, Any], path: KeyPath) -> None:
    here: Any = values
    for part in path[:-1]:
        here = here.get(part, {})
    here.pop(path[-1], None)


def _is_harmless(value: object, answer: Answer) -> bool:
    """Unset, switched off, or one of the values that the answer names."""
    if value is None or value is False or value == {} or value == ():
        return not (value is False and True in answer.harmless)
    if isinstance(value, dict) and value.get("enabled") is False:
        return True
    return any(value == same and isinstance(value, bool) == isinstance(same, bool) for same in answer.harmless)


def _place(entries: Entries, path: KeyPath) -> str:
    place = entries.location(path)
    return f"{place}: " if place else ""


def _lower(value: object) -> object:
    return value.lower() if isinstance(value, str) else value
