"""A run that is asked to end does so at a step boundary, saved, under every way of starting it."""

import signal
import sys

import pytest

from megatron.events import read_events
from megatron.record.start import read_starts
from tests.end_to_end.commands import SMALL, command, run
from tests.end_to_end.processes import deepy, descendants, end, is_running, started, steps_done, wait_for

MANY = "train_iters=100000"


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "small.yml").write_text(SMALL + "save: run\nload: run\n")
    return tmp_path


@pytest.mark.parametrize("number", [signal.SIGTERM, pytest.param(signal.SIGUSR1, marks=pytest.mark.long)])
def test_a_signal_to_deepy_ends_the_run_with_a_checkpoint_that_it_goes_on_from(folder, number):
    with deepy(folder, "train.py", "small", MANY, "num_gpus=2") as process:
        wait_for(lambda: steps_done(folder / "run") >= 3, process)
        ranks = descendants(process.pid)
        code, out, err = end(process, number)
    assert (code, err) == (
        0,
        f"{number.name}: the run ends at the next step boundary, with a checkpoint; Ctrl-C ends it at once\n",
    )
    step = steps_done(folder / "run")
    assert f"stopped by {number.name} after step {step}; its checkpoint is in run\n" in out
    assert (folder / "run" / "latest").read_text() == f"global_step{step}"
    assert (folder / "run" / f"global_step{step}" / "state" / ".metadata").is_file()
    assert not [process for process in ranks if is_running(process)]
    done = run(folder, "train.py", "small", f"train_iters={step + 2}")
    assert f"resuming from run/global_step{step}" in done.stdout
    events = read_events(folder / "run" / "logs")
    ends = [(event.text, event.details) for event in events if event.kind == "finish"]
    assert ends == [(f"stopped by {number.name} at a step boundary", {"code": 0}), ("done", {"code": 0})]
    assert [event.kind for event in events if event.kind in ("start", "resume")] == ["start", "resume"]
    first, second = read_starts(folder / "run" / "logs")
    assert first.facts["command"] == ["deepy.py", "train.py", "small", MANY, "num_gpus=2"]
    assert (first.facts["layout"]["world_size"], second.facts["layout"]["world_size"]) == (2, 1)
    assert (second.step, second.facts["checkpoint"]) == (step, str(folder / "run" / f"global_step{step}"))


@pytest.mark.long
def test_a_run_whose_output_nobody_reads_any_more_still_saves(folder):
    """As after Ctrl-C with `2>&1 | tee log`, which ends tee too."""
    with deepy(folder, "train.py", "small", MANY, "num_gpus=2") as process:
        wait_for(lambda: steps_done(folder / "run") >= 3, process)
        ranks = descendants(process.pid)
        for stream in (process.stdout, process.stderr):
            stream.close()
        process.stdout = process.stderr = None
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=60) == 0
    step = steps_done(folder / "run")
    assert (folder / "run" / "latest").read_text() == f"global_step{step}"
    assert not [process for process in ranks if is_running(process)]
    assert read_events(folder / "run" / "logs")[-1].text == "stopped by SIGINT at a step boundary"


@pytest.mark.long
def test_a_stop_without_a_place_to_save_is_a_failure(folder):
    (folder / "small.yml").write_text(SMALL)
    with deepy(folder, "train.py", "small", MANY, "num_gpus=2", "log_dir=run/logs") as process:
        wait_for(lambda: steps_done(folder / "run") >= 3, process)
        code, _, err = end(process, signal.SIGINT)
    assert code == 1
    assert err.endswith("save is not set, so nothing is kept\n")
    failure = read_events(folder / "run" / "logs")[-1]
    assert failure.kind == "failure" and failure.text.endswith("save is not set, so nothing is kept")


@pytest.mark.long
def test_under_torchrun_all_ranks_stop_after_the_same_step(folder):
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--master_port=0"]
    torchrun += ["--rdzv_backend=c10d", "--rdzv_endpoint=127.0.0.1:0"]
    with started(folder, [*torchrun, *command("train.py", "small", MANY, "num_workers=2")[1:]]) as process:
        wait_for(lambda: steps_done(folder / "run") >= 3, process)
        _, out, _ = end(process, signal.SIGTERM)
    step = steps_done(folder / "run")
    assert f"stopped by SIGTERM after step {step}; its checkpoint is in run\n" in out
    assert (folder / "run" / "latest").read_text() == f"global_step{step}"


@pytest.mark.long
def test_the_limit_of_time_ends_the_run_with_a_checkpoint(folder):
    done = run(folder, "deepy.py", "train.py", "small", MANY, "num_gpus=2", "time_limit_minutes=0.2")
    step = steps_done(folder / "run")
    assert f"stopped by time_limit_minutes after step {step}; its checkpoint is in run\n" in done.stdout
    assert (folder / "run" / "latest").read_text() == f"global_step{step}"
