"""Full disks, read-only folders, damaged files, two runs in one folder: messages, exit codes, and nothing is lost."""

import contextlib
import os
import shutil
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
import torch

from megatron.checkpoint.folder import damage, find_checkpoint
from megatron.checkpoint.reading import read_tensors
from tests.end_to_end.commands import SMALL, command, run
from tests.end_to_end.processes import deepy, end, started, steps_done, wait_for

KEPT = "num_gpus: 2\nzero_optimization: {stage: 1}\ncheckpoint_factor: 5\n"
WAYS = [pytest.param(way, id=way) for way in ("async_save=false", "async_save=true")]


@pytest.fixture(scope="module")
def configured(tmp_path_factory) -> Path:
    """The folder with a configuration."""
    folder = tmp_path_factory.mktemp("faults")
    (folder / "small.yml").write_text(SMALL + KEPT)
    return folder


@pytest.fixture(scope="module")
def folder(configured) -> Path:
    """And with a run that was never disturbed, with checkpoints of steps 5, 10, 15 and 20."""
    run(configured, "train.py", "small", "save=whole", "load=whole")
    return configured


@contextlib.contextmanager
def small_disk(place: Path, kibibytes: int) -> Iterator[Path]:
    """A file system of that size."""
    place.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={kibibytes}k", "tmpfs", str(place)]
    if (done := subprocess.run(mount, capture_output=True, text=True)).returncode:
        pytest.skip(f"no file system can be mounted here: {done.stderr.strip()}")
    try:
        yield place
    finally:
        subprocess.run(["umount", "--lazy", str(place)], check=True)


def complaint(stderr: str) -> str:
    """What a user gets to read."""
    lines = [line for line in stderr.splitlines() if line.strip()]
    assert "Traceback" not in stderr and len(lines) <= 2, stderr
    return "\n".join(lines)


def same_end(folder: Path, save: Path) -> bool:
    """Whether a run ended as the undisturbed one did, bit for bit."""
    wanted, found = (read_tensors(path / "global_step20") for path in (folder / "whole", save))
    return wanted.keys() == found.keys() and all(torch.equal(wanted[name], found[name]) for name in wanted)


def disk_full(folder: Path, disk: Path, script: str, way: str) -> None:
    """`disk` has room for two checkpoints, not for a third; with more room the run resumes and finishes."""
    save = disk / "run"
    words = ("small", f"save={save}", f"load={save}", f"log_dir={folder / 'logs'}", way)
    done = run(folder, *script.split(), *words, expect=1)
    said = complaint(done.stderr)
    assert f"cannot save {save}/global_step15" in said and "No space left on device" in said
    assert find_checkpoint(save) == save / "global_step10"
    assert damage(save / "global_step5", "full") == damage(save / "global_step10", "full") == []
    subprocess.run(["mount", "-o", "remount,size=16m", str(disk)], check=True)
    assert f"resuming from {save}/global_step10" in run(folder, *script.split(), *words).stdout
    assert damage(save / "global_step20", "full") == []


@pytest.mark.long
def test_a_full_disk_ends_the_run_and_leaves_what_was_saved(folder, tmp_path):
    with small_disk(tmp_path / "disk", 1500) as disk:
        disk_full(folder, disk, "train.py", "async_save=false")
        assert same_end(folder, disk / "run")


@pytest.mark.long
@pytest.mark.parametrize("way", WAYS)
def test_a_full_disk_ends_all_ranks_and_leaves_what_was_saved(folder, tmp_path, way):
    with small_disk(tmp_path / "disk", 1500) as disk:
        disk_full(folder, disk, "deepy.py train.py", way)


def as_anybody(*words: object) -> list[str]:
    """A command whose process obeys permissions, which root's do not."""
    if os.geteuid() != 0:
        return command(*words)
    if shutil.which("setpriv") is None:
        pytest.skip("permissions do not bind root, and setpriv is not installed")
    return ["setpriv", "--bounding-set=-dac_override,-dac_read_search", *command(*words)]


@pytest.mark.long
@pytest.mark.parametrize("way", WAYS)
def test_a_folder_that_may_no_longer_be_written_to_ends_all_ranks_and_leaves_what_was_saved(folder, tmp_path, way):
    save = tmp_path / "run"
    words = ("small", f"save={save}", f"load={save}", f"log_dir={tmp_path}", "checkpoint_factor=1", way)
    with started(folder, as_anybody("deepy.py", "train.py", *words, "train_iters=100000")) as process:
        wait_for((save / "latest").exists, process)
        save.chmod(0o555)
        code, _, stderr = end(process)
    save.chmod(0o755)
    assert code == 1
    said = complaint(stderr)
    assert "cannot save into" in said and str(save) in said and "Permission denied" in said
    assert (last := find_checkpoint(save)) is not None and damage(last, "full") == []


