"""Scripts from the fork server are like those that Python was started for."""

import os
import subprocess
import sys

import pytest

from tests.forking import BACKEND, run_script

pytestmark = pytest.mark.skipif(BACKEND != "gloo", reason="the fork server is one for GPUs")
SCRIPT = """
import atexit, os, subprocess, sys
import added, neighbour
atexit.register(print, "at the end")
print(sys.argv[1:], os.getcwd(), os.environ.get("MINE"), os.environ.get("THEIRS"), __name__, sys.stdin.read() == "")
print(sys.path[0] == os.path.dirname(__file__), os.path.exists(__file__), flush=True)
subprocess.run(["echo", "from a child"])
print("to stderr", file=sys.stderr)
sys.exit(3)
"""


@pytest.fixture
def script(tmp_path):
    (tmp_path / "scripts").mkdir()
    (tmp_path / "scripts" / "neighbour.py").write_text("")
    (tmp_path / "scripts" / "script.py").write_text(SCRIPT)
    return tmp_path / "scripts" / "script.py"


def test_a_forked_script_does_what_a_started_one_does(tmp_path, script, monkeypatch):
    monkeypatch.setenv("THEIRS", "of the tests")
    (tmp_path / "modules").mkdir()
    (tmp_path / "modules" / "added.py").write_text("")
    environment = {"PATH": os.environ["PATH"], "MINE": "own", "PYTHONPATH": str(tmp_path / "modules")}
    forked = run_script(script, ["a", "--b"], tmp_path, environment, timeout=60)
    started = subprocess.run(
        [sys.executable, script, "a", "--b"],
        capture_output=True, text=True, cwd=tmp_path, env=environment, stdin=subprocess.DEVNULL,
    )  # fmt: skip
    assert (forked.returncode, forked.stdout, forked.stderr) == (3, started.stdout, "to stderr\n")
    assert (started.returncode, started.stderr) == (3, "to stderr\n")


def test_an_exception_is_exit_code_one_with_its_traceback(tmp_path, script):
    script.write_text("raise ValueError('unhappy')")
    done = run_script(script, [], tmp_path, {}, timeout=60)
    assert done.returncode == 1 and done.stderr.endswith("ValueError: unhappy\n")


def test_a_script_that_takes_too_long_is_killed(tmp_path, script):
    script.write_text("import time\nprint('begun', flush=True)\ntime.sleep(600)")
    with pytest.raises(subprocess.TimeoutExpired) as raised:
        run_script(script, [], tmp_path, {}, timeout=4)
    assert raised.value.stdout == b"begun\n"
