"""Kill a run at random moments, with signal 9: the next one goes on and ends as if nothing had happened.

The runs save after every step, in the background, and prune; so most moments lie in saving, in pruning, or between a
finished and an unfinished checkpoint.
"""

import os
import random
import signal
import subprocess
import time
from contextlib import suppress
from pathlib import Path

import psutil
import pytest
import torch

from megatron.checkpoint.reading import read_tensors
from tests.end_to_end.commands import ENVIRONMENT, SMALL, command, run

STEPS = 30
SAVING = f"""
train_iters: {STEPS}
eval_interval: 1000
checkpoint_factor: 1
keep_last_n_checkpoints: 2
async_save: true
num_gpus: 2
zero_optimization: {{stage: 1}}
"""


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    """The folder with the configuration, and the undisturbed run in it."""
    folder = tmp_path_factory.mktemp("torture")
    text = SMALL.replace("train_iters: 20\n", "").replace("eval_interval: 10\n", "")
    (folder / "small.yml").write_text(text + SAVING)
    run(folder, "deepy.py", "train.py", "small", "save=whole", "load=whole")
    return folder


def ranks_of(launcher: "subprocess.Popen[bytes]") -> list[psutil.Process]:
    """The processes that train."""
    children = psutil.Process(launcher.pid).children(recursive=True)
    return [child for child in children if any(word.endswith("rank.py") for word in child.cmdline())]


def killed_run(folder: Path, save: str, seed: int) -> int:
    """Start a run, kill one rank or everything at a random moment; returns the exit code (0: it was too late)."""
    choice = random.Random(seed)
    log = folder / save / "logs" / "rank_0.log"
    process = subprocess.Popen(
        command("deepy.py", "train.py", "small", f"save={save}", f"load={save}"),
        cwd=folder,
        env=os.environ | ENVIRONMENT,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    deadline = time.monotonic() + 120
    while not (log.exists() and "starting fresh" in log.read_text()):
        assert process.poll() is None and time.monotonic() < deadline, "the run did not begin to train"
        time.sleep(0.02)
    time.sleep(choice.uniform(0, 3.0))
    victims = ranks_of(process)
    if victims:
        for victim in victims if choice.random() < 0.5 else [choice.choice(victims)]:
            with suppress(psutil.NoSuchProcess):
                victim.send_signal(signal.SIGKILL)
    return process.wait(timeout=120)


def moments() -> list:
    """Forty seeds; one of them in the short run of the tests."""
    return [seed if seed < 1 else pytest.param(seed, marks=pytest.mark.long) for seed in range(40)]


@pytest.mark.parametrize("seed", moments())
def test_a_killed_run_resumes_and_ends_like_an_undisturbed_one(whole, seed):
    save = f"killed_{seed}"
    code = killed_run(whole, save, seed)
    assert code in (0, 1)
    run(whole, "deepy.py", "train.py", "small", f"save={save}", f"load={save}")
    wanted, found = (read_tensors(whole / name / f"global_step{STEPS}") for name in ("whole", save))
    assert wanted.keys() == found.keys()
    assert [name for name in wanted if not torch.equal(wanted[name], found[name])] == []
    assert sorted(path.name for path in (whole / save).glob(".global*")) == [], "what the crash left is cleared away"
