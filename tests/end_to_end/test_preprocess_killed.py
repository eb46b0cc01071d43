"""Preprocessing that is killed (signal 9) at random moments and resumed writes what an undisturbed run writes.

Moments are drawn from a seed: some while the command starts, most of them while it reads, tokenizes and writes. (That
in which files get their names is too short to be met by chance: see test_preprocessing_resume.py.) Backend and
workers may change from one attempt to the next.
"""

import gzip
import json
import os
import random
import signal
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path

import pytest
import zstandard

from megatron.preprocessing.chunks import CHUNK_BYTES
from tests.end_to_end.test_preprocess_tools import command, run
from tests.tokenizer_files import TEXT, bpe_file

THREADS = ["--backend", "gigatoken", "--workers", 3]
PROCESSES = ["--backend", "hf", "--workers", 2]
BYTES = ["--tokenizer-type", "CharLevelTokenizer", "--workers", 2]  # processes, too
PLAIN = ["--jsonl-keys", "text", "title", "--deduplicate", "--append-eod"]
ANSWERS = ["--prompt-key", "title", "--completion-key", "text"]


@dataclass
class Work:
    """A command over three files in `folder`, whose undisturbed outcome is under the prefix "whole"."""

    folder: Path
    tool: str
    flags: list[object]
    chunks: int  # about as many checkpoints are written
    seconds: float = 0.0  # that the work itself takes, without the start of the process

    def words(self, name: str, ways: list[object]) -> list[object]:
        return ["--input", self.folder / "in", "--output-prefix", self.folder / name, *self.flags, *ways]

    def files(self, name: str) -> dict[str, bytes]:
        """What lies under final names."""
        found = self.folder.glob(f"{name}_*_document.*")
        return {path.name.removeprefix(name): path.read_bytes() for path in found if path.suffix in (".bin", ".idx")}

    def manifest(self, name: str) -> tuple[object, object]:
        """Inputs and counts of a manifest."""
        content = json.loads((self.folder / f"{name}_manifest.json").read_text())
        return content["inputs"], content["counts"] | {"seconds": 0, "by_reference": 0}

    def forget(self, name: str) -> None:
        for path in self.folder.glob(f"{name}*"):
            path.unlink()

    def unfinished(self) -> list[str]:
        return [path.name for path in self.folder.iterdir() if path.name.endswith((".partial", ".journal"))]


def make_inputs(folder: Path, size: int) -> int:
    """Three files of documents, plain and compressed; every ninth document occurs twice. Returns the chunks."""
    (folder / "in").mkdir()
    chance = random.Random(5)
    for name in ("a.jsonl", "b.jsonl.gz", "c.jsonl.zst"):
        lines, written = list[str](), 0
        while written < size // 3:
            text = f"{chance.random()} {TEXT[chance.randrange(3)] * chance.randrange(1, 60)}"
            line = json.dumps({"text": text, "title": text[: chance.randrange(2, 90)]}) + "\n"
            lines += [line] * (2 if chance.randrange(9) == 0 else 1)
            written += len(line)
        data = "".join(lines).encode()
        data = gzip.compress(data) if name.endswith("gz") else zstandard.compress(data) if "zst" in name else data
        (folder / "in" / name).write_bytes(data)
    return size // CHUNK_BYTES


def undisturbed(folder: Path, size: int, tool: str, flags: list[object], ways: list[object]) -> Work:
    work = Work(folder, tool, flags, make_inputs(folder, size))
    done = run(tool, *work.words("whole", [*ways, "--checkpoint-seconds", 0]), timeout=300)
    assert done.returncode == 0, done.stderr
    work.seconds = json.loads((folder / "whole_manifest.json").read_text())["counts"]["seconds"]
    return work


