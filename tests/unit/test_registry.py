"""The table of names."""

import sys
from pathlib import Path

import pytest

from megatron import registry
from megatron.errors import UserError


@pytest.fixture
def plugin(tmp_path, monkeypatch):
    """A module that declares whatever a test writes into it; the table is as before afterwards."""
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(registry, "TABLE", {kind: dict(entries) for kind, entries in registry.TABLE.items()})

    def write(name: str, text: str) -> str:
        sys.modules.pop(name, None)
        Path(tmp_path, f"{name}.py").write_text(text)
        return name

    return write


ENTRIES = [(kind, name) for kind, entries in registry.TABLE.items() for name in entries]


@pytest.mark.parametrize(("kind", "name"), ENTRIES, ids=[f"{kind}-{name}" for kind, name in ENTRIES])
def test_every_name_in_the_table_stands_for_something(kind, name):
    assert registry.resolve(kind, name) is not None


def test_an_unknown_name_is_answered_with_the_nearest_one_and_with_all():
    with pytest.raises(UserError, match=r'unknown norm "rms_norm"\. Did you mean "rmsnorm"\? .*layernorm, rmsnorm'):
        registry.resolve("norm", "rms_norm")


def test_nearest_ignores_case_and_gives_up_on_what_resembles_nothing():
    assert registry.nearest("hftokeniser", ["GPT2BPETokenizer", "HFTokenizer"]) == "HFTokenizer"
    assert registry.nearest("zzz", ["HFTokenizer"]) is None


def test_a_plugin_adds_a_name_that_resolves(plugin):
    name = plugin("good_plugin", 'DEEPY_REGISTRY = {"norm": {"mine": "good_plugin:Mine"}}\nclass Mine: pass\n')
    registry.load_plugins([name])
    registry.load_plugins([name])
    assert "mine" in registry.names("norm")
    assert registry.resolve("norm", "mine").__name__ == "Mine"


@pytest.mark.parametrize("target", ["no_such_module:x", "half_plugin:Missing"])
def test_a_target_of_a_plugin_that_is_not_there_is_named(plugin, target):
    registry.load_plugins([plugin("half_plugin", f'DEEPY_REGISTRY = {{"norm": {{"mine": "{target}"}}}}')])
    with pytest.raises(UserError, match=f'norm "mine": the plugin\'s {target} cannot be imported: '):
        registry.resolve("norm", "mine")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "no table DEEPY_REGISTRY"),
        ("import there_is_no_such_module", "cannot be imported: ModuleNotFoundError"),
        ("1 / 0", "cannot be imported: ZeroDivisionError"),
        ("import sys\nsys.no_such_thing", "cannot be imported: AttributeError: module 'sys' has no attribute"),
        ("DEEPY_REGISTRY = []", "no table DEEPY_REGISTRY"),
        ('DEEPY_REGISTRY = {"norm": "mine"}', "must be a dictionary of names"),
        ('DEEPY_REGISTRY = {"norm": {"mine": "module.attribute"}}', "must be a dictionary of names"),
        ('DEEPY_REGISTRY = {"norm": {"mine": 5}}', "must be a dictionary of names"),
        ('DEEPY_REGISTRY = {"colour": {"red": "a:b"}}', 'unknown kind "colour"'),
        ('DEEPY_REGISTRY = {"norm": {"rmsnorm": "a:b"}}', "which is megatron.model.norms:RMSNorm already"),
    ],
)
def test_a_broken_plugin_is_named_with_the_reason(plugin, text, message):
    with pytest.raises(UserError, match=message):
        registry.load_plugins([plugin("bad_plugin", text)])
