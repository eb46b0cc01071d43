"""What is written from the code is in step with it: docs/configuration.md, docs/from-neox.md, configs/schema.json."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from ruamel.yaml import YAML

from megatron.config.neox.answers import ANSWERS, VALUES
from megatron.config.schema.config import group_of_key

ROOT = Path(__file__).parents[2]
FILES = sorted((ROOT / "configs").rglob("*.yml"))
SCHEMA = json.loads((ROOT / "configs" / "schema.json").read_text())


def test_the_written_files_are_what_the_code_says():
    done = subprocess.run(
        [sys.executable, "tools/make_docs.py", "--check"], cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr


def test_every_key_is_in_the_reference_and_in_the_schema():
    reference = (ROOT / "docs" / "configuration.md").read_text()
    for key in [*group_of_key(), "plugins"]:
        assert f"- **`{key}`** (" in reference
        assert SCHEMA["properties"][key]["description"]
        assert key.replace("_", "-") in SCHEMA["properties"]


def test_every_answer_to_a_key_of_gpt_neox_is_on_its_page():
    page = (ROOT / "docs" / "from-neox.md").read_text()
    for key, answer in ANSWERS.items():
        assert f"`{key}`" in page
        assert answer.line in page
    for (key, value), answer in VALUES.items():
        assert f"| `{key}` | `{value}` | {answer.kind}: {answer.line} |" in page


@pytest.mark.parametrize("file", FILES, ids=lambda path: str(path.relative_to(ROOT / "configs")))
def test_an_editor_finds_nothing_wrong_with_a_shipped_file(file):
    check(YAML(typ="safe", pure=True).load(file.read_text()), SCHEMA, file.name)


@pytest.mark.parametrize(
    ("text", "where"),
    [
        ("hiden_size: 1", "hiden_size"),
        ("zero_optimization: {stge: 1}", "zero_optimization.stge"),
        ("train_iters: ten", "train_iters"),
        ("num-layers: [1]", "num-layers"),
        ("precision: bf16", "precision"),
    ],
)
def test_an_editor_marks_what_is_wrong(text, where):
    with pytest.raises(AssertionError, match=rf"^a\.yml\.{where}"):
        check(YAML(typ="safe", pure=True).load(text), SCHEMA, "a.yml")


TYPES = {"integer": int, "number": (int, float), "string": str, "boolean": bool, "null": type(None), "array": list}


def check(value, schema, path):
    """The part of JSON Schema that schema.json uses; an AssertionError names the place."""
    if "$ref" in schema:
        target = SCHEMA
        for part in schema["$ref"].removeprefix("#/").split("/"):
            target = target[part]
        schema = target
    if "anyOf" in schema:
        assert any(passes(value, choice, path) for choice in schema["anyOf"]), f"{path}: {value!r} is none of the kinds"
    for part in schema.get("allOf", ()):
        check(value, part, path)
    assert value in schema.get("enum", [value]), f"{path}: {value!r} is not one of {schema.get('enum')}"
    assert value == schema.get("const", value), f"{path}: {value!r}"
    kind = schema.get("type")
    if kind == "object" or "properties" in schema:
        assert isinstance(value, dict), f"{path}: {value!r} is no group"
        for key, inner in value.items():
            assert key in schema["properties"], f"{path}.{key}: unknown key"
            check(inner, schema["properties"][key], f"{path}.{key}")
    elif kind is not None:
        right = isinstance(value, TYPES[kind]) and (kind == "boolean" or not isinstance(value, bool))
        whole = kind == "integer" and isinstance(value, float) and value.is_integer()
        assert right or whole, f"{path}: {value!r} is no {kind}"


def passes(value, schema, path):
    try:
        check(value, schema, path)
    except AssertionError:
        return False
    return True