def test_a_folder_that_may_not_be_written_to_is_refused_before_work_begins(configured, tmp_path):
    (tmp_path / "closed").mkdir(mode=0o555)
    words = as_anybody("train.py", "small", f"save={tmp_path / 'closed'}", f"log_dir={tmp_path}")
    with started(configured, words) as process:
        code, _, stderr = end(process)
    assert code == 2
    assert complaint(stderr) == f"save ({tmp_path / 'closed'}) cannot be written to"


def truncate(checkpoint: Path) -> str:
    file = max((checkpoint / "state").glob("__*"), key=lambda f: f.stat().st_size)
    os.truncate(file, file.stat().st_size // 2)
    return f"global_step20 is damaged and not used: {file.name} has "


def flip_a_byte(checkpoint: Path) -> str:
    file = max((checkpoint / "state").glob("__*"), key=lambda f: f.stat().st_size)
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    return f"global_step20 is damaged and not used: {file.name} has other content than was written"


def empty_latest(checkpoint: Path) -> str:
    (checkpoint.parent / "latest").write_text("")
    return "latest is missing or empty: taking the newest whole checkpoint"


@pytest.mark.long
@pytest.mark.parametrize("spoil", [truncate, flip_a_byte, empty_latest])
def test_a_run_goes_on_from_the_newest_good_checkpoint_says_so_and_ends_as_it_would_have(folder, spoil):
    save = folder / spoil.__name__
    shutil.copytree(folder / "whole", save, ignore=shutil.ignore_patterns("logs"))
    told = spoil(save / "global_step20")
    words = ("train.py", "small", f"save={save}", f"load={save}", "verify=full")
    done = run(folder, *words)
    assert told in done.stdout + done.stderr
    assert ("step 20" if spoil is empty_latest else f"resuming from {save}/global_step15") in done.stdout
    assert same_end(folder, save)
    for checkpoint in save.glob("global_step*"):
        (checkpoint / "manifest.json").unlink()
    assert "holds no whole checkpoint" in run(folder, *words, expect=2).stderr


@pytest.mark.long
def test_a_second_run_into_the_same_folder_is_refused_by_name_and_the_first_goes_on(folder):
    words = ("train.py", "small", "save=shared", "load=shared", "checkpoint_factor=100000", "train_iters=100000")
    words += ("log_interval=20",)  # the output of the first is not read
    with deepy(folder, *words) as first:
        wait_for(lambda: steps_done(folder / "shared") > 0, first)
        done = run(folder, "deepy.py", *words, expect=2)
        assert "save (shared) is being written to by another run: process " in complaint(done.stderr)
        beside = (*words, "save=beside", "load=beside", "log_dir=shared/logs")  # the first would lose its metrics
        done = run(folder, "train.py", *beside[1:], expect=2)
        assert "log_dir (shared/logs) is being written to by another run: process " in complaint(done.stderr)
        before = steps_done(folder / "shared")
        wait_for(lambda: steps_done(folder / "shared") > before, first)
        for process in psutil.Process(first.pid).children(recursive=True):
            with contextlib.suppress(psutil.NoSuchProcess):
                process.send_signal(signal.SIGKILL)
        end(first)
    run(folder, "deepy.py", *words, "exit_interval=2")
    assert find_checkpoint(folder / "shared").name == "global_step2"


FP16_ON_CPU = """
from deepspeed.accelerator.cpu_accelerator import CPU_Accelerator

CPU_Accelerator.is_fp16_supported = lambda self: True
DEEPY_REGISTRY = {}
"""


@pytest.mark.long
def test_an_fp16_run_whose_gradients_overflow_at_the_lowest_scale_ends_and_keeps_what_was_saved(tmp_path):
    """Weights this large overflow at any scale."""
    (tmp_path / "small.yml").write_text(SMALL.replace("train_iters: 20", "train_iters: 200"))
    (tmp_path / "fp16_on_cpu.py").write_text(FP16_ON_CPU)
    words = ("small", "save=run", "plugins=[fp16_on_cpu]", "init_method_std=1e4", "extra_save_iters=[0]")
    fp16 = "fp16={enabled: true, initial_scale_power: 4, hysteresis: 1, min_loss_scale: 2}"
    modules = os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", modules)
        done = run(tmp_path, "train.py", *words, fp16, expect=1)
    said = complaint(done.stderr)
    # 16 halves to 2 in three steps; ten more, the third among them, are too many
    assert "the training has diverged: the gradients of 12 steps in a row, up to step 12, were not finite" in said
    assert "loss scale 2, which is its lowest" in said and "bad_batch_step_12.jsonl" in said
    assert [path.name for path in (tmp_path / "run").glob("global_step*")] == ["global_step0"]
    assert damage(tmp_path / "run" / "global_step0", "full") == []
