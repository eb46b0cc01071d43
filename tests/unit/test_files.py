"""Paths and files as users hand them over."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from megatron.errors import UserError
from megatron.files import FileLock, exists, expanded, is_file, is_folder, refuse_overwriting, replaced_when_complete


def test_home_and_variables_are_expanded_as_a_shell_does(monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    monkeypatch.setenv("RUN", "seven")
    assert expanded("~/a/$RUN/${RUN}x", "save") == "/home/me/a/seven/sevenx"
    assert expanded("a~/b$", "save") == "a~/b$"


def test_a_variable_that_is_not_set_is_refused_by_its_name(monkeypatch):
    monkeypatch.delenv("NOT_SET_HERE", raising=False)
    with pytest.raises(UserError, match="NOT_SET_HERE is not set"):
        expanded("${NOT_SET_HERE}/a", "save")


def test_a_user_who_does_not_exist_is_refused():
    with pytest.raises(UserError, match="no user nobody_of_this_name"):
        expanded("~nobody_of_this_name/a", "save")


@pytest.mark.parametrize("text", ["x" * 5000, "zero\0byte", "a/" * 3000])
def test_text_that_cannot_be_a_path_is_no_file(text):
    assert not is_file(text) and not is_folder(text) and not exists(text)


@pytest.mark.parametrize("spelling", ["same", "dotted", "symbolic link", "hard link"])
def test_an_output_that_is_an_input_is_refused_by_any_spelling(tmp_path, spelling):
    (tmp_path / "in").write_text("text")
    (tmp_path / "symbolic link").symlink_to("in")
    (tmp_path / "hard link").hardlink_to(tmp_path / "in")
    output = {"same": tmp_path / "in", "dotted": f"{tmp_path}/../{tmp_path.name}/./in"}.get(
        spelling, tmp_path / spelling
    )
    with pytest.raises(UserError, match=r"output .* is input .* itself"):
        refuse_overwriting({"output": output}, {"input": tmp_path / "in"})
    refuse_overwriting({"output": tmp_path / "out"}, {"input": tmp_path / "in"})


def test_a_file_appears_under_its_name_only_when_it_is_complete(tmp_path):
    path = tmp_path / "folder" / "file"
    with replaced_when_complete(path) as file:
        file.write("whole")
        assert not path.exists()
    assert path.read_text() == "whole"
    with pytest.raises(RuntimeError), replaced_when_complete(path) as file:
        file.write("half")
        raise RuntimeError
    assert path.read_text() == "whole" and list(path.parent.iterdir()) == [path]


def test_a_lock_is_held_by_one_process_and_given_back_at_its_end(tmp_path):
    code = "import sys, pathlib; from megatron.files import FileLock; FileLock(pathlib.Path(sys.argv[1]), 'it').take()"
    other = [sys.executable, "-c", code, str(tmp_path / "lock")]
    with FileLock(tmp_path / "lock", "it") as lock:
        lock.take()  # held already
        refused = subprocess.run(other, capture_output=True, text=True, cwd=Path(__file__).parents[2])
        assert (
            refused.returncode != 0
            and f"it is being written to by another run: process {os.getpid()}" in refused.stderr
        )
    assert subprocess.run(other, cwd=Path(__file__).parents[2]).returncode == 0


def test_a_lock_is_taken_from_a_process_that_was_given_up_and_from_no_other(tmp_path):
    code = "import sys, pathlib; from megatron.files import FileLock; FileLock(pathlib.Path(sys.argv[1]), 'it').take()"
    words = [sys.executable, "-c", f"{code}; print('taken', flush=True); sys.stdin.read()", str(tmp_path / "lock")]
    root = Path(__file__).parents[2]
    with subprocess.Popen(words, cwd=root, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout.readline() == "taken\n"
        host = os.uname().nodename
        with pytest.raises(UserError, match=f"another run: process {holder.pid} on {host}"):
            FileLock(tmp_path / "lock", "it", abandoned=[(host, holder.pid + 1), ("other", holder.pid)]).take()
        with FileLock(tmp_path / "lock", "it", abandoned=[(host, holder.pid)]) as lock:
            assert lock._is_at_path(lock._descriptor)
            assert json.loads((tmp_path / "lock").read_text())["process"] == os.getpid()
        holder.stdin.close()


def test_a_terminal_or_device_may_be_both_input_and_output():
    refuse_overwriting({"output": "/dev/null"}, {"input": "/dev/null"})


def test_a_temporary_lock_leaves_no_file_and_is_taken_anew_after_its_deletion(tmp_path):
    path = tmp_path / "lock"
    with FileLock(path, "it", temporary=True):
        assert path.exists()
    assert not path.exists()
    lock = FileLock(path, "it", temporary=True)
    stale = lock._locked_file()
    path.unlink()
    assert not lock._is_at_path(stale)
    os.close(stale)
    with lock:
        assert lock._is_at_path(lock._descriptor)
