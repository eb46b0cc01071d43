"""Write what follows from the code: docs/configuration.md, docs/from-neox.md and configs/schema.json.

python tools/make_docs.py            writes them
python tools/make_docs.py --check    exit code 1 and their names where one is out of step
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from megatron import registry
from megatron.config.neox.answers import HONOURED, REFUSED, TRANSLATED, VALUES
from megatron.config.neox.translate import Answer
from megatron.config.schema.config import Config, group_fields

ROOT = Path(__file__).resolve().parent.parent
NOTE = "<!-- Written by `python tools/make_docs.py` from the code; change it there. -->\n"
FREE = {"type": "string"}
# Keys whose values a registry names; plugins may add to them, so an editor proposes and does not insist.
NAMED = {
    "norm": "norm",
    "pos_emb": "position_embedding",
    "activation": "activation",
    "init_method": "init_method",
    "output_layer_init_method": "init_method",
    "lr_decay_style": "lr_schedule",
    "tokenizer_type": "tokenizer",
    "launcher": "launcher",
}


def configuration() -> str:
    """The reference of all keys, group by group."""
    parts = [
        "# Configuration\n",
        NOTE,
        "A configuration is one or more flat YAML (or JSON) files, put together: `./deepy.py train.py a.yml b.yml "
        "key=value`. A key stands in one file only; `key=value` replaces it, and reaches into groups by dots "
        "(`optimizer.params.lr=1e-4`). `-` and `_` are the same in a key. Unknown keys, wrong types and values that do "
        "not fit together are errors, all said at once, with file and line.\n",
        "`--print-config` prints the merged configuration with every default and derived value; `--dry-run` what it "
        "amounts to. [schema.json](../configs/schema.json) gives completion in editors: begin a file with\n"
        "`# yaml-language-server: $schema=PATH/configs/schema.json`. For GPT-NeoX's keys see "
        "[from-neox.md](from-neox.md), for the figures of `--dry-run` [estimates.md](estimates.md).\n",
    ]
    for name, group in group_fields().items():
        parts.append(f"## {name}\n\n{_sentence(group.__doc__)}\n")
        parts += [_entry(key, field, 0) for key, field in group.model_fields.items()]
    plugins = Config.model_fields["plugins"]
    parts.append(f"## plugins\n\n{_entry('plugins', plugins, 0)}")
    return "\n".join(parts)


def _entry(key: str, field: FieldInfo, depth: int) -> str:
    """One key with its type, default and description, and the keys of its group below it."""
    kind = field.annotation
    nested = isinstance(kind, type) and issubclass(kind, BaseModel)
    default = "required" if field.is_required() else "" if nested else f"default {_value(field.default)}"
    head = ", ".join(part for part in (_type(field), default) if part)
    lines = [f"{'  ' * depth}- **`{key}`** ({head}): {_sentence(field.description)}"]
    if nested:
        lines += [_entry(inner, part, depth + 1).rstrip("\n") for inner, part in kind.model_fields.items()]
    return "\n".join(lines) + ("\n" if depth == 0 else "")


def _type(field: FieldInfo) -> str:
    kind: Any = field.annotation
    if isinstance(kind, type) and issubclass(kind, BaseModel):
        return "group"
    names = {bool: "true or false", int: "whole number", float: "number", str: "text"}
    text = str(kind)
    if kind in names:
        return names[kind]
    if "tuple" in text:
        return "list"
    if "Literal" in text:
        words = [repr(word) for part in getattr(kind, "__args__", ()) for word in getattr(part, "__args__", (part,))]
        return " or ".join(word.replace("'", "") for word in words if word != "<class 'NoneType'>")
    return next((name for known, name in names.items() if known.__name__ in text), "value")


def _value(value: object) -> str:
    if value is None:
        return "unset"
    return f"`{json.dumps(value)}`"


def _sentence(text: str | None) -> str:
    return " ".join((text or "").split())


def from_neox() -> str:
    """What becomes of every key of GPT-NeoX."""
    honoured = [f"| `{key}` | {line} |" for key, line in sorted(HONOURED.items())]
    return "\n".join(
        [
            "# Coming from GPT-NeoX\n",
            NOTE,
            "Commands, YAML keys, the `.bin`/`.idx` files and the JSON lines of `generate.py` are GPT-NeoX's. Each of "
            "its keys (version 2.0.0, and the nested ones of its files) has one of three answers; none is dropped in "
            "silence. What is refused stops the run with exit code 2 before it starts, with the line below.\n",
            "Keys that keep their meaning are also described in [configuration.md](configuration.md). Checkpoints have "
            "a format of their own, which knows no layout.\n",
            "## Honoured\n\nThe same meaning; where something differs, it says what.\n",
            "| key | what differs |\n|---|---|",
            *honoured,
            "\n## Translated, or left out because they change nothing\n\nOne line on stderr says so.\n",
            "| key | why |\n|---|---|",
            *_rows(TRANSLATED),
            "\n## Refused\n\nUnset, `false`, and the values in the last column pass, with a line, because nothing "
            "would be different.\n",
            "| key | why, and what to use | passes |\n|---|---|---|",
            *_rows(REFUSED, harmless=True),
            "\n## Single values\n\nOf keys that are honoured otherwise.\n",
            "| key | value | |\n|---|---|---|",
            *(f"| `{key}` | `{value}` | {answer.kind}: {answer.line} |" for (key, value), answer in VALUES.items()),
            "",
        ]
    )


def _rows(entries: tuple[tuple[tuple[str, ...], Answer], ...], harmless: bool = False) -> list[str]:
    rows = []
    for keys, answer in entries:
        names = ", ".join(f"`{key}`" for key in keys)
        passes = " | " + ", ".join(f"`{json.dumps(value)}`" for value in answer.harmless) if harmless else ""
        rows.append(f"| {names} | {answer.line}{passes} |")
    return rows


def schema() -> str:
    """JSON schema of a configuration file."""
    definitions: dict[str, Any] = {}
    properties: dict[str, Any] = {}
    for group in group_fields().values():
        part = group.model_json_schema(mode="validation")
        definitions |= part.pop("$defs", {})
        properties |= part["properties"]
    properties["plugins"] = Config.model_json_schema()["properties"]["plugins"]
    for key, kind in NAMED.items():
        default = {"default": properties[key]["default"]} if "default" in properties[key] else {}
        choices = {"anyOf": [{"enum": registry.names(kind)}, FREE]}
        properties[key] = {"title": key, "description": properties[key]["description"], **choices, **default}
    for key in list(properties):
        # both spellings work in a file
        if "_" in key:
            properties[key.replace("_", "-")] = {"$ref": f"#/properties/{key}"}
    whole = {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "Deepy configuration",
        "type": "object",
        "additionalProperties": False,
        "properties": properties,
        "$defs": definitions,
    }
    return json.dumps(whole, indent=1) + "\n"


PAGES = {
    "docs/configuration.md": configuration,
    "docs/from-neox.md": from_neox,
    "configs/schema.json": schema,
}


def main() -> int:
    """Write or check the files. Returns the exit code."""
    parser = argparse.ArgumentParser(description="write what follows from the code")
    parser.add_argument("--check", action="store_true", help="write nothing, name what is out of step")
    if not parser.parse_args().check:
        for name, page in PAGES.items():
            (ROOT / name).write_text(page(), encoding="utf-8")
        return 0
    stale = [name for name, page in PAGES.items() if (ROOT / name).read_text(encoding="utf-8") != page()]
    for name in stale:
        print(f"{name} is out of step; run python tools/make_docs.py", file=sys.stderr)
    return 1 if stale else 0


if __name__ == "__main__":
    sys.exit(main())
