"""The record of a start: what is written, what is left out, and that it holds no secret."""

import json
import os
import subprocess
import time
from pathlib import Path

import pytest

from megatron.config.command_line import (
    MERGED_FLAG,
    configuration_of,
    merged_to_argument,
    parse_command_line,
)
from megatron.config.schema.config import group_of_key
from megatron.errors import UserError
from megatron.record import code as code_file
from megatron.record.code import code_of
from megatron.record.machine import installed_packages
from megatron.record.secrets import (
    environment_without_secrets,
    has_secret,
    is_secret_name,
    values_without_secrets,
    without_secrets,
    words_without_secrets,
)
from megatron.record.start import Surroundings, find_starts, read_starts, write_start

PLANTED = {
    "WANDB_API_KEY": "short",
    "HF_TOKEN": "short",
    "NCCL_PASSWORD": "x",
    "UCX_AUTH": "x",
    "WANDB_BASE_URL": "https://me:pass@wandb.example.org",
    "TORCH_NOTE": "use ghp_abcdefghijklmnopqrstuvwxyz0123456789",
    "PYTORCH_X": "0123456789abcdef0123456789abcdef01234567",
    "DS_HOOK": "https://hooks.slack.com/services/T0/B0/abc",
}
KEPT = {
    "OMP_NUM_THREADS": "2",
    "TOKENIZERS_PARALLELISM": "false",
    "NCCL_SOCKET_IFNAME": "eth0",
    "TORCHINDUCTOR_CACHE_DIR": "/scratch/cache/of/the/compiler0123456789",
    "PYTORCH_ALLOC_CONF": "expandable_segments:True",
    "GLIBC_TUNABLES": "glibc.malloc.arena_max=1:glibc.malloc.mmap_threshold=17179869184",
}
SECRETS = [
    "sk-proj-abcdefghijklmnopqrstuvwx",
    "sk_" + "live_abcdefghijklmnop0123",
    "sk_" + "0123456789abcdef" * 3,
    "hf_abcdefghijklmnopqrstuvwxyz",
    "ghp_abcdefghijklmnopqrstuvwxyz0123456789",
    "AKIAIOSFODNN7EXAMPLE",
    "xoxb-123456789012-abcdef",
    "https://hooks.slack.com/services/T00/B00/XXXX",
    "eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiIxMjM0In0.abc",
    "-----BEGIN RSA PRIVATE KEY-----\nMIIE\n-----END RSA PRIVATE KEY-----",
]
SMALL = """# our run
num_layers: 2
hidden_size: 32
num_attention_heads: 4
seq_length: 32
tokenizer_type: CharLevelTokenizer
data_impl: mock
train_batch_size: 8
train_iters: 6
optimizer: {type: Adam, params: {lr: 1e-2}}
"""


def test_of_the_environment_only_what_is_named_is_kept_and_no_secret():
    environment = KEPT | PLANTED | {"HOME": "/root", "AWS_SECRET_ACCESS_KEY": "x", "SOMETHING": "else"}
    prefixes = ("OMP_", "TOKENIZERS_", "NCCL_", "TORCH", "PYTORCH_", "GLIBC_", "WANDB_", "HF_", "UCX_", "DS_")
    assert environment_without_secrets(environment, prefixes) == KEPT
    assert not set(KEPT) - set(environment_without_secrets(environment, ("",)))
    assert not set(PLANTED) & set(environment_without_secrets(environment, ("",)))


@pytest.mark.parametrize("secret", SECRETS)
def test_what_looks_like_a_secret_is_withheld_in_text_words_and_values(secret):
    assert has_secret(f"before {secret} after") and secret not in without_secrets(f"before {secret} after")
    [word] = words_without_secrets([f"comment={secret}"])
    assert secret not in word and word.startswith("comment=")
    assert secret not in json.dumps(values_without_secrets({"a": [{"comment": f"x {secret}"}]}))


@pytest.mark.parametrize("path", ["sk_wikipedia_2024_text_document", "data/sk-wikipedia_2024_text_document"])
def test_data_in_slovak_is_no_secret(path):
    assert without_secrets(path) == values_without_secrets({"data_path": path})["data_path"] == path


def test_settings_whose_name_says_so_are_withheld_and_the_others_kept():
    text = 'wandb_api_key: abc\nlr: 1e-3\nparams: {a: 1}\n  - "password": "x y"\nuse_key: true\nsave: runs/token/a\n'
    assert without_secrets(text) == (
        "wandb_api_key: (withheld)\nlr: 1e-3\nparams: {a: 1}\n"
        '  - "password": (withheld)\nuse_key: true\nsave: runs/token/a\n'
    )
    assert without_secrets("#api_key: x\na: {b: 1, token: x, c: {my_secret: y}}\n") == (
        "#api_key: (withheld)\na: {b: 1, token: (withheld), c: {my_secret: (withheld)}}\n"
    )
    words = ["deepy.py", "--api-key", "abc", "my_token=x", "seed=3", "--token=x", "a.yml"]
    clean = ["deepy.py", "--api-key", "(withheld)", "my_token=(withheld)", "seed=3", "--token=(withheld)", "a.yml"]
    assert words_without_secrets(words) == clean
    assert values_without_secrets({"key": "x", "keys": {"secret": ["y"]}, "seed": 1}) == {
        "key": "(withheld)",
        "keys": {"secret": ["(withheld)"]},
        "seed": 1,
    }
    assert without_secrets("https://me:pass@git.example.org/a.git") == "https://(withheld)@git.example.org/a.git"


