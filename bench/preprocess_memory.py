"""Peak memory of preprocessing documents of 100 MB, by /usr/bin/time -v (Debian: apt install time).

    python bench/preprocess_memory.py [--megabytes 100] [--only chinese]

Each case is a run of tools/preprocess_data.py on two documents of one kind. time -v reports the largest process. The
tree is the resident memory of all processes, with shared pages counted for each, sampled every 20 ms. Prints a table;
the last line is one JSON object.
"""

import argparse
import json
import random
import re
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path

import psutil
import sentencepiece

from megatron.preprocessing.corpora import standard_library_files
from megatron.tokenizer.train import train_byte_level_bpe

TOOL = Path(__file__).resolve().parents[1] / "tools" / "preprocess_data.py"
TIME = "/usr/bin/time"
IDEOGRAPHS = [chr(number) for number in range(0x4E00, 0x9FA5)]
BPE = ("HFTokenizer", "bpe.json")
MODEL = ("SPMTokenizer", "unigram.model")
BYTES = ("CharLevelTokenizer", None)
CASES = [  # tokenizer, backend, workers
    (BPE, "auto", 2), (BPE, "hf", 1), (BPE, "hf", 2), (MODEL, "hf", 2), (BYTES, "hf", 2),
]  # fmt: skip


def source_text(size: int, chance: random.Random) -> str:
    text = "".join(text for text in standard_library_files() if text.isascii())
    return (text * (size // len(text) + 1))[:size]


def chinese(size: int, chance: random.Random) -> str:
    """Ideographs without spaces, with Zipf frequencies; three bytes each."""
    block = "".join(chance.choices(IDEOGRAPHS, [1 / rank for rank in range(1, len(IDEOGRAPHS) + 1)], k=1_000_000))
    turns = (chance.randrange(len(block)) for _ in range(size // 3_000_000 + 1))
    return "".join(block[turn:] + block[:turn] for turn in turns)[: size // 3]


KINDS = {
    "source text": source_text,
    "Chinese": chinese,
    "one word: x": lambda size, chance: "x" * size,
    "one word: ACGT": lambda size, chance: "".join(chance.choices("ACGT", k=size)),
}


def make_tokenizers(folder: Path) -> None:
    texts = list(standard_library_files())
    train_byte_level_bpe(texts, 32_000, str(folder / "bpe.json"))
    lines = [line for text in texts for line in text.splitlines()] + re.findall(
        ".{500}", chinese(900_000, random.Random(1))
    )
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines), model_prefix=str(folder / "unigram"), vocab_size=16_000, byte_fallback=True,
        character_coverage=0.98, minloglevel=2,
    )  # fmt: skip


def peak(command: list[str]) -> dict[str, float]:
    """Peak MiB of the largest process and of the tree, and seconds. Raises RuntimeError if the command fails."""
    process = subprocess.Popen([TIME, "-v", *command], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    parent, most, ended = psutil.Process(process.pid), 0, threading.Event()

    def watch() -> None:
        nonlocal most
        while not ended.wait(0.02):
            most = max(most, sum(resident(parent)))

    watcher = threading.Thread(target=watch)
    watcher.start()
    output, report = process.communicate()
    ended.set()
    watcher.join()
    if process.returncode:
        raise RuntimeError(output + report)
    [largest] = re.findall(r"Maximum resident set size \(kbytes\): (\d+)", report)
    [elapsed] = re.findall(r"Elapsed .*\): ([\d:.]+)", report)
    seconds = sum(float(part) * 60**place for place, part in enumerate(reversed(elapsed.split(":"))))
    return {"largest_mib": round(int(largest) / 1024), "tree_mib": round(most / 2**20), "seconds": round(seconds)}


def resident(parent: psutil.Process) -> Iterator[int]:
    """Resident bytes of each descendant of `parent`."""
    try:
        children = parent.children(recursive=True)
    except psutil.Error:
        return
    for child in children:
        try:
            yield child.memory_info().rss
        except psutil.Error:  # it has ended
            continue


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megabytes", type=float, default=100, help="of each of the two documents")
    parser.add_argument(
        "--only", default="", metavar="WORDS", help="only cases whose row contains these words, ignoring case"
    )
    options = parser.parse_args()
    if not Path(TIME).exists():
        parser.error(f"{TIME} does not exist; on Debian and Ubuntu: apt install time")
    figures = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make_tokenizers(folder)
        print("| two documents of | tokenizer | backend, workers | largest process | tree | seconds |")
        print("|---|---|---|---|---|---|")
        for kind, make in KINDS.items():
            text = make(int(options.megabytes * 1e6), random.Random(0))
            (folder / "in.jsonl").write_text((json.dumps({"text": text}, ensure_ascii=False) + "\n") * 2)
            del text
            for (tokenizer, vocabulary), backend, workers in CASES:
                label = f"{kind} | {tokenizer} | {backend}, {workers}"
                if options.only.casefold() not in label.casefold():
                    continue
                flags = ["--vocab-file", str(folder / vocabulary)] if vocabulary else []
                words = ["--input", str(folder / "in.jsonl"), "--output-prefix", str(folder / "out"), *flags]
                words += [
                    "--tokenizer-type",
                    tokenizer,
                    "--backend",
                    backend,
                    "--workers",
                    str(workers),
                    "--append-eod",
                ]
                found = peak([sys.executable, str(TOOL), *words])
                figures[label.replace(" |", ",")] = found
                print(
                    f"| {label} | {found['largest_mib']:,} MiB | {found['tree_mib']:,} MiB | {found['seconds']} |",
                    flush=True,
                )
    print(json.dumps({"megabytes": options.megabytes, "cases": figures}))


if __name__ == "__main__":
    main()
