"""Preprocessing speed of the fast backend and of the tokenizer's own library, from jsonl to .bin/.idx.

    python bench/preprocess.py --megabytes 400 --workers 2

Each repetition runs the command tools/preprocess_data.py once with each backend, alternately, and times the whole
process. The reference reads only the first part of the corpus (--reference-megabytes), because it is slow; speeds are
per byte of input. Prints a table; the last line is one JSON object with the medians, the ratio in each repetition, and
the peak memory of the largest process.
"""

import argparse
import json
import os
import random
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from megatron.preprocessing.corpora import standard_library_files
from megatron.tokenizer.train import train_byte_level_bpe

TOOL = Path(__file__).resolve().parents[1] / "tools" / "preprocess_data.py"


def write_corpus(path: Path, size: int) -> None:
    """Repeat the standard library, each time with rotated lines and many words changed."""
    chance, texts, written = random.Random(0), list(standard_library_files()), 0
    with path.open("w") as file:
        while written < size:
            for text in texts:
                lines = text.splitlines(keepends=True)
                turn = chance.randrange(len(lines))
                text = "".join(lines[turn:] + lines[:turn])
                text = text.replace("self", f"s{chance.getrandbits(20):x}").replace(
                    "the", f"t{chance.getrandbits(20):x}"
                )
                written += file.write(json.dumps({"text": text}) + "\n")
                if written >= size:
                    break


def first_part(path: Path, part: Path, size: int) -> None:
    with path.open("rb") as file, part.open("wb") as target:
        target.write(file.read(size) + file.readline())


def measure(backend: str, corpus: Path, tokenizer: Path, folder: Path, workers: int) -> dict[str, float]:
    flags = [
        "--tokenizer-type",
        "HFTokenizer",
        "--vocab-file",
        str(tokenizer),
        "--append-eod",
        "--workers",
        str(workers),
    ]
    output = folder / backend
    command = [sys.executable, str(TOOL), "--input", str(corpus), "--output-prefix", str(output), *flags]
    started = time.monotonic()
    subprocess.run([*command, "--backend", backend, "--log-interval", "1000000000"], check=True, capture_output=True)
    seconds = time.monotonic() - started
    return {"seconds": seconds, "megabytes_per_second": corpus.stat().st_size / 1e6 / seconds}


def same(folder: Path, corpus: Path, tokenizer: Path, workers: int) -> bool:
    """Whether both backends write the same bytes for the reference's part."""
    for backend in ("auto", "hf"):
        measure(backend, corpus, tokenizer, folder, workers)
    pairs = [
        [(folder / f"{name}_text_document{end}").read_bytes() for end in (".bin", ".idx")] for name in ("auto", "hf")
    ]
    return pairs[0] == pairs[1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megabytes", type=float, default=400)
    parser.add_argument("--reference-megabytes", type=float, default=40)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--vocab-size", type=int, default=32000)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        corpus, part, tokenizer = folder / "corpus.jsonl", folder / "part.jsonl", folder / "tokenizer.json"
        write_corpus(corpus, int(options.megabytes * 1e6))
        first_part(corpus, part, int(options.reference_megabytes * 1e6))
        train_byte_level_bpe(standard_library_files(), options.vocab_size, str(tokenizer))
        identical = same(folder, part, tokenizer, options.workers)  # also caches the comparison of the backends
        fast, reference = [], []
        for number in range(options.repetitions):
            load = os.getloadavg()[0]
            fast.append(measure("auto", corpus, tokenizer, folder, options.workers)["megabytes_per_second"])
            reference.append(measure("hf", part, tokenizer, folder, options.workers)["megabytes_per_second"])
            print(f"repetition {number + 1}: fast {fast[-1]:.1f} MB/s, reference {reference[-1]:.2f} MB/s, "
                  f"ratio {fast[-1] / reference[-1]:.1f} (load before: {load:.1f})", flush=True)  # fmt: skip
        ratios = [one / other for one, other in zip(fast, reference, strict=True)]
        result = {
            "megabytes": corpus.stat().st_size / 1e6,
            "reference_megabytes": part.stat().st_size / 1e6,
            "workers": options.workers,
            "cores": os.cpu_count(),
            "fast_mb_per_s": statistics.median(fast),
            "reference_mb_per_s": statistics.median(reference),
            "ratio": statistics.median(ratios),
            "ratios": ratios,
            "fast_each": fast,
            "reference_each": reference,
            "identical_output": identical,
            "peak_mib_of_a_process": resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024,
        }
        print(f"| fast | {result['fast_mb_per_s']:.1f} MB/s |\n| reference | {result['reference_mb_per_s']:.2f} MB/s |")
        print(json.dumps(result))


if __name__ == "__main__":
    main()
