"""The folder of a run: what survives a crash at each place, and that one run at a time writes there."""

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from megatron.checkpoint.folder import checkpoint_path, clear_remains, find_checkpoint, publish, steps_in
from megatron.checkpoint.lock import LOCK, SaveLock
from megatron.errors import UserError

HOLD = """
import os, sys, time
from pathlib import Path
from megatron.checkpoint.lock import SaveLock
with SaveLock(Path(sys.argv[1])) as lock:
    lock.take()
    child = os.fork()  # as a loader of data is
    print(child, flush=True) if child else None
    time.sleep(600)
"""


def save(folder: Path, step: int) -> Path:
    (folder / "unfinished").mkdir()
    publish(folder / "unfinished", folder / f"global_step{step}", {"progress.json": {"step": step}}, {})
    return folder / f"global_step{step}"


def test_a_checkpoint_that_was_being_replaced_is_found_read_and_put_back(tmp_path):
    """The crash came between the two renames, and there is no other."""
    replaced = save(tmp_path, 5).rename(tmp_path / ".global_step5.replaced")
    assert steps_in(tmp_path) == [5] and checkpoint_path(tmp_path, 5) == replaced
    assert find_checkpoint(tmp_path) == find_checkpoint(tmp_path, 5) == replaced
    clear_remains(tmp_path)
    assert find_checkpoint(tmp_path) == tmp_path / "global_step5"
    assert not replaced.exists()


def test_where_the_new_one_is_there_the_replaced_one_is_no_checkpoint_and_is_cleared_away(tmp_path):
    shutil.copytree(save(tmp_path, 5), tmp_path / ".global_step5.replaced")
    for remains in (".global_step4.deleted", ".global_step6.unfinished"):
        (tmp_path / remains).mkdir()
    assert steps_in(tmp_path) == [5] and find_checkpoint(tmp_path) == tmp_path / "global_step5"
    clear_remains(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["global_step5", "latest"]


def test_a_second_writer_is_refused_with_the_name_of_the_first_until_that_is_killed(tmp_path):
    holder = subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    child = int(holder.stdout.readline())
    try:
        told = rf"save \({tmp_path}\) is being written to by another run: process {holder.pid} on .*, since 20"
        with pytest.raises(UserError, match=told):
            SaveLock(tmp_path).take()
        (tmp_path / LOCK).write_text("")
        with pytest.raises(UserError, match="one that has only just begun"):
            SaveLock(tmp_path).take()
        holder.kill()
        holder.wait()
        os.kill(child, 0)  # what it has forked lives on, and holds nothing
        with SaveLock(tmp_path) as lock:
            lock.take()
            assert f'"process": {os.getpid()}' in (tmp_path / LOCK).read_text()
            lock.take()
    finally:
        os.kill(child, signal.SIGKILL)
        holder.kill()


def test_a_folder_that_is_not_there_yet_is_locked_later_and_no_folder_never(tmp_path):
    with SaveLock(tmp_path / "new") as lock, SaveLock(None) as none:
        for each in (lock, none):
            each.take()
        assert not (tmp_path / "new").exists()
        (tmp_path / "new").mkdir()
        lock.take()
        assert (tmp_path / "new" / LOCK).exists()


def test_where_files_cannot_be_locked_that_is_said_and_the_run_goes_on(tmp_path, monkeypatch, caplog):
    def refuse(*_):
        raise OSError(38, "Function not implemented")  # what Lustre says without its option flock

    monkeypatch.setattr("fcntl.lockf", refuse)
    with SaveLock(tmp_path) as lock:
        lock.take()
    assert "cannot be locked (Function not implemented): let no other run save there" in caplog.text
