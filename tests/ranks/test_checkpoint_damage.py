"""Checkpoints that are damaged or made by somebody with a purpose, and the tool that looks into them."""

import io
import json
import os
import pickle
import shutil
from functools import partial
from pathlib import Path

import pytest
import torch

from megatron.checkpoint.folder import damage, find_checkpoint
from megatron.checkpoint.reading import SafeReader, read_tensors, tensor_shapes
from megatron.checkpoint.state import TrainState
from megatron.checkpoint.store import CheckpointWriter, load_checkpoint
from megatron.errors import UserError, exit_code
from tests.ranks.moves import engine_of, run_steps, tensors
from tests.ranks.run import run_ranks
from tools.inspect_checkpoint import main as inspect_checkpoint


@pytest.fixture(scope="module")
def two_checkpoints(tmp_path_factory):
    folder = tmp_path_factory.mktemp("two")
    run_ranks(2, saving_two, str(folder))
    return folder


def saving_two(folder: str) -> None:
    engine, plan = engine_of({"data": 2, "zero": 1})
    writer = CheckpointWriter(engine, Path(folder), {})
    state = TrainState()
    for _ in range(2):
        state, _ = run_steps(engine, plan, state, 1)
        writer.save(state)


def test_the_manifest_has_every_file_but_itself(two_checkpoints):
    for checkpoint in two_checkpoints.glob("global_step*"):
        files = {str(path.relative_to(checkpoint)) for path in checkpoint.rglob("*") if path.is_file()}
        assert len(files) == 7, "of two ranks, the description of their tensors, three documents and the manifest"
        assert json.loads((checkpoint / "manifest.json").read_text())["files"].keys() == files - {"manifest.json"}


def truncate(path: Path) -> str:
    file = max((path / "state").glob("__*"), key=lambda f: f.stat().st_size)
    os.truncate(file, file.stat().st_size - 1)
    return file.name


def flip_a_byte(path: Path) -> str:
    file = max((path / "state").glob("__*"), key=lambda f: f.stat().st_size)
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    return file.name


def remove_a_file(path: Path) -> str:
    (path / "progress.json").unlink()
    return "progress.json"


def lie_about_the_step(path: Path) -> str:
    """In as many bytes."""
    text = (path / "progress.json").read_text()
    (path / "progress.json").write_text(text.replace('"step": ', '"step":') + " ")
    return "progress.json has other content"


def garble_the_description(path: Path) -> str:
    file = path / "state" / ".metadata"
    file.write_bytes(file.read_bytes().replace(b"fp32", b"pf32", 1))
    return ".metadata has other content"


def spoil_the_manifest(path: Path) -> str:
    (path / "manifest.json").write_text("{}")
    return "manifest.json"


@pytest.mark.parametrize(
    ("spoil", "verify"),
    [
        (truncate, "quick"),
        (remove_a_file, "quick"),
        (lie_about_the_step, "quick"),
        (garble_the_description, "quick"),
        (spoil_the_manifest, "quick"),
        (flip_a_byte, "full"),
    ],
)
def test_a_damaged_checkpoint_is_named_file_by_file_and_the_one_before_taken(
    tmp_path, two_checkpoints, caplog, spoil, verify
):
    folder = tmp_path / "copy"
    shutil.copytree(two_checkpoints, folder)
    assert damage(folder / "global_step2", "full") == []
    file = spoil(folder / "global_step2")
    assert find_checkpoint(folder, verify=verify) == folder / "global_step1"
    assert "global_step2 is damaged" in caplog.text and file in caplog.text
    with pytest.raises(UserError, match=rf"global_step2 is damaged:\n.*{file}"):
        find_checkpoint(folder, 2, verify)
    spoil(folder / "global_step1")
    with pytest.raises(UserError, match="no whole checkpoint"):
        find_checkpoint(folder, verify=verify)


@pytest.mark.parametrize("content", ["", "global_step77", None], ids=["empty", "wrong", "missing"])
def test_without_a_good_latest_the_newest_checkpoint_is_taken(tmp_path, two_checkpoints, caplog, content):
    folder = tmp_path / "copy"
    shutil.copytree(two_checkpoints, folder)
    (folder / "latest").unlink()
    if content is not None:
        (folder / "latest").write_text(content)
    assert find_checkpoint(folder) == folder / "global_step2"
    assert "taking the newest" in caplog.text


def test_what_a_crash_leaves_is_no_checkpoint(tmp_path):
    assert find_checkpoint(tmp_path) is None
    (tmp_path / ".global_step5.unfinished").mkdir()
    assert find_checkpoint(tmp_path) is None


class Malicious:
    def __reduce__(self):
        return os.system, ("touch pwned",)


# the same call, by a dotted name through a module that describes tensors
DOTTED = b"\x80\x04\x8c\x27torch.distributed.checkpoint.filesystem\x8c\tos.system\x93\x8c\x0btouch pwned\x85R."


