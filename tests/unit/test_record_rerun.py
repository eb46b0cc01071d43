"""The commands that make a run again."""

import json
import shlex
import subprocess
from pathlib import Path

import pytest

from megatron.events import EventLog
from megatron.record.rerun import Place, Rerun, path_keys
from megatron.record.start import Start

CONFIG = {
    "save": "run",
    "load": "run",
    "train_data_paths": ["data/a_text_document", "/far/b_text_document"],
    "vocab_file": "cl100k_base",
    "merge_file": "files/merges.txt",
    "hostfile": "hosts",
    "seed": 3,
}


def start(tmp_path: Path, number: int, step: int, config: dict | None = None, **changes) -> Start:
    folder = tmp_path / "starts" / f"{number:04d}"
    folder.mkdir(parents=True)
    (folder / "packages.txt").write_text(changes.pop("packages", "a==1\n"))
    facts = {
        "step": step,
        "consumed_samples": 8 * step,
        "batch": {"global_size": 8},
        "checkpoint": f"/home/me/deepy/run/global_step{step}",
        "time": 1.8e9,
        "command": ["deepy.py", "train.py", "a b.yml"],
        "working_folder": "/home/me/deepy",
        "beginning": f"step {step}",
        "config": CONFIG | (config or {}),
        "hosts": ["node1"],
        "layout": {"world_size": 4},
        "versions": {"python": "3.12.4", "torch": "2.13.0+cpu"},
        "hardware": {"threads": 2, "devices": []},
        "environment": {"NCCL_DEBUG": "x y", "PYTHONPATH": "/home/me/mine"},
        "code": {"folder": "/home/me/deepy", "commit": "abc", "remote": None, "patch": None},
    }
    return Start(folder, facts | changes)


def rerun(*starts: Start, **place) -> Rerun:
    return Rerun(starts, Place(Path("/new"), **place))


def commands(script: str) -> list[list[str]]:
    return [shlex.split(line) for line in script.splitlines() if line and not line.startswith("#")]


def trainings(script: str) -> list[dict[str, str]]:
    """The overrides of each call of deepy.py."""
    calls = [words for words in commands(script) if "deepy.py" in words]
    return [dict(word.split("=", 1) for word in words[4:]) for words in calls]


def test_a_start_ends_where_the_next_one_went_on_and_one_whose_steps_were_done_again_is_left_out(tmp_path):
    steps = [0, 10, 20, 20, 15, 30]
    whole = rerun(*(start(tmp_path, number, step) for number, step in enumerate(steps, 1)))
    assert [(each.step, end) for each, end in whole.parts] == [(0, 10), (10, 15), (15, 30), (30, None)]
    assert rerun(*whole.starts[1:4]).parts == [(whole.starts[1], 20), (whole.starts[3], None)]
    calls = trainings(whole.script())
    assert [call.get("exit_interval") for call in calls] == ["10", "15", "30", None]
    assert all(call["save"] == call["load"] == "/new/run" and call["num_gpus"] == "4" for call in calls)


def test_a_run_that_the_commands_do_not_make_again_is_not_said_to_be_the_same(tmp_path, monkeypatch):
    second = {"consumed_samples": 8 * 10 + 24, "time": 1.8e9 + 100}
    third = {"consumed_samples": 8 * 20 + 24 + 56, "time": 1.8e9 + 200}
    starts = start(tmp_path, 1, 0), start(tmp_path, 2, 10, **second), start(tmp_path, 3, 20, **third)
    events = EventLog(tmp_path)
    monkeypatch.setattr("time.time", lambda: 1.8e9 + 50)
    events.record("rewind", "from a step before, so these commands go back as well", 9, skipped_samples=[40, 64])
    assert rerun(*starts[:2]).problems == []
    monkeypatch.setattr("time.time", lambda: 1.8e9 + 150)
    events.record("rewind", "from a step that the next start had yet to do", 21, skipped_samples=[184, 240])
    (problem,) = rerun(*starts).problems
    assert "NOT THE SAME: start 0002 went back from a loss spike and left 56 samples out before start 0003" in problem
    (problem,) = rerun(starts[1]).problems
    assert "NOT HERE: the start that made step 10 is not recorded" in problem
    assert "Copy its checkpoint (/home/me/deepy/run/global_step10) into /new/run" in problem
    assert rerun(start(tmp_path, 4, 10, {"load": "/far/run"})).problems == []


def test_outputs_go_into_the_new_folder_one_inside_another_stays_inside(tmp_path):
    other = {"save": "/x/run", "load": "run/global", "log_dir": "/x/run/notes", "tensorboard_dir": "/x/board"}
    whole = rerun(start(tmp_path, 1, 0), start(tmp_path, 2, 5, other))
    first, second = (whole.settings(each) for each in whole.starts)
    assert first["save"] == "/new/run-1" and first["load"] == "/new/run-1"  # /home/me/deepy/run
    assert second["load"] == "/new/run-1/global"
    assert (second["save"], second["log_dir"]) == ("/new/run-2", "/new/run-2/notes")
    assert second["tensorboard_dir"] == "/new/board"


