"""The folder of a run: what survives a crash at each place, and that one run at a time writes there."""

import contextlib
import itertools
import json
import os
import pkgutil
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from megatron.checkpoint.folder import (
    Retention,
    checkpoint_path,
    clear_remains,
    damage,
    find_checkpoint,
    prune,
    publish,
    steps_in,
)
from megatron.errors import UserError
from megatron.files import FolderLock

LOCK = ".save.lock"

HOLD = """
import os, sys, time
from pathlib import Path
from megatron.files import FolderLock
with FolderLock(Path(sys.argv[1]), "save") as lock:
    lock.take()
    child = os.fork()  # as a loader of data is
    print(child, flush=True) if child else None
    time.sleep(600)
"""


def save(folder: Path, step: int) -> Path:
    (folder / "unfinished").mkdir()
    publish(folder / "unfinished", folder / f"global_step{step}", {"progress.json": {"step": step}}, {})
    return folder / f"global_step{step}"


class Crash(Exception):
    """What ends a process in the middle."""


CHANGES = ["pathlib.Path.rename", "os.fsync", "shutil.rmtree", "os.unlink", "os.rmdir"]


def crashing_at(number: int, monkeypatch) -> Callable[[], bool]:
    """Let the process die before the change number `number` that it makes to the disk; tells whether it did."""
    left = itertools.count(number, -1)
    dead: list[bool] = []

    def before(change):
        def changed(*arguments, **options):
            if dead or next(left) == 0:
                dead.append(True)
                raise Crash
            return change(*arguments, **options)

        return changed

    for name in CHANGES:
        owner, _, function = name.rpartition(".")
        monkeypatch.setattr(name, before(getattr(pkgutil.resolve_name(owner), function)))
    return lambda: bool(dead)


def replace(folder: Path) -> None:
    shutil.rmtree(folder / "unfinished", ignore_errors=True)
    save(folder, 10)


@pytest.mark.parametrize(
    "change",
    [lambda folder: save(folder, 15), replace, lambda folder: prune(folder, Retention(last=1))],
    ids=["new", "replaced", "pruned"],
)
def test_a_crash_at_any_place_leaves_latest_on_a_whole_checkpoint_and_nothing_half_under_a_name(
    tmp_path, monkeypatch, caplog, change
):
    for number in itertools.count():
        folder = tmp_path / str(number)
        folder.mkdir()
        save(folder, 5), save(folder, 10)
        with monkeypatch.context() as patch:
            died = crashing_at(number, patch)
            with contextlib.suppress(Crash):
                change(folder)
        assert find_checkpoint(folder, verify="full") in {checkpoint_path(folder, step) for step in (10, 15)}
        assert not [step for step in steps_in(folder) if damage(checkpoint_path(folder, step), "full")]
        assert caplog.text == "", "latest names what is there"
        if not died():
            break
    assert number >= 2


def test_each_file_of_a_checkpoint_is_verified(tmp_path):
    documents = {f"{letter}.json": {} for letter in "abcde"}
    (tmp_path / "unfinished").mkdir()
    publish(tmp_path / "unfinished", tmp_path / "global_step5", documents, {})
    for name in documents:
        file = tmp_path / "global_step5" / name
        for content, verify, told in (
            ("[]", "full", "has other content"),
            ("{ }", "quick", "has 3 bytes instead of 2"),
        ):
            file.write_text(content)
            assert [told in problem and name in problem for problem in damage(file.parent, verify)] == [True]
        file.write_text(json.dumps({}))
    assert damage(tmp_path / "global_step5", "full") == []


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (None, "manifest.json is missing or cannot be read"),
        ("{", "manifest.json is missing or cannot be read"),
        ("[]", "manifest.json is missing or cannot be read"),
        ("{}", "manifest.json does not describe the files of a checkpoint"),
        ('{"format": 1, "files": []}', "manifest.json does not describe the files of a checkpoint"),
        ('{"format": 1, "files": {"progress.json": 7}}', "manifest.json does not describe the files of a checkpoint"),
        ('{"format": 2}', "its format is 2, and this version of Deepy reads format 1"),
    ],
)
def test_a_bad_manifest_is_told_in_our_words(tmp_path, content, problem):
    manifest = save(tmp_path, 5) / "manifest.json"
    manifest.unlink() if content is None else manifest.write_text(content)
    assert damage(tmp_path / "global_step5") == [problem]


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
            FolderLock(tmp_path, "save").take()
        (tmp_path / LOCK).write_text("")
        with pytest.raises(UserError, match="one that has only just begun"):
            FolderLock(tmp_path, "save").take()
        holder.kill()
        holder.wait()
        os.kill(child, 0)  # what it has forked lives on, and holds nothing
        with FolderLock(tmp_path, "save") as lock:
            lock.take()
            assert f'"process": {os.getpid()}' in (tmp_path / LOCK).read_text()
            lock.take()
    finally:
        os.kill(child, signal.SIGKILL)
        holder.kill()


def test_a_folder_that_is_not_there_yet_is_locked_later_and_no_folder_never(tmp_path):
    with FolderLock(tmp_path / "new", "save") as lock, FolderLock(None, "save") as none:
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
    with FolderLock(tmp_path, "save") as lock:
        lock.take()
    assert "cannot be locked (Function not implemented): let no other run write there" in caplog.text
