"""The scripts in the repository's root: what they need, what they hide, and their exit codes."""

import os
import shutil
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

import pytest

from megatron import doors
from megatron.errors import RunError, UserError, exit_code, first_line

ROOT = Path(__file__).resolve().parents[2]
DOORS = ("train.py", "generate.py", "evaluate.py", "serve.py")


def run(*command: object, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [str(word) for word in command], capture_output=True, text=True, env=os.environ | environment, timeout=120
    )


@pytest.fixture(scope="module")
def bare_python(tmp_path_factory) -> Path:
    """A Python without any package."""
    folder = tmp_path_factory.mktemp("bare") / "env"
    venv.create(folder, with_pip=False)
    return folder / "bin" / "python"


@pytest.fixture
def clone(tmp_path) -> Path:
    """A door with what it imports, and no environment beside it."""
    shutil.copytree(ROOT / "megatron", tmp_path / "megatron", ignore=shutil.ignore_patterns("__pycache__"))
    for door in DOORS:
        shutil.copy(ROOT / door, tmp_path)
    return tmp_path


@pytest.mark.parametrize("door", DOORS)
def test_without_an_environment_a_door_says_how_to_get_one(clone, bare_python, door):
    result = run(bare_python, clone / door)
    assert result.returncode == 2
    assert "make demo" in result.stderr
    assert "Traceback" not in result.stderr


def test_a_door_goes_on_with_the_environment_beside_it_and_says_so(clone, bare_python):
    venv.create(clone / ".venv", with_pip=False)
    [packages] = (clone / ".venv" / "lib").glob("python*/site-packages")
    (packages / "all_of_ours.pth").write_text(sysconfig.get_path("purelib"))
    result = run(bare_python, clone / "train.py", "--help")
    assert result.returncode == 0
    assert result.stderr.count("\n") == 1
    assert ".venv/bin/python" in result.stderr
    assert "usage: train.py" in result.stdout


def test_an_environment_of_another_machine_is_not_used(clone, bare_python):
    python = clone / ".venv" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_bytes(b"\x7fELF of another machine")
    python.chmod(0o755)
    result = run(bare_python, clone / "train.py")
    assert result.returncode == 2
    assert "make demo" in result.stderr
    assert "Traceback" not in result.stderr


def test_an_environment_that_lacks_the_packages_does_not_start_itself_for_ever(clone):
    venv.create(clone / ".venv", with_pip=False)
    assert run(clone / ".venv" / "bin" / "python", clone / "train.py").returncode == 2


@pytest.mark.parametrize("door", DOORS)
def test_a_wrong_configuration_is_exit_code_two_with_one_clear_message(door):
    result = run(sys.executable, ROOT / door, "num_layres=2")
    assert result.returncode == 2
    assert "num_layers" in result.stderr
    assert "Traceback" not in result.stderr


def test_an_unknown_key_is_found_before_torch_is_imported(tmp_path):
    (tmp_path / "bad.yml").write_text("num_layres: 2\n")
    result = run(sys.executable, "-X", "importtime", ROOT / "train.py", tmp_path / "bad.yml")
    assert result.returncode == 2
    assert "megatron.config" in result.stderr
    assert " torch\n" not in result.stderr


PROGRAM = """
import sys
from megatron.doors import run
from megatron.errors import UserError, work_begins

def target(config):
    if config.training.seed == 1:
        raise UserError("a folder is missing")
    with work_begins():
        raise UserError("an id that no tokenizer made")

sys.modules["target"] = sys.modules["__main__"]
sys.argv = ["train.py", "data_impl=mock", "num_layers=1", "hidden_size=8", "num_attention_heads=1", "seq_length=8",
            "train_iters=1", "train_batch_size=1", "seed=" + sys.argv[1]]
sys.exit(run("train.py", "target:target"))
"""


@pytest.mark.parametrize(
    ("seed", "code", "said"), [(1, 2, "a folder is missing\n"), (2, 1, "error: an id that no tokenizer made\n")]
)
def test_what_the_user_can_mend_is_exit_code_2_until_work_begins(seed, code, said, tmp_path):
    (tmp_path / "program.py").write_text(PROGRAM)
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs" / "default.yml").write_text("{}")
    done = subprocess.run([sys.executable, "program.py", str(seed)], cwd=tmp_path, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (code, said)


def _raise(error):
    raise error


@pytest.mark.parametrize(
    ("main", "code", "said"),
    [
        (lambda: None, 0, ""),
        (lambda: 0, 0, ""),
        (lambda: 7, 7, ""),
        (lambda: _raise(UserError("one", "two")), 2, "one\ntwo\n"),
        (lambda: _raise(RunError("it diverged")), 1, "error: it diverged\n"),
        (lambda: Path("/nowhere/x").read_text(), 1, "error: /nowhere/x: No such file or directory\n"),
        (lambda: _raise(OSError(28, "No space left on device")), 1, "error: No space left on device\n"),
        (lambda: _raise(OSError("no more of it")), 1, "error: no more of it\n"),
        (lambda: _raise(KeyboardInterrupt()), 130, "interrupted\n"),
    ],
)
def test_every_command_translates_its_end_into_the_same_exit_codes(main, code, said, capsys):
    assert exit_code(main) == code
    assert capsys.readouterr() == ("", said)


def test_a_defect_keeps_its_traceback():
    with pytest.raises(ValueError, match="a defect"):
        exit_code(lambda: _raise(ValueError("a defect")))
    with pytest.raises(OSError, match="perhaps a defect"):
        exit_code(lambda: _raise(OSError("perhaps a defect")), failures=(RunError,))


CHECK = """
import sys
from megatron.doors import enter
enter({door!r})
import evaluate
print(evaluate.__file__)
"""


def test_inside_evaluate_py_the_package_evaluate_is_not_ours(tmp_path):
    (tmp_path / "evaluate.py").write_text("")  # stands where the installed package would
    code = CHECK.format(door=str(ROOT / "evaluate.py"))
    result = run(sys.executable, "-c", code, PYTHONPATH=f"{ROOT}{os.pathsep}{tmp_path}")
    assert result.stdout.strip() == str(tmp_path / "evaluate.py"), result.stderr


def test_inside_evaluate_py_the_package_evaluate_is_the_one_that_the_harness_imports():
    code = CHECK.format(door=str(ROOT / "evaluate.py")).replace("import evaluate", "from importlib import util")
    code = code.replace("evaluate.__file__", "util.find_spec('evaluate').origin")
    result = run(sys.executable, "-c", code, PYTHONPATH=str(ROOT))
    assert result.stdout.strip() == f"{sysconfig.get_path('purelib')}/evaluate/__init__.py", result.stderr


@pytest.mark.parametrize("door", DOORS)
def test_a_door_is_short(door):
    assert len((ROOT / door).read_text().splitlines()) <= 30


def test_an_exception_without_text_is_named_by_its_type():
    assert first_line(ValueError()) == "ValueError"
    assert first_line(EOFError("ran out\nof input")) == "EOFError: ran out"


def test_a_door_finds_its_packages_where_the_working_folder_is_gone(tmp_path, monkeypatch):
    """Installations in place put names into the path that are no folders, and relative."""
    gone = tmp_path / "gone"
    gone.mkdir()
    monkeypatch.chdir(gone)
    gone.rmdir()
    monkeypatch.setattr(doors, "_has_environment", lambda: True)  # which the path below hides
    monkeypatch.setattr(sys, "path", ["", "__editable__.a_hook", str(ROOT), "/elsewhere"])
    doors.enter(str(ROOT / "train.py"))
    assert sys.path == ["", "__editable__.a_hook", "/elsewhere"]