@pytest.mark.parametrize(
    ("value", "clean"),
    [
        ("curl -H 'Authorization: Bearer abcd1234' x", "curl -H 'Authorization: Bearer (withheld)' x"),
        ("curl -u me:word https://a.example.org", "curl -u (withheld) https://a.example.org"),
        ("https://api.example.org/bot12345:AAF-abcdefghijklmnopqrst/send", "https://api.example.org(withheld)/send"),
        ("--export=ALL,WANDB_API_KEY=abc,SEED=1", "--export=ALL,WANDB_API_KEY=(withheld),SEED=1"),
        ("https://a.example.org/?token=abc&run=1", "https://a.example.org/?token=(withheld)&run=1"),
        ("Basic arithmetic: lr=3e-4, max_tokens=20", "Basic arithmetic: lr=3e-4, max_tokens=20"),
    ],
)
def test_a_secret_within_a_value_is_withheld_and_the_rest_kept(value, clean):
    assert values_without_secrets({"alert_command": value}) == {"alert_command": clean}
    assert without_secrets(value) == clean


@pytest.mark.parametrize(
    ("line", "is_secret"),
    [
        ('os.environ["WANDB_API_KEY"] = "0123456789abcdef0123456789abcdef01234567"', True),
        ("password = 'hunter2'", True),
        ('token = "<|endoftext|>"', False),
        ('pass_name = "forward"', False),
    ],
)
def test_in_code_a_text_that_a_secret_name_gets_is_seen(line, is_secret):
    assert has_secret(f"+{line}\n") == is_secret


def test_no_setting_of_ours_is_taken_for_a_secret():
    assert [key for key in group_of_key() if is_secret_name(key)] == []


def git(folder: Path, *words: str) -> str:
    identity = ["-c", "user.name=us", "-c", "user.email=us@example.org"]
    return subprocess.run(
        ["git", "-C", str(folder), *identity, *words], capture_output=True, text=True, check=True
    ).stdout.strip()


@pytest.fixture
def repository(tmp_path) -> Path:
    folder = tmp_path / "code"
    folder.mkdir()
    git(folder, "init", "--quiet", "--initial-branch", "main")
    (folder / "a.py").write_text("one\n")
    (folder / "b.bin").write_bytes(bytes(range(256)))
    git(folder, "add", ".")
    git(folder, "commit", "--quiet", "-m", "first")
    return folder


def test_commit_branch_remote_and_changes_are_found_and_the_patch_makes_them_again(repository, tmp_path):
    git(repository, "remote", "add", "origin", "https://us:secret@git.example.org/a.git")
    (repository / "a.py").write_text("two\n")
    (repository / "b.bin").write_bytes(bytes(range(255)))
    (repository / "new.py").write_text("three\n")
    found = code_of(repository)
    assert (found.commit, found.branch, found.note) == (git(repository, "rev-parse", "HEAD"), "main", None)
    assert found.remote == "https://(withheld)@git.example.org/a.git"
    assert (found.changed_files, found.untracked) == (2, ("new.py",))
    (tmp_path / "patch").write_bytes(found.patch)
    git(tmp_path, "clone", "--quiet", str(repository), str(tmp_path / "again"))
    git(tmp_path / "again", "apply", str(tmp_path / "patch"))
    assert (tmp_path / "again" / "a.py").read_text() == "two\n"
    assert (tmp_path / "again" / "b.bin").read_bytes() == bytes(range(255))


def test_the_patch_has_the_form_that_git_applies_whatever_the_user_has_configured(repository, tmp_path):
    for key in ("diff.noprefix", "diff.mnemonicPrefix"):
        git(repository, "config", key, "true")
    (repository / "a.py").write_text("two\n")
    (tmp_path / "patch").write_bytes(code_of(repository).patch)
    git(repository, "checkout", "--quiet", "a.py")
    git(repository, "apply", "--index", str(tmp_path / "patch"))
    assert (repository / "a.py").read_text() == "two\n"


def test_changes_that_git_cannot_tell_are_noted(repository):
    git(repository, "config", "filter.large.clean", "false")
    git(repository, "config", "filter.large.required", "true")
    (repository / ".gitattributes").write_text("*.py filter=large\n")
    (repository / "a.py").write_text("two and more\n")
    found = code_of(repository)
    assert found.patch == b"" and "ended with code 128" in str(found.note)


