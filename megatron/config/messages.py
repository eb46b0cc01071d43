"""Pydantic's findings in words that name file, line, key, value and the nearest right value."""

from typing import TYPE_CHECKING, Any

from megatron import registry
from megatron.config.schema.config import group_fields, group_of_key
from megatron.config.yaml_file import Entries, KeyPath, dotted, show

if TYPE_CHECKING:
    from pydantic_core import ErrorDetails

EXPECTED = {
    "int_type": "must be a whole number",
    "int_from_float": "must be a whole number",
    "float_type": "must be a number",
    "bool_type": "must be true or false",
    "string_type": "must be text",
    "tuple_type": "must be a list",
    "model_type": "must be a group of keys",
    "finite_number": "must be a finite number",
    "greater_than": "must be greater than {gt}",
    "greater_than_equal": "must be at least {ge}",
    "less_than": "must be less than {lt}",
    "less_than_equal": "must be at most {le}",
}


def validation_problem(detail: "ErrorDetails", entries: Entries) -> str:
    """One line for one finding; `detail["loc"]` starts at the flat key."""
    path: KeyPath = detail["loc"]
    location = entries.location(path)
    return (f"{location}: " if location else "") + _what(detail, path)


def _what(detail: "ErrorDetails", path: KeyPath) -> str:
    kind, value, context = detail["type"], detail["input"], detail.get("ctx", {})
    key = dotted(path)
    if kind == "missing" and len(path) > 1 and isinstance(path[-1], int):
        return f"{dotted(path[:-1])} ({show(value)}) is too short"
    if kind == "missing":
        return f'"{key}" is missing; it has no default'
    if kind == "extra_forbidden":
        near = registry.nearest(str(path[-1]), _keys_of(path[:-1]))
        return f'unknown key "{key}"' + (f'. Did you mean "{near}"?' if near else "")
    if kind == "value_error":
        return f"{key}: {context['error']}"
    if kind == "literal_error":
        return f"{key} ({show(value)}) must be {context['expected']}" + _did_you_mean(value, context)
    if kind == "too_long":
        return f"{key} ({show(value)}) must not have more than {context['max_length']}"
    return f"{key} ({show(value)}) " + EXPECTED.get(kind, detail["msg"]).format(**context)


def _did_you_mean(value: object, context: dict[str, Any]) -> str:
    choices = str(context["expected"]).replace(" or ", ", ").replace("'", "").split(", ")
    near = registry.nearest(value, choices) if isinstance(value, str) else None
    return f'. Did you mean "{near}"?' if near else ""


def _keys_of(path: KeyPath) -> list[str]:
    """The keys that the nested group at `path` knows."""
    kind: Any = group_fields()[group_of_key()[str(path[0])]]
    for part in path:
        kind = kind.model_fields[part].annotation
    return list(kind.model_fields)
