"""Kill a run with signal 9 in the middle of any work: it goes on by itself and ends as an undisturbed run does.

The run saves after every step and prunes, so that there is much to interrupt. `killer.py` chooses the moment. No step
may be lost that the log calls saved, but for the last one where the writing is done behind.

All forty take about twelve minutes on two idle cores: python -m pytest tests/end_to_end/test_torture.py
"""

import json
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from megatron.checkpoint.folder import damage, find_checkpoint
from megatron.checkpoint.reading import read_tensors
from megatron.events import read_events
from tests.end_to_end.commands import ENVIRONMENT, SMALL, command, run
from tests.end_to_end.killer import ORDER

STEPS, FEW_STEPS = 30, 6  # of a long case on two ranks, and of the quick one on one rank
SAVING = """
eval_interval: 1000
checkpoint_factor: 1
keep_last_n_checkpoints: 2
zero_optimization: {stage: 1}
"""
MOMENTS = ("asynchronous saving", "loading", "saving", "pruning", "training")
BEHIND = ("asynchronous saving", "pruning")  # the moments of a run that writes while it trains


@pytest.fixture(scope="module")
def whole(tmp_path_factory, request) -> Path:
    """The folder with the configuration, and the undisturbed run of so many steps in it."""
    ranks = 1 if request.param == FEW_STEPS else 2
    folder = tmp_path_factory.mktemp("torture")
    text = SMALL.replace("train_iters: 20\n", f"train_iters: {request.param}\n").replace("eval_interval: 10\n", "")
    (folder / "small.yml").write_text(f"{text}{SAVING}num_gpus: {ranks}\n")
    run(folder, "train.py", "small", "save=whole", "load=whole", "async_save=true", ranks=ranks)
    return folder


def killed_run(folder: Path, save: str, moment: str, seed: int, *more: str, expect: int) -> str:
    """Start a run that is killed at `moment`; returns where exactly that was. expect: the exit code of deepy.py."""
    report = folder / f"{save}.txt"
    modules = os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])
    order = {ORDER: json.dumps([moment, seed, str(report)]), "PYTHONPATH": modules}
    switches = {"async_save": moment in BEHIND, "report": has_reports(seed)}
    words = command("deepy.py", "train.py", "small", f"save={save}", f"load={save}")
    words += [f"{key}={str(value).lower()}" for key, value in switches.items()]
    words += ["plugins=[killer]", *more]
    done = subprocess.run(
        words, cwd=folder, env=os.environ | ENVIRONMENT | order, capture_output=True, text=True, timeout=600
    )
    assert report.exists() and done.returncode == expect, f"no rank was killed:\n{done.stdout}\n{done.stderr}"
    return report.read_text()


def has_reports(seed: int) -> bool:
    """Whether the report is written after each checkpoint: in a quarter of the runs, over all kinds of work."""
    return seed % 4 == 0


def without_the_last(folder: Path, save: Path) -> None:
    """A copy of the whole run that has yet to do its last step, so that there is something to load."""
    shutil.copytree(folder / "whole", save, ignore=shutil.ignore_patterns(f"global_step{STEPS}", "logs"))
    (save / "latest").write_text(f"global_step{STEPS - 1}")


def step_to_go_on_from(save: Path, moment: str) -> int:
    """The step that a killed run is known to have saved, because its log says so."""
    if moment == "loading":
        return STEPS - 1
    log = (save / "logs" / "rank_0.log").read_text()
    told = max((int(step) for step in re.findall(r"^step (\d+) (?:saved|copied)", log, re.MULTILINE)), default=0)
    return told - 1 if moment in BEHIND else told


def assert_nothing_was_lost(whole: Path, save: str, where: str, saved: int, log: str) -> None:
    """The run that went on, with this log, began at or after step `saved`, and ended as the whole one did."""
    resumed = re.search(rf"resuming from {save}/\.?global_step(\d+)", log)
    assert (int(resumed[1]) if resumed else 0) >= saved, f"{where}, and step {saved} was lost:\n{log}"
    last = find_checkpoint(whole / "whole")
    wanted, found = read_tensors(last), read_tensors(last := whole / save / last.name)
    assert wanted.keys() == found.keys()
    assert [name for name in wanted if not torch.equal(wanted[name], found[name])] == [], where
    assert damage(last, "full") == []
    assert sorted(path.name for path in (whole / save).glob(".global*")) == [], f"what is left of {where}"


def moments() -> list:
    """Forty seeds, eight for each kind of work; one of them, smaller than the others, in the short run of the tests."""
    cases = [(STEPS, MOMENTS[seed % len(MOMENTS)], seed) for seed in range(40)]
    return [(FEW_STEPS, *cases[0][1:]), *(pytest.param(*case, marks=pytest.mark.long) for case in cases)]


@pytest.mark.parametrize(("whole", "moment", "seed"), moments(), indirect=["whole"])
def test_a_killed_run_goes_on_by_itself_and_ends_like_an_undisturbed_one(whole, moment, seed):
    save = f"killed_{seed}"
    if moment == "loading":
        without_the_last(whole, whole / save)
    where = killed_run(whole, save, moment, seed, "max_restarts=1", expect=0)
    print(where)
    saved = step_to_go_on_from(whole / save, moment)
    [event] = [event for event in read_events(whole / save / "logs") if event.kind == "restart"]
    assert "was ended by SIGKILL" in event.details["reason"] and event.details["attempt"] == 2
    log = (whole / save / "logs" / "rank_0_attempt_2.log").read_text()
    if has_reports(seed):
        page = (whole / save / "logs" / "report.md").read_text()
        assert "| restart |" in page and "| finish | done |" in page
    assert_nothing_was_lost(whole, save, where, saved, log)


@pytest.mark.long
@pytest.mark.parametrize("whole", [STEPS], indirect=True)
@pytest.mark.parametrize(("moment", "seed"), [(moment, 100 + seed) for seed, moment in enumerate(MOMENTS)])
def test_a_killed_run_is_resumed_by_the_same_command(whole, moment, seed):
    save = f"killed_{seed}"
    if moment == "loading":
        without_the_last(whole, whole / save)
    where = killed_run(whole, save, moment, seed, expect=1)
    print(where)
    saved = step_to_go_on_from(whole / save, moment)
    log = run(whole, "deepy.py", "train.py", "small", f"save={save}", f"load={save}").stdout
    assert_nothing_was_lost(whole, save, where, saved, log)