def test_changes_that_are_too_many_or_hold_a_secret_are_not_kept(repository, monkeypatch):
    (repository / "a.py").write_text("token = 'hf_abcdefghijklmnopqrstuvwxyz'\n")
    found = code_of(repository)
    assert found.patch == b"" and "look" in str(found.note) and found.commit
    monkeypatch.setattr(code_file, "MOST_CHANGES", 1000)
    (repository / "a.py").write_text("x\n" * 1000)
    found = code_of(repository)
    assert found.patch == b"" and "more than" in str(found.note)


def test_code_without_a_repository_or_git_says_so(repository, tmp_path, monkeypatch):
    inside = repository / ".venv" / "site-packages"
    inside.mkdir(parents=True)
    assert code_of(inside).commit is None and "repository of its own" in str(code_of(inside).note)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert "git cannot be asked" in str(code_of(repository).note)


def test_installed_packages_are_those_that_pip_knows():
    from importlib.metadata import distributions

    def normal(name: str) -> str:
        return name.lower().replace("_", "-").replace(".", "-")

    known = {normal(one.metadata["Name"]): one.version for one in distributions()}
    known.pop("deepy", None)
    assert {normal(name): version for name, version in installed_packages().items()} == known


@pytest.fixture
def config(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("small.yml").write_text(SMALL)
    Path("more.yml").write_text("wandb_project: sk-abcdefghijklmnopqrstuvwx  # oh\n")
    words = ["small.yml", "more", "seed=5", "-H", "hosts"]
    return configuration_of(parse_command_line(words, "train.py"), ["train.py", *words], "train.py")


def test_a_start_is_recorded_as_given_and_as_merged(config, tmp_path, repository):
    passed_on = parse_command_line([MERGED_FLAG, merged_to_argument(config)], "train.py").merged
    assert passed_on.origin == config.origin and passed_on.to_flat() == config.to_flat()
    (repository / "a.py").write_text("two\n")
    logs = tmp_path / "logs"
    for step in (0, 7):
        folder = write_start(
            logs, passed_on, Surroundings.looked_up(repository), {"step": step, "versions": {"a": "1"}}
        )
    assert folder == logs / "starts" / "0002"
    first, second = read_starts(logs)
    assert (first.step, second.step) == (0, 7)
    facts = second.facts
    assert facts["command"] == ["train.py", "small.yml", "more", "seed=5", "-H", "hosts"]
    assert facts["overrides"] == ["seed=5", 'hostfile="hosts"'] and facts["working_folder"] == str(tmp_path)
    assert [file["path"] for file in facts["config_files"]] == [f"{tmp_path}/small.yml", f"{tmp_path}/more.yml"]
    assert [(folder / file["copy"]).read_text() for file in facts["config_files"]] == [
        SMALL,
        "wandb_project: (withheld)  # oh\n",
    ]
    assert facts["config"]["seed"] == 5 and facts["config"]["wandb_project"] == "(withheld)"
    assert facts["code"]["patch"] == "changes.patch" and b"+two" in (folder / "changes.patch").read_bytes()
    assert facts["versions"]["a"] == "1" and facts["versions"]["deepspeed"]
    assert f"deepspeed=={facts['versions']['deepspeed']}\n" in (folder / "packages.txt").read_text()
    assert facts["hardware"]["memory_bytes"] > 0 and abs(facts["time"] - time.time()) < 100
    again = parse_command_line([str(folder / "config.yml")], "train.py")
    assert configuration_of(again, [], "train.py").to_flat() == facts["config"]
    assert "sk-abcdef" not in "".join(path.read_text() for path in folder.rglob("*") if path.is_file())


def test_a_pipe_and_very_long_files_are_named_without_their_text(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("long.yml").write_text("# " + "x" * 100_000 + "\n" + SMALL)
    for name in ("half", "other"):
        Path(f"{name}.yml").write_text("# " + "x" * 40_000 + "\n")
    read, write = os.pipe()
    os.write(write, b"seed: 3\n")
    os.close(write)
    words = ["long.yml", f"/dev/fd/{read}", "half.yml", "other.yml"]
    config = configuration_of(parse_command_line(words, "train.py"), words, "train.py")
    os.close(read)
    assert config.training.seed == 3
    assert [(Path(path).name, text is None) for path, text in config.origin.files] == [
        *(("long.yml", True), (str(read), True), ("half.yml", False), ("other.yml", True)),
    ]


def test_starts_that_are_not_whole_are_passed_over_and_a_folder_without_any_is_named(config, tmp_path, repository):
    logs = tmp_path / "run" / "logs"
    write_start(logs, config, Surroundings.looked_up(repository), {"step": 3})
    for number, text in enumerate(["", '{"step": "x"}', "[]", "{}"], 5):
        (folder := logs / "starts" / f"{number:04d}").mkdir()
        (folder / "start.json").write_text(text)
    (logs / "starts" / "0009").mkdir()
    assert [start.step for start in find_starts(tmp_path / "run")] == [3]
    assert write_start(logs, config, Surroundings.looked_up(repository), {"step": 4}).name == "0010"
    with pytest.raises(UserError, match="holds no record of a run"):
        find_starts(tmp_path)
