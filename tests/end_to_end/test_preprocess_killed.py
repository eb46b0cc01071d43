"""Preprocessing that is killed (signal 9) at random moments and goes on with --resume ends as if nothing had happened.

Moments are drawn from a seed: some while the command starts, most of them while it reads, tokenizes and writes, some in
the last stretch, in which files get their names. Backend and workers may change from one attempt to the next.
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

    def unfinished(self) -> list[str]:
        return [path.name for path in self.folder.iterdir() if path.name.endswith((".partial", ".journal"))]


def make_inputs(folder: Path, size: int) -> None:
    """Three files of documents, each plain or compressed, in which every ninth document occurs twice."""
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


def undisturbed(folder: Path, tool: str, flags: list[object], ways: list[object]) -> Work:
    work = Work(folder, tool, flags)
    done = run(tool, *work.words("whole", [*ways, "--checkpoint-seconds", 0]), timeout=300)
    assert done.returncode == 0, done.stderr
    work.seconds = json.loads((folder / "whole_manifest.json").read_text())["counts"]["seconds"]
    return work


def killed(work: Work, words: list[object], delay: float, at_work: bool) -> bool:
    """Start the command and kill it, with its workers, after `delay` seconds (of its work). False: it was over."""
    process = subprocess.Popen(
        command(work.tool, *words), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, start_new_session=True
    )
    sign = work.folder / f"{words[3]}.journal"
    before = sign.stat().st_mtime_ns if sign.exists() else 0
    while at_work and process.poll() is None and not (sign.exists() and sign.stat().st_mtime_ns > before):
        time.sleep(0.005)
    time.sleep(delay)
    was_over = process.poll() is not None
    if was_over:
        assert process.returncode == 0, process.stderr.read().decode() if process.stderr else ""
    else:
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
    return not was_over


def check(work: Work, seed: int, kills: int, ways: list[list[object]]) -> None:
    """Kill the work at random moments until it was killed so many times or is done; then let it go on to its end.

    ways: backend and workers of the attempts, in turns.
    """
    chance, count, at_work = random.Random(seed), 0, 0
    whole = work.files("whole")
    while count < kills:
        way = [*ways[count % len(ways)], "--checkpoint-seconds", chance.choice([0, 0, 0.2]), "--resume"]
        working = chance.random() < 0.75
        delay = chance.uniform(0, work.seconds / kills if working else 1.5)
        if not killed(work, work.words("killed", way), delay, working):
            break
        count, at_work = count + 1, at_work + working
        named = work.files("killed")
        assert named.items() <= whole.items(), f"after kill {count}: a name was given to what is not complete"
    assert at_work, "it was over before it could be killed"
    done = run(work.tool, *work.words("killed", [*ways[-1], "--resume"]), timeout=300)
    assert done.returncode == 0, done.stderr
    assert work.files("killed") == whole != {}
    assert work.manifest("killed") == work.manifest("whole")
    assert work.unfinished() == []


def test_what_was_killed_goes_on_and_ends_as_if_nothing_had_happened(tmp_path: Path) -> None:
    make_inputs(tmp_path, 12_000_000)
    tokenizer = ["--tokenizer-type", "HFTokenizer", "--vocab-file", bpe_file(tmp_path)]
    work = undisturbed(tmp_path, "preprocess_data.py", [*tokenizer, *PLAIN], THREADS)
    check(work, seed=1, kills=2, ways=[PROCESSES, THREADS])


def test_instruction_data_go_on_as_well(tmp_path: Path) -> None:
    make_inputs(tmp_path, 12_000_000)
    work = undisturbed(tmp_path, "preprocess_instructions.py", ANSWERS, BYTES)
    check(work, seed=3, kills=1, ways=[BYTES])


@pytest.mark.long
@pytest.mark.timeout(1500)
@pytest.mark.parametrize("tool", ["preprocess_data.py", "preprocess_instructions.py"])
@pytest.mark.parametrize("ways", [[THREADS], [PROCESSES], [THREADS, PROCESSES]], ids=["threads", "processes", "both"])
def test_at_many_moments(tmp_path: Path, tool: str, ways: list[list[object]]) -> None:
    make_inputs(tmp_path, 40_000_000)
    tokenizer = ["--tokenizer-type", "HFTokenizer", "--vocab-file", bpe_file(tmp_path)]
    work = undisturbed(tmp_path, tool, [*tokenizer, *(PLAIN if tool == "preprocess_data.py" else ANSWERS)], ways[-1])
    for seed in range(4):
        for path in tmp_path.glob("killed*"):
            path.unlink()
        check(work, seed, kills=6, ways=ways)
