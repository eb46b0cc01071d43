"""Apply the answers to GPT-NeoX keys: translate a key or leave it out with a line, or refuse it.

The answers are data (`answers.py`); they are applied before the keys are checked. A key that is a field of Config is
honoured and only some of its values have answers. Nested keys have dotted names ("fp16.type").
"""

from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from megatron.config.yaml_file import Entries, KeyPath, dotted, show

EXTRA_ARGS = "deepspeed_extra_args"
Kind = Literal["honoured", "translated", "refused"]
# From the value and all keys of the configuration to dotted keys of ours; None: there is nothing to translate.
Change = Callable[[Any, Mapping[str, Any]], Mapping[str, Any] | None]


@dataclass(frozen=True)
class Answer:
    """What a GPT-NeoX key, or one value of it, means here."""

    kind: Kind
    line: str = ""  # honoured: what differs, if anything; else why, and what to use instead
    harmless: tuple[object, ...] = ()  # refused: values that change nothing here
    change: Change | None = None  # translated: our keys for it; None: it is left out because it changes nothing


def unpack_extra_args(entries: Entries, known: Collection[str]) -> None:
    """Move what `deepspeed_extra_args` adds to DeepSpeed's settings to the keys of the same names.

    known: DeepSpeed's keys that have a field or an answer; others are refused.
    """
    group = entries.values.get(EXTRA_ARGS)
    if not isinstance(group, dict):
        return
    del entries.values[EXTRA_ARGS]
    for key, value in group.items():
        origin = (EXTRA_ARGS, key)
        said = f"{entries.prefix(origin)}{dotted(origin)} ({show(value)})"
        if key not in known:
            entries.problems.append(f"{said} is not supported: no key here sets it; leave it out")
            continue
        if key in entries.values and entries.values[key] != value:
            entries.problems.append(f"{said} and the key {key} contradict each other; keep {key}")
            continue
        entries.values[key] = value
        for path, location in list(entries.locations.items()):
            if path[:2] == origin:
                entries.locations.setdefault(path[1:], location)
        entries.notes.append(f"{said} is taken as the key {key}")


def answer_keys(entries: Entries, answers: Mapping[str, Answer]) -> None:
    """Replace or remove the keys that have an answer; notes go to `entries.notes`, refusals to `entries.problems`."""
    for path, value in list(walk(entries.values)):
        answer = answers.get(dotted(path))
        if answer is None or answer.kind == "honoured" or not _is_there(entries.values, path):
            continue
        said = f"{entries.prefix(path)}{dotted(path)} ({show(value)})"
        if answer.kind == "translated":
            _translate(entries, path, value, answer, said)
            continue
        _remove(entries.values, path)
        if _is_harmless(value, answer):
            entries.notes.append(f"{said} is left out: it changes nothing here")
        else:
            entries.problems.append(f"{said} is not supported: {answer.line}")


def answer_values(entries: Entries, answers: Mapping[tuple[str, object], Answer]) -> None:
    """Apply answers to single values of honoured keys, such as norm: scalenorm."""
    for path, value in list(walk(entries.values)):
        answer = answers.get((dotted(path), _lower(value))) if isinstance(value, str | int | float) else None
        if answer is None:
            continue
        said = f"{entries.prefix(path)}{dotted(path)} ({show(value)})"
        if answer.kind == "translated":
            _translate(entries, path, value, answer, said)
        else:
            _remove(entries.values, path)
            entries.problems.append(f"{said} is not supported: {answer.line}")


def _translate(entries: Entries, path: KeyPath, value: Any, answer: Answer, said: str) -> None:
    new = {} if answer.change is None else answer.change(value, entries.values)
    if new is None:
        return
    _remove(entries.values, path)
    for name, replacement in new.items():
        _put(entries, tuple(name.split(".")), replacement, path, said)
    written = ", ".join(f"{name}: {show(replacement)}" for name, replacement in new.items())
    entries.notes.append(f"{said} {f'is taken as {written}' if new else 'is left out'}: {answer.line}")


def _put(entries: Entries, target: KeyPath, value: Any, origin: KeyPath, said: str) -> None:
    """Write `value` at `target`, with the location of `origin`; a different value there is a problem."""
    here: Any = entries.values
    for part in target[:-1]:
        here = here.setdefault(part, {})
        if not isinstance(here, dict):
            return  # not a group, which is reported when it is checked
    if here.get(target[-1], value) != value:
        entries.problems.append(
            f"{said} and {dotted(target)} ({show(here[target[-1]])}) contradict each other; keep {dotted(target)}"
        )
        return
    here[target[-1]] = value
    location = entries.location(origin)
    if location is not None:
        entries.locations.setdefault(target, location)


def walk(values: Mapping[str, Any], above: KeyPath = ()) -> Iterator[tuple[KeyPath, Any]]:
    """Every key with its value, a group before its keys."""
    for key, value in values.items():
        yield (*above, key), value
        if isinstance(value, dict):
            yield from walk(value, (*above, key))


def _is_there(values: Mapping[str, Any], path: KeyPath) -> bool:
    here: Any = values
    for part in path:
        if not isinstance(here, dict) or part not in here:
            return False  # removed by the answer to another key
        here = here[part]
    return True


def _remove(values: dict[str, Any], path: KeyPath) -> None:
    here: Any = values
    for part in path[:-1]:
        here = here.get(part, {})
    here.pop(path[-1], None)


def _is_harmless(value: object, answer: Answer) -> bool:
    """Whether the value is unset, switched off, or one of those that the answer names."""
    if value is None or value is False or value == {} or value == ():
        return not (value is False and True in answer.harmless)
    if isinstance(value, dict) and value.get("enabled") is False:
        return True
    return any(value == same and isinstance(value, bool) == isinstance(same, bool) for same in answer.harmless)


def _lower(value: object) -> object:
    return value.lower() if isinstance(value, str) else value
