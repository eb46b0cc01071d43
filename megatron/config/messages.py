"""Turn pydantic's errors into messages with file, line, key, value and the nearest valid value."""

import re
from typing import TYPE_CHECKING, Any

from megatron import registry
from megatron.config.schema.config import fields_at
from megatron.config.schema.key_group import PATH_PROBLEM
from megatron.config.yaml_file import Entries, KeyPath, dotted, show

if TYPE_CHECKING:
    from pydantic_core import ErrorDetails

EXPECTED = {
    "int_type": "must be a whole number",
    "int_from_float": "must be a whole number",
    "int_parsing_size": "must be a whole number below 2^63",
    "float_type": "must be a number",
    "bool_type": "must be true or false",
    "string_type": "must be text",
    "string_too_short": "must not be empty",
    "dict_type": "must be a group of keys",
    "tuple_type": "must be a list",
    "model_type": "must be a group of keys",
    "finite_number": "must be a finite number",
    "greater_than": "must be greater than {gt}",
    "greater_than_equal": "must be at least {ge}",
    "less_than": "must be less than {lt}",
    "less_than_equal": "must be at most {le}",
}
BOOLEANS = {
    **dict.fromkeys(("yes", "on", "true", "1", "y"), "true"),
    **dict.fromkeys(("no", "off", "false", "0", "n"), "false"),
}
NUMBER = re.compile(r"[-+]?(\d[\d_]*\.?\d*|\.\d+)([eE][-+]?\d+)?")


def validation_problem(detail: "ErrorDetails", entries: Entries) -> str:
    """One line for one error; `detail["loc"]` starts at the flat key."""
    path: KeyPath = detail["loc"]
    return entries.prefix(path) + _what(detail, path)


def _what(detail: "ErrorDetails", path: KeyPath) -> str:
    kind, value, context = detail["type"], detail["input"], detail.get("ctx", {})
    key = dotted(path)
    if kind == "missing" and len(path) > 1 and isinstance(path[-1], int):
        return f"{dotted(path[:-1])} ({show(value)}) is too short"
    if kind == "missing":
        return f'"{key}" is missing; it has no default'
    if kind == "extra_forbidden":
        near = registry.nearest(str(path[-1]), fields_at(path[:-1]))
        return f'unknown key "{key}"' + (f'. Did you mean "{near}"?' if near else "")
    if kind == PATH_PROBLEM:
        return str(detail["msg"])
    if kind == "value_error":
        return f"{key}: {context['error']}"
    if kind == "literal_error":
        return f"{key} ({show(value)}) must be {context['expected']}" + _did_you_mean(value, context)
    if kind == "too_long":
        return f"{key} ({show(value)}) must not have more than {context['max_length']}"
    return f"{key} ({show(value)}) " + EXPECTED.get(kind, detail["msg"]).format(**context) + _way_out(kind, value)


def _way_out(kind: str, value: object) -> str:
    """What to write for a value of the wrong type, where that can be guessed."""
    if kind == "bool_type" and str(value).lower() in BOOLEANS:
        return f"; write {BOOLEANS[str(value).lower()]}"
    if kind in ("int_type", "float_type") and isinstance(value, str) and NUMBER.fullmatch(value.strip()):
        return f"; write {value.strip()} without quotation marks"
    if kind == "string_type" and isinstance(value, bool | int | float):
        return "; put it in quotation marks"
    if kind == "tuple_type" and isinstance(value, str):
        return f"; write [{value}]"
    return ""


def _did_you_mean(value: object, context: dict[str, Any]) -> str:
    choices = str(context["expected"]).replace(" or ", ", ").replace("'", "").split(", ")
    near = registry.nearest(value, choices) if isinstance(value, str) else None
    return f'. Did you mean "{near}"?' if near else ""