def inspect(monkeypatch, capsys, *words: object) -> tuple[int, str]:
    """What `tools/inspect_checkpoint.py` returns and prints."""
    monkeypatch.setattr("sys.argv", ["inspect_checkpoint.py", *map(str, words)])
    code, said = exit_code(inspect_checkpoint), capsys.readouterr()
    return code, said.out + said.err


def test_checkpoints_are_listed_verified_shown_and_compared(tmp_path, two_checkpoints, monkeypatch, capsys):
    folder = tmp_path / "copy"
    shutil.copytree(two_checkpoints, folder)
    one, two = folder / "global_step1", folder / "global_step2"
    ask = partial(inspect, monkeypatch, capsys)
    code, said = ask(folder)
    assert code == 0 and [line.split(":")[0] for line in said.splitlines()] == ["global_step1", "global_step2"]
    assert "16 samples, 256 tokens" in said
    assert ask(folder, "--verify") == (0, "".join(f"{p.name}: every file is as it was written\n" for p in (one, two)))
    code, said = ask(two, "--filter", "final_norm.weight/fp32")
    values = tensors(two)["final_norm.weight/fp32"]
    assert code == 0 and f"[32]                 mean {float(values.mean()):+.3e}  std {float(values.std()):.3e}" in said
    assert ask(two, "--compare", two) == (0, f"the {len(tensors(two))} tensors are equal, bit for bit\n")
    code, said = ask(one, "--compare", two, "--filter", "final_norm.weight/fp32")
    gap = float((tensors(one)["final_norm.weight/fp32"] - values).abs().max())
    assert (code, said) == (1, f"final_norm.weight/fp32: 32 of 32 elements, by at most {gap:.3e}\n")
    file = flip_a_byte(two)
    assert ask(folder)[0] == 0 and ask(folder, "--verify")[0] == 1
    assert f"global_step2: {file} has other content than was written" in ask(folder, "--verify")[1]
    remove_a_file(two)
    for words in ([folder], [two]):
        code, said = ask(*words)
        assert code == 1 and "global_step2: DAMAGED: progress.json is missing" in said
    for words in ([tmp_path / "gone"], [two, "--compare", folder]):
        code, said = ask(*words)
        assert code == 2 and "not a checkpoint" in said


@pytest.mark.parametrize("content", [pickle.dumps(Malicious()), DOTTED], ids=["plain", "dotted"])
def test_a_checkpoint_cannot_run_code(tmp_path, two_checkpoints, monkeypatch, content):
    folder = tmp_path / "copy"
    shutil.copytree(two_checkpoints, folder)
    monkeypatch.chdir(tmp_path)
    (folder / "global_step2" / "state" / ".metadata").write_bytes(content)
    with pytest.raises(UserError, match=r"metadata is refused: it asks for .*system"):
        read_tensors(folder / "global_step2")
    assert not (tmp_path / "pwned").exists()


def put_a_program_into_a_tensor(checkpoint: Path) -> None:
    """In the place of the largest tensor, in the form in which torch kept tensors once and reads them still."""
    places = SafeReader(checkpoint / "state").read_metadata().storage_data
    place = max(places.values(), key=lambda each: each.length)
    program = io.BytesIO()
    torch.save(Malicious(), program, _use_new_zipfile_serialization=False)
    file = checkpoint / "state" / place.relative_path
    content = file.read_bytes()
    program = program.getvalue().ljust(place.length, b"\0")
    file.write_bytes(content[: place.offset] + program + content[place.offset + place.length :])
    torch.load(io.BytesIO(program), weights_only=False)
    Path("pwned").unlink()  # so it is one


def loading_a_program(checkpoint: str) -> None:
    engine, _ = engine_of({})
    with pytest.raises(UserError, match=r"global_step2 cannot be read: a file holds no tensor\nwith verify: full"):
        load_checkpoint(engine, Path(checkpoint))


def test_a_tensor_cannot_run_code_either_and_what_cannot_be_read_is_told(tmp_path, two_checkpoints, monkeypatch):
    folder = tmp_path / "copy"
    shutil.copytree(two_checkpoints, folder)
    monkeypatch.chdir(tmp_path)
    put_a_program_into_a_tensor(folder / "global_step2")
    run_ranks(1, loading_a_program, str(folder / "global_step2"))
    assert not list(tmp_path.rglob("pwned")) and not Path(__file__).parents[2].joinpath("pwned").exists()
    assert find_checkpoint(folder, verify="full") == folder / "global_step1"


@pytest.mark.parametrize("content", [b"no pickle", pickle.dumps([1, 2]), b""], ids=["text", "a list", "empty"])
def test_what_describes_no_tensors_is_refused(tmp_path, content):
    (tmp_path / ".metadata").write_bytes(content)
    with pytest.raises(UserError, match=r"metadata is refused: "):
        tensor_shapes(SafeReader(tmp_path))