def killed(work: Work, words: list[object], checkpoints: int, delay: float) -> bool:
    """Start the command and kill it and its workers `delay` seconds after so many checkpoints. False: it was over."""
    journal = work.folder / "killed.journal"
    wanted = noted(journal) + checkpoints
    process = subprocess.Popen(
        command(work.tool, *words), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, start_new_session=True
    )
    while checkpoints and process.poll() is None and noted(journal) < wanted:
        time.sleep(0.002)
    time.sleep(delay)
    if process.poll() is None:  # it may end just now, but its group is there until it is waited for
        os.killpg(process.pid, signal.SIGKILL)
    _, errors = process.communicate()
    assert process.returncode in (0, -signal.SIGKILL), errors.decode()
    return process.returncode != 0


def noted(journal: Path) -> int:
    try:
        return journal.read_bytes().count(b"\n")
    except FileNotFoundError:  # not there yet, or not any more
        return 0


def check(work: Work, seed: int, kills: int, ways: list[list[object]]) -> None:
    """Kill the work `kills` times at random moments, or until it is done; then resume it to its end.

    ways: backend and workers of the attempts, in turns. Work that was done before any kill met it (the machine is
    faster, or this process slower, than the moments suppose) is begun anew, to be killed at its first checkpoint.
    """
    chance, count, at_work, too_late = random.Random(seed), 0, 0, 0
    whole = work.files("whole")
    while count < kills or not at_work:
        way = [*ways[count % len(ways)], "--checkpoint-seconds", 0, "--resume"]
        checkpoints = chance.choice([0, *range(1, 1 + max(3, work.chunks // kills))])
        delay = chance.uniform(0, 2 * work.seconds / work.chunks if checkpoints else 1.5)
        if too_late:
            checkpoints, delay = 1, 0.0
        if not killed(work, work.words("killed", way), checkpoints, delay):
            if at_work:
                break
            too_late += 1
            assert too_late < 10, "it is over each time before it can be killed: it needs a larger input"
            work.forget("killed")
            continue
        count, at_work = count + 1, at_work + (checkpoints > 0)
        named = work.files("killed")
        assert named.items() <= whole.items(), f"after kill {count}: a name was given to what is not complete"
    done = run(work.tool, *work.words("killed", [*ways[-1], "--resume"]), timeout=300)
    assert done.returncode == 0, done.stderr
    assert work.files("killed") == whole != {}
    assert work.manifest("killed") == work.manifest("whole")
    assert work.unfinished() == []


def test_what_was_killed_goes_on_and_ends_as_if_nothing_had_happened(tmp_path: Path) -> None:
    tokenizer = ["--tokenizer-type", "HFTokenizer", "--vocab-file", bpe_file(tmp_path)]
    work = undisturbed(tmp_path, 12_000_000, "preprocess_data.py", [*tokenizer, *PLAIN], THREADS)
    check(work, seed=1, kills=2, ways=[PROCESSES, THREADS])


@pytest.mark.long
def test_instruction_data_go_on_as_well(tmp_path: Path) -> None:
    work = undisturbed(tmp_path, 12_000_000, "preprocess_instructions.py", ANSWERS, BYTES)
    check(work, seed=3, kills=1, ways=[BYTES])


@pytest.mark.long
@pytest.mark.timeout(1500)
@pytest.mark.parametrize("tool", ["preprocess_data.py", "preprocess_instructions.py"])
@pytest.mark.parametrize("ways", [[THREADS], [PROCESSES], [THREADS, PROCESSES]], ids=["threads", "processes", "both"])
def test_at_many_moments(tmp_path: Path, tool: str, ways: list[list[object]]) -> None:
    flags = ["--tokenizer-type", "HFTokenizer", "--vocab-file", bpe_file(tmp_path)]
    flags += PLAIN if tool == "preprocess_data.py" else ANSWERS
    work = undisturbed(tmp_path, 40_000_000, tool, flags, THREADS)  # the faster one, for the delays
    for seed in range(4):
        work.forget("killed")
        check(work, seed, kills=6, ways=ways)