def test_inputs_are_where_they_were_or_where_they_have_moved_and_names_stay_names(tmp_path):
    here = start(tmp_path, 1, 0)
    settings = rerun(here).settings(here)
    assert settings["train_data_paths"] == ["/home/me/deepy/data/a_text_document", "/far/b_text_document"]
    assert "vocab_file" not in settings and settings["merge_file"] == "/home/me/deepy/files/merges.txt"
    assert settings["hostfile"] is None and "seed" not in settings
    settings = rerun(here, moved=(("/far", "/near"), ("/home/me/deepy/data/a_", "/c/z_"))).settings(here)
    assert settings["train_data_paths"] == ["/c/z_text_document", "/near/b_text_document"]
    texts = start(tmp_path, 3, 0, {"sample_prompts": ["either / or"]})
    assert "sample_prompts" not in rerun(texts).settings(texts)
    file = start(tmp_path, 4, 0, {"sample_prompts": "a/b.txt"})
    assert rerun(file).settings(file)["sample_prompts"] == "/home/me/deepy/a/b.txt"
    other = start(tmp_path, 2, 0, {"load": "hf:/far/model"})
    assert rerun(other, moved=(("/far", "/near"),)).settings(other)["load"] == "hf:/near/model"


def test_settings_that_are_paths_are_known_by_their_type():
    assert {"save", "load", "data_path", "train_data_paths", "vocab_file", "eval_data"} <= path_keys()
    assert not {"seed", "launcher", "wandb_project", "optimizer"} & path_keys()


def test_code_and_packages_are_fetched_once_and_again_where_they_changed(tmp_path):
    changed = {"folder": "/home/me/deepy", "commit": "def", "patch": "changes.patch", "changed_files": 2}
    starts = [
        start(tmp_path, 1, 0),
        start(tmp_path, 2, 5),
        start(tmp_path, 3, 9, code=changed | {"untracked": ["u.py"]}, packages="a==2\n"),
    ]
    (starts[2].folder / "changes.patch").write_text("diff")
    script = rerun(*starts).script()
    lines = commands(script)
    assert [line[:2] for line in lines if line[0] == "git"] == [
        *(["git", "clone"], ["git", "checkout"], ["git", "checkout"], ["git", "apply"]),
    ]
    assert "not recorded: u.py" in script and "other packages" in script
    assert ["python3.12", "-m", "venv", "/new/venv"] in lines
    assert lines[lines.index(
        ["python3.12", "-m", "venv", "/new/venv"]
    ) + 1][5:7] == ["--extra-index-url", "https://download.pytorch.org/whl/cpu"]  # fmt: skip
    assert ["export", "NCCL_DEBUG=x y"] in lines and ["export", "OMP_NUM_THREADS=2"] in lines
    assert "# PYTHONPATH was /home/me/mine" in script
    assert lines.count(["("]) == lines.count([")"]) == 3  # the environment of a start is not that of the next
    ready = rerun(*starts, python="/p/python", code="/c").script()
    assert not [line for line in commands(ready) if line[0] == "git" or "venv" in line]
    assert ["cd", "/c"] in commands(ready)


def test_the_script_is_one_that_a_shell_reads_and_paths_with_spaces_arrive_whole(tmp_path):
    config = {"train_data_paths": ["d/a, b: c/x_text_document"], "save": "my 'run'"}
    here = start(tmp_path, 1, 0, config, command=["deepy.py", "a\ntouch pwned"])
    whole = Rerun([here], Place(tmp_path / "new place", python="/p/py"), ["a note\ntouch pwned"])
    program = tmp_path / "deepy.sh"
    program.write_text('#!/bin/sh\nprintf "%s\\n" "$@"\n')
    program.chmod(0o755)
    script = whole.script().replace("/p/py deepy.py", str(program)).replace("git ", "true git ").replace("cd ", "true ")
    done = subprocess.run(["bash"], input=script, capture_output=True, text=True, check=True, cwd=tmp_path)
    assert not done.stderr and not (tmp_path / "pwned").exists()
    words = done.stdout.splitlines()
    assert f"save={json.dumps(str(tmp_path / 'new place' / chr(39).join(['my ', 'run', ''])))}" in words
    assert 'train_data_paths=["/home/me/deepy/d/a, b: c/x_text_document"]' in words


@pytest.mark.parametrize("hosts", [["a", "b"]])
def test_a_run_on_several_nodes_says_that_it_needs_them(tmp_path, hosts):
    here = start(tmp_path, 1, 0, hosts=hosts)
    assert "It ran on 2 nodes" in rerun(here).script() and rerun(here).settings(here)["num_gpus"] == 2
